"""Recognise attention, and what its mask means.

What           scaled_dot_product_attention, and softmax(q k^T * scale + mask) v spelled out,
               become attention over [b,s,h,d]. A mask that is proved to be causal over the cache
               becomes the operand `lengths`; no mask stays no mask.
Why it pays    a mask of s x t elements is neither built nor read, rows that no query sees are
               skipped, and the scores never leave the chip.
Preconditions  stage TRACED. Any mask that is not causal is refused with the reason, and the
               attention stays as it was.
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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.dims import Dim
from dsc.ir.graph import GraphBuilder, Node, Operand, Value
from dsc.ir.ops.shape import axis_of
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import random_tensor
from dsc.passes._masks import Causal, classify
from dsc.passes._views import VIEW_RULES
from dsc.passes.raise_append import LENGTHS, lengths_of
from dsc.rewrite import lift
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import apply_rules
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope

_SCORES = frozenset({"cast", "mul", "div", "add", "where"})
_MASKED = """graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6]{more}) {{
  %i = arange {{start={start}, end={end}, dtype=i64}}
  %c = reshape %i {{shape=[S,1]}}
  %j = arange {{start=0, end=T, dtype=i64}}
  %m = {mask}
  %e = expand {last} {{shape=[B,1,S,T]}}
  %y = sdpa %q, %k, %v, %e {{scale=0.5}}
  return %y
}}"""
_SPELLED = """graph g(%q: f32[B,2,S,4], %k: f32[B,2,S,4], %v: f32[B,2,S,6]) {{
  %t = permute %k {{dims=[0,1,3,2]}}
  %s = matmul %q, %t
  %n = full {{shape=[], value={scale}, dtype=f32}}
  %u = mul %s, %n
  %p = softmax %u {{axis={axis}}}
  %y = matmul %p, %v
  return %y
}}"""


class Attention(Rule):
    """sdpa(q, k, v, mask), softmax(q k^T * scale + mask) v  ==>  attention(q, k, v, lengths)."""

    tolerance = 1e-5
    anchors = frozenset({"sdpa", "softmax"})
    examples = (
        _MASKED.format(start="T-S", end="T", mask="le %j, %c", last="%m", more="").replace(
            "T", "S+P"
        ),
        _MASKED.format(
            start="T-S", end="T", mask="le %j, %c", last="%m", more=", %lengths: i64[B]"
        ).replace("T", "S+P"),
        "graph g(%q: f32[B,S,4], %k: f32[B,T,4], %v: f32[B,T,6]) {"
        " %y = sdpa %q, %k, %v {scale=0.5}\n return %y }",
        _SPELLED.format(scale=0.25, axis=-1),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mask is a window of 5 rows": _MASKED.format(
            start="T-S",
            end="T",
            mask="""le %j, %c
  %w = full {shape=[], value=5, dtype=i64}
  %d = sub %c, %w
  %g = gt %j, %d
  %h = logical_and %m, %g""",
            last="%h",
            more="",
        ).replace("T", "S+P"),
        "the mask is an input": "graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6],"
        " %m: bool[B,1,S,T]) { %y = sdpa %q, %k, %v, %m {scale=0.5}\n return %y }",
        "causal from the upper left, over a past": "graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4],"
        " %v: f32[B,2,T,6]) { %y = sdpa %q, %k, %v {scale=0.5, causal=true}\n return %y }",
        "the softmax is over queries": _SPELLED.format(scale=0.25, axis=2),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """A full past."""
        import torch

        if value.name == LENGTHS:
            return torch.full((env["B"],), env["P"])
        return random_tensor(value.type, f"{seed}:{value.name}")

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Queries, keys, values, mask and scale."""
        found = _whole(node) if node.op == "sdpa" else _spelled_out(scope, node)
        if found is None or isinstance(found, Reject):
            return found
        rank = {found[x].type.rank for x in "qkv"}
        if len(rank) != 1 or not rank <= {2, 3, 4}:
            return reject("queries, keys and values differ in rank", *(found[x] for x in "qkv"))
        root = found.pop("root")
        own = tuple(found.pop("nodes"))
        return Match(found, own, root.outputs, root, scope)

    def check(self, m: Match) -> Facts | Reject:
        """The mask's meaning, then (for a spelled-out form) the whole by evaluation."""
        facts = self._visibility(m)
        if isinstance(facts, Reject) or m.root.op == "sdpa":
            return facts
        leaves = [m.q, m.k, m.v, *([m.mask] if m.mask is not None else [])]
        names = {x.name for x in leaves}
        region = lift.cut(m.scope, [m.root.output], lambda v: v.name in names)
        if region is None or {x.name for x in region.leaves} != names:
            return reject("attention reads more than queries, keys, values and mask", m.q)
        key = ("attention", region.key, str(m.scale))
        why = lift.proven(m.scope, key, lambda: _prove(m, region))
        return reject(why, m.q) if why else facts

    def _visibility(self, m: Match) -> Facts | Reject:
        """What a query sees: `lengths`, the causal triangle, or everything."""
        new, total = m.q.type.shape[-2], m.k.type.shape[-2]
        if m.mask is None:
            if m.causal and new != total:
                return reject("causal from the upper left although keys and queries differ", m.k)
            return {"lengths": None, "causal": bool(m.causal)}
        mask = classify(m.scope, m.mask)
        if isinstance(mask, Reject):
            return mask
        assert isinstance(mask, Causal)
        batch = m.q.type.shape[0] if m.q.type.rank > 2 else 1
        lengths = mask.lengths or lengths_of(m.scope.graph, batch)
        if lengths is not None and lengths.type.shape != (batch,):
            return reject("the lengths are not one a sequence", lengths)
        return {"lengths": lengths, "causal": True}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """attention between the views to [b,s,h,d] and back."""
        return _emit(b, m.q, m.k, m.v, facts["lengths"], m.scale, facts["causal"])


def _whole(node: Node) -> dict[str, Any]:
    """The parts of an sdpa node."""
    q, k, v, *mask = node.inputs
    return {
        "q": q, "k": k, "v": v, "mask": mask[0] if mask else None, "root": node,
        "scale": node.attrs["scale"], "causal": node.attrs.get("causal", False), "nodes": (node,),
    }  # fmt: skip


def _spelled_out(scope: Scope, node: Node) -> dict[str, Any] | Reject | None:
    """The parts of softmax(q k^T * scale + mask) v, seen from its softmax."""
    rank = node.output.type.rank
    out: Value = node.output
    readers = scope.consumers(out)
    while len(readers) == 1 and readers[0].op == "cast":
        out = readers[0].output
        readers = scope.consumers(out)
    if len(readers) != 1 or readers[0].op != "matmul" or readers[0].inputs[0] != out:
        return None
    if axis_of(node.attrs.get("axis", -1), rank) != rank - 1:
        return reject("the softmax in front of a product is not over its last axis", node.output)
    root, mask, scale = readers[0], None, 1.0
    at = scope.producer(node.inputs[0])
    inner: list[Node] = []
    while at is not None and at.op in _SCORES:
        inner.append(at)
        step = _score_step(scope, at)
        if step is None:
            return None
        x, factor, masked = step
        if masked is not None and mask is not None:
            return reject("the scores are masked twice", masked)
        scale, mask = scale * factor, masked if masked is not None else mask
        at = scope.producer(x)
    if at is None or at.op != "matmul":
        return None
    keys = scope.producer(at.inputs[1])
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    if keys is None or keys.op != "permute" or tuple(keys.attrs["dims"]) != swapped:
        return None
    return {
        "q": at.inputs[0], "k": keys.inputs[0], "v": root.inputs[1], "mask": mask, "root": root,
        "scale": scale, "causal": False, "nodes": (at, *inner, node, root),
    }  # fmt: skip


def _score_step(scope: Scope, node: Node) -> tuple[Operand, float, Operand | None] | None:
    """One node between the scores and the softmax: what it reads, its factor, its mask."""
    a, *rest = node.operands
    if node.op == "cast":
        return a, 1.0, None
    b = rest[0]
    if node.op in ("mul", "div"):
        for x, other in ((a, b), (b, a)):
            factor = scope.constant(other)
            if factor is not None and (node.op == "mul" or other is b) and factor:
                return x, factor if node.op == "mul" else 1 / factor, None
        return None
    if node.op == "add":
        made = scope.producer(a)
        return (
            (a, 1.0, b) if made is not None and made.op in (_SCORES | {"matmul"}) else (b, 1.0, a)
        )
    hidden = scope.constant(rest[1])
    return (b, 1.0, a) if hidden is not None and hidden <= -1e4 else None


def _emit(
    b: GraphBuilder,
    q: Operand,
    k: Operand,
    v: Operand,
    lengths: Operand | None,
    scale: float,
    causal: bool,
) -> Operand:
    """attention of operands [b,h,s,d], [b,s,d] or [s,d]; the result in the same form."""
    shape = (*q.type.shape[:-1], v.type.shape[-1])
    parts = [_to_front(b, x) for x in (q, k, v)]
    (out,) = b.call("attention", *parts, lengths, scale=scale, causal=causal)
    if q.type.rank == 4:
        return b.call("permute", out, dims=(0, 2, 1, 3))[0]
    return b.call("reshape", out, shape=shape)[0]


def _to_front(b: GraphBuilder, x: Operand) -> Operand:
    """[b,h,s,d], [b,s,d] or [s,d] as [b,s,h,d]."""
    if x.type.rank == 4:
        return b.call("permute", x, dims=(0, 2, 1, 3))[0]
    rows: tuple[Dim, ...] = x.type.shape[:-1] if x.type.rank == 3 else (1, x.type.shape[0])
    return b.call("reshape", x, shape=(*rows, 1, x.type.shape[-1]))[0]


def _prove(m: Match, region: lift.Region) -> str:
    """Why the spelled-out form is no attention with this scale; the mask is a leaf shown whole."""
    import torch

    graph = lift.widened(region.graph)
    inputs = [Value(v.name, v.type) for v in graph.inputs]
    place = [region.leaves.index(x) for x in (m.q, m.k, m.v)]

    def body(b: GraphBuilder, *xs: Value) -> Operand:
        q, k, v = (xs[i] for i in place)
        return _emit(b, q, k, v, None, m.scale, False)

    candidate = lift.build(inputs, body)
    cases = []
    for seed, sizes in enumerate(lift.assignments(graph)):
        tensors = [
            torch.ones(lift.at_sizes(x, sizes), dtype=torch.bool)
            if x.type.dtype.value == "bool"
            else lift.normal(x, sizes, seed + i) * (leaf != m.mask)
            for i, (x, leaf) in enumerate(zip(inputs, region.leaves, strict=True))
        ]
        cases.append(lift.Case(sizes, tensors))
    return lift.prove(graph, candidate, cases)


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Raise every attention, then merge the views around it."""

    needs = frozenset({Stage.TRACED})
    tolerance = 1e-5

    def run(self, program: Program, report: PassReport) -> Program:
        """One sweep, then the views."""
        raised = apply_rules(program, (Attention(),), report)
        return raised if raised is program else apply_rules(raised, VIEW_RULES, report)
