"""Lower experts to sorted rows, two grouped GEMMs and a weighted combine, where that is cheaper.

What           experts becomes dispatch (count, prefix sum, permute), grouped_linear for gate and
               up, the activation, grouped_linear for down, and combine; or stays the direct form.
Why it pays    with many tokens each expert's weights are read once for all of its tokens, at GEMM
               speed. With few, hardly two tokens share an expert, and rows need not be moved.
Preconditions  stage CANONICAL or OPTIMIZED. With `kernels`, where the number of tokens is a symbol
               the form is the one whose cost is at worst nearer to the better form's, over the
               entry's range of tokens (`dsc.ir.expert_forms`); the range is that of the symbols,
               cut by the entry's guard: prefill serves steps with more new tokens than extend.
               Without `kernels`, always; so too with biases, limits or factors of the gate, which
               become pointwise operators on the sorted rows.
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from dsc.ir.dims import Range, bounds, product
from dsc.ir.expert_forms import ExpertKernels, ExpertLayer, direct_pays
from dsc.ir.graph import Attrs, GraphBuilder, Node, Operand
from dsc.ir.interface import Guard
from dsc.ir.limits import BATCH, STEP
from dsc.ir.ops.moe import is_plain
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild


@dataclass(frozen=True)
class LowerMoeDispatch(Pass):
    """Rewrite experts operators in the grouped form, in the entries where it costs less."""

    kernels: ExpertKernels | None = option(None, of="experts")

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # the sum over experts changes its order

    def run(self, program: Program, report: PassReport) -> Program:
        """Choose and lower in all entries; the report has each one's form and why."""
        entries = {}
        for name, graph in program.entries.items():
            ranges = ranges_of(program, name)
            entries[name] = rebuild(graph, partial(self._lower, name, ranges, report))
        return replace(program, entries=entries).at(Stage.OPTIMIZED)

    def _lower(
        self,
        entry: str,
        ranges: Mapping[str, Range],
        report: PassReport,
        b: GraphBuilder,
        node: Node,
        operands: Operands,
    ) -> Sequence[Operand] | None:
        if node.op != "experts" or node.attrs["pairs"]:
            return None
        simple = len(node.operands) == 5 and is_plain(node.attrs)
        direct = (
            self.kernels is not None
            and simple
            and _direct(node, self.kernels, entry, ranges, report)
        )
        if direct:
            return None
        report.fire("lower")
        return _grouped(b, node, operands)


def ranges_of(program: Program, entry: str) -> dict[str, Range]:
    """The ranges of the symbols in an entry: sequences and new tokens as guards give them to it."""
    ranges, steps = dict(program.ranges(entry)), {g.entry: g.step for g in program.guards}
    if entry not in steps:
        return ranges
    if BATCH in ranges:
        ranges[BATCH] = _many(program.guards, entry, ranges[BATCH])
    if STEP not in ranges:
        return ranges
    known, limit = ranges[STEP], steps[entry]
    low = max([known.lo, *(n + 1 for n in steps.values() if n and (not limit or n < limit))])
    high = min(limit or known.hi, known.hi)
    return {**ranges, STEP: Range(min(low, high), high)}


def _many(guards: Sequence[Guard], entry: str, known: Range) -> Range:
    """Sequences of an entry, without those that guards before it take of all its steps."""
    at = [guard.entry for guard in guards].index(entry)
    step, context = guards[at].step or inf, guards[at].context or inf
    taken = [
        g.batch for g in guards[:at]
        if g.batch is not None and (g.step or inf) >= step and (g.context or inf) >= context
    ]  # fmt: skip
    low = max([known.lo, *(n + 1 for n in taken)])
    return Range(min(low, known.hi), known.hi)


def _direct(
    node: Node,
    kernels: ExpertKernels,
    entry: str,
    ranges: Mapping[str, Range],
    report: PassReport,
) -> bool:
    """Whether the direct form costs less, over the range of tokens."""
    x, idx, _, gate_up, down = (o.type for o in node.operands[:5])
    fixed = (down.shape[0], idx.shape[-1], *down.shape[1:], gate_up.nbytes + down.nbytes)
    number, top_k, width, inner, stored = (bounds(d, ranges).hi for d in fixed)
    layer = ExpertLayer(number, top_k, width, inner, x.dtype.itemsize, stored // number)
    tokens = bounds(product(x.shape[:-1]), ranges)
    pays, (direct, grouped) = direct_pays(layer, kernels, tokens.lo, tokens.hi)
    report.facts[entry] = {
        "experts": "direct" if pays else "grouped",
        "tokens": [tokens.lo, tokens.hi],
        "worst_cost_over_best": {"direct": round(direct, 3), "grouped": round(grouped, 3)},
    }
    return pays


def _grouped(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand]:
    first, (gate_up_bias, down_bias) = operands[:5], (*operands[5:], None, None)[:2]
    x, idx, w, gate_up, down = (o for o in first if o is not None)
    tokens = product(x.type.shape[:-1])
    x, idx, w = (b.as_shape(o, (tokens, o.type.shape[-1])) for o in (x, idx, w))
    number, inner = gate_up.type.shape[0], down.type.shape[2]
    rows, offsets, order = b.call("dispatch", x, idx, experts=number, hint="rows")

    def with_bias(y: Operand, bias: Operand | None) -> Operand:
        """Each row with the bias of its expert."""
        if bias is None:
            return y
        flat = b.as_shape(idx, order.type.shape)
        (expert,) = b.call("take", flat, order, axis=0, hint="expert")
        return b.call("add", y, b.call("take", bias, expert, axis=0)[0])[0]

    (both,) = b.call("grouped_linear", rows, gate_up, offsets, hint="gate_up")
    gate, up = b.call("split", with_bias(both, gate_up_bias), sizes=(inner, inner), axis=-1)
    hidden = _gated(b, gate, up, node.attrs)
    (out,) = b.call("grouped_linear", hidden, down, offsets, hint="down")
    y = with_bias(out, down_bias)
    if node.output.type.rank == 2:
        b.taken.discard(node.output.name)
        return b.call("combine", y, order, w, hint=node.output.name)
    (flat,) = b.call("combine", y, order, w)
    b.taken.discard(node.output.name)
    return b.call("reshape", flat, shape=node.output.type.shape, hint=node.output.name)


def _gated(b: GraphBuilder, gate: Operand, up: Operand, attrs: Attrs) -> Operand:
    """What `experts` makes of its gate and up rows, spelled out but where it is swiglu."""
    act, limit, alpha, shift = (attrs[name] for name in ("act", "limit", "alpha", "shift"))
    if act == "silu" and is_plain(attrs):
        return b.call("swiglu", gate, up)[0]

    def with_number(op: str, x: Operand, value: float) -> Operand:
        number = b.call("full", shape=(), value=value, dtype=x.type.dtype)[0]
        return b.call(op, x, number)[0]

    if limit < inf:
        gate = with_number("minimum", gate, limit)
        up = with_number("maximum", with_number("minimum", up, limit), -limit)
    opened = gate if alpha == 1.0 else with_number("mul", gate, alpha)
    opened = b.call(act, opened)[0]
    opened = opened if alpha == 1.0 else with_number("div", opened, alpha)
    return b.call("mul", opened, with_number("add", up, shift) if shift else up)[0]
