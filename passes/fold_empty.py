"""Compute nothing where there is nothing to compute.

What           a result without elements becomes `full`; a sum or a product over an axis of no
               elements becomes its neutral value; joins leave out empty parts, splits do not make
               them, and writes of nothing are dropped.
Why it pays    no later pass and no kernel has to think of tensors without elements.
Preconditions  stage TRACED; the axis of no elements is known when compiling.
Before         graph main(%x: f32[0,4], %y: f32[2,4]) {
                 %a = exp %x : f32[0,4]
                 %s = sum %x {axes=[0]} : f32[4]
                 %c = concat %a, %y {axis=0} : f32[2,4]
                 %z = mul %c, %s : f32[2,4]
                 return %z
               }
After          graph main(%x: f32[0,4], %y: f32[2,4]) {
                 %a = full {dtype=f32, shape=[0,4], value=0.0} : f32[0,4]
                 %s = full {dtype=f32, shape=[4], value=0.0} : f32[4]
                 %c = concat %y {axis=0} : f32[2,4]
                 %z = mul %c, %s : f32[2,4]
                 return %z
               }
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from dsc.ir.graph import Attrs, Graph, Node, Operand, Value
from dsc.ir.op import lookup
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import TensorType
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class FoldEmpty(Pass):
    """Take tensors without elements out of every entry."""

    needs = frozenset({Stage.TRACED})

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk an entry."""
        return program.map_entries(lambda graph: _folded(graph, report))


def _folded(graph: Graph, report: PassReport) -> Graph:
    made = [_without_nothing(node) for node in graph.nodes]
    changed = [node.op for node, new in zip(graph.nodes, made, strict=True) if new != [node]]
    for op in changed:
        report.fire(op)
    return graph.with_nodes(chain(*made)) if changed else graph


def _is_empty(t: TensorType) -> bool:
    return any(d == 0 for d in t.shape)


def _without_nothing(node: Node) -> list[Node]:
    """The nodes that give a node's results, of which none reads or makes nothing."""
    definition = lookup(node.op)
    traits = definition.traits
    if node.op == "full" or node.body is not None or definition.aliases:
        return [node]
    made = [v for v in node.outputs if not _is_empty(v.type)]
    fills = [_fill(node, v, 0.0) for v in node.outputs if _is_empty(v.type)]
    read = [x for x in node.operands if not _is_empty(x.type)]
    if not made:
        return fills
    if node.op == "split" and fills:
        sizes = tuple(s for s in node.attrs["sizes"] if s != 0)
        attrs = Attrs({**node.attrs, "sizes": sizes})
        return [replace(node, attrs=attrs, outputs=tuple(made)), *fills]
    if len(read) == len(node.operands):
        return [node]
    (value,) = made
    if node.op == "concat":
        return [replace(node, inputs=tuple(read))]
    if traits.updates and _is_empty(node[traits.updates].type):
        return [_view("reshape", node, node.operands[0], value)]
    if node.op == "linear" and len(node.operands) == 3:
        return [_view("expand", node, node.operands[2], value)]
    if traits.of_nothing is not None:
        return [_fill(node, value, traits.of_nothing)]
    return [node]


def _fill(node: Node, value: Value, number: float) -> Node:
    t = value.type
    attrs = Attrs({"shape": t.shape, "value": number, "dtype": t.dtype})
    return Node("full", (), attrs, (value,), node.loc)


def _view(op: str, node: Node, x: Operand, value: Value) -> Node:
    return Node(op, (x,), Attrs({"shape": value.type.shape}), (value,), node.loc)
