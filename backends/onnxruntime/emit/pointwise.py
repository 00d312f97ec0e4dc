"""Pointwise operators. Most are one ONNX operator; broadcasting is NumPy's in both."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from dsc.backends.onnxruntime.graph import GraphWriter
from dsc.ir.graph import Attrs, Node
from dsc.ir.types import DType


def one(op_type: str, *copied: str, **attrs: Any) -> Callable[..., str]:
    """One ONNX operator on the same operands; `copied` attributes are the node's own."""

    def emit(g: GraphWriter, node: Node, *xs: str) -> str:
        return g.op(op_type, *xs, **{name: node.attrs[name] for name in copied}, **attrs)

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


def _relu(g: GraphWriter, node: Node, x: str) -> str:
    if _operand_type(node).is_float:
        return g.op("Relu", x)
    return g.op("Max", x, g.scalar(0, _integer(node)))


def silu(g: GraphWriter, x: str) -> str:
    """x * sigmoid(x), which ONNX Runtime fuses into one kernel."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def activate(g: GraphWriter, x: str, act: str) -> str:
    """The activation called `act`."""
    if act == "gelu_tanh":
        return g.op("Gelu", x, approximate="tanh")
    return silu(g, x) if act == "silu" else g.op({"gelu": "Gelu", "relu": "Relu"}[act], x)


def gated(g: GraphWriter, gate: str, up: str, attrs: Attrs) -> str:
    """What `experts` makes of its gate and up rows, in fp32."""
    limit, alpha, shift = (attrs[name] for name in ("limit", "alpha", "shift"))
    if limit < inf:
        gate = g.op("Min", gate, g.scalar(limit))
        up = g.op("Clip", up, g.scalar(-limit), g.scalar(limit))
    if alpha != 1.0:
        gate = g.op("Mul", gate, g.scalar(alpha))
    opened = activate(g, gate, attrs["act"])
    if alpha != 1.0:
        opened = g.op("Div", opened, g.scalar(alpha))
    return g.op("Mul", opened, g.op("Add", up, g.scalar(shift)) if shift else up)


def _cast(g: GraphWriter, node: Node, x: str) -> str:
    return g.cast(x, _operand_type(node), node.attrs["dtype"])


EMITTERS: dict[str, Callable[..., Any]] = {
    "add": one("Add"),
    "sub": one("Sub"),
    "mul": one("Mul"),
    "div": _div,
    "remainder": _remainder,
    "maximum": one("Max"),
    "minimum": one("Min"),
    "pow": one("Pow"),
    "lt": one("Less"),
    "le": one("LessOrEqual"),
    "gt": one("Greater"),
    "ge": one("GreaterOrEqual"),
    "eq": one("Equal"),
    "ne": lambda g, node, a, b: g.op("Not", g.op("Equal", a, b)),
    "logical_and": one("And"),
    "logical_or": one("Or"),
    "logical_not": one("Not"),
    "where": one("Where"),
    "neg": one("Neg"),
    "abs": one("Abs"),
    "exp": one("Exp"),
    "log": one("Log"),
    "sqrt": one("Sqrt"),
    "rsqrt": lambda g, node, x: g.op("Reciprocal", g.op("Sqrt", x)),
    "reciprocal": one("Reciprocal"),
    "square": lambda g, node, x: g.op("Mul", x, x),
    "sigmoid": one("Sigmoid"),
    "silu": lambda g, node, x: silu(g, x),
    "tanh": one("Tanh"),
    "cos": one("Cos"),
    "sin": one("Sin"),
    "erf": one("Erf"),
    "relu": _relu,
    "gelu": one("Gelu"),
    "gelu_tanh": lambda g, node, x: activate(g, x, "gelu_tanh"),
    "swiglu": lambda g, node, gate, up: g.op("Mul", silu(g, gate), up),
    "cast": _cast,
}
