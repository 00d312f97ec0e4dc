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


def _operand_type(node: Node, index: int = 0) -> DType:
    x = node.inputs[index]
    assert x is not None
    return x.type.dtype


def _div(g: GraphWriter, node: Node, a: str, b: str) -> str:
    """ONNX divides integers towards zero, the IR downwards: take the remainder off first."""
    if _operand_type(node).is_float:
        return g.op("Div", a, b)
    return g.op("Div", g.op("Sub", a, g.op("Mod", a, b)), b)


def _remainder(g: GraphWriter, node: Node, a: str, b: str) -> str:
    if not _operand_type(node).is_float:
        return g.op("Mod", a, b)
    return g.op("Sub", a, g.op("Mul", b, g.op("Floor", g.op("Div", a, b))))


def _ne(g: GraphWriter, node: Node, a: str, b: str) -> str:
    return g.op("Not", g.op("Equal", a, b))


def _where(g: GraphWriter, node: Node, condition: str, a: str, b: str) -> str:
    """ONNX Runtime has no Where over bools."""
    if _operand_type(node, 1) is not DType.boolean:
        return g.op("Where", condition, a, b)
    chosen = g.op("And", condition, a)
    return g.op("Or", chosen, g.op("And", g.op("Not", condition), b))


def _relu(g: GraphWriter, node: Node, x: str) -> str:
    if _operand_type(node).is_float:
        return g.op("Relu", x)
    return g.op("Max", x, g.scalar(0, _operand_type(node)))


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
    "where": _where,
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
