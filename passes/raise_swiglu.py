"""Recognise the gated activation of the feed-forward layers.

What           silu(gate) * up, and gate * sigmoid(gate) * up, become swiglu.
Why it pays    the projections to gate and up can be merged into one GEMM with this as its
               epilogue, and the intermediate is written once.
Preconditions  stage TRACED; gate and up have one shape and type.
Before         graph main(%gate: f32[B,4], %up: f32[B,4]) {
                 %silu = silu %gate : f32[B,4] loc "mlp.act_fn"
                 %y = mul %silu, %up : f32[B,4] loc "mlp"
                 return %y
               }
After          graph main(%gate: f32[B,4], %up: f32[B,4]) {
                 %y = swiglu %gate, %up : f32[B,4] loc "mlp"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.rewrite import pattern as patterns
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject


class Swiglu(Rule):
    """silu(gate) * up  ==>  swiglu(gate, up)."""

    tolerance = 1e-6
    examples = (
        "graph g(%gate: f32[B,4], %up: f32[B,4]) { %s = silu %gate\n"
        " %y = mul %up, %s\n return %y }",
        "graph g(%gate: f32[B,4], %up: f32[B,4]) { %s = sigmoid %gate\n"
        " %t = mul %gate, %s\n %y = mul %t, %up\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "up is broadcast": "graph g(%gate: f32[B,4], %up: f32[4]) { %s = silu %gate\n"
        " %y = mul %s, %up\n return %y }",
        "the activation is read elsewhere": "graph g(%gate: f32[4], %up: f32[4]) {"
        " %s = silu %gate\n %y = mul %s, %up\n return %y, %s }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """silu, whole or as a product with the sigmoid."""
        return p.mul(p.either(p.silu(p.gate), p.mul(p.gate, p.sigmoid(p.gate))), p.up)

    def check(self, m: Match) -> Facts | Reject:
        """No broadcasting."""
        if m.gate.type != m.up.type:
            return reject("gate and up differ in type", m.gate, m.up)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One gated activation."""
        return b.call("swiglu", m.gate, m.up)


@dataclass(frozen=True)
class RaiseSwiglu(RaisePass):
    """Raise every gated activation."""

    rules = (Swiglu(),)
