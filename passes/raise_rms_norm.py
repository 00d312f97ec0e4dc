"""Recognise the root-mean-square norm that the tracer took apart into six operators.

What           weight * (x * rsqrt(mean(x^2) + eps)), with or without casts to fp32 and back,
               becomes rms_norm. A number added to the weight (1 + w, Gemma) is added where weights
               are packed; a norm without a weight is one by ones. Where the product is in fp32, the
               weight is too: it is multiplied before the result is rounded.
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
from dsc.ir.types import DType
from dsc.ir.weights import apply
from dsc.rewrite import pattern as patterns
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

_NORM = """graph g(%x: f32[B,2,8], %z: f32[B,2,8], @w: f32[8]) {{
  %s = {square} : f32[B,2,8]
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
_OFFSET = """  %one = full {dtype=f32, shape=[], value=1.0}
  %g = add @w, %one
"""
_NARROW = """graph g(%x: bf16[B,8], @w: bf16[8]) {{
  %c = cast %x {{dtype=f32}}
  %s = square %c
  %m = mean %s {{axes=[1], keepdims=true}}
  %e = full {{dtype=f32, shape=[], value=1e-06}}
  %a = add %m, %e
  %r = rsqrt %a
  %n = mul %c, %r
{late}
  return %y
}}"""
_EARLY = "  %d = cast %n {dtype=bf16}\n  %y = mul @w, %d"
_LATE = "  %g = cast @w {dtype=f32}\n  %d = mul %g, %n\n  %y = cast %d {dtype=bf16}"
_GEMMA = (
    "  %f = cast @w {dtype=f32}\n  %one = full {dtype=f32, shape=[], value=1.0}\n"
    "  %g = add %one, %f\n  %d = mul %n, %g\n  %y = cast %d {dtype=bf16}"
)


def _norm(head: str = "", **changes: str) -> str:
    text = _NORM.format(**(_FORM | changes))
    return text.replace("  %y = ", f"{head}  %y = ", 1)


def _scaled(p: patterns.Names) -> patterns.Pattern:
    """x over its root mean square; its cast to fp32 is read twice by nature."""
    wide = p.either(p.cast(p.x).may_be_shared(), p.x)
    squared = p.either(p.square(wide), p.mul(wide, wide))
    inner = p.add(p.mean(squared, keepdims=True).named("mean"), p.number("eps"))
    inverse = p.either(p.rsqrt(inner), p.pow(inner, -0.5))
    return p.either(p.mul(wide, inverse), p.div(wide, p.sqrt(inner)))


def _foreign(m: Match) -> Reject | None:
    """Why a match is none of the operator's: it norms the last axis, in the type of x."""
    x: Operand = m.x
    if tuple(axis_of(a, x.type.rank) for a in m.mean.attrs["axes"]) != (x.type.rank - 1,):
        return reject("the mean is not over the last axis alone", x)
    if m.root.output.type.dtype is not x.type.dtype:
        return reject("the result has another element type", x, m.root.output)
    return None


class RmsNorm(Rule):
    """weight * (x * rsqrt(mean(x^2) + eps))  ==>  rms_norm(x, weight)."""

    tolerance = 1e-6
    examples = (
        _norm(),
        _norm(square="mul %x, %x", sum="%e, %m", weighted="%n, @w"),
        _norm(root="sqrt %a", scaled="div %x, %r"),
        _norm(_OFFSET, weighted="%n, %g"),
        _NARROW.format(late=_EARLY),
        _NARROW.format(late=_LATE),
        _NARROW.format(late=_GEMMA),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mean is over another axis": _norm(axis="1"),
        "what is squared is not what is scaled": _norm(square="square %z"),
        "the unweighted value is needed as well": _norm(also=", %n"),
        "there is a weight for each row": _norm(weighted="@w, %n").replace(
            "@w: f32[8]", "@w: f32[2,8]"
        ),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The weight as it is, in fp32, and with a number added; the product perhaps rounded."""
        own = p.maybe("cast", p.weight("weight"))
        shifted = p.maybe("cast", p.add(own, p.number("offset")))
        weighted = p.mul(p.maybe("cast", _scaled(p)), p.either(own, shifted)).named("product")
        return p.either(p.cast(weighted), weighted)

    def check(self, m: Match) -> Facts | Reject:
        """One value a channel, in a type that the operator knows."""
        if m.weight.type.shape != m.x.type.shape[-1:]:
            return reject("the weight is not one value a channel", m.weight, m.x)
        gain = m.product.output.type.dtype
        if (why := _foreign(m)) is not None:
            return why
        if gain not in (m.x.type.dtype, DType.f32):
            return reject("it is multiplied in another element type", m.x, m.product.output)
        return {"gain": gain}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One norm, by a weight in the type that it multiplies in."""
        name, expr, gain = m.weight.name, b.expr(m.weight), facts["gain"]
        if m.weight.type.dtype is not gain:
            name, expr = f"{name}.{gain}", apply("cast", expr, dtype=gain)
        if (offset := m.get("offset")) is not None:
            number = apply("full", shape=(), value=float(offset), dtype=gain)
            name, expr = f"{name}.plus_{offset:g}", apply("add", expr, number)
        return b.call("rms_norm", m.x, b.weight(name, expr), eps=m.eps)


class PlainRmsNorm(Rule):
    """x * rsqrt(mean(x^2) + eps)  ==>  rms_norm(x, ones)."""

    tolerance = 1e-6
    examples = (
        _norm(weighted="%n, %z"),
        _norm(root="pow %a, %p", weighted="%n, %z").replace(
            "  %a = add", "  %p = full {dtype=f32, shape=[], value=-0.5}\n  %a = add"
        ),
        _NARROW.format(late="  %y = cast %n {dtype=bf16}"),
        _NARROW.format(late="  %d = sigmoid %n\n  %y = cast %d {dtype=bf16}"),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the mean is over another axis": _norm(axis="1", weighted="%n, %z"),
        "the statistics are needed as well": _norm(also=", %a", weighted="%n, %z"),
        "there is one value for all channels": _norm(weighted="%n, %z").replace(",8]", ",D]")
        .replace(", @w: f32[8]", ""),
    }  # fmt: skip

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The norm, perhaps rounded: what multiplies it was no weight, or there is nothing."""
        return p.either(p.cast(_scaled(p)), _scaled(p))

    def check(self, m: Match) -> Facts | Reject:
        """As many ones as there are channels."""
        x: Operand = m.x
        if not isinstance(x.type.shape[-1], int) or x.type.dtype is DType.f64:
            return reject("the channels are not known, or in fp64", x)
        return _foreign(m) or {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One norm by ones, which all layers share."""
        width, dtype = m.x.type.shape[-1], m.x.type.dtype
        ones = apply("full", shape=(width,), value=1.0, dtype=dtype)
        return b.call("rms_norm", m.x, b.weight(f"ones.{dtype}.{width}", ones), eps=m.eps)


_WIDENED = """graph g(%x: bf16[B,8], @w: {weight}[8]) {{
  %c = cast %x {{dtype=f32}}
  %n = rms_norm %c, @w {{eps=1e-06}}
  %y = cast %n {{dtype={back}}}
  return %y
}}"""


class WidenedRmsNorm(Rule):
    """cast(rms_norm(cast(x), weight))  ==>  rms_norm(x, weight), all but x in fp32."""

    examples = (_WIDENED.format(weight="f32", back="bf16"),)
    near_misses: ClassVar[Mapping[str, str]] = {
        "the result has another type than x": _WIDENED.format(weight="f32", back="f16"),
        "it stays in fp32": _WIDENED.format(weight="f32", back="f32"),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The cast of x may have other readers."""
        return p.cast(p.rms_norm(p.cast(p.x).may_be_shared(), p.gain).named("norm"))

    def check(self, m: Match) -> Facts | Reject:
        """There and back, by way of fp32."""
        x, wide, gain = m.x, m.norm.output, m.gain
        if m.root.output.type.dtype is not x.type.dtype:
            return reject("the result has another element type", x, m.root.output)
        if not wide.type.dtype is gain.type.dtype is DType.f32:
            return reject("it is not normed in fp32", wide, gain)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The operator has its statistics in fp32 as it is, and rounds last."""
        return b.call("rms_norm", m.x, m.gain, **m.norm.attrs)


@dataclass(frozen=True)
class RaiseRmsNorm(RaisePass):
    """Raise every root-mean-square norm."""

    rules = (RmsNorm(), PlainRmsNorm(), WidenedRmsNorm())
