"""Recognise multi-head latent attention: keys and values that are rebuilt from a latent.

What           attention whose queries are [q_nope | q_rope], whose keys are [k_nope | one rope key
               shared by all heads] and whose k_nope and values are the two parts of one linear
               projection of a latent, becomes mla_attention on the latent itself. What scales whole
               queries by their positions (Mistral 4) scales both parts.
Why it pays    only this form can be absorbed: a decode step then reads the latent cache (c + r
               values a token) instead of rebuilding heads x (nope + v) of them.
Preconditions  stage TRACED, after raise_attention; the projection is a weight [h*(n+v), c] whose
               rows are, per head, [k_nope | v]; the mask is by lengths. Proved by evaluation at
               reduced widths.
Before         graph main(%qn: f32[B,S,2,3], %qr: f32[B,S,2,4], %c: f32[B,T,6],
                     %r: f32[B,T,4], %lengths: i64[B], @kv_b: f32[16,6]) {
                 %a = linear %c, @kv_b : f32[B,T,16]
                 %b = reshape %a {shape=[B,T,2,8]} : f32[B,T,2,8]
                 %kn, %v = split %b {sizes=[3,5]} : f32[B,T,2,3], f32[B,T,2,5]
                 %d = reshape %r {shape=[B,T,1,4]} : f32[B,T,1,4]
                 %kr = expand %d {shape=[B,T,2,4]} : f32[B,T,2,4]
                 %q = concat %qn, %qr {axis=3} : f32[B,S,2,7]
                 %k = concat %kn, %kr {axis=3} : f32[B,T,2,7]
                 %y = attention %q, %k, %v, %lengths {causal=true, scale=0.5} : f32[B,S,2,5]
                   loc "attn"
                 return %y
               }
After          graph main(%qn: f32[B,S,2,3], %qr: f32[B,S,2,4], %c: f32[B,T,6],
                     %r: f32[B,T,4], %lengths: i64[B], @kv_b: f32[16,6]) {
                 %y = mla_attention %qn, %qr, %c, %r, @kv_b, %lengths {scale=0.5} : f32[B,S,2,5]
                   loc "attn"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.dims import Dim, symbol
from dsc.ir.graph import GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.op import defaults
from dsc.ir.ops.shape import axis_of
from dsc.passes._views import VIEW_RULES
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, at, reject
from dsc.rewrite.scope import VIEWS, Scope
from dsc.rewrite.widen import widened

_SAME_ELEMENTS = frozenset({"reshape", "permute", "expand", "cast"})
_FORM = """graph g(%qn: f32[B,S,2,3], %qr: f32[B,S,2,4], %c: f32[B,T,6], %r: f32[B,T,4],
  %lengths: i64[B], @kv_b: f32[{rows},6]) {{
  %a = linear %c, @kv_b
  %b = reshape %a {{shape=[B,T,2,{each}]}}
  %p = permute %b {{dims=[0,2,1,3]}}
  {first}, {second} = split %p {{sizes={sizes}}}
  %d = reshape %r {{shape=[B,1,T,4]}}
  %kr = expand %d {{shape=[B,2,T,4]}}
  %q = concat %qn, %qr {{axis=3}}
  %k = concat %kn, %kr {{axis=3}}
  %kt = permute %k {{dims=[0,2,1,3]}}
  %vt = permute %v {{dims=[0,2,1,3]}}
  %y = attention %q, %kt, %vt{lengths} {{causal=true, scale=0.5}}
  return %y
}}"""
_RIGHT: dict[str, Any] = {
    "rows": 16, "each": 8, "first": "%kn", "second": "%v", "sizes": "[3,5]", "lengths": ", %lengths"
}  # fmt: skip


class MlaAttention(Rule):
    """attention([qn|qr], [kv_b(c).k|r], kv_b(c).v)  ==>  mla_attention(qn, qr, c, r, kv_b)."""

    tolerance = 1e-5
    anchors = frozenset({"attention"})
    examples = (
        _FORM.format(**_RIGHT),
        _FORM.format(**_RIGHT | {"rows": 12, "each": 6, "sizes": "[3,3]"}),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the values come before the keys": _FORM.format(
            **_RIGHT | {"first": "%v", "second": "%kn", "sizes": "[5,3]"}
        ),
        "the mask is not by lengths": _FORM.format(**_RIGHT | {"lengths": ""}),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """Lengths that leave every query something to see."""
        return (
            lift.normal(value, env, seed)
            if value.type.dtype.is_float
            else lift.integers(value, env, seed, env["T"] - env["S"] + 1)
        )

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Queries and keys in two parts; k_nope and values from one projection."""
        q, k, v = node.operands[:3]
        lengths = node.get("lengths")
        queries, keys = _halves(scope, q), _halves(scope, k)
        if queries is None or keys is None:
            return None
        widths = [x.type.shape[-1] for x in (*queries, *keys)]
        if widths[:2] != widths[2:]:
            return reject(
                "queries and keys are concatenated from parts of different widths", *queries
            )
        of_keys, of_values = _projection(scope, keys[0]), _projection(scope, v)
        if of_keys is None or of_values is not of_keys:
            return reject("keys and values are not parts of one projection", keys[0])
        if lengths is None:
            return reject("the mask is not by lengths", node.output)
        usual = defaults(node.op)
        if node.get("sinks") is not None or any(node.attrs[k] != x for k, x in usual.items()):
            return reject("it has a window, chunks, sinks or capped scores", node.output)
        return self._region(scope, node, queries, keys[1], of_keys, lengths)

    def _region(
        self,
        scope: Scope,
        node: Node,
        queries: tuple[Operand, ...],
        rope_key: Operand,
        projection: Node,
        lengths: Operand,
    ) -> Match | Reject:
        batch, new, heads, _ = node.output.type.shape
        total = node.operands[1].type.shape[1]
        latent, kv_b = projection.operands[0], projection.operands[1]
        r, c = rope_key.type.shape[-1], kv_b.type.shape[-1]
        n = queries[0].type.shape[-1]
        values = {
            "q_nope": _as_shape(scope, queries[0], (batch, new, heads, n)),
            "q_rope": _as_shape(scope, queries[1], (batch, new, heads, r)),
            "latent": _as_shape(scope, latent, (batch, total, c)),
            "rope": _as_shape(scope, rope_key, (batch, total, r)),
        }
        for role, value in values.items():
            if value is None:
                return reject(f"no value of the shape of {role} leads to it", node.output)
        values |= {"kv_b": kv_b, "lengths": lengths}
        names = {x.name for x in values.values() if x is not None}
        region = lift.cut(scope, [node.output], lambda x: x.name in names)
        if region is None or {x.name for x in region.leaves} != names:
            return reject("the attention reads more than queries, latent and rope key", node.output)
        return lift.matched(scope, node, region, **values)

    def check(self, m: Match) -> Facts | Reject:
        """Prove it at reduced widths."""
        v = m.root.output.type.shape[-1]
        if m.kv_b.type.shape[0] != m.q_nope.type.shape[2] * (m.q_nope.type.shape[3] + v):
            return reject("the projection has not h*(n+v) rows", m.kv_b)
        key = ("mla", m.region.key, tuple(m.region.leaves.index(m.get(r)) for r in _ROLES))
        why = lift.proven(m.scope, key, lambda: _prove(m))
        return reject(why, m.q_nope, m.latent, m.kv_b) if why else {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Attention over the latent."""
        return _emit(b, *(m.get(r) for r in _ROLES), scale=m.root.attrs["scale"])


_ROLES = ("q_nope", "q_rope", "latent", "rope", "kv_b", "lengths")


_SCALED = """graph g(%qn: f32[B,S,2,3], %qr: f32[B,S,2,4], %k: f32[B,T,2,7], %v: f32[B,T,2,5],
  %s: f32[{scale}], %lengths: i64[B]) {{
  %q = concat %qn, %qr {{axis=3}}
  %qt = permute %q {{dims=[0,2,1,3]}}
  %m = mul %qt, %s
  %qs = permute %m {{dims=[0,2,1,3]}}
  %y = attention %qs, %k, %v, %lengths {{causal=true, scale=0.5}}
  return %y
}}"""


class ScaleOfParts(Rule):
    """attention([qn|qr] * s, k, v)  ==>  attention([qn * s | qr * s], k, v), s by position."""

    tolerance = 1e-6
    anchors = frozenset({"attention"})
    examples = (_SCALED.format(scale="B,1,S,1"), _SCALED.format(scale="1,1,S,1"))
    near_misses: ClassVar[Mapping[str, str]] = {
        "each head has a scale of its own": _SCALED.format(scale="B,2,S,1"),
        "each channel has one": _SCALED.format(scale="B,1,S,7"),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """As of what is raised next."""
        return MlaAttention().sample(value, env, seed)

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Queries [b,h,s,d] in two parts under a product with one number a position."""
        q = node.operands[0]
        made = scope.producer(scope.through(q, frozenset({"permute"})))
        if made is None or made.op != "mul" or scope.consumers(made.output) != [scope.producer(q)]:
            return None
        for x, scale in (made.operands, made.operands[::-1]):
            parts = _halves(scope, x)
            shape = scale.type.shape
            if parts is not None and len(shape) == 4 and shape[1] == shape[3] == 1:
                return at(scope, made, parts=parts, scale=scale)
        return None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Both parts by the scale, as [b,s,h,d]."""
        shape, swap = m.root.output.type.shape, (0, 2, 1, 3)
        scale, rows = b.as_order(m.scale, swap), (shape[0], shape[2], shape[1])
        scaled = []
        for part in m.parts:
            first = part.type.shape[:3] == rows
            (by,) = b.call("mul", part if first else b.as_order(part, swap), scale)
            scaled.append(by)
        (whole,) = b.call("concat", *scaled, axis=3)
        return b.as_order(whole, swap)


def _emit(b: GraphBuilder, *operands: Operand, scale: float) -> Operand:
    return b.call("mla_attention", *operands, scale=scale)[0]


def _halves(scope: Scope, operand: Operand) -> tuple[Operand, Operand] | None:
    """The two parts of a concat along the last axis, seen through moves of the other axes."""
    for seen in scope.viewed(operand, frozenset({"permute", "cast", "reshape"})):
        node = scope.producer(seen)
        if node is not None and node.op == "concat" and len(node.operands) == 2:
            last = axis_of(node.attrs["axis"], node.output.type.rank) == node.output.type.rank - 1
            return (node.operands[0], node.operands[1]) if last else None
    return None


def _projection(scope: Scope, operand: Operand) -> Node | None:
    """The linear that `operand` is a view of, without a bias and by a weight."""
    for seen in scope.viewed(operand, VIEWS | {"cast"}):
        node = scope.producer(seen)
        if node is not None and node.op == "linear" and len(node.inputs) == 2:
            return node if isinstance(node.inputs[1], Weight) else None
    return None


def _as_shape(scope: Scope, operand: Operand, shape: tuple[Dim, ...]) -> Operand | None:
    """The farthest value of this shape that `operand` shows; it may be `operand` itself."""
    wanted = operand.type.with_shape(shape)
    found = [x for x in scope.viewed(operand, _SAME_ELEMENTS) if x.type == wanted]
    return found[-1] if found else None


def _prove(m: Match) -> str:
    """Why the region is no latent attention; empty when it is."""
    region: lift.Region = m.region
    heads, nope = m.q_nope.type.shape[2:]
    real = {
        "h": heads, "n": nope, "r": m.rope.type.shape[-1], "c": m.latent.type.shape[-1],
        "v": m.root.output.type.shape[-1],
    }  # fmt: skip
    h, n, r, v = (symbol(x) for x in "hnrv")
    derived = [n + r, n + v, h * (n + v), h * (n + r), h * v, h * n]
    small = lift.shrunk_sizes(real, derived)
    if small is None:
        return "no small widths are consistent with its own"
    graph = lift.resized(widened(region.graph), small)
    inputs = [*graph.inputs]
    place = [region.leaves.index(m.get(role)) for role in _ROLES]
    scale = m.root.attrs["scale"]
    candidate = lift.build(inputs, lambda b, *xs: _emit(b, *(xs[i] for i in place), scale=scale))
    new, total = m.q_nope.type.shape[1], m.latent.type.shape[1]
    cases = []
    for seed, sizes in enumerate(lift.assignments(graph)):
        rows, cached = (lift.extent(d, sizes) for d in (new, total))
        if rows > cached:
            continue  # more queries than rows: no step is like that
        tensors = [
            lift.normal(x, sizes, seed + i)
            if x.type.dtype.is_float
            else lift.integers(x, sizes, seed, cached - rows + 1)
            for i, x in enumerate(inputs)
        ]
        cases.append(lift.Case(sizes, tensors))
    return lift.prove(graph, candidate, cases) if cases else "it runs at no size"


@dataclass(frozen=True)
class RaiseMla(RaisePass):
    """Raise every multi-head latent attention, then merge the views around it."""

    rules = (ScaleOfParts(), MlaAttention())
    then = VIEW_RULES
