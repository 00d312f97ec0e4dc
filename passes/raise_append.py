"""Recognise how new rows enter a KV cache.

What           a concat of a cache and its new rows, and a scatter of new rows at `lengths`, become
               append. The concat of transformers puts new rows behind all P cached ones; that is
               append where every sequence has P rows, which is all a uniform trace can show. The
               raised program is the one for ragged batches too.
Why it pays    the cache becomes a state with a declared update, which can then be made in place:
               a decode step writes one row instead of copying the whole past.
Preconditions  stage TRACED, after raise_attention, so that from the first append on every row is
               masked by lengths; the graph has an input `lengths: i64[b]`; the past is the
               graph input of an alias. Without `lengths` a concat stays a concat.
Before         graph main(%lengths: i64[B], %past: f32[B,P,4], %new: f32[B,S,4]) {
                 %a = reshape %past {shape=[B,1,P,4]} : f32[B,1,P,4]
                 %b = reshape %new {shape=[B,1,S,4]} : f32[B,1,S,4]
                 %c = concat %a, %b {axis=2} : f32[B,1,P+S,4]
                 %d = reshape %c {shape=[B,P+S,4]} : f32[B,P+S,4]
                 return %d as "present" updates %past
               }
After          graph main(%lengths: i64[B], %past: f32[B,P,4], %new: f32[B,S,4]) {
                 %append = append %past, %new, %lengths : f32[B,P+S,4]
                 return %append as "present" updates %past
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.limits import BATCH, PAST
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_tensor
from dsc.passes._views import VIEW_RULES
from dsc.rewrite import lift
from dsc.rewrite.base import EXACT
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope
from dsc.rewrite.widen import widened

LENGTHS = "lengths"
_RESHAPE = frozenset({"reshape"})

_GROWN = """graph g(%lengths: i64[B], %past: f32[B,P,4], %new: f32[B,S,4]) {{
  %l = reshape %lengths {{shape=[B,1]}}
  %r = arange {{start={first}, end=S+{first}, dtype=i64}}
  %p = add %l, %r
  %q = reshape %p {{shape=[B,S,1]}}
  %i = expand %q {{shape=[B,S,4]}}
  %z = full {{shape=[B,S+1,4], value=0.0, dtype=f32}}
  %t = slice %z {{axis=1, start=0, end=S}}
  %g = concat %past, %t {{axis=1}}
  %y = scatter %g, %i, %new {{axis=1}}
  return %y as "present" updates %past
}}"""


def lengths_of(graph: Graph, batch: Dim) -> Value | None:
    """The graph input that counts cached tokens: `lengths: i64[b]`."""
    wanted = TensorType(DType.i64, (batch,))
    return next((v for v in graph.inputs if v.name == LENGTHS and v.type == wanted), None)


class Append(Rule):
    """concat(past, new), scatter(past, lengths + i, new)  ==>  append(past, new, lengths)."""

    anchors = frozenset({"concat", "scatter"})
    examples = (
        """graph g(%lengths: i64[B], %past: f32[B,P,4], %new: f32[B,S,4]) {
  %y = concat %past, %new {axis=1}
  return %y as "present" updates %past
}""",
        _GROWN.format(first=0),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "there is no input of lengths": """graph g(%past: f32[B,P,4], %new: f32[B,S,4]) {
  %y = concat %past, %new {axis=1}
  return %y as "present" updates %past
}""",
        "the past is no state": """graph g(%lengths: i64[B], %a: f32[B,P,4], %new: f32[B,S,4]) {
  %y = concat %a, %new {axis=1}
  return %y
}""",
        "what comes next is another value": """graph g(%lengths: i64[B], %past: f32[B,P,4],
    %new: f32[B,S,4]) {
  %y = concat %past, %new {axis=1}
  %z = neg %y
  return %z as "present" updates %past, %y
}""",
        "it comes next in another cache": """graph g(%lengths: i64[B], %past: f32[B,P,4],
    %other: f32[B,P,4], %new: f32[B,S,4]) {
  %y = concat %other, %new {axis=1}
  return %y as "present" updates %past
}""",
        "new rows come first": """graph g(%lengths: i64[B], %past: f32[B,P,4], %new: f32[B,S,4]) {
  %y = concat %new, %past {axis=1}
  return %y as "present" updates %past
}""",
        "rows are written one further": _GROWN.format(first=1),
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """A full past: what a concat stands for."""
        if value.name == LENGTHS:
            return torch.full((env[BATCH],), env[PAST])
        return random_tensor(value.type, f"{seed}:{value.name}")

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """A cache and new rows in one value."""
        past = _past(scope, node)
        if past is None or past.type.rank != 3 or not _is_next(scope, node.output, past):
            return None
        lengths = lengths_of(scope.graph, past.type.shape[0])
        if lengths is None:
            return reject("the graph has no input lengths: i64[b]", past)
        new = node.inputs[1] if node.op == "concat" else node.inputs[2]
        if not isinstance(new, Value) or len(node.inputs) != (2 if node.op == "concat" else 3):
            return None
        region = lift.cut(scope, [node.output], lambda v: v.name in (new.name, past.name))
        if region is None or {x.name for x in region.leaves} - {past.name, new.name, LENGTHS}:
            return reject("what is appended depends on more than cache, new rows and lengths", past)
        return lift.matched(scope, node, region, past=past, new=new, lengths=lengths)

    def check(self, m: Match) -> Facts | Reject:
        """Prove it: for ragged lengths where the region reads them, else for a full past."""
        b, p, d = m.past.type.shape
        total = m.root.output.type.numel // (b * d) if m.root.output.type.numel else 0
        new = total - p
        if product((b, new, d)) != m.new.type.numel:
            return reject("cache and new rows do not add up", m.past, m.new)
        shape = (b, new, d)
        key = ("append", m.region.key, len(m.region.leaves))
        why = lift.proven(m.scope, key, lambda: _prove(m, shape))
        return reject(why, m.past, m.new) if why else {"shape": shape}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """append on [b,t,d], seen under the shape that readers expect."""
        return _emit(b, m.past, m.new, m.lengths, facts["shape"], m.root.output.type.shape)


def _past(scope: Scope, node: Node) -> Value | None:
    """The cache behind the first operand: as it is, or as the front of a concat."""
    seen = scope.through(node.inputs[0], _RESHAPE) if node.inputs[0] is not None else None
    grown = scope.producer(seen)
    if node.op == "scatter" and grown is not None and grown.op == "concat":
        seen = scope.through(grown.operands[0], _RESHAPE)
    return seen if isinstance(seen, Value) else None


def _is_next(scope: Scope, value: Value, past: Value) -> bool:
    """Whether `value` is what the graph declares as the next state of the input `past`."""
    graph = scope.graph
    return any(
        graph.inputs[i] == past and scope.through(graph.outputs[o], _RESHAPE) == value
        for o, i in graph.aliases
    )


def _emit(
    b: GraphBuilder,
    past: Operand,
    new: Operand,
    lengths: Operand,
    rows: tuple[Dim, ...],
    shape: tuple[Dim, ...],
) -> Operand:
    (grown,) = b.call("append", past, b.as_shape(new, rows), lengths)
    return b.as_shape(grown, shape)


def _prove(m: Match, rows: tuple[Dim, ...]) -> str:
    """Why the region is no append; empty when it is."""
    region: lift.Region = m.region
    graph = widened(region.graph)
    ragged = m.lengths in region.leaves
    leaves = [*region.leaves] + ([] if ragged else [m.lengths])
    inputs = [*graph.inputs]
    if not ragged:  # the region does not read lengths; the candidate does
        inputs.append(Value(f"in.{len(inputs)}", m.lengths.type))
        graph = Graph(graph.name, tuple(inputs), graph.nodes, graph.outputs, graph.output_names)
    place = [leaves.index(x) for x in (m.past, m.new, m.lengths)]
    shape = graph.outputs[0].type.shape

    def body(b: GraphBuilder, *xs: Value) -> Operand:
        past, new, lengths = (xs[i] for i in place)
        return _emit(b, past, new, lengths, rows, shape)

    candidate = lift.build(inputs, body)
    cases = []
    for seed, sizes in enumerate(lift.assignments(graph)):
        tensors = [lift.normal(v, sizes, seed + i) for i, v in enumerate(inputs)]
        past = lift.at_sizes(inputs[place[0]], sizes)[1]
        count = lift.integers(m.lengths, sizes, seed, past + 1)
        tensors[place[2]] = count if ragged else torch.full_like(count, past)
        cases.append(lift.Case(sizes, tensors))
    return lift.prove(graph, candidate, cases)


@dataclass(frozen=True)
class RaiseAppend(RaisePass):
    """Raise every append to a cache, then merge the views around it."""

    rules = (Append(),)
    then = VIEW_RULES
    tolerance = EXACT
