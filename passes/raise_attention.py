"""Recognise attention, and what its mask means.

What           scaled_dot_product_attention, and softmax(q k^T * scale + mask) v spelled out,
               become attention over [b,s,h,d]. A mask that is proved to be causal over the cache
               becomes the operand `lengths`, one of a window or of chunks their attribute; no mask
               stays no mask. Scores that a tanh caps, sinks (a column of logits that the softmax
               sees and the values do not) and heads repeated for those that share them are read
               off the spelled-out form.
Why it pays    a mask of s x t elements is neither built nor read, rows that no query sees are
               skipped, and the scores never leave the chip.
Preconditions  stage TRACED. Any mask that is not causal, or adds a bias, is refused with the
               reason, and the attention stays as it was.
Before         graph main(%q: f32[B,2,S,4], %k: f32[B,2,S,4], %v: f32[B,2,S,4]) {
                 %y = sdpa %q, %k, %v {causal=true, scale=0.5} : f32[B,2,S,4] loc "attn"
                 return %y
               }
After          graph main(%q: f32[B,2,S,4], %k: f32[B,2,S,4], %v: f32[B,2,S,4]) {
                 %permute = permute %q {dims=[0,2,1,3]} : f32[B,S,2,4] loc "attn"
                 %permute_1 = permute %k {dims=[0,2,1,3]} : f32[B,S,2,4] loc "attn"
                 %permute_2 = permute %v {dims=[0,2,1,3]} : f32[B,S,2,4] loc "attn"
                 %attention = attention %permute, %permute_1, %permute_2 {causal=true, scale=0.5}
                   : f32[B,S,2,4] loc "attn"
                 %y = permute %attention {dims=[0,2,1,3]} : f32[B,2,S,4] loc "attn"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.dims import Dim, product
from dsc.ir.graph import GraphBuilder, Node, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.passes._attention_forms import (
    BY_LENGTHS,
    CHUNK,
    DROPPED,
    GROUPED,
    MASKED,
    REPEATED,
    SPELLED,
    WINDOW,
)
from dsc.passes._masks import Causal, classify
from dsc.passes._spelled_attention import leaves, spelled_out, whole
from dsc.passes._spelled_parts import Spelling
from dsc.passes._views import VIEW_RULES
from dsc.passes.raise_append import Append, lengths_of
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope
from dsc.rewrite.widen import widened


class Attention(Rule):
    """sdpa(q, k, v, mask), softmax(q k^T * scale + mask) v  ==>  attention(q, k, v, lengths)."""

    tolerance = 1e-5
    anchors = frozenset({"sdpa", "softmax"})
    examples = (
        MASKED.format(start="T-S", end="T", mask="le %j, %c", last="%m", more="").replace(
            "T", "S+P"
        ),
        MASKED.format(
            start="T-S", end="T", mask="le %j, %c", last="%m", more=", %lengths: i64[B]"
        ).replace("T", "S+P"),
        "graph g(%q: f32[B,S,4], %k: f32[B,T,4], %v: f32[B,T,6]) {"
        " %y = sdpa %q, %k, %v {scale=0.5}\n return %y }",
        "graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6]) {"
        " %y = sdpa %q, %k, %v {scale=0.5, causal=true}\n return %y }",
        SPELLED.format(scale=0.25, axis=-1),
        """graph g(%q: f32[S,B,2,4], %k: f32[B,T,4], %v: f32[T,B,6]) {
  %s = einsum %k, %q {eq="btd,sbhd->htsb"}
  %p = softmax %s {axis=1}
  %y = einsum %p, %v {eq="htsb,tbe->bhse"}
  return %y
}""",
        BY_LENGTHS.format(more=WINDOW.format(width=5, compare="gt"), last="%h"),
        BY_LENGTHS.format(more=WINDOW.format(width=5, compare="ge"), last="%h"),
        BY_LENGTHS.format(more=CHUNK, last="%h"),
        GROUPED.format(shown="%z", after=DROPPED, values="%v"),
        GROUPED.format(
            shown="%z",
            after="%g = amax %t {axes=[4], keepdims=true}\n  %h = sub %t, %g\n  "
            + DROPPED.replace("%t", "%h"),
            values="%v",
        ),
        REPEATED.format(rest="%y = sdpa %q, %c, %f {scale=0.5}"),
        REPEATED.format(rest="%y = sdpa %q, %c, %f {scale=0.5}")  # by turns: no groups
        .replace("[B,2,1,T,", "[B,1,2,T,")
        .replace("[B,2,3,T,", "[B,3,2,T,"),
        REPEATED.format(
            rest="%g = permute %c {dims=[0,1,3,2]}\n  %h = matmul %q, %g\n"
            "  %i = softmax %h {axis=-1}\n  %y = matmul %i, %f"
        ),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the window shows a row after the query's own": BY_LENGTHS.format(
            more="%w = full {shape=[], value=1, dtype=i64}\n  %d = add %c, %w\n  %h = le %j, %d",
            last="%h",
        ),
        "the window is one off for the first query": BY_LENGTHS.format(
            more="%o = full {shape=[], value=0, dtype=i64}\n  %g0 = eq %i, %o\n"
            "  %g1 = cast %g0 {dtype=i64}\n  %g2 = reshape %g1 {shape=[S,1]}\n"
            "  %w0 = full {shape=[], value=5, dtype=i64}\n  %w1 = add %g2, %w0\n"
            "  %d = sub %c, %w1\n  %g = gt %j, %d\n  %h = logical_and %m, %g",
            last="%h",
        ),
        "the mask differs between heads": BY_LENGTHS.format(
            more=WINDOW.format(width=5, compare="gt") + "\n  %b = concat %m, %h {axis=1}",
            last="%b",
        ),
        "the sinks are not dropped": GROUPED.format(
            shown="%z",
            after="%f = softmax %t {axis=-1}",
            values="%vt",
        ).replace(
            "  %y =",
            "  %vs = slice %v {axis=2, start=0, end=1}\n  %vt = concat %v, %vs {axis=2}\n  %y =",
        ),
        "another column than that of the sinks is dropped": GROUPED.format(
            shown="%z",
            after=DROPPED.replace("start=0, end=S+P", "start=1, end=S+P+1"),
            values="%v",
        ),
        "the sinks differ between queries": GROUPED.format(shown="%z", after=DROPPED, values="%v")
        .replace("@sinks: f32[6]", "%sinks: f32[S]")
        .replace("@sinks {shape=[1,2,3,1,1]}", "%sinks {shape=[1,1,1,S,1]}"),
        "the scores are capped after the mask": GROUPED.format(
            shown="%u", after=DROPPED, values="%v"
        )
        .replace("  %r =", "  %o1 = tanh %o\n  %r =")
        .replace("concat %o,", "concat %o1,"),
        "the mask is an input": "graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6],"
        " %m: bool[B,1,S,T]) { %y = sdpa %q, %k, %v, %m {scale=0.5}\n return %y }",
        "the mask is one row for all queries": "graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4],"
        " %v: f32[B,2,T,6]) { %m = full {shape=[1,T], value=1.0, dtype=bool}\n"
        " %y = sdpa %q, %k, %v, %m {scale=0.5}\n return %y }",
        "the factor comes after the softmax": """graph g(%q: f32[B,S,4], %k: f32[B,S,4]) {
  %s = einsum %q, %k {eq="bsd,btd->bst"}
  %p = softmax %s {axis=-1}
  %n = full {shape=[], value=0.5, dtype=f32}
  %u = mul %p, %n
  %y = matmul %u, %k
  return %y
}""",
        "the softmax is over queries": SPELLED.format(scale=0.25, axis=2),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """A full past."""
        return Append().sample(value, env, seed)

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Queries, keys, values, mask and scale, and how their axes lie."""
        found = whole(scope, node) if node.op == "sdpa" else spelled_out(scope, node)
        if found is None or isinstance(found, Reject):
            return found
        return Match({"found": found}, found.nodes, found.root.outputs, found.root, scope)

    def check(self, m: Match) -> Facts | Reject:
        """The mask's meaning, then (for a spelled-out form) the whole by evaluation."""
        found: Spelling = m.found
        if found.q.type.dtype is DType.f64:
            return reject("attention is computed in fp32", found.q)
        facts = _visibility(m.scope, found)
        if isinstance(facts, Reject) or found.root.op == "sdpa":
            return facts
        names = {x.name for x in leaves(found)}
        region = lift.cut(m.scope, [found.root.output], lambda v: v.name in names)
        if region is None or {x.name for x in region.leaves} != names:
            return reject("attention reads more than queries, keys, values and mask", found.q)
        forms = str((found.axes, found.result, found.scale, found.softcap))
        key = ("attention", region.key, forms)
        why = lift.proven(m.scope, key, lambda: _prove(found, region))
        return reject(why, found.q) if why else facts

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """attention between the views to [b,s,h,d] and back."""
        found: Spelling = m.found
        mask: Causal | None = facts["mask"]
        lengths = facts["lengths"]
        if facts["from_start"]:
            (lengths,) = b.call("full", shape=(_batch(found),), value=0.0, dtype=DType.i64)
        sight = {"window": mask.window, "chunk": mask.chunk} if mask else {}
        return _emit(b, found, found.operands, lengths, facts["causal"], sight)


def _visibility(scope: Scope, found: Spelling) -> Facts | Reject:
    """What a query sees: `lengths`, the causal triangle from the end or the start, or all."""
    new, total = (found.extents(part)[-2] for part in (0, 1))
    if found.mask is None:
        from_start = found.causal and new != total
        return {
            "mask": None, "lengths": None, "causal": found.causal, "from_start": from_start
        }  # fmt: skip
    if found.mask.type.shape[-2:] != (new, total):
        return reject("the mask is not one of queries by keys", found.mask)
    mask = classify(scope, found.mask, found.inverse)
    if isinstance(mask, Reject):
        return mask
    if mask.from_start:
        return {"mask": mask, "lengths": None, "causal": True, "from_start": True}
    batch = _batch(found)
    lengths = mask.lengths or lengths_of(scope.graph, batch)
    if lengths is not None and lengths.type.shape != (batch,):
        return reject("the lengths are not one a sequence", lengths)
    return {"mask": mask, "lengths": lengths, "causal": True, "from_start": False}


def _lead(found: Spelling) -> tuple[Dim, Dim, Dim]:
    """Batch, query heads and key heads that the leading axes come to."""
    queries, keys = (found.extents(part)[:-2] for part in (0, 1))
    if found.heads:
        groups = keys[-1] if len(keys) > 1 else 1
        return product(keys[:-1] or keys), groups * product(queries[len(keys) :]), groups
    if len(keys) < 2:
        return product(keys), 1, 1
    return product(keys[:-1]), queries[-1], keys[-1]


def _batch(found: Spelling) -> Dim:
    return _lead(found)[0]


def _emit(
    b: GraphBuilder,
    found: Spelling,
    operands: Sequence[Operand],
    lengths: Operand | None,
    causal: bool,
    sight: Mapping[str, int],
) -> Operand:
    """attention of the parts brought to [b,h,s,d]; its result with the axes that the root has."""
    batch, heads, groups = _lead(found)
    parts, sinks = operands[:3], operands[3:]
    ready: list[Operand] = []
    shapes = (None, *found.shapes)
    for part, shape, order, h in zip(
        parts, shapes, found.axes, (heads, groups, groups), strict=True
    ):
        x = b.as_order(part if shape is None else b.as_shape(part, shape), order)
        rows, columns = x.type.shape[-2:]
        if h == 1 and x.type.shape[:-2] != (batch, 1):
            ready.append(b.as_shape(x, (batch, rows, 1, columns)))
        else:
            ready.append(b.as_order(b.as_shape(x, (batch, h, rows, columns)), (0, 2, 1, 3)))
    more: list[Operand] = [b.as_type(b.as_shape(x, (heads,)), ready[0].type.dtype) for x in sinks]
    attrs: dict[str, Any] = {**sight, "softcap": found.softcap}
    out: Operand
    (out,) = b.call("attention", *ready, lengths, *more, scale=found.scale, causal=causal, **attrs)
    lead = found.extents(0)[:-1]
    shape = (*lead, out.type.shape[-1])
    if heads != 1 or len(shape) == 4:
        out = b.as_order(out, (0, 2, 1, 3))
    return b.as_order(b.as_shape(out, shape), found.result)


def _prove(found: Spelling, region: lift.Region) -> str:
    """Why the spelled-out form is no attention with this scale; the mask is a leaf shown whole."""
    graph = widened(region.graph)
    inputs = [*graph.inputs]
    place = [region.leaves.index(x) for x in found.operands]

    def body(b: GraphBuilder, *xs: Value) -> Operand:
        return _emit(b, found, [xs[i] for i in place], None, False, {})

    candidate = lift.build(inputs, body)
    cases = []
    for seed, sizes in enumerate(lift.assignments(graph)):
        tensors = [
            torch.full(lift.at_sizes(x, sizes), not found.inverse)
            if x.type.dtype.value == "bool"
            else lift.normal(x, sizes, seed + i, _spread(found, leaf)) * (leaf != found.mask)
            for i, (x, leaf) in enumerate(zip(inputs, region.leaves, strict=True))
        ]
        cases.append(lift.Case(sizes, tensors))
    return lift.prove(graph, candidate, cases)


def _spread(found: Spelling, leaf: Operand) -> float:
    """How wide the numbers of a leaf are drawn: scores that are capped must come near their cap."""
    if not found.softcap or leaf != found.q:
        return 1.0
    return max(1.0, 0.5 * found.softcap / abs(found.scale))


@dataclass(frozen=True)
class RaiseAttention(RaisePass):
    """Raise every attention, then merge the views around it."""

    rules = (Attention(),)
    then = VIEW_RULES
