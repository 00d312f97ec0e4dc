"""Spell out the attention that has a mask of its own, and that of fp64.

What           scaled_dot_product_attention that raise_attention left becomes its products, the
               mask, a softmax and the product with the values.
Why it pays    every backend multiplies and takes softmax; the operator `attention` has no mask,
               and computes in fp32.
Preconditions  stage TRACED, after raise_attention. A row that sees no key gives zeros, as torch.
Before         graph main(%q: f32[B,S,4], %k: f32[B,T,4], %v: f32[B,T,6], %m: f32[S,T]) {
                 %y = sdpa %q, %k, %v, %m {scale=0.5} : f32[B,S,6]
                 return %y
               }
After          graph main(%q: f32[B,S,4], %k: f32[B,T,4], %v: f32[B,T,6], %m: f32[S,T]) {
                 %permute = permute %k {dims=[0,2,1]} : f32[B,4,T]
                 %matmul = matmul %q, %permute : f32[B,S,T]
                 %full = full {dtype=f32, shape=[], value=0.5} : f32[]
                 %mul = mul %matmul, %full : f32[B,S,T]
                 %add = add %mul, %m : f32[B,S,T]
                 %softmax = softmax %add {axis=-1} : f32[B,S,T]
                 %amax = amax %add {axes=[-1], keepdims=true} : f32[B,S,1]
                 %full_1 = full {dtype=f32, shape=[], value=-inf} : f32[]
                 %eq = eq %amax, %full_1 : bool[B,S,1]
                 %full_2 = full {dtype=f32, shape=[], value=0.0} : f32[]
                 %where = where %eq, %full_2, %softmax : f32[B,S,T]
                 %y = matmul %where, %v : f32[B,S,6]
                 return %y
               }
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.ir.dims import Dim
from dsc.ir.graph import GraphBuilder, Node, Operand, Value
from dsc.ir.types import DType
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope

_NARROW = (DType.bf16, DType.f16)
_GIVEN = "graph g(%q: f32[B,4,S,8], %k: f32[B,{keys},T,8], %v: f32[B,{keys},T,6], %m: {mask}) {{"
_MASKED = _GIVEN + " %y = sdpa %q, %k, %v, %m {{scale=0.5{more}}}\n return %y }}"


class SpellOut(Rule):
    """sdpa(q, k, v, mask)  ==>  softmax(q k^T * scale + mask) v."""

    tolerance = 1e-5
    anchors = frozenset({"sdpa"})
    examples = (
        _MASKED.format(keys=4, mask="bool[B,1,S,T]", more=""),
        _MASKED.format(keys=4, mask="f32[S,T]", more=""),
        _MASKED.format(keys=2, mask="f32[B,4,S,T]", more=", grouped=true"),
        "graph g(%q: f32[S,8], %k: f32[T,8], %v: f32[T,8], %m: bool[S,1]) {"
        " %y = sdpa %q, %k, %v, %m {scale=1.0}\n return %y }",
        "graph g(%q: f64[S,8], %k: f64[T,8], %v: f64[T,8]) {"
        " %y = sdpa %q, %k, %v {scale=1.0, causal=true}\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mask is causal as well": "graph g(%q: f32[S,8], %k: f32[T,8], %v: f32[T,8],"
        " %m: bool[S,T]) { %y = sdpa %q, %k, %v, %m {scale=1.0, causal=true}\n return %y }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Every attention that is left."""
        return Match({}, (node,), node.outputs, node, scope)

    def check(self, m: Match) -> Facts | Reject:
        """With a mask or a causal one, but not both, which is torch's error."""
        node = m.root
        if len(node.operands) > 3 and node.attrs["causal"]:
            return reject("it has a mask and is causal as well", node.operands[3])
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """In fp32 for 16-bit floats, rounded once."""
        node = m.root
        dtype = node.output.type.dtype
        working = DType.f32 if dtype in _NARROW else dtype
        q, k, v = (b.as_type(x, working) for x in node.operands[:3])
        if node.attrs["grouped"]:
            k, v = (_repeated(b, x, q) for x in (k, v))
        order = (*range(k.type.rank - 2), k.type.rank - 1, k.type.rank - 2)
        scores: Operand = b.matmul(q, b.permute(k, dims=order))
        scores = b.mul(scores, _number(b, node.attrs["scale"], working))
        if node.attrs["causal"]:
            scores = _masked(b, scores, _causal(b, *scores.type.shape[-2:]), working)
        elif len(node.operands) > 3:
            scores = _masked(b, scores, node.operands[3], working)
        weights = b.softmax(scores, axis=-1)
        best = b.amax(scores, axes=(-1,), keepdims=True)
        nothing_seen = b.eq(best, _number(b, -math.inf, working))
        weights = b.where(nothing_seen, _number(b, 0.0, working), weights)
        return (b.as_type(b.matmul(weights, v), dtype),)


def _causal(b: GraphBuilder, new: Dim, total: Dim) -> Operand:
    """bool[s, t]: query i sees the keys up to i."""
    rows = b.reshape(b.arange(start=0, end=new, dtype=DType.i64), shape=(new, 1))
    return b.le(b.arange(start=0, end=total, dtype=DType.i64), rows)  # type: ignore[no-any-return]


def _masked(b: GraphBuilder, scores: Operand, mask: Operand, dtype: DType) -> Operand:
    if mask.type.dtype is DType.boolean:
        hidden: Operand = b.where(mask, scores, _number(b, -math.inf, dtype))
        return hidden
    return b.add(scores, b.as_type(mask, dtype))  # type: ignore[no-any-return]


def _repeated(b: GraphBuilder, x: Operand, q: Operand) -> Operand:
    """Keys or values [*, g, t, d], each for its share of the query heads: [*, h, t, d]."""
    *lead, groups, rows, width = x.type.shape
    heads = q.type.shape[-3]
    if heads == groups:
        return x
    column = b.reshape(x, shape=(*lead, groups, 1, rows, width))
    wide = b.expand(column, shape=(*lead, groups, heads // groups, rows, width))
    return b.reshape(wide, shape=(*lead, heads, rows, width))  # type: ignore[no-any-return]


def _number(b: GraphBuilder, value: float, dtype: DType) -> Value:
    return b.full(shape=(), value=value, dtype=dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SpellOutSdpa(RaisePass):
    """Spell out every attention that has a mask."""

    rules = (SpellOut(),)
