"""What each pointwise operator computes, on values in registers; storage is for kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dsc.backends.tvm import tir
from dsc.backends.tvm.launch import Unsupported
from dsc.backends.tvm.tir import VALUE, Expr, libm, splat, tirx
from dsc.ir.graph import Node
from dsc.ir.kernels import Formula
from dsc.ir.op import kernel_of
from dsc.ir.types import DType


def _element(x: Expr) -> str:
    return str(x.ty.dtype.with_lanes(1))


def _is_float(x: Expr) -> bool:
    return bool(x.ty.dtype.is_float)


def _divide(a: Expr, b: Expr) -> Expr:
    if _is_float(a):
        return a / b
    unsafe, divisor = _divisor(b)
    return tir.select(unsafe, -a, tirx.floordiv(a, divisor))


def _remainder(a: Expr, b: Expr) -> Expr:
    """Exactly, as C's fmod gives it, with the sign of b."""
    if not _is_float(a):
        unsafe, divisor = _divisor(b)
        return tir.select(unsafe, _filled(0, a), tirx.floormod(a, divisor))
    rest = tir.bind(tir.libm("fmodf", a, b))
    zero = tir.number(0.0, rest)
    apart = _and(tirx.NE(rest, zero), tirx.NE(_as_byte(rest < zero), _as_byte(b < zero)))
    return tir.select(apart, rest + b, rest)


def _divisor(b: Expr) -> tuple[Expr, Expr]:
    """Whether an integer divisor is -1 or 0, which counts as -1; and b, or 1 in its place.

    A processor ends the process that divides by 0, or the least integer by -1.
    """
    unsafe = _or(tirx.EQ(b, _filled(0, b)), tirx.EQ(b, _filled(-1, b)))
    return unsafe, tir.select(unsafe, _filled(1, b), b)


def _filled(n: int, like: Expr) -> Expr:
    return splat(tirx.const(n, _element(like)), tir.lanes_of(like))


def _as_byte(a: Expr) -> Expr:
    return tir.cast(a, "uint8")


def _larger(a: Expr, b: Expr) -> Expr:
    """As torch.maximum: a NaN on either side wins."""
    return tir.select(_or(a > b, tir.is_nan(a)) if _is_float(a) else a > b, a, b)


def _smaller(a: Expr, b: Expr) -> Expr:
    """As torch.minimum: a NaN on either side wins."""
    return tir.select(_or(a < b, tir.is_nan(a)) if _is_float(a) else a < b, a, b)


def _ordered(holds: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """A comparison that holds of equal values, but not of NaN with itself, as TVM would have it."""

    def compare(a: Expr, b: Expr) -> Expr:
        if _element(a) == "bool":
            a, b = _as_byte(a), _as_byte(b)
        found = holds(a, b)
        return _and(found, _not(tir.is_nan(a))) if _is_float(a) else found

    return compare


_equal = _ordered(lambda a, b: tirx.EQ(a, b))


def _or(a: Expr, b: Expr) -> Expr:
    return tir.cast(tir.cast(a, "uint8") | tir.cast(b, "uint8"), "bool")


def _and(a: Expr, b: Expr) -> Expr:
    return tir.cast(tir.cast(a, "uint8") & tir.cast(b, "uint8"), "bool")


def _not(a: Expr) -> Expr:
    return tirx.EQ(tir.cast(a, "uint8"), splat(tirx.const(0, "uint8"), tir.lanes_of(a)))


def _of_truths(truths: Callable[..., Expr], numbers: Callable[..., Expr]) -> Callable[..., Expr]:
    """What an operator is of truth values, which LLVM neither adds nor orders, and of numbers."""
    return lambda a, b: (truths if _element(a) == "bool" else numbers)(a, b)


FORMULAS: dict[str, Callable[..., Expr]] = {
    "add": _of_truths(_or, lambda a, b: a + b),
    "sub": lambda a, b: a - b,
    "mul": _of_truths(_and, lambda a, b: a * b),
    "div": _divide,
    "remainder": _remainder,
    "maximum": _of_truths(_or, _larger),
    "minimum": _of_truths(_and, _smaller),
    "pow": lambda a, b: libm("powf", a, b),
    "lt": _of_truths(lambda a, b: _and(_not(a), b), lambda a, b: a < b),
    "le": _ordered(lambda a, b: a <= b),
    "gt": _of_truths(lambda a, b: _and(a, _not(b)), lambda a, b: a > b),
    "ge": _ordered(lambda a, b: a >= b),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "logical_and": _and,
    "logical_or": _or,
    "logical_not": _not,
    "where": tir.select,
    "swiglu": lambda a, b: tir.silu(a) * b,
    "neg": lambda x: -x,
    "abs": lambda x: tirx.abs(x),
    "square": lambda x: x * x,
    "exp": tir.exp_of_any,
    "log": lambda x: libm("logf", x),
    "sqrt": lambda x: tirx.sqrt(x),
    "rsqrt": lambda x: _filled(1, x) / tirx.sqrt(x),
    "reciprocal": lambda x: _filled(1, x) / x,
    "sigmoid": lambda x: tir.keep_nan(x, tir.sigmoid(x)),
    "silu": tir.silu,
    "tanh": lambda x: libm("tanhf", x),
    "cos": lambda x: libm("cosf", x),
    "sin": lambda x: libm("sinf", x),
    "erf": tir.erf,
    "relu": tir.relu,
    "gelu": tir.gelu,
    "gelu_tanh": tir.gelu_tanh,
}
FLOAT_ONLY = frozenset(
    {"pow", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh", "cos", "sin"}
    | {"erf", "gelu", "gelu_tanh", "swiglu"}
)


def formula(op: str, attrs: Mapping[str, Any]) -> Callable[..., Expr]:
    """What an operator computes on register values. Raises `Unsupported`."""
    if op in FORMULAS:
        return FORMULAS[op]
    own = kernel_of(op, "tvm")
    if not isinstance(own, Formula):
        raise Unsupported(f"no kernel for the operator {op}")
    return partial(own.function, **attrs)


def check(node: Node) -> None:
    """Raise `Unsupported` unless a node's formula takes its element types."""
    if node.op != "cast":
        formula(node.op, node.attrs)
    own, dtype = kernel_of(node.op, "tvm"), node.operands[-1].type.dtype
    floats = own.floats_only if isinstance(own, Formula) else node.op in FLOAT_ONLY
    if floats and not dtype.is_float:
        raise Unsupported(f"{node.op} of {dtype}; floats have it")


def convert(value: Expr, source: DType, target: DType) -> Expr:
    """A register value of `source` as one of `target`; a NaN is true, as torch has it."""
    if target is DType.boolean and source is not DType.boolean:
        return FORMULAS["ne"](value, splat(tirx.const(0, VALUE[source]), tir.lanes_of(value)))
    return value if VALUE[source] == VALUE[target] else tir.cast(value, VALUE[target])
