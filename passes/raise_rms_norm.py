"""Recognise the root-mean-square norm that the tracer took apart into six operators.

What           weight * (x * rsqrt(mean(x^2) + eps)), with or without casts to fp32 and back,
               becomes rms_norm.
Why it pays    one kernel reads x once instead of six that write it five times; fusion and
               quantisation know the norm by name.
Preconditions  stage TRACED; the mean is over the last axis, the weight one value a channel.
Before         graph main(%x: f32[B,8], @norm.weight: f32[8]) {
                 %square = square %x : f32[B,8] loc "norm"
                 %mean = mean %square {axes=[1], keepdims=true} : f32[B,1] loc "norm"
                 %eps = full {dtype=f32, shape=[], value=1e-06} : f32[] loc "norm"
                 %add = add %mean, %eps : f32[B,1] loc "norm"
                 %rsqrt = rsqrt %add : f32[B,1] loc "norm"
                 %mul = mul %x, %rsqrt : f32[B,8] loc "norm"
                 %y = mul @norm.weight, %mul : f32[B,8] loc "norm"
                 return %y
               }
After          graph main(%x: f32[B,8], @norm.weight: f32[8]) {
                 %y = rms_norm %x, @norm.weight {eps=1e-06} : f32[B,8] loc "norm"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.ir.graph import Operand
from dsc.ir.ops.shape import axis_of
from dsc.rewrite import pattern as patterns
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

_NORM = """graph g(%x: f32[B,S,8], %z: f32[B,S,8], @w: f32[8]) {{
  %s = {square} : f32[B,S,8]
  %m = mean %s {{axes=[{axis}], keepdims=true}}
  %e = full {{dtype=f32, shape=[], value=1e-05}}
  %a = add {sum}
  %r = {root}
  %n = {scaled}
  %y = mul {weighted}
  return %y{also}
}}"""
_FORM = {
    "square": "square %x",
    "axis": "-1",
    "sum": "%m, %e",
    "root": "rsqrt %a",
    "scaled": "mul %x, %r",
    "weighted": "@w, %n",
    "also": "",
}


def _norm(**changes: str) -> str:
    return _NORM.format(**(_FORM | changes))


class RmsNorm(Rule):
    """weight * (x * rsqrt(mean(x^2) + eps))  ==>  rms_norm(x, weight)."""

    tolerance = 1e-6
    examples = (
        _norm(),
        _norm(square="mul %x, %x", sum="%e, %m", weighted="%n, @w"),
        _norm(root="sqrt %a", scaled="div %x, %r"),
        """graph g(%x: bf16[B,8], @w: bf16[8]) {
  %c = cast %x {dtype=f32}
  %s = square %c
  %m = mean %s {axes=[1], keepdims=true}
  %e = full {dtype=f32, shape=[], value=1e-06}
  %a = add %m, %e
  %r = rsqrt %a
  %n = mul %c, %r
  %d = cast %n {dtype=bf16}
  %y = mul @w, %d
  return %y
}""",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mean is over another axis": _norm(axis="1"),
        "what is squared is not what is scaled": _norm(square="square %z"),
        "the unweighted value is needed as well": _norm(also=", %n"),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The cast of x to fp32 is read twice by nature."""
        wide = p.either(p.cast(p.x).may_be_shared(), p.x)
        squared = p.either(p.square(wide), p.mul(wide, wide))
        mean = p.mean(squared, keepdims=True).named("mean")
        inner = p.add(mean, p.number("eps"))
        scaled = p.either(p.mul(wide, p.rsqrt(inner)), p.div(wide, p.sqrt(inner)))
        return p.mul(p.maybe("cast", scaled), p.maybe("cast", p.weight("weight")))

    def check(self, m: Match) -> Facts | Reject:
        """The last axis, and the element types of the operator."""
        x: Operand = m.x
        axes = tuple(axis_of(a, x.type.rank) for a in m.mean.attrs["axes"])
        if axes != (x.type.rank - 1,):
            return reject("the mean is not over the last axis alone", x)
        if m.weight.type.shape != x.type.shape[-1:]:
            return reject("the weight is not one value a channel", m.weight, x)
        if not m.root.output.type.dtype == x.type.dtype == m.weight.type.dtype:
            return reject("the result has another element type", x, m.weight, m.root.output)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One norm."""
        return b.call("rms_norm", m.x, m.weight, eps=m.eps)


@dataclass(frozen=True)
class RaiseRmsNorm(RaisePass):
    """Raise every root-mean-square norm."""

    rules = (RmsNorm(),)
