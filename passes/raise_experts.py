"""Recognise the routed experts, however they are spelled.

What           everything between the tokens, the chosen experts and their weights on one side and
               the weighted sum on the other becomes experts: sort and grouped GEMMs, batched GEMMs
               over gathered weights, or every expert on every token under a mask of weights.
Why it pays    a backend can then choose: a direct path for few tokens, grouped GEMMs for many; the
               dense spelling does experts / top_k times the work, the batched one copies weights.
Preconditions  stage TRACED, after raise_router; expert weights stacked in tensors of rank 3.
               Proved by evaluation at reduced widths, with experts that get no token.
Before         graph main(%x: f32[N,4], %idx: i64[N,2], %w: f32[N,2],
                     @gate_up: f32[5,6,4], @down: f32[5,4,3]) {
                 %a = full {dtype=f32, shape=[N,5], value=0.0} : f32[N,5]
                 %b = scatter %a, %idx, %w {axis=1} : f32[N,5]
                 %c = expand %x {shape=[5,N,4]} : f32[5,N,4]
                 %d = permute @gate_up {dims=[0,2,1]} : f32[5,4,6]
                 %e = matmul %c, %d : f32[5,N,6]
                 %f, %g = split %e {axis=2, sizes=[3,3]} : f32[5,N,3], f32[5,N,3]
                 %h = swiglu %f, %g : f32[5,N,3]
                 %i = permute @down {dims=[0,2,1]} : f32[5,3,4]
                 %j = matmul %h, %i : f32[5,N,4]
                 %k = permute %b {dims=[1,0]} : f32[5,N]
                 %l = reshape %k {shape=[5,N,1]} : f32[5,N,1]
                 %m = mul %j, %l : f32[5,N,4]
                 %y = sum %m {axes=[0], keepdims=false} : f32[N,4] loc "experts"
                 return %y
               }
After          graph main(%x: f32[N,4], %idx: i64[N,2], %w: f32[N,2],
                     @gate_up: f32[5,6,4], @down: f32[5,4,3]) {
                 %y = experts %x, %idx, %w, @gate_up, @down {act="silu"} : f32[N,4] loc "experts"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.graph import Node, Operand, Value, Weight
from dsc.ir.op import traits_of
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.weights import apply
from dsc.passes._gated_experts import (
    BATCHED,
    BIASED,
    DENSE,
    GROUPED,
    INTERLEAVED,
    arranged,
    distinct,
    emit,
    prove,
)
from dsc.passes._views import VIEW_RULES
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import VIEWS, Scope

_PRODUCTS = frozenset({"grouped_mm", "matmul", "einsum"})
_MOVES = VIEWS | {"cast", "take", "gather"}
_GLUE = _MOVES | {
    "sort", "histc", "cumsum", "scatter", "index_put", "arange", "full", "concat", "where", "eq",
    "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not",
}  # fmt: skip
"""What only moves tokens, indices and weights about."""
_BETWEEN = VIEWS | _PRODUCTS | {"concat"}
"""What may lie between the two products, beside pointwise operators."""


class Experts(Rule):
    """sum_k w_k * down_k(act(gate_k x) * up_k x), in any spelling  ==>  experts(x, idx, w)."""

    tolerance = 2e-2
    anchors = _PRODUCTS
    examples = (
        DENSE.format(act="silu", gated="mul %u, %g").replace("B,S", "N"),
        DENSE.format(act="gelu", gated="mul %g, %u").replace("B,S", "N"),
        BATCHED,
        GROUPED,
        BIASED.format(parts=INTERLEAVED, least=-7.0),
        BIASED.format(parts="%f, %g = split %cb {axis=1, sizes=[3,3]}", least=-7.0),
        GROUPED.replace("[N,2", "[N,1").replace("2*N", "N").replace("value=2,", "value=1,"),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the activation is another": DENSE.format(act="tanh", gated="mul %u, %g").replace(
            "B,S", "N"
        ),
        "the gate and up rows are added": DENSE.format(act="silu", gated="add %u, %g").replace(
            "B,S", "N"
        ),
        "up is cut to another number below": BIASED.format(parts=INTERLEAVED, least=-6.0),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """Distinct experts for each token."""
        if value.type.dtype is DType.i64:
            return distinct(lift.at_sizes(value, env), 5, seed)
        return lift.normal(value, env, seed)

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """`node` multiplies by the down weights; the up weights come before it."""
        down = _stacked(scope, node)
        if down is None:
            return None
        before = list(_earlier(scope, node, down))
        if not 1 <= len(before) <= 2:
            return None
        best: Match | Reject | None = None
        for x in _tokens(scope, before[0], node):
            for found in self._regions(scope, node, before, down, x):
                if isinstance(found, Match) and not isinstance(self.check(found), Reject):
                    if not _is_moved(scope, found.root.outputs[0]):
                        return found
                    best = found
                best = best if isinstance(best, Match) else found
        return best

    def _regions(
        self, scope: Scope, node: Node, before: Sequence[Node], down: Weight, x: Value
    ) -> Iterator[Match | Reject]:
        """Values after `node` shaped like the tokens that read nothing foreign, nearest first."""
        cone = {v.name for n in before for m in scope.forward(n.output) for v in m.outputs}
        cone |= {n.output.name for n in before}
        gate_up = tuple(w for n in before if (w := _stacked(scope, n)) is not None)

        def is_leaf(v: Operand) -> bool:
            made = scope.producer(v)
            if v.name == x.name or made is None or v.name in cone:
                return v.name == x.name
            whole = made.op in ("add", "sub", "mul", "div") and v.type.dtype.is_int
            return not (made.op in _GLUE or whole)

        why = reject("no weighted sum of the experts has the shape of the tokens", x, node.output)
        for later in scope.forward(node.output, limit=16):
            y = later.outputs[0]
            if y.type.dtype != x.type.dtype or y.type.numel != x.type.numel:
                continue
            region = lift.cut(scope, [y], is_leaf)
            if region is None:
                continue
            rest = [v for v in region.leaves if v not in (x, down, *gate_up)]
            biases = tuple(v for v in rest if _is_bias(v, down))
            rest = [v for v in rest if v not in biases]
            chosen = [v for v in rest if v.type.dtype is DType.i64]
            shares = [v for v in rest if v.type.dtype.is_float]
            if len(chosen) != 1 or len(shares) != 1 or len(rest) != 2:
                why = reject("the experts read more than tokens, choices and weights", *rest)
                continue
            idx, share = chosen[0], shares[0]
            if idx.type.shape[:-1] != x.type.shape[:-1] or share.type.shape != idx.type.shape:
                why = reject("tokens, choices and weights differ in shape", x, idx, share)
                continue
            values = dict(x=x, idx=idx, w=share, down=down, gate_up=gate_up, biases=biases)
            yield lift.matched(scope, later, region, **values)
        yield why

    def check(self, m: Match) -> Facts | Reject:
        """Prove one activation and one arrangement of the weights."""
        roles = (m.x, m.idx, m.w, m.down, *m.gate_up, *m.biases)
        place = tuple(m.region.leaves.index(v) for v in roles)
        found = lift.proven(m.scope, ("experts", m.region.key, place), lambda: prove(m, place))
        return reject(found, m.x, *m.gate_up, m.down) if isinstance(found, str) else found

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """experts, over weights in the declared arrangement."""
        weights = _weights(b, m, facts)
        return emit(b, m.values, weights, facts, m.root.outputs[0])


def _is_moved(scope: Scope, y: Value) -> bool:
    """Whether the rows of a result are put into another order: then more belongs to the experts.

    With one expert the sorted rows are the rows in order, so what was sorted proves equal too.
    """
    readers = scope.consumers(y)
    while len(readers) == 1 and readers[0].op in VIEWS:
        readers = scope.consumers(readers[0].outputs[0])
    return any(reader.op in ("take", "gather") for reader in readers)


def _stacked(scope: Scope, node: Node) -> Weight | None:
    """The stacked weights [e, _, _] that a product reads, through views and lookups."""
    if node.op not in _PRODUCTS:
        return None
    for operand in node.operands:
        seen = scope.through(operand, _MOVES)
        if isinstance(seen, Weight) and seen.type.rank == 3:
            return seen
    return None


def _earlier(scope: Scope, node: Node, down: Weight) -> Iterator[Node]:
    """Products by other stacked weights that `node` depends on, with no product between."""
    pending = [node]
    visited: set[int] = set()
    while pending and len(visited) < 40:
        for operand in pending.pop().operands:
            made = scope.producer(operand)
            if made is None or id(made) in visited or not operand.type.dtype.is_float:
                continue
            if made.op not in _BETWEEN and traits_of(made.op).role is not Role.POINTWISE:
                continue
            visited.add(id(made))
            other = _stacked(scope, made)
            if other is None:
                pending.append(made)
            elif other != down:
                yield made


def _tokens(scope: Scope, first: Node, last: Node) -> Iterator[Value]:
    """Values that the first product's tokens are rows of, farthest first."""
    width = last.output.type.shape
    found: list[Value] = []
    for operand in first.operands:
        seen = (x for x in scope.viewed(operand, _MOVES) if isinstance(x, Value))
        found += (x for x in seen if x.type.dtype.is_float and x.type.shape[-1] in width)
    yield from reversed(found)


def _is_bias(operand: Operand, down: Weight) -> bool:
    """Whether a leaf may be a bias: a weight with a row for each expert."""
    shape = operand.type.shape
    return isinstance(operand, Weight) and len(shape) == 2 and shape[0] == down.type.shape[0]


def _weights(b: RewriteBuilder, m: Match, facts: Facts) -> list[Operand | None]:
    """Weights as the operator wants them; those that changed have names of their own."""
    given = [b.expr(w) for w in m.gate_up], b.expr(m.down), [b.expr(w) for w in m.biases]
    suffix = ".t" if facts["transposed"] else ""
    first = m.gate_up[-1 if facts["swapped"] else 0].name + suffix
    first += ".up" if len(m.gate_up) == 2 else ""
    names = [first, m.down.name + suffix]
    names += ["" if at is None else m.biases[at].name for at in facts["biases"]]
    if facts["interleaved"]:
        names = [f"{n}.parted" if n and at in (0, 2) else n for at, n in enumerate(names)]
    exprs = arranged(apply, *given, facts)
    return [None if e is None else b.weight(n, e) for n, e in zip(names, exprs, strict=True)]


@dataclass(frozen=True)
class RaiseExperts(RaisePass):
    """Raise every layer of routed experts, then merge the views around it."""

    rules = (Experts(),)
    then = VIEW_RULES
