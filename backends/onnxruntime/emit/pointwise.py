"""Pointwise operators. Most are one ONNX operator; broadcasting is NumPy's in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc.backends.onnxruntime.graph import GraphWriter
from dsc.ir.graph import Node
from dsc.ir.types import DType


def _is(op_type: str) -> Callable[..., str]:
    """An operator that ONNX has under another name."""

    def emit(g: GraphWriter, node: Node, *xs: str) -> str:
        return g.op(op_type, *xs)

    return emit


def _operand_type(node: Node) -> DType:
    return node.operands[0].type.dtype


def _div(g: GraphWriter, node: Node, a: str, b: str) -> str:
    """ONNX divides integers towards zero, the IR downwards: take the remainder off first."""
    if _operand_type(node).is_float:
        return g.op("Div", a, b)
    unsafe, divisor = _divisor(g, node, b)
    down = g.op("Div", g.op("Sub", a, g.op("Mod", a, divisor)), divisor)
    return g.op("Where", unsafe, g.op("Neg", a), down)


def _divisor(g: GraphWriter, node: Node, b: str) -> tuple[str, str]:
    """Whether an integer divisor is -1 or 0, which counts as -1; and b, or 1 in its place.

    A processor ends the process that divides by 0, or the least integer by -1.
    """
    kind = _integer(node)
    unsafe = g.op("Or", *(g.op("Equal", b, g.scalar(n, kind)) for n in (0, -1)))
    return unsafe, g.op("Where", unsafe, g.scalar(1, kind), b)


def _integer(node: Node) -> DType:
    """The type that an operator on integers computes in."""
    return DType.i64 if _operand_type(node) is DType.i64 else DType.i32


def _remainder(g: GraphWriter, node: Node, a: str, b: str) -> str:
    """Of floats exactly, as C's fmod gives it, with the sign of b."""
    if not _operand_type(node).is_float:
        unsafe, divisor = _divisor(g, node, b)
        return g.op("Where", unsafe, g.scalar(0, _integer(node)), g.op("Mod", a, divisor))
    rest, zero = g.op("Mod", a, b, fmod=1), g.scalar(0.0)
    signs = g.op("Xor", g.op("Less", rest, zero), g.op("Less", b, zero))
    apart = g.op("And", signs, g.op("Not", g.op("Equal", rest, zero)))
    return g.op("Where", apart, g.op("Add", rest, b), rest)


def _ne(g: GraphWriter, node: Node, a: str, b: str) -> str:
    return g.op("Not", g.op("Equal", a, b))


def _relu(g: GraphWriter, node: Node, x: str) -> str:
    if _operand_type(node).is_float:
        return g.op("Relu", x)
    return g.op("Max", x, g.scalar(0, _integer(node)))


def _rsqrt(g: GraphWriter, node: Node, x: str) -> str:
    return g.op("Reciprocal", g.op("Sqrt", x))


def _square(g: GraphWriter, node: Node, x: str) -> str:
    return g.op("Mul", x, x)


def silu(g: GraphWriter, x: str) -> str:
    """x * sigmoid(x), which ONNX Runtime fuses into one kernel."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def activate(g: GraphWriter, x: str, act: str) -> str:
    """The activation called `act`: silu, gelu (exact) or relu."""
    return silu(g, x) if act == "silu" else g.op({"gelu": "Gelu", "relu": "Relu"}[act], x)


def _silu(g: GraphWriter, node: Node, x: str) -> str:
    return silu(g, x)


def _swiglu(g: GraphWriter, node: Node, gate: str, up: str) -> str:
    return g.op("Mul", silu(g, gate), up)


def _cast(g: GraphWriter, node: Node, x: str) -> str:
    return g.cast(x, _operand_type(node), node.attrs["dtype"])


EMITTERS: dict[str, Callable[..., Any]] = {
    "add": _is("Add"),
    "sub": _is("Sub"),
    "mul": _is("Mul"),
    "div": _div,
    "remainder": _remainder,
    "maximum": _is("Max"),
    "minimum": _is("Min"),
    "pow": _is("Pow"),
    "lt": _is("Less"),
    "le": _is("LessOrEqual"),
    "gt": _is("Greater"),
    "ge": _is("GreaterOrEqual"),
    "eq": _is("Equal"),
    "ne": _ne,
    "logical_and": _is("And"),
    "logical_or": _is("Or"),
    "logical_not": _is("Not"),
    "where": _is("Where"),
    "neg": _is("Neg"),
    "abs": _is("Abs"),
    "exp": _is("Exp"),
    "log": _is("Log"),
    "sqrt": _is("Sqrt"),
    "rsqrt": _rsqrt,
    "reciprocal": _is("Reciprocal"),
    "square": _square,
    "sigmoid": _is("Sigmoid"),
    "silu": _silu,
    "tanh": _is("Tanh"),
    "cos": _is("Cos"),
    "sin": _is("Sin"),
    "erf": _is("Erf"),
    "relu": _relu,
    "gelu": _is("Gelu"),
    "swiglu": _swiglu,
    "cast": _cast,
}
