"""Recognise the layer norm: a root-mean-square norm of what is centred, and a bias perhaps.

What           rms_norm(x - mean(x), weight) + bias, with or without casts to fp32 and back, becomes
               layer_norm. Weights are ones where there are none; where two norms of one value were
               merged up to their weights (GPT-NeoX), each is one norm again.
Why it pays    one kernel reads x once instead of four that write it three times; fusion and
               sharding know the norm by name.
Preconditions  stage TRACED, after raise_rms_norm; the mean is over the last axis, in fp32.
Before         graph main(%x: f32[B,8], @norm.weight: f32[8], @norm.bias: f32[8]) {
                 %mean = mean %x {axes=[-1], keepdims=true} : f32[B,1] loc "norm"
                 %sub = sub %x, %mean : f32[B,8] loc "norm"
                 %normed = rms_norm %sub, @norm.weight {eps=1e-05} : f32[B,8] loc "norm"
                 %y = add %normed, @norm.bias : f32[B,8] loc "norm"
                 return %y
               }
After          graph main(%x: f32[B,8], @norm.weight: f32[8], @norm.bias: f32[8]) {
                 %y = layer_norm %x, @norm.weight, @norm.bias {eps=1e-05} : f32[B,8] loc "norm"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.ir.graph import Operand, Weight
from dsc.ir.ops.shape import axis_of
from dsc.ir.types import DType
from dsc.ir.weights import Apply, apply
from dsc.rewrite import pattern as patterns
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

_NORM = """graph g(%x: f32[B,2,8], %z: f32[B,2,1], @w: f32[8]) {{
  %m = mean %x {{axes=[{axis}], keepdims=true}}
  %c = sub {centred}
  %y = rms_norm %c, @w {{eps=1e-05}}
  return %y{also}
}}"""
_AFTER = """graph g(%x: {type}[B,8], @w: f32[8], @b: {bias}) {{
  %f = cast %x {{dtype=f32}}
  %n = layer_norm %f, @w{given} {{eps=1e-05}}
{late}
  return %y{also}
}}"""
_BIASED = {
    "type": "bf16", "bias": "f32[8]", "given": "", "late": "  %y = add @b, %n", "also": "",
}  # fmt: skip
_WIDENED = {
    "type": "bf16", "bias": "f32[8]", "given": ", @b", "late": "  %y = cast %n {dtype=bf16}",
    "also": "",
}  # fmt: skip
_ONES = """program "p" {{stage=TRACED}}
weights {{
  @ones : f32[8] = full() {{dtype=f32, shape=[8], value={value}}}
  @w : f32[8] = source "w" : f32[8]
}}
graph main(%x: f32[3,8]) {{
  %n = layer_norm %x, @ones {{eps=1e-05}}
  %y = mul %n, @w
  return %y, %n
}}"""


def _norm(**changes: str) -> str:
    form = {"axis": "-1", "centred": "%x, %m", "also": ""}
    return _NORM.format(**(form | changes))


class LayerNorm(Rule):
    """rms_norm(x - mean(x), weight)  ==>  layer_norm(x, weight)."""

    tolerance = 1e-6
    examples = (_norm(), _norm(axis="2"))
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mean is over another axis": _norm(axis="1"),
        "what is taken away is no mean": _norm(centred="%x, %z"),
        "the value is taken away from its mean": _norm(centred="%m, %x"),
        "the centred value is needed as well": _norm(also=", %c"),
        "it is not normed in fp32": _norm().replace("f32", "bf16"),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The norm of what is left of x without its mean."""
        mean = p.mean(p.x, keepdims=True).named("mean")
        return p.rms_norm(p.sub(p.x, mean), p.gain)

    def check(self, m: Match) -> Facts | Reject:
        """Over the last axis, in fp32."""
        x: Operand = m.x
        if tuple(axis_of(a, x.type.rank) for a in m.mean.attrs["axes"]) != (x.type.rank - 1,):
            return reject("the mean is not over the last axis alone", x)
        if not x.type.dtype is m.gain.type.dtype is DType.f32:
            return reject("it is not normed in fp32", x, m.gain)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One norm."""
        return b.call("layer_norm", m.x, m.gain, **m.root.attrs)


class ScaledLayerNorm(Rule):
    """layer_norm(x, ones) * weight  ==>  layer_norm(x, weight), whoever else reads the first."""

    tolerance = 1e-6
    examples = (_ONES.format(value="1.0"),)
    near_misses: ClassVar[Mapping[str, str]] = {"they are no ones": _ONES.format(value="2.0")}

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """A norm by ones, times a weight."""
        return p.mul(p.layer_norm(p.x, p.weight("ones")).may_be_shared().named("norm"),
                     p.weight("gain"))  # fmt: skip

    def check(self, m: Match) -> Facts | Reject:
        """One value a channel in place of ones."""
        ones = m.scope.program.weights.get(m.ones.name)
        if not isinstance(ones, Apply) or ones.op != "full" or ones.attrs["value"] != 1.0:
            return reject("it has a weight of its own", m.ones)
        if m.gain.type != m.ones.type:
            return reject("the weight is not one value a channel", m.gain, m.x)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """A norm of its own."""
        return b.call("layer_norm", m.x, m.gain, **m.norm.attrs)


class BiasedLayerNorm(Rule):
    """layer_norm(x, weight) + bias  ==>  layer_norm(x, weight, bias)."""

    tolerance = 1e-6
    examples = (
        _AFTER.format(**_BIASED),
        _AFTER.format(
            **_BIASED | {"bias": "bf16[8]", "late": "  %c = cast @b {dtype=f32}\n  %y = add %n, %c"}
        ),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "it has a bias": _AFTER.format(**_BIASED | {"given": ", @b"}),
        "it is read without the bias as well": _AFTER.format(**_BIASED | {"also": ", %n"}),
        "what is added is one value for all": _AFTER.format(**_BIASED | {"bias": "f32[1]"}),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """A norm without a bias, and one added."""
        norm = p.layer_norm(p.x, p.gain).named("norm")
        return p.add(norm, p.maybe("cast", p.weight("bias")))

    def check(self, m: Match) -> Facts | Reject:
        """One value a channel."""
        if m.bias.type.shape != m.gain.type.shape or m.gain.type.dtype is not DType.f32:
            return reject("the bias is not one value a channel, in fp32", m.bias, m.gain)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One norm, whose bias has the type of its weight."""
        bias: Weight = m.bias
        name, expr = bias.name, b.expr(bias)
        if bias.type.dtype is not DType.f32:
            name, expr = f"{name}.f32", apply("cast", expr, dtype=DType.f32)
        return b.call("layer_norm", m.x, m.gain, b.weight(name, expr), **m.norm.attrs)


class WidenedLayerNorm(Rule):
    """cast(layer_norm(cast(x), …))  ==>  layer_norm(x, …), all but x in fp32."""

    examples = (_AFTER.format(**_WIDENED), _AFTER.format(**_WIDENED | {"given": ""}))
    near_misses: ClassVar[Mapping[str, str]] = {
        "the result has another type than x": _AFTER.format(**_WIDENED | {"type": "f16"}),
        "it is needed in fp32 as well": _AFTER.format(**_WIDENED | {"also": ", %n"}),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The cast of x may have other readers."""
        wide = p.cast(p.x).may_be_shared()
        norms = p.layer_norm(wide, p.gain), p.layer_norm(wide, p.gain, p.bias)
        return p.cast(p.either(*(norm.named("norm") for norm in norms)))

    def check(self, m: Match) -> Facts | Reject:
        """There and back, by way of fp32."""
        if m.root.output.type.dtype is not m.x.type.dtype:
            return reject("the result has another element type", m.x, m.root.output)
        if m.norm.output.type.dtype is not DType.f32:
            return reject("it is not normed in fp32", m.norm.output)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The operator is in fp32 inside as it is, and rounds last."""
        return b.call("layer_norm", m.x, *m.norm.operands[1:], **m.norm.attrs)


@dataclass(frozen=True)
class RaiseLayerNorm(RaisePass):
    """Raise every layer norm, then what is around it."""

    rules = (LayerNorm(), ScaledLayerNorm(), BiasedLayerNorm(), WidenedLayerNorm())
