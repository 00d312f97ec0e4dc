"""Recognise the router of a mixture of experts, in its variants.

What           everything between the hidden states, the gate's weight and the bias on one side and
               the chosen experts with their weights on the other becomes route. The variant (score
               function, groups, how a group is scored, what masked groups are filled with,
               normalising, scale) is read off the region and proved by routing random tokens.
Why it pays    one small kernel instead of some twenty; and the choices that distinguish V2 from V3,
               each of which is a known bug when confused, stand in the program as attributes.
Preconditions  stage TRACED; the scores come from one linear; the weights are fp32.
Before         graph main(%x: f32[B,S,4], @gate: f32[6,4]) {
                 %a = reshape %x {shape=[B*S,4]} : f32[B*S,4]
                 %b = linear %a, @gate : f32[B*S,6]
                 %c = softmax %b {axis=-1} : f32[B*S,6]
                 %d, %e = topk %c {k=2} : f32[B*S,2], i64[B*S,2] loc "gate"
                 return %d as "w", %e as "idx"
               }
After          graph main(%x: f32[B,S,4], @gate: f32[6,4]) {
                 %route, %route_1 = route %x, @gate {fill=-inf, group_score="top2", groups=1,
                   keep=1, normalise=false, scale=1.0, score="softmax", top_k=2}
                   : i64[B,S,2], f32[B,S,2] loc "gate"
                 %e = reshape %route {shape=[B*S,2]} : i64[B*S,2] loc "gate"
                 %d = reshape %route_1 {shape=[B*S,2]} : f32[B*S,2] loc "gate"
                 return %d as "w", %e as "idx"
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from dsc.ir.graph import Node, Operand, Value
from dsc.ir.types import DType
from dsc.passes._routing import emit, prove
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope

_TO_WEIGHTS = frozenset(
    {
        "gather",
        "add",
        "sub",
        "mul",
        "div",
        "sum",
        "softmax",
        "sigmoid",
        "cast",
        "reshape",
        "permute",
    }
)
_OF_TOKENS = frozenset({"cast", "reshape"})
_OF_EXPERTS = frozenset({"sort", "take"})
"""What puts weights in the order of the experts: from there on they are not the router's."""
MAX_STEPS = 40

_V3 = """graph g(%x: bf16[B,S,8], @gate: bf16[12,8], @bias: f32[12]) {{
  %t = reshape %x {{shape=[B*S,8]}}
  %u = cast %t {{dtype=f32}}
  %v = cast @gate {{dtype=f32}}
  %l = linear %u, %v
  %s = sigmoid %l
  %c = add %s, @bias
  %g = reshape %c {{shape=[B*S,4,3]}}
  %a, %ai = topk %g {{k=2}}
  %h = sum %a {{axes=[-1]}}
  %m, %mi = topk %h {{k=2}}
  %z = full {{shape=[B*S,4], value=0.0, dtype=f32}}
  %one = full {{shape=[], value=1.0, dtype=f32}}
  %n = scatter %z, %mi, %one {{axis=1}}
  %k = cast %n {{dtype=bool}}
  %r = reshape %k {{shape=[B*S,4,1]}}
  %f = full {{shape=[], value={fill}, dtype=f32}}
  %o = where %r, %g, %f
  %p = reshape %o {{shape=[B*S,12]}}
  %q, %idx = topk %p {{k=3}}
  %w1 = gather {source}, %idx {{axis=1}}
  %w2 = sum %w1 {{axes=[-1], keepdims=true}}
  %e = full {{shape=[], value=1e-20, dtype=f32}}
  %w3 = add %w2, %e
  %w4 = div %w1, %w3
  %sc = full {{shape=[], value=2.5, dtype=f32}}
  %w = mul %w4, %sc
  return %idx, %w
}}"""


_CHOSEN = """graph g(%x: f32[N,8], @gate: f32[6,8], @b: f32[6]) {{
  %g = linear %x, @gate, @b
  %l, %idx = topk %g {{k=2}}
  %w = {score}
  return %idx, %w
}}"""


class Route(Rule):
    """topk(score(x @ gate^T) + bias, in kept groups), its scores  ==>  route(x, gate, bias)."""

    tolerance = 1e-5
    anchors = frozenset({"topk"})
    examples = (
        _V3.format(fill="-inf", source="%s"),
        _V3.format(fill="0.0", source="%s"),
        "graph g(%x: f32[N,8], @gate: f32[6,8]) { %l = linear %x, @gate\n"
        " %s = softmax %l {axis=-1}\n %w, %idx = topk %s {k=2}\n"
        " %f = full {shape=[], value=16.0, dtype=f32}\n %y = mul %w, %f\n return %idx, %y }",
        _CHOSEN.format(score="softmax %l {axis=-1}"),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the weights are the biased scores": _V3.format(fill="-inf", source="%c"),
        "masked groups get another number": _V3.format(fill="0.25", source="%s"),
        "the logits are turned into other weights": _CHOSEN.format(score="tanh %l"),
        "the logits are chosen without a score function": "graph g(%x: f32[N,8], @gate: f32[6,8])"
        " { %l = linear %x, @gate\n %w, %idx = topk %l {k=2}\n return %idx, %w }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """A topk over the scores of one linear, and what is made of those scores."""
        linear = _scores(scope, node)
        idx = node.outputs[1]
        if linear is None or any(n.op == "topk" for n in scope.forward(idx, limit=12)):
            return None
        experts, width = linear.operands[1].type.shape
        seen = scope.viewed(linear.operands[0], _OF_TOKENS)
        *_, x = (v for v in seen if v.type.shape[-1:] == (width,))
        gate = scope.through(linear.operands[1], frozenset({"cast"}))
        shift = linear.operands[2] if len(linear.operands) > 2 else None
        known = {v.name for v in (x, gate, shift) if v is not None}
        region = lift.cut(scope, [idx], lambda v: v.name in known)
        if region is None:
            return reject("the scores depend on too much", idx)
        others = [v for v in region.leaves if v.name not in known]
        if len(others) > 1 or any(v.type.shape != (experts,) for v in others):
            return reject("the choice depends on more than x, gate and bias", idx, *others)
        leaves = known | {v.name for v in others}
        weights = tuple(_weights(scope, node, leaves))
        if not weights:
            return reject("no fp32 weight of the chosen experts is computed from the scores", idx)
        values = {
            "x": x, "gate": gate, "bias": others[0] if others else None, "shift": shift,
            "top_k": node.attrs["k"], "weights": weights, "idx": idx,
        }  # fmt: skip
        return Match(values, (node,), (idx, weights[-1]), node, scope)

    def check(self, m: Match) -> Facts | Reject:
        """Prove one variant, for the last weight that has one."""
        given = (m.x, m.gate, m.bias, m.shift)
        names = {v.name for v in given if v is not None}
        why = ""
        for w in reversed(m.weights):
            region = lift.cut(m.scope, [m.idx, w], lambda v: v.name in names)
            if region is None:
                continue
            place = tuple(_index(region, v) for v in given)
            proof = partial(prove, region, place, m.gate.type.shape[0], m.top_k)
            found = lift.proven(m.scope, ("route", region.key, place), proof)
            if not isinstance(found, str):
                return {"w": w, "attrs": found}
            why = why or found
        return reject(why, m.x, m.gate)

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """route over the tokens as they come, and its results in the shapes that readers expect."""
        w = m.weights[-1]
        idx, weights = emit(b, m.x, m.gate, (m.bias, m.shift), facts["attrs"], m.idx, w)
        return idx, weights

    def find(self, scope: Scope) -> Iterator[Match | Reject]:
        """Settle which weight is replaced before the driver asks for the rewrite."""
        for found in super().find(scope):
            if isinstance(found, Match):
                facts = self.check(found)
                if not isinstance(facts, Reject):
                    w = facts["w"]
                    values = {**found.values, "weights": (w,)}
                    yield Match(values, found.nodes, (found.idx, w), found.root, scope)
                    continue
            yield found


def _index(region: lift.Region, value: Operand | None) -> int:
    return region.leaves.index(value) if value is not None and value in region.leaves else -1


def _scores(scope: Scope, node: Node) -> Node | None:
    """The one linear behind the operand of a topk."""
    pending, seen, linears = [node], 0, {}
    visited: set[int] = set()
    while pending and seen < MAX_STEPS:
        at = pending.pop()
        seen += 1
        for operand in at.operands:
            made = scope.producer(operand)
            if made is None or id(made) in visited:
                continue
            visited.add(id(made))
            if made.op == "linear":
                linears[id(made)] = made
            else:
                pending.append(made)
    found = list(linears.values())
    return found[0] if len(found) == 1 and found[0].operands[1].type.rank == 2 else None


def _weights(scope: Scope, node: Node, leaves: set[str]) -> Iterator[Value]:
    """Values shaped like the chosen indices that follow from them, nearest first.

    They are in fp32, or all in the type that the scores are chosen in.
    """
    values, idx = node.outputs
    inside = {values.name, idx.name}
    yield values
    starts = [n for v in node.outputs for n in scope.forward(v, limit=24)]
    for later in sorted(starts, key=lambda n: scope.position[n.outputs[0].name]):
        if later.op not in _TO_WEIGHTS or later.output.name in inside:
            continue
        inside.add(later.output.name)
        if later.output.type not in (values.type, values.type.with_dtype(DType.f32)):
            continue
        region = lift.cut(scope, [idx, later.output], lambda v: v.name in leaves)
        if region is None or region.ops & _OF_EXPERTS:
            continue
        if {x.name for x in region.leaves} <= leaves:
            yield later.output


@dataclass(frozen=True)
class RaiseRouter(RaisePass):
    """Raise every router."""

    rules = (Route(),)
