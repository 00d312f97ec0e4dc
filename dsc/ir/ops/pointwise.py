"""Pointwise operators: arithmetic, comparisons, activations, casts. Operands broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dsc.ir.dims import Dim
from dsc.ir.lazy import torch
from dsc.ir.op import OpDef, TypeMismatch, op
from dsc.ir.placement import Place, PlacedCall, Placing, additive, pointwise
from dsc.ir.traits import Role, Traits
from dsc.ir.types import DType, TensorType


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The common shape under NumPy's rules. Raises `TypeMismatch`."""
    rank = max(len(s) for s in shapes)
    out: list[Dim] = []
    for axis in range(rank):
        dims = {s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0}
        dims.discard(1)
        if len(dims) > 1:
            shown = " and ".join(f"({', '.join(map(str, s))})" for s in shapes)
            raise TypeMismatch(f"{shown} do not broadcast")
        out.append(dims.pop() if dims else 1)
    return tuple(out)


def _infer_broadcast(
    types: Sequence[TensorType], attrs: Mapping[str, Any], *, dtype: DType | None = None
) -> tuple[TensorType, ...]:
    shape = broadcast(*(t.shape for t in types))
    return (TensorType(dtype or types[-1].dtype, shape),)


def _binary(
    name: str,
    reference: Callable[..., Any],
    doc: str,
    booleans: bool = True,
    commutative: bool = False,
    place: Place = pointwise,
) -> OpDef:
    def infer(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        if types[0].dtype is DType.boolean and not booleans:
            raise TypeMismatch(f"{name} of truth values")
        return _infer_broadcast(types, attrs)

    return op(
        f"{name}(a: T[...], b: T[...]) -> T[...]",
        Traits(Role.POINTWISE, commutative=commutative, place=place),
        reference=reference,
        doc=doc,
        example="f32[2,1,3], f32[4,1]",
        infer=infer,
    )


def _compare(
    name: str, reference: Callable[..., Any], doc: str, commutative: bool = False
) -> OpDef:
    return op(
        f"{name}(a: T[...], b: T[...]) -> bool[...]",
        Traits(Role.POINTWISE, commutative=commutative),
        reference=reference,
        doc=doc,
        example="f32[2,1,3], f32[4,1]",
        infer=partial(_infer_broadcast, dtype=DType.boolean),
    )


def _logical(name: str, reference: Callable[..., Any], doc: str) -> OpDef:
    return op(
        f"{name}(a: bool[...], b: bool[...]) -> bool[...]",
        Traits(Role.POINTWISE, commutative=True),
        reference=reference,
        doc=doc,
        example="bool[2,1,3], bool[4,1]",
        infer=_infer_broadcast,
    )


def _unary(
    name: str,
    reference: Callable[..., Any],
    doc: str,
    integers: bool = False,
    place: Place = pointwise,
) -> OpDef:
    """Declare an operator on floats, and on integers where they have a result of their type."""

    def infer(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        if types[0].dtype is DType.boolean:
            raise TypeMismatch(f"{name} of truth values")
        return tuple(types)

    return op(
        f"{name}(x: T[*n]) -> T[*n]" if integers else f"{name}(x: F[*n]) -> F[*n]",
        Traits(Role.POINTWISE, place=place),
        reference=reference,
        doc=doc,
        example="f32[2,3]",
        infer=infer,
    )


def _in_f32(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Evaluate 16-bit floats in fp32 and round once, as a fused kernel does."""

    def reference(x: Any) -> Any:
        narrow = x.is_floating_point() and x.dtype.itemsize < 4
        return function(x.float()).to(x.dtype) if narrow else function(x)

    return reference


def _divide(a: Any, b: Any) -> Any:
    """True division of floats; of integers, the floor."""
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="floor")


add = _binary("add", lambda a, b: a + b, "Sum.", commutative=True, place=additive)
sub = _binary("sub", lambda a, b: a - b, "Difference.", booleans=False, place=additive)
mul = _binary("mul", lambda a, b: a * b, "Product.", commutative=True)
div = _binary("div", _divide, "Quotient; of integers, rounded down.", booleans=False)
remainder = _binary(
    "remainder", lambda a, b: torch.remainder(a, b), "a - b * floor(a / b).", booleans=False
)
maximum = _binary(
    "maximum", lambda a, b: torch.maximum(a, b), "The larger of two.", commutative=True
)
minimum = _binary(
    "minimum", lambda a, b: torch.minimum(a, b), "The smaller of two.", commutative=True
)
pow = _binary("pow", lambda a, b: torch.pow(a, b), "a to the power b.", booleans=False)

lt = _compare("lt", lambda a, b: a < b, "a < b.")
le = _compare("le", lambda a, b: a <= b, "a <= b.")
gt = _compare("gt", lambda a, b: a > b, "a > b.")
ge = _compare("ge", lambda a, b: a >= b, "a >= b.")
eq = _compare("eq", lambda a, b: a == b, "a == b.", commutative=True)
ne = _compare("ne", lambda a, b: a != b, "a != b.", commutative=True)
logical_and = _logical("logical_and", lambda a, b: a & b, "Both.")
logical_or = _logical("logical_or", lambda a, b: a | b, "Either.")
logical_not = op(
    "logical_not(x: bool[*n]) -> bool[*n]",
    Traits(Role.POINTWISE),
    reference=lambda x: ~x,
    doc="Not.",
    example="bool[2,3]",
)

neg = _unary("neg", lambda x: -x, "Negation.", integers=True, place=additive)
abs = _unary("abs", lambda x: x.abs(), "Absolute value.", integers=True)
exp = _unary("exp", _in_f32(lambda x: x.exp()), "e to the power x.")
log = _unary("log", _in_f32(lambda x: x.log()), "Natural logarithm.")
sqrt = _unary("sqrt", _in_f32(lambda x: x.sqrt()), "Square root.")
rsqrt = _unary("rsqrt", _in_f32(lambda x: x.rsqrt()), "1 / sqrt(x).")
reciprocal = _unary("reciprocal", _in_f32(lambda x: x.reciprocal()), "1 / x.")
square = _unary("square", _in_f32(lambda x: x * x), "x * x.", integers=True)
sigmoid = _unary("sigmoid", _in_f32(lambda x: x.sigmoid()), "1 / (1 + e^-x).")
silu = _unary("silu", _in_f32(lambda x: torch.nn.functional.silu(x)), "x * sigmoid(x).")
tanh = _unary("tanh", _in_f32(lambda x: x.tanh()), "Hyperbolic tangent.")
cos = _unary("cos", _in_f32(lambda x: x.cos()), "Cosine of radians.")
sin = _unary("sin", _in_f32(lambda x: x.sin()), "Sine of radians.")
erf = _unary("erf", _in_f32(lambda x: x.erf()), "Error function.")
relu = _unary("relu", lambda x: x.relu(), "max(x, 0).", integers=True)
gelu = _unary(
    "gelu", _in_f32(lambda x: torch.nn.functional.gelu(x)), "x times the normal distribution's CDF."
)
gelu_tanh = _unary(
    "gelu_tanh",
    _in_f32(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "gelu by tanh(sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks & Gimpel 2016).",
)


def _place_cast(call: PlacedCall) -> Placing | str:
    """To floats of 16 bits or more it is linear but for rounding; of others there are no sums."""
    dtype: DType = call.attrs["dtype"]
    return additive(call) if dtype.is_float and dtype.itemsize > 1 else pointwise(call)


cast = op(
    "cast(x: T[*n]; dtype: dtype) -> dtype[*n]",
    Traits(Role.POINTWISE, place=_place_cast),
    reference=lambda x, dtype: x.to(dtype.torch),
    doc="Convert elements to another element type, rounding to nearest even.",
    example="f32[2,3] {dtype=bf16}",
)


def _infer_where(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    return _infer_broadcast(types, attrs, dtype=types[1].dtype)


where = op(
    "where(condition: bool[...], a: T[...], b: T[...]) -> T[...]",
    Traits(Role.POINTWISE),
    reference=lambda condition, a, b: torch.where(condition, a, b),
    doc="`a` where the condition holds, else `b`.",
    example="bool[2,1,3], f32[4,1], f32[]",
    infer=_infer_where,
)
