"""Let each gate row of experts be followed by its up row.

What           the rows of gate_up, which are all gate rows of an expert and then all up rows, and
               of its bias, lie in pairs; the experts are told so (`pairs`).
Why it pays    ONNX Runtime's QMoE reads them so: one operator a layer, where a branch an expert
               takes milliseconds to load, and three nodes of each step for every expert.
Preconditions  stage CANONICAL or OPTIMIZED, formats chosen. The activation is silu; gate_up is a
               weight in unsigned codes, which experts alone read, and so is its bias if there is
               one.
Before         program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @gu : i8{1x16,f32,unsigned}[2,4,16] = scaled(source "gu" : u8[2,4,16],
                   source "gu.scale" : f32[2,4,1]) {block=[1,16], columns=16, unsigned="i8"}
                 @dn : f32[2,16,2] = source "dn" : f32[2,16,2]
               }
               graph main(%x: f32[N,16], %i: i64[N,1], %w: f32[N,1]) {
                 %y = experts %x, %i, %w, @gu, @dn : f32[N,16]
                 return %y
               }
After          program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @gu : i8{1x16,f32,unsigned}[2,4,16] = scaled(reshape(permute(reshape(
                   source "gu" : u8[2,4,16]) {shape=[2,2,2,16]}) {dims=[0,2,1,3]})
                   {shape=[2,4,16]}, reshape(permute(reshape(source "gu.scale" : f32[2,4,1])
                   {shape=[2,2,2,1]}) {dims=[0,2,1,3]}) {shape=[2,4,1]})
                   {block=[1,16], columns=16, unsigned="i8"}
                 @dn : f32[2,16,2] = source "dn" : f32[2,16,2]
               }
               graph main(%x: f32[N,16], %i: i64[N,1], %w: f32[N,1]) {
                 %y = experts %x, %i, %w, @gu, @dn {pairs=true} : f32[N,16]
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dsc.ir.analyses import Use, weight_uses
from dsc.ir.graph import Attrs, Graph, Node, Weight
from dsc.ir.op import operand_index
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import Apply, WeightExpr, apply, scaled
from dsc.passes._unsigned import each_matrix
from dsc.rewrite.base import Pass, PassReport

RULE = "pair"
GATES = ("gate_up", "gate_up_bias")
"""The operands of experts whose rows are gates and ups."""


@dataclass(frozen=True)
class PairGates(Pass):
    """Decide for every layer's experts; all entries read one stack."""

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk over all nodes."""
        read = weight_uses(program.entries.values())
        paired: dict[str, WeightExpr] = {}

        def ready(node: Node) -> bool:
            names = _names(node)
            return bool(names) and all(_alone(name, read) for name in names)

        def each(node: Node) -> Node:
            if not ready(node):
                return node
            paired.update({name: _paired(program.weights[name]) for name in _names(node)})
            report.fire(RULE, places=[node.loc])
            return replace(node, attrs=Attrs({**node.attrs, "pairs": True}))

        def graph(g: Graph) -> Graph:
            return replace(g, nodes=tuple(map(each, g.nodes)))

        done = program.map_entries(graph)
        return done.with_weights(paired) if paired else program


def _names(node: Node) -> Sequence[str]:
    """The weights of experts whose rows are gates and ups, or none where they stay."""
    if node.op != "experts" or node.attrs["pairs"] or node.attrs["act"] != "silu":
        return ()
    format = node["gate_up"].type.format
    if format is None or not format.unsigned:
        return ()
    found = [x for name in GATES if (x := node.get(name)) is not None]
    weights = [x.name for x in found if isinstance(x, Weight)]
    return weights if len(weights) == len(found) else ()


def _alone(name: str, read: Mapping[str, Sequence[Use]]) -> bool:
    """Whether only experts that can be told read a weight, as their gate and up rows."""
    return all(
        node is not None
        and name in _names(node)
        and at in map(partial(operand_index, node.op), GATES)
        for node, at in read[name]
    )


def _paired(expr: WeightExpr) -> WeightExpr:
    """The rows of a stack in pairs, or the elements of its bias."""
    if expr.type.format is None:
        return _in_pairs(expr, expr.type.rank - 1)
    assert isinstance(expr, Apply)

    def rows(x: WeightExpr) -> WeightExpr:
        return _in_pairs(x, x.type.rank - 2)

    return scaled((each_matrix(arg, rows) for arg in expr.args), expr.type)


def _in_pairs(x: WeightExpr, axis: int) -> WeightExpr:
    """The second half of an axis between the elements of the first."""
    shape, rank = x.type.shape, x.type.rank
    halves = apply("reshape", x, shape=(*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]))
    order = (*range(axis), axis + 1, axis, *range(axis + 2, rank + 1))
    return apply("reshape", apply("permute", halves, dims=order), shape=shape)
