"""Compute equal things once: masks, rotary tables and views that every layer repeats.

What           of nodes with the same operator, operands and attributes the first stays; later
               readers read its results.
Why it pays    a traced model rebuilds the same ranges, constants and views in each layer; every one
               would cost a kernel.
Preconditions  none; operators that update an operand in place are left alone.
Before         graph main(%x: f32[B]) {
                 %a = neg %x : f32[B]
                 %b = neg %x : f32[B]
                 %c = add %a, %b : f32[B]
                 return %c
               }
After          graph main(%x: f32[B]) {
                 %a = neg %x : f32[B]
                 %c = add %a, %a : f32[B]
                 return %c
               }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc.ir.graph import Attrs, Graph, GraphBuilder, Node, Operand
from dsc.ir.op import lookup
from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.rebuild import Operands, rebuild

Key = tuple[str, Operands, Attrs]


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge equal nodes in every entry."""

    def run(self, program: Program, report: PassReport) -> Program:
        """One forward walk an entry; operands are merged before their readers are compared."""
        return program.map_entries(lambda graph: merged(graph, report))


def merged(graph: Graph, report: PassReport) -> Graph:
    """The graph with equal nodes merged; itself when there are none."""
    first: dict[Key, Node] = {}

    def once(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
        if lookup(node.op).aliases:
            return None
        same = first.setdefault((node.op, operands, node.attrs), node)
        if same is node:
            return None
        report.fire("merged node")
        return same.outputs

    return rebuild(graph, once)
