"""What each pointwise operator computes, as text over names of values in registers.

16-bit floats are widened to fp32, and rounded after each operator as memory would round them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dsc.ir.op import kernel_of, traits_of
from dsc.ir.region_steps import Step
from dsc.ir.traits import Role
from dsc.ir.types import DType

TYPES = {
    DType.f32: "tl.float32", DType.f64: "tl.float64", DType.bf16: "tl.bfloat16",
    DType.f16: "tl.float16", DType.i64: "tl.int64", DType.i32: "tl.int32", DType.i16: "tl.int16",
    DType.i8: "tl.int8",
    DType.u8: "tl.uint8", DType.boolean: "tl.int1", DType.f8e4m3: "tl.float8e4nv",
    DType.f8e4m3fnuz: "tl.float8e4b8", DType.f8e5m2: "tl.float8e5",
}  # fmt: skip
NAN = "propagate_nan=tl.PropagateNan.ALL"

# Operator to expression over {0}, {1}, {2}; the second entry is for integers where that differs.
EXPRESSIONS: dict[str, tuple[str, str | None]] = {
    "add": ("{0} + {1}", None),
    "sub": ("{0} - {1}", None),
    "mul": ("{0} * {1}", None),
    "div": ("{0} / {1}", "{0} // {1} - (({0} % {1} != 0) & (({0} < 0) != ({1} < 0)))"),
    # in f64, where quotients up to 2^30 are exact enough; what is finite stays, or is the infinite
    "remainder": (
        "tl.where((tl.abs({1}) == float('inf')) & (tl.abs({0}) < float('inf')),"
        " tl.where(({0} == 0.0) | (({0} < 0.0) == ({1} < 0.0)), {0}, {1}),"
        " ({0}.to(tl.float64) - tl.floor({0}.to(tl.float64) / {1}) * {1}).to(tl.float32))",
        "{0} % {1} + tl.where(({0} % {1} != 0) & (({0} < 0) != ({1} < 0)), {1}, 0)",
    ),
    "maximum": (f"tl.maximum({{0}}, {{1}}, {NAN})", "tl.maximum({0}, {1})"),
    "minimum": (f"tl.minimum({{0}}, {{1}}, {NAN})", "tl.minimum({0}, {1})"),
    "lt": ("{0} < {1}", None),
    "le": ("{0} <= {1}", None),
    "gt": ("{0} > {1}", None),
    "ge": ("{0} >= {1}", None),
    "eq": ("{0} == {1}", None),
    "ne": ("{0} != {1}", None),
    "logical_and": ("{0} & {1}", None),
    "logical_or": ("{0} | {1}", None),
    "logical_not": ("{0} == 0", None),
    "where": ("tl.where({0}, {1}, {2})", None),
    "neg": ("-{0}", None),
    "abs": ("tl.abs({0})", None),
    "exp": ("tl.exp({0})", None),
    "log": ("tl.log({0})", None),
    "sqrt": ("tl.sqrt({0})", None),
    "rsqrt": ("tl.rsqrt({0})", None),
    "reciprocal": ("1.0 / {0}", None),
    "square": ("{0} * {0}", None),
    "sigmoid": ("1.0 / (1.0 + tl.exp(-{0}))", None),
    "silu": ("{0} / (1.0 + tl.exp(-{0}))", None),
    "swiglu": ("{0} / (1.0 + tl.exp(-{0})) * {1}", None),
    "tanh": (
        "tl.where(tl.abs({0}) < 0.05, {0} - {0} * {0} * {0} * (0.3333333 - {0} * {0} * 0.1333333),"
        " 2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0)",
        None,
    ),
    "cos": ("tl.cos({0})", None),
    "sin": ("tl.sin({0})", None),
    "erf": ("tl.erf({0})", None),
    "relu": (f"tl.maximum({{0}}, 0.0, {NAN})", "tl.maximum({0}, 0)"),
    "gelu": ("0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", None),
    "gelu_tanh": (
        "{0} / (1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))",
        None,
    ),
    # |a|^b by logarithm; a negative base keeps its sign for odd b, and only infinity has a value
    # for fractions.
    "pow": (
        "tl.where(({1} == 0.0) | ({0} == 1.0), 1.0,"
        " tl.exp({1} * tl.log(tl.abs({0}))) * tl.where({0} >= 0.0, 1.0,"
        " tl.where({1} == tl.floor({1}), 1.0 - 2.0 * tl.abs({1} % 2.0),"
        ' tl.where(tl.abs({0}) == float("inf"), 1.0, float("nan")))))',
        None,
    ),
}
FLOAT_ONLY = frozenset(
    {"exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "swiglu", "tanh", "cos"}
    | {"sin", "erf", "gelu", "gelu_tanh", "pow"}
)


def has_formula(op: str) -> bool:
    """Whether a pointwise operator has an expression: one of these, or one that it brings along."""
    if op in EXPRESSIONS or op == "cast":
        return True
    return isinstance(kernel_of(op, "triton"), str) and traits_of(op).role is Role.POINTWISE


def expressions(op: str) -> tuple[str, str | None]:
    """What an operator computes of floats, and of integers where that differs."""
    own = kernel_of(op, "triton")
    return (own, None) if isinstance(own, str) else EXPRESSIONS[op]


def widen(dtype: DType) -> str:
    """The conversion of a loaded value to the type it is computed in."""
    return ".to(tl.float32)" if dtype.is_float and dtype.bits < 32 else ""


def applied(step: Step, values: Sequence[str]) -> str:
    """What a step computes, as an expression over the names of what it reads."""
    if step.op == "copy":
        return values[0]
    if step.op == "cast":
        boolean = step.dtype is DType.boolean
        return f"{values[0]} != 0" if boolean else _narrowed(values[0], step.dtype)
    floats, integers = expressions(step.op)
    chosen = floats if integers is None or step.reads[0].dtype.is_float else integers
    return rounded(chosen.format(*values, **_numbers(step)), step.dtype)


def _numbers(step: Step) -> dict[str, str]:
    """The attributes of an operator that brings its expression along, as source text."""
    if not isinstance(kernel_of(step.op, "triton"), str):
        return {}
    kinds = {n: DType.f32 if isinstance(v, float) else DType.i64 for n, v in step.attrs.items()}
    return {name: f"({literal(value, kinds[name])})" for name, value in step.attrs.items()}


def rounded(value: str, dtype: DType) -> str:
    """A value as it would come back from memory."""
    return _narrowed(f"({value})", dtype) if widen(dtype) else value


def _narrowed(value: str, dtype: DType) -> str:
    return f"{value}.to({TYPES[dtype]}){widen(dtype)}"


def normed(x: str, scale: str, gain: str, dtype: DType, rounds: bool) -> str:
    """Values times the scale of their row and times a gain, rounded between where that is due."""
    made = f"{x} * {scale}"
    made = rounded(made, dtype) if rounds else made
    return rounded(f"({made}) * {gain}", dtype)


def wide_type(dtype: DType) -> str:
    """The type that values are computed in."""
    return "tl.float32" if widen(dtype) else TYPES[dtype]


def literal(value: Any, dtype: DType) -> str:
    """A constant as source text."""
    if dtype.is_float:
        number = float(value)
        return repr(number) if math.isfinite(number) else f'float("{number}")'
    return str(int(value))
