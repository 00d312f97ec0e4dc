"""Lower experts to sorted rows, two grouped GEMMs and a weighted combine.

What           experts becomes dispatch (count, prefix sum, permute), grouped_linear for gate and
               up, swiglu, grouped_linear for down, and combine.
Why it pays    each expert's weights are read once for all of its tokens, at GEMM speed.
Preconditions  stage CANONICAL or OPTIMIZED; act is silu; the backend has grouped GEMMs.
Before         graph main(%x: f32[N,8], %idx: i64[N,2], %w: f32[N,2], @gate_up: f32[4,6,8],
                 @down: f32[4,8,3]) {
                 %y = experts %x, %idx, %w, @gate_up, @down : f32[N,8]
                 return %y
               }
After          graph main(%x: f32[N,8], %idx: i64[N,2], %w: f32[N,2], @gate_up: f32[4,6,8],
                 @down: f32[4,8,3]) {
                 %rows, %rows_1, %rows_2 = dispatch %x, %idx {experts=4}
                 %gate_up = grouped_linear %rows, @gate_up, %rows_1 : f32[2*N,6]
                 %split, %split_1 = split %gate_up {axis=-1, sizes=[3,3]}
                 %swiglu = swiglu %split, %split_1 : f32[2*N,3]
                 %down = grouped_linear %swiglu, @down, %rows_1 : f32[2*N,8]
                 %y = combine %down, %rows_2, %w : f32[N,8]
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc.ir.dims import product
from dsc.ir.graph import GraphBuilder, Node, Operand, Value
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.rebuild import Operands, rebuild


@dataclass(frozen=True)
class LowerMoeDispatch(Pass):
    """Rewrite every experts operator in the grouped form."""

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # the sum over experts changes its order

    def run(self, program: Program, report: PassReport) -> Program:
        """Lower all entries."""

        def lower(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            if node.op != "experts":
                return None
            if node.attrs.get("act", "silu") != "silu":
                report.miss("lower", node.loc, f"act is {node.attrs['act']}, silu needed")
                return None
            report.fire("lower")
            return _lower(b, node, operands)

        return program.map_entries(lambda g: rebuild(g, lower)).at(Stage.OPTIMIZED)


def _lower(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand]:
    x, idx, w, gate_up, down = (o for o in operands if o is not None)
    x, idx, w = (_rows(b, o) for o in (x, idx, w))
    number, inner = gate_up.type.shape[0], down.type.shape[2]
    rows, offsets, order = b.call("dispatch", x, idx, experts=number, hint="rows")
    (both,) = b.call("grouped_linear", rows, gate_up, offsets, hint="gate_up")
    gate, up = b.call("split", both, sizes=(inner, inner), axis=-1)
    (hidden,) = b.call("swiglu", gate, up)
    (y,) = b.call("grouped_linear", hidden, down, offsets, hint="down")
    if node.output.type.rank == 2:
        b.taken.discard(node.output.name)
        return b.call("combine", y, order, w, hint=node.output.name)
    (flat,) = b.call("combine", y, order, w)
    b.taken.discard(node.output.name)
    return b.call("reshape", flat, shape=node.output.type.shape, hint=node.output.name)


def _rows(b: GraphBuilder, x: Operand) -> Operand:
    """Leading axes as one."""
    if x.type.rank == 2:
        return x
    shape = (product(x.type.shape[:-1]), x.type.shape[-1])
    flat: Value = b.reshape(x, shape=shape)
    return flat
