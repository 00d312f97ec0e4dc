"""Recognise an activation that is written out: gelu by tanh or erf, and silu.

What           everything between x and a product, computed from x and numbers alone, becomes gelu,
               gelu_tanh or silu. The region is proposed by structure (a product behind a tanh, an
               erf or a sigmoid) and proved by running it against each on a grid of numbers.
Why it pays    eight operators are one, which the experts and every backend know by name.
Preconditions  stage TRACED; nothing of it is read elsewhere.
Before         graph main(%x: f32[B,4]) {
                 %half = full {dtype=f32, shape=[], value=0.5} : f32[] loc "mlp.act"
                 %a = mul %x, %half : f32[B,4] loc "mlp.act"
                 %c = full {dtype=f32, shape=[], value=0.7071067811865476} : f32[] loc "mlp.act"
                 %b = mul %x, %c : f32[B,4] loc "mlp.act"
                 %e = erf %b : f32[B,4] loc "mlp.act"
                 %one = full {dtype=f32, shape=[], value=1.0} : f32[] loc "mlp.act"
                 %d = add %e, %one : f32[B,4] loc "mlp.act"
                 %y = mul %a, %d : f32[B,4] loc "mlp.act"
                 return %y
               }
After          graph main(%x: f32[B,4]) {
                 %y = gelu %x : f32[B,4] loc "mlp.act"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.graph import Node, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.op import named
from dsc.ir.traits import Role
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope
from dsc.rewrite.widen import widened

_ACTIVATIONS = ("gelu_tanh", "gelu", "silu")
_CURVES = {"tanh", "erf", "sigmoid"}
"""What an activation bends by; its last operator is a product."""
_POINTWISE = named(Role.POINTWISE)
_STEPS = 8
"""Operators between a curve and the product that ends an activation, at most; and before it."""
TOLERANCE = 3e-6
"""Of a value at most 6: the two forms of gelu are 5e-4 apart."""

_GELU = """graph g(%x: {type}[B,4], %z: {type}[B,4]) {{
  %three = full {{dtype={type}, shape=[], value=3.0}}
  %p = pow %x, %three
  %k = full {{dtype={type}, shape=[], value={bend}}}
  %q = mul %p, %k
  %a = add %x, %q
  %c = full {{dtype={type}, shape=[], value=0.7978845608028654}}
  %b = mul %a, %c
  %t = tanh %b
  %one = full {{dtype={type}, shape=[], value=1.0}}
  %d = add %t, %one
  %half = full {{dtype={type}, shape=[], value=0.5}}
  %h = mul {times}, %half
  %y = mul %h, %d
  return %y{also}
}}"""
_FAST = """graph g(%x: f32[B,4]) {
  %k = full {dtype=f32, shape=[], value=0.044715}
  %q = mul %x, %k
  %r = mul %q, %x
  %one = full {dtype=f32, shape=[], value=1.0}
  %s = add %r, %one
  %c = full {dtype=f32, shape=[], value=0.7978845608}
  %u = mul %x, %c
  %b = mul %u, %s
  %t = tanh %b
  %d = add %t, %one
  %half = full {dtype=f32, shape=[], value=0.5}
  %h = mul %x, %half
  %y = mul %h, %d
  return %y
}"""
_FORM = {"type": "f32", "bend": "0.044715", "times": "%x", "also": ""}


class Activation(Rule):
    """x times a curve of x and numbers  ==>  the activation of that name."""

    tolerance = 1e-5
    examples = (
        _GELU.format(**_FORM),
        _FAST,
        "graph g(%x: f32[B,4]) { %s = sigmoid %x\n %y = mul %s, %x\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "it bends elsewhere": _GELU.format(**_FORM | {"bend": "0.044"}),
        "it is times another value": _GELU.format(**_FORM | {"times": "%z"}),
        "the curve is read elsewhere": _GELU.format(**_FORM | {"also": ", %t"}),
        "the sigmoid is of another value": "graph g(%x: f32[B,4], %z: f32[B,4]) {"
        " %s = sigmoid %z\n %y = mul %s, %x\n return %y }",
        "the sigmoid is steeper": "graph g(%x: f32[B,4]) {"
        " %k = full {dtype=f32, shape=[], value=1.702}\n %b = mul %x, %k\n"
        " %s = sigmoid %b\n %y = mul %s, %x\n return %y }",
    }

    def find(self, scope: Scope) -> Iterator[Match | Reject]:
        """Every product behind a curve that is computed from one value."""
        for node in scope.graph.nodes:
            if node.op in _CURVES and node.output.type.dtype.is_float:
                yield from _proposals(scope, node)

    def check(self, m: Match) -> Facts | Reject:
        """Prove one of the activations."""
        key = ("activation", m.region.key)
        found = lift.proven(m.scope, key, lambda: _prove(m.region))
        return {"op": found} if found in _ACTIVATIONS else reject(found, m.x)

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One operator."""
        return b.call(facts["op"], m.x)


def _proposals(scope: Scope, curve: Node) -> Iterator[Match]:
    """Products behind a curve that one value before it, and numbers, lead to."""
    sources = list(_before(scope, curve))
    for later in scope.forward(curve.output, limit=_STEPS):
        if later.op not in _POINTWISE:
            return
        for x in sources if later.op == "mul" else ():
            if later.output.type != x.type:
                continue
            region = lift.cut(scope, [later.output], lambda v, x=x: v == x)  # type: ignore[misc]
            if region is not None and region.leaves == (x,) and _whole(scope, region, later):
                yield lift.matched(scope, later, region, x=x)


def _before(scope: Scope, curve: Node) -> Iterator[Value]:
    """Values that a curve is computed from, element by element, nearest first."""
    pending: list[Operand] = [*curve.operands]
    for _ in range(2 * _STEPS):
        if not pending:
            return
        x = pending.pop(0)
        if isinstance(x, Value) and x.type == curve.output.type:
            yield x
            made = scope.producer(x)
            pending += made.operands if made is not None and made.op in _POINTWISE else ()


def _whole(scope: Scope, region: lift.Region, root: Node) -> bool:
    """Whether nothing of a region but its end, and numbers, is read outside of it."""
    inside = {id(n) for n in region.nodes}
    return all(
        reader is not None and id(reader) in inside
        for node in region.nodes
        if node is not root and node.op in _POINTWISE
        for reader, _ in scope.uses[node.output.name]
    )


def _prove(region: lift.Region) -> str:
    """The activation that a region is, or why it is none of them."""
    wide = {d: _STEPS for d in region.leaves[0].type.shape if isinstance(d, int) and d > _STEPS}
    graph = widened(lift.resized(region.graph, wide))
    (x,) = graph.inputs
    sizes = dict.fromkeys(x.type.symbols, 2)
    shape = lift.at_sizes(x, sizes)
    count = int(torch.tensor(shape).prod())
    numbers = torch.linspace(-6, 6, max(count, 1)).to(x.type.dtype.torch)
    turned = [numbers.roll(n).reshape(shape) for n in range(4)]
    noise = [lift.normal(x, sizes, seed, 2.0).clamp(-6, 6) for seed in range(8)]
    cases = [lift.Case(sizes, [each]) for each in (*turned, *noise)]
    why = ""
    for op in _ACTIVATIONS:
        candidate = lift.build([x], lambda b, v, op=op: b.call(op, v)[0])
        why = lift.prove(graph, candidate, cases, _same)
        if not why:
            return op
    return f"it is none of {', '.join(_ACTIVATIONS)} ({why})"


def _same(left: list[Any], right: list[Any]) -> str:
    """How results differ, in absolute numbers."""
    worst = float((left[0].double() - right[0].double()).abs().max())
    return f"a difference of {worst:.2g}" if not worst <= TOLERANCE else ""


@dataclass(frozen=True)
class RaiseActivation(RaisePass):
    """Raise every activation that is written out."""

    rules = (Activation(),)
