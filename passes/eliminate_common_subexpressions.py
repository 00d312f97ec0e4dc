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

from dataclasses import dataclass

from dsc.ir.graph import Attrs, Graph, Node, Operand, Value
from dsc.ir.op import lookup
from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import substitute

Key = tuple[str, tuple[Operand | None, ...], Attrs]


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge equal nodes in every entry."""

    def run(self, program: Program, report: PassReport) -> Program:
        """One forward walk an entry; operands are merged before their readers are compared."""
        return program.map_entries(lambda graph: merged(graph, report))


def merged(graph: Graph, report: PassReport) -> Graph:
    """The graph with equal nodes merged; itself when there are none."""
    first: dict[Key, Node] = {}
    env: dict[str, Operand] = {}
    nodes: list[Node] = []
    for original in graph.nodes:
        node = substitute(original, env)
        key = (node.op, node.inputs, node.attrs)
        same = None if lookup(node.op).aliases else first.setdefault(key, node)
        if same is None or same is node:
            nodes.append(node)
            continue
        env.update((a.name, b) for a, b in zip(node.outputs, same.outputs, strict=True))
    if not env:
        return graph
    report.fire("merged node", len(graph.nodes) - len(nodes))
    outputs = (env.get(x.name, x) if isinstance(x, Value) else x for x in graph.outputs)
    return graph.with_nodes(nodes, outputs)
