"""How values lie over ranks, and what each operator does with it: the propagation behind `shard`.

A value is whole (every rank has all of it), `Split` along an axis (rank r has part r), or `PARTIAL`
(the sum over ranks is the value). A rule takes a node whose operands lie somehow to the node that a
rank runs and how its results lie. Where there is no rule, operands are made whole by a collective:
so every program comes out right, and a rule only saves communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Attrs, GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.op import infer
from dsc.ir.ops.shape import axis_of
from dsc.ir.program import Program
from dsc.ir.ranks import RANK
from dsc.ir.types import DType
from dsc.ir.weights import WeightExpr, apply
from dsc.rewrite.base import PassReport
from dsc.rewrite.rebuild import Operands


@dataclass(frozen=True, slots=True)
class Split:
    """Part r of an axis lies on rank r."""

    axis: int


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank has a summand."""


PARTIAL = Partial()
Placement: TypeAlias = Split | Partial | None
"""Where a value lies; `None` is whole."""
Placed = tuple[Sequence[Value], Sequence[Placement]]
Rule = Callable[["Sharding", GraphBuilder, Node, Operands], Placed | None]

ATTENTION = frozenset(
    {"mla_attention", "latent_attention", "paged_mla_attention", "paged_latent_attention"}
    | {"attention"}
)
POINTWISE = frozenset(
    {"add", "sub", "mul", "div", "neg", "cast", "swiglu", "silu", "sigmoid", "gelu", "relu", "tanh"}
)
LINEAR_MAPS = frozenset({"cast", "neg", "permute", "split", "slice", "select_rows"})
"""Operators that commute with a sum, beside reshape and add."""


@dataclass
class Sharding:
    """The state of one run: where the values of the graph lie, and the weights that were cut.

    `columns` names the results of linears whose rows are to be split; `experts` says how experts
    are shared: by expert (`ep`), each in parts (`tp`), or not at all.
    """

    program: Program
    ranks: int
    experts: str
    report: PassReport
    weights: dict[str, WeightExpr] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    placed: dict[str, Placement] = field(default_factory=dict)
    _whole: dict[str, Value] = field(default_factory=dict)
    _loc: dict[str, str] = field(default_factory=dict)

    def enter(self, columns: frozenset[str]) -> None:
        """Begin another graph."""
        self.columns = columns
        self.placed.clear()
        self._whole.clear()
        self._loc.clear()

    def of(self, x: Operand | None) -> Placement:
        """How an operand lies."""
        return self.placed.get(x.name) if isinstance(x, Value) else None

    def run(self, b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Value] | None:
        """Append what a rank runs in the place of `node`; `None` where the node stays as it is."""
        rule = RULES.get(node.op)
        done = None if rule is None else rule(self, b, node, operands)
        if done is None:
            if all(self.of(x) is None for x in operands):
                return None
            at = ", ".join(str(x) for x in operands if self.of(x) is not None)
            if not all(self.of(x) == PARTIAL for x in operands if self.of(x) is not None):
                self.report.miss("shard", node.loc, f"{node.op} takes {at} whole")
            done = self.emit(b, node, [self.whole(b, x) for x in operands]), ()
        values, placements = done
        self.placed.update(zip((v.name for v in values), placements, strict=False))
        self._loc.update((v.name, node.loc) for v in values)
        return values

    def emit(
        self, b: GraphBuilder, node: Node, operands: Sequence[Operand | None], **changed: object
    ) -> tuple[Value, ...]:
        """Append `node` over other operands and attributes; its results keep their names."""
        attrs = Attrs({**node.attrs, **changed})
        types = infer(node.op, operands, attrs)
        outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, types, strict=True))
        b.nodes.append(Node(node.op, tuple(operands), attrs, outputs, node.loc))
        return outputs

    def whole(self, b: GraphBuilder, x: Operand | None) -> Operand | None:
        """`x` as every rank needs it: gathered or summed by a collective, once."""
        placement = self.of(x)
        if not isinstance(x, Value) or placement is None:
            return x
        if x.name not in self._whole:
            op, hint, attrs = "all_reduce", f"{x.name}.sum", {"ranks": self.ranks}
            if isinstance(placement, Split):
                op, hint, attrs["axis"] = "all_gather", f"{x.name}.all", placement.axis
            (found,) = b.call(op, x, hint=hint, loc=self._loc.get(x.name, b.loc), **attrs)
            self.report.fire(op)
            self._whole[x.name] = found
        return self._whole[x.name]

    def part(self, weight: Weight, axis: int) -> Weight:
        """This rank's part of a weight along an axis, as a slice expression."""
        expr = self.program.weights[weight.name]
        return self.keep(f"{weight.name}.shard_{axis}", self.sliced(expr, axis))

    def sliced(self, expr: WeightExpr, axis: int) -> WeightExpr:
        """This rank's part of a weight expression."""
        extent = expr.type.shape[axis]
        assert isinstance(extent, int)
        start = RANK * (extent // self.ranks)
        return apply("slice", expr, axis=axis, start=start, end=start + extent // self.ranks)

    def keep(self, name: str, expr: WeightExpr) -> Weight:
        """The weight called `name`, which is `expr`."""
        self.weights[name] = expr
        return Weight(name, expr.type)

    def divides(self, extent: Dim) -> bool:
        """Whether an extent is known and parts into as many equal pieces as there are ranks."""
        return isinstance(extent, int) and extent % self.ranks == 0


def _linear(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    x, weight, bias = (*operands, None)[:3]
    if not isinstance(x, Value) or not isinstance(weight, Weight):
        return None
    last = x.type.rank - 1
    if s.of(x) is None and node.output.name in s.columns:
        rows: list[Operand | None] = [x, s.part(weight, 0)]
        if bias is not None:
            if not isinstance(bias, Weight):
                return None
            rows.append(s.part(bias, 0))
        s.report.fire("columns")
        return s.emit(b, node, rows), [Split(last)]
    if s.of(x) == Split(last) and bias is None:
        s.report.fire("rows")
        return s.emit(b, node, [x, s.part(weight, 1)]), [PARTIAL]
    return None


def _einsum(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    """A contraction over a split letter is partial; a split letter that stays, splits the result.

    The other operand must be a weight that has the letter: it is cut along it.
    """
    x, weight = (*operands, None)[:2]
    placement = s.of(x)
    if not isinstance(placement, Split) or not isinstance(weight, Weight) or len(operands) != 2:
        return None
    terms, _, out = node.attrs["eq"].replace(" ", "").partition("->")
    first, second = terms.split(",")
    letter = first[placement.axis]
    if second.count(letter) != 1 or first.count(letter) != 1:
        return None
    found = s.emit(b, node, [x, s.part(weight, second.index(letter))])
    return found, [Split(out.index(letter)) if letter in out else PARTIAL]


def _reshape(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    """The split axis must begin an axis of the result that can be split as well."""
    (x,) = operands
    placement = s.of(x)
    if not isinstance(x, Value) or placement is None:
        return None
    shape: tuple[Dim, ...] = node.attrs["shape"]
    if not isinstance(placement, Split):
        return s.emit(b, node, [x]), [placement]
    before = product(x.type.shape[: placement.axis])
    for axis, extent in enumerate(shape):
        if product(shape[:axis]) == before and extent != 1 and s.divides(extent):
            local = (*shape[:axis], extent // s.ranks, *shape[axis + 1 :])
            return s.emit(b, node, [x], shape=local), [Split(axis)]
    return None


def _split(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    """Parts of an axis that is not the split one; a partial value parts anyhow."""
    x, placement = operands[0], s.of(operands[0])
    if not isinstance(x, Value) or placement is None:
        return None
    axis = axis_of(node.attrs["axis"], x.type.rank)
    if isinstance(placement, Split) and placement.axis == axis:
        return None
    return s.emit(b, node, [x]), [placement] * len(node.outputs)


def _permute(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    placement = s.of(operands[0])
    if placement is None:
        return None
    dims = node.attrs["dims"]
    moved = Split(dims.index(placement.axis)) if isinstance(placement, Split) else placement
    return s.emit(b, node, operands), [moved]


def _rows(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    """Operators over the last axis of x, here on a part of another one."""
    x, placement = operands[0], s.of(operands[0])
    if not isinstance(placement, Split) or not isinstance(x, Value):
        return None
    if placement.axis == x.type.rank - 1 or any(s.of(o) is not None for o in operands[1:]):
        return None
    if node.op == "rope" and placement.axis != 2:
        return None
    return s.emit(b, node, operands), [placement]


def _pointwise(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    tensors = [x for x in operands if x is not None and x.type.rank]
    lies = {s.of(x) for x in tensors}
    if len(lies) != 1 or any(x.type.shape != tensors[0].type.shape for x in tensors):
        return None
    (placement,) = lies
    summed = node.op in LINEAR_MAPS or (node.op in ("add", "sub") and len(tensors) == len(operands))
    if placement is None or (placement == PARTIAL and not summed):
        return None
    return s.emit(b, node, operands), [placement]


def _attention(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    """Heads lie on axis 2 of every operand that has heads."""
    with_heads = 3 if node.op == "attention" else 2
    if any(s.of(x) != Split(2) for x in operands[:with_heads]):
        return None
    given = [*operands]
    if any(s.of(x) is not None for x in operands[with_heads:]):
        return None
    if node.op in ("mla_attention", "paged_mla_attention"):
        kv_b = operands[4]
        if not isinstance(kv_b, Weight):
            return None
        given[4] = s.part(kv_b, 0)
    s.report.fire("heads")
    return s.emit(b, node, given), [Split(2)]


def _experts(s: Sharding, b: GraphBuilder, node: Node, operands: Operands) -> Placed | None:
    x, idx, w, gate_up, down = operands
    if not (isinstance(gate_up, Weight) and isinstance(down, Weight)) or not s.experts:
        return None
    x, idx, w = (s.whole(b, o) for o in (x, idx, w))
    if s.experts == "ep":
        idx, w = _local_choice(s, b, idx, w, gate_up.type.shape[0])
        given = [x, idx, w, s.part(gate_up, 0), s.part(down, 0)]
        s.report.fire("experts")
        return s.emit(b, node, given), [PARTIAL]
    if not s.divides(down.type.shape[2]):
        inner = f"experts of {down.type.shape[2]} rows on {s.ranks} ranks stay whole"
        s.report.miss("shard", node.loc, inner)
        return None
    s.report.fire("experts")
    given = [x, idx, w, _gate_and_up(s, gate_up), s.part(down, 2)]
    return s.emit(b, node, given), [PARTIAL]


def _gate_and_up(s: Sharding, weight: Weight) -> Weight:
    """This rank's gate rows, then its up rows, of every expert."""
    expr = s.program.weights[weight.name]
    both = expr.type.shape[1]
    assert isinstance(both, int)
    gate = apply("slice", expr, axis=1, start=0, end=both // 2)
    up = apply("slice", expr, axis=1, start=both // 2, end=both)
    cut = apply("concat", s.sliced(gate, 1), s.sliced(up, 1), axis=1)
    return s.keep(f"{weight.name}.shard_1", cut)


def _local_choice(
    s: Sharding, b: GraphBuilder, idx: Operand | None, w: Operand | None, number: Dim
) -> tuple[Value, Value]:
    """A choice of experts as this rank sees it: its own by their place here, others weigh nothing.

    Two tables of `number` entries say where each expert lies; they are all that differs by rank.
    """
    assert isinstance(number, int)
    mine = number // s.ranks

    def constant(value: int) -> WeightExpr:
        return apply("full", shape=(), value=float(value), dtype=DType.i64)

    first = RANK * -mine
    place = apply("arange", start=first, end=first + number, dtype=DType.i64)
    inside = apply(
        "logical_and",
        apply("ge", place, constant(0)),
        apply("lt", place, constant(mine)),
    )
    local = s.keep(f"rank.place_of_{number}", apply("where", inside, place, constant(0)))
    present = s.keep(f"rank.has_of_{number}", apply("cast", inside, dtype=DType.f32))
    (here,) = b.call("take", local, idx, axis=0, hint="place")
    (mask,) = b.call("take", present, idx, axis=0, hint="has")
    (weight,) = b.call("mul", w, mask, hint="w_here")
    return here, weight


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(sorted(ATTENTION), _attention),
    **dict.fromkeys(("rope", "rms_norm"), _rows),
    **dict.fromkeys(("split", "slice"), _split),
    "linear": _linear,
    "einsum": _einsum,
    "reshape": _reshape,
    "permute": _permute,
    "experts": _experts,
}
