"""Rows of the ATen table that compute: arithmetic, contractions, complex numbers.

ATen promotes element types by itself. The operators of the IR do not: each row casts its operands
to the type that the tracer recorded for the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from dsc.frontends.lowering import Complex, Lowering, Number, Unsupported
from dsc.ir.dims import Dim, Sym
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.op import OpDef
from dsc.ir.types import DType

Row: TypeAlias = Callable[..., Any]

NARROW = (DType.bf16, DType.f16)
LN_2, LN_10 = math.log(2), math.log(10)


# Arithmetic. Operands take the result's element type, as ATen's promotion does.


def _exact(x: Number, dtype: DType) -> bool:
    """Whether a Python number survives rounding to `dtype`; tensors and sizes count as exact."""
    if not isinstance(x, float) or not math.isfinite(x):
        return True
    return float(torch.tensor(x, dtype=dtype.torch)) == float(torch.tensor(x))


def arithmetic(op: str) -> Callable[..., Operand]:
    """`op` on two operands. ATen keeps a Python number in fp32 beside 16-bit floats; so do we."""

    def row(t: Lowering, a: Number, b: Number) -> Operand:
        dtype = t.out.dtype
        wide = dtype in NARROW and not (_exact(a, dtype) and _exact(b, dtype))
        working = DType.f32 if wide else dtype
        return t.cast(t.call(op, t.operand(a, working), t.operand(b, working)), dtype)

    return row


_multiply, _subtract, _add, _divide = (arithmetic(op) for op in ("mul", "sub", "add", "div"))


def _scaled(t: Lowering, x: Number, alpha: float) -> Number:
    return x if alpha == 1 else _multiply(t, x, alpha)


def sum_of_two(t: Lowering, a: Number, b: Number, alpha: float = 1) -> Operand:
    """a + alpha * b; a range plus a size stays a range, and truth values add as "or"."""
    if t.out.dtype is DType.boolean:
        return t.call("logical_or", t.operand(a, DType.boolean), t.operand(b, DType.boolean))
    shifted = t.shifted(a, b) or t.shifted(b, a)
    if shifted is not None and alpha == 1:
        return shifted
    return _add(t, a, _scaled(t, b, alpha))


def difference(t: Lowering, a: Number, b: Number, alpha: float = 1) -> Operand:
    """a - alpha * b."""
    return _subtract(t, a, _scaled(t, b, alpha))


def product_of_two(t: Lowering, a: Number, b: Number) -> Operand:
    """a * b; truth values multiply as "and"."""
    if t.out.dtype is DType.boolean:
        return t.call("logical_and", t.operand(a, DType.boolean), t.operand(b, DType.boolean))
    if isinstance(b, (int, float)) and b == 1 and isinstance(a, (Value, Weight)):
        return t.cast(a, t.out.dtype)
    return _multiply(t, a, b)


def quotient(t: Lowering, a: Number, b: Number, rounding_mode: str | None = None) -> Operand:
    """a / b, or rounded down or towards zero."""
    if rounding_mode is None:
        return _divide(t, a, b)
    if t.out.dtype.is_int:
        return _whole_quotient(t, a, _not_zero(t, b), rounding_mode)
    if rounding_mode == "trunc":
        return trunc(t, _divide(t, a, b))
    working = DType.f32 if t.out.dtype in NARROW else t.out.dtype
    return t.cast(_floor_of_quotient(t, t.operand(a, working), t.operand(b, working)), t.out.dtype)


def _not_zero(t: Lowering, x: Number) -> Number:
    """An integer divisor that is known not to be zero."""
    x = t.known(x)
    if isinstance(x, (Value, Weight)) or x == 0:
        raise Unsupported("integer division by numbers that may be 0, which is an error")
    return x


def _whole_quotient(t: Lowering, a: Number, b: Number, rounding_mode: str) -> Operand:
    """An integer quotient rounded down, or one more where that is not towards zero."""
    x, y = t.operand(a, t.out.dtype), t.operand(b, t.out.dtype)
    down = t.call("div", x, y)
    if rounding_mode == "floor":
        return down
    zero = t.number(0, t.out.dtype)
    rest = t.call("ne", t.call("remainder", x, y), zero)
    below = t.call("ne", *(t.cast(t.call("lt", v, zero), DType.i64) for v in (x, y)))
    return t.call("add", down, t.cast(t.call("logical_and", rest, below), t.out.dtype))


def _floor_of_quotient(t: Lowering, a: Operand, b: Operand) -> Operand:
    """As Python's float `//` has it: exact where the quotient itself would round up."""
    dtype = a.type.dtype
    zero = t.number(0, dtype)
    rest = _fmod(t, a, b)
    apart = t.call("ne", *(t.cast(t.call("lt", x, zero), dtype) for x in (rest, b)))
    less = t.call("logical_and", t.call("ne", rest, zero), apart)
    ratio = t.call("div", t.call("sub", a, rest), b)
    ratio = t.call("sub", ratio, t.cast(less, dtype))
    down = floor(t, ratio)
    above = t.call("gt", t.call("sub", ratio, down), t.number(0.5, dtype))
    whole = t.call("where", above, t.call("add", down, t.number(1, dtype)), down)
    whole = t.call("where", t.call("eq", ratio, zero), trunc(t, t.call("div", a, b)), whole)
    return t.call("where", t.call("eq", b, zero), t.call("div", a, b), whole)


def fmod(t: Lowering, a: Number, b: Number) -> Operand:
    """The remainder with the sign of a."""
    b = _not_zero(t, b) if t.out.dtype.is_int else b
    return _fmod(t, t.operand(a, t.out.dtype), t.operand(b, t.out.dtype))


def _fmod(t: Lowering, x: Operand, y: Operand) -> Operand:
    zero = t.number(0, x.type.dtype)
    if x.type.dtype.is_int:  # the least integer has no absolute value
        rest = t.call("remainder", x, y)
        apart = t.call("ne", *(t.cast(t.call("lt", v, zero), DType.i64) for v in (x, y)))
        wrong = t.call("logical_and", t.call("ne", rest, zero), apart)
        return t.call("where", wrong, t.call("sub", rest, y), rest)
    rest = t.call("remainder", t.call("abs", x), t.call("abs", y))
    below = t.call("lt", x, zero)
    return t.call("where", below, t.call("neg", rest), rest)


def remainder(t: Lowering, a: Number, b: Number) -> Operand:
    """The remainder with the sign of b."""
    return arithmetic("remainder")(t, a, _not_zero(t, b) if t.out.dtype.is_int else b)


def power(t: Lowering, x: Number, exponent: Number) -> Operand:
    """x ** exponent, by the function that ATen itself uses for 2, 1/2, -1/2 and -1.

    Of fp16 ATen takes roots as powers, which have another result at -inf and -0.
    """
    named: dict[float, str] = {2: "square", -1: "reciprocal"}
    if t.out.dtype is not DType.f16:
        named |= {0.5: "sqrt", -0.5: "rsqrt"}
    exponent = t.known(exponent)
    if isinstance(exponent, (int, float)) and t.out.dtype.is_float and exponent in named:
        return t.call(named[exponent], t.operand(x, t.out.dtype))
    if exponent == 1:
        return t.operand(x, t.out.dtype)
    if isinstance(exponent, int) and 2 <= exponent <= _MOST_FACTORS and _is_whole(exponent, t):
        base = t.operand(x, t.out.dtype)
        product = base
        for _ in range(exponent - 1):
            product = t.call("mul", product, base)
        return product
    if exponent == 0 and isinstance(x, (Value, Weight)):
        return t.expand(t.number(1, t.out.dtype), t.out.shape)
    return arithmetic("pow")(t, x, exponent)


_MOST_FACTORS = 16


def _is_whole(exponent: int, t: Lowering) -> bool:
    """Whether a power is a product: of integers, and the cube, which ATen multiplies out too."""
    return t.out.dtype.is_int or exponent == 3


def _stand_in(x: Number) -> Any:
    """What torch's promotion rules see of an operand."""
    if isinstance(x, (Value, Weight)):
        return torch.empty((1,) * x.type.rank, dtype=x.type.dtype.torch, device="meta")
    return 1 if isinstance(x, Sym) else x if isinstance(x, (bool, int, float)) else 1.0


def comparison(op: str) -> Row:
    """`op` on operands promoted to their common type."""

    def row(t: Lowering, a: Number, b: Number) -> Operand:
        dtype = DType.of(torch.result_type(_stand_in(a), _stand_in(b)))
        return t.call(op, t.operand(a, dtype), t.operand(b, dtype))

    return row


def truth(t: Lowering, x: Operand) -> Operand:
    """Whether elements differ from zero."""
    if x.type.dtype is DType.boolean:
        return x
    return t.call("ne", x, t.number(0, x.type.dtype))


def logical(op: str) -> Row:
    """`op` on the truth of the operands."""
    return lambda t, *xs: t.call(op, *(truth(t, x) for x in xs))


def bitwise(op: str) -> Row:
    """`op` on truth values; the IR has no integer bit operations."""

    def row(t: Lowering, *xs: Number) -> Operand:
        if t.out.dtype is not DType.boolean:
            raise Unsupported("bitwise operations on integers")
        return t.call(op, *(t.operand(x, DType.boolean) for x in xs))

    return row


def unary(op: str) -> Row:
    """`op` on floats, where an integer operand is promoted."""
    return lambda t, x: t.call(op, t.cast(x, t.out.dtype))


def sign(t: Lowering, x: Operand) -> Operand:
    """-1, 0 or 1."""
    zero = t.number(0, x.type.dtype)
    above, below = (t.cast(t.call(op, x, zero), x.type.dtype) for op in ("gt", "lt"))
    return t.call("sub", above, below)


def trunc(t: Lowering, x: Operand) -> Operand:
    """Towards zero, by way of i64; values of 2^52 and more are whole already and stay.

    A zero keeps the sign of x.
    """
    zero, size = t.number(0, x.type.dtype), t.call("abs", x)
    whole = t.cast(t.cast(size, DType.i64), x.type.dtype)
    signed = t.call("where", t.call("lt", x, zero), t.call("neg", whole), whole)
    small = t.call("lt", size, t.number(2.0**52, x.type.dtype))
    broken = t.call("logical_and", small, t.call("ne", x, zero))
    return t.call("where", broken, signed, x)


def floor(t: Lowering, x: Operand) -> Operand:
    """The largest whole number not above x."""
    if not x.type.dtype.is_float:
        return x
    whole = trunc(t, x)
    return t.call("sub", whole, t.cast(t.call("gt", whole, x), x.type.dtype))


def ceil(t: Lowering, x: Operand) -> Operand:
    """The smallest whole number not below x."""
    return t.call("neg", floor(t, t.call("neg", x)))


def widened(t: Lowering, x: Operand) -> tuple[Operand, DType]:
    """x in the element type that ATen computes in: fp64 as it is, all others in fp32."""
    dtype = DType.f64 if x.type.dtype is DType.f64 else DType.f32
    return t.cast(x, dtype), dtype


def round_half_to_even(t: Lowering, x: Operand, **options: Any) -> Operand:
    """To the nearest whole number; of two, to the even one."""
    if options.get("decimals"):
        raise Unsupported("rounding to decimals")
    if not x.type.dtype.is_float:
        return x
    wide, dtype = widened(t, x)
    whole = trunc(t, wide)
    rest = t.call("abs", t.call("sub", wide, whole))
    half = t.number(0.5, dtype)
    odd = t.call("ne", t.call("remainder", whole, t.number(2, dtype)), t.number(0, dtype))
    tie = t.call("logical_and", t.call("eq", rest, half), odd)
    away = t.cast(t.call("logical_or", t.call("gt", rest, half), tie), dtype)
    back = t.call("mul", sign(t, t.call("neg", wide)), away)  # +0 or -0 leaves a zero its sign
    return t.cast(t.call("sub", whole, back), x.type.dtype)


def gelu(t: Lowering, x: Operand, approximate: str = "none") -> Operand:
    """Exact, or by the tanh approximation (Hendrycks & Gimpel 2016)."""
    return t.call("gelu" if approximate == "none" else "gelu_tanh", x)


def with_factor(op: str, before: float = 1.0, after: float = 1.0) -> Row:
    """A function in another base: `op(x * before) * after`, in fp32."""

    def row(t: Lowering, x: Operand) -> Operand:
        wide, dtype = widened(t, x)
        if before != 1:
            wide = t.call("mul", wide, t.number(before, dtype))
        result = t.call(op, wide)
        if after != 1:
            result = t.call("mul", result, t.number(after, dtype))
        return t.cast(result, t.out.dtype)

    return row


def log1p(t: Lowering, x: Operand) -> Operand:
    """log(1 + x) without the loss near 0: x * log(u) / (u - 1) for u = 1 + x (Higham 2002)."""
    wide, dtype = widened(t, x)
    one = t.number(1, dtype)
    u = t.call("add", wide, one)
    ratio = t.call("div", wide, t.call("sub", u, one))
    correction = t.call("where", is_infinite(t, u), one, ratio)
    precise = t.call("mul", t.call("log", u), correction)
    return t.cast(t.call("where", t.call("eq", u, one), wide, precise), t.out.dtype)


def expm1(t: Lowering, x: Operand) -> Operand:
    """exp(x) - 1 without the loss near 0: x * (u - 1) / log(u) for u = exp(x)."""
    wide, dtype = widened(t, x)
    one = t.number(1, dtype)
    u = t.call("exp", wide)
    less = t.call("sub", u, one)
    precise = t.call("mul", less, t.call("div", wide, t.call("log", u)))
    small = t.call("lt", t.call("abs", wide), one)
    result = t.call("where", small, precise, less)
    return t.cast(t.call("where", t.call("eq", u, one), wide, result), t.out.dtype)


def is_infinite(t: Lowering, x: Operand) -> Operand:
    """Whether elements are an infinity."""
    return t.call("eq", t.call("abs", x), t.number(math.inf, x.type.dtype))


def clamp(t: Lowering, x: Operand, low: Any = None, high: Any = None) -> Operand:
    """x limited from below, from above, or both."""
    x = t.cast(x, t.out.dtype)
    x = x if low is None else t.call("maximum", x, t.operand(low, x.type.dtype))
    return x if high is None else t.call("minimum", x, t.operand(high, x.type.dtype))


def where(t: Lowering, condition: Operand, a: Number, b: Number) -> Operand:
    """a where the condition holds, else b."""
    dtype = t.out.dtype
    return t.call("where", condition, t.operand(a, dtype), t.operand(b, dtype))


def to(t: Lowering, x: Operand, *_: Any, **__: Any) -> Operand:
    """Another element type; where a tensor lies is of no concern."""
    return t.cast(x, t.out.dtype)


def copy(t: Lowering, target: Operand, source: Operand, non_blocking: bool = False) -> Operand:
    """The source with the type and shape of the target."""
    return t.expand(t.cast(source, t.out.dtype), t.out.shape)


# Contractions and the operators of a network.


def matmul(t: Lowering, a: Operand, b: Operand, *_: Any) -> Operand:
    """torch.matmul in all its ranks, bmm and mm."""
    if a.type.rank == 1:
        a = t.reshape(a, (1, a.type.shape[0]))
    if b.type.rank == 1:
        b = t.reshape(b, (b.type.shape[0], 1))
    return t.reshape(t.call("matmul", a, b), t.out.shape)


def matmul_plus(
    t: Lowering, x: Operand, a: Operand, b: Operand, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """addmm, baddbmm, addmv: beta * x + alpha * a @ b."""
    product: Operand = matmul(t, a, b)
    if alpha != 1:
        product = _multiply(t, product, alpha)
    return product if beta == 0 else _add(t, _scaled(t, x, beta), product)


def grouped_mm(
    t: Lowering, x: Operand, weight: Operand, offs: Operand | None = None,
    bias: Operand | None = None, out_dtype: Any = None,
) -> Operand:  # fmt: skip
    """Rows up to offs[g] times weight[g]: the experts of transformers."""
    if offs is None or x.type.rank != 2 or weight.type.rank != 3:
        raise Unsupported(f"a grouped product of {x.type} and {weight.type}")
    if bias is not None:
        raise Unsupported("a grouped product with a bias")
    return t.cast(t.call("grouped_mm", x, weight, offs), t.out.dtype)


def einsum(t: Lowering, equation: str, operands: Sequence[Operand], **_: Any) -> Operand:
    """An equation with every letter written, as the IR wants it."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if "." in left:
        raise Unsupported(f"einsum {equation!r} with an ellipsis")
    letters = sorted(c for c in set(left) - {","} if left.count(c) == 1)
    right = right if arrow else "".join(letters)
    if any(len(set(term)) < len(term) for term in left.split(",")):
        raise Unsupported(f"einsum {equation!r}, which takes a diagonal")
    return t.call("einsum", *operands, eq=f"{left}->{right}")


def sdpa(
    t: Lowering, q: Operand, k: Operand, v: Operand, mask: Operand | None = None,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Operand:  # fmt: skip
    """Scaled dot-product attention, whole."""
    if dropout:
        raise Unsupported("attention with dropout; call .eval() first")
    width = q.type.shape[-1]
    if scale is None and not isinstance(width, int):
        raise Unsupported("attention of a symbolic head width with no scale given")
    factor = 1 / math.sqrt(width) if scale is None else scale  # type: ignore[arg-type]
    return t.call("sdpa", q, k, v, mask, scale=float(factor), causal=causal, grouped=enable_gqa)


def rms_norm(
    t: Lowering, x: Operand, extents: Sequence[Dim], weight: Operand | None = None,
    eps: float | None = None,
) -> Operand:  # fmt: skip
    """torch's own norm multiplies by the weight in fp32 and rounds last."""
    if len(extents) != 1:
        raise Unsupported("rms_norm over several axes")
    eps = torch.finfo(x.type.dtype.torch).eps if eps is None else eps
    if weight is None:
        weight = t.full(extents, 1.0, x.type.dtype)
    if x.type.dtype in NARROW:
        weight = t.cast(weight, DType.f32)
    return t.call("rms_norm", x, weight, eps=float(eps))


def native_layer_norm(
    t: Lowering, x: Operand, extents: Sequence[Dim], weight: Operand | None,
    bias: Operand | None, eps: float,
) -> tuple[Operand, ...]:  # fmt: skip
    """The normalised tensor, the mean and 1/deviation, in fp32 or wider inside.

    The statistics have the tracer's element type, which is that of x.
    """
    axes = tuple(range(-len(extents), 0))
    wide, dtype = widened(t, x)
    mean = t.call("mean", wide, axes=axes, keepdims=True)
    centred = t.call("sub", wide, mean)
    variance = t.call("mean", t.call("square", centred), axes=axes, keepdims=True)
    inverse = t.call("rsqrt", t.call("add", variance, t.number(eps, dtype)))
    y: Operand = t.call("mul", centred, inverse)
    y = y if weight is None else t.call("mul", y, t.cast(weight, dtype))
    y = y if bias is None else t.call("add", y, t.cast(bias, dtype))
    return tuple(t.cast(v, x.type.dtype) for v in (y, mean, inverse))


def embedding(t: Lowering, weight: Operand, ids: Operand, *_: Any) -> Operand:
    """Rows of a table."""
    return t.call("embedding", t.cast(ids, DType.i64), weight)


def linear(t: Lowering, x: Operand, weight: Operand, bias: Operand | None = None) -> Operand:
    """x @ weight^T + bias."""
    if weight.type.rank != 2:
        raise Unsupported(f"linear with a weight of rank {weight.type.rank}")
    if x.type.dtype not in (DType.f32, *NARROW):
        product: Operand = matmul(t, x, t.permute(weight, (1, 0)))
        return product if bias is None else t.call("add", product, bias)
    return t.call("linear", x, weight, bias)


# Complex numbers: pairs of real tensors.


def polar(t: Lowering, magnitude: Operand, angle: Operand) -> Complex:
    """magnitude * (cos(angle) + i sin(angle))."""
    parts = (t.call("mul", magnitude, t.call(op, angle)) for op in ("cos", "sin"))
    return Complex(*parts)


def _complex_product(t: Lowering, a: Any, b: Any) -> Complex:
    if not isinstance(a, Complex):
        a, b = b, a
    if not isinstance(b, Complex):
        return Complex(product_of_two(t, a.re, b), product_of_two(t, a.im, b))
    re = t.call("sub", t.call("mul", a.re, b.re), t.call("mul", a.im, b.im))
    return Complex(re, t.call("add", t.call("mul", a.re, b.im), t.call("mul", a.im, b.re)))


def _complex_sum(op: str) -> Row:
    def row(t: Lowering, a: Any, b: Any) -> Complex:
        if not (isinstance(a, Complex) and isinstance(b, Complex)):
            raise Unsupported("a sum of a complex and a real tensor")
        return Complex(t.call(op, a.re, b.re), t.call(op, a.im, b.im))

    return row


def view_as_complex(t: Lowering, x: Operand) -> Complex:
    """The inverse of torch.view_as_real."""
    parts = (t.slice(x, -1, part, part + 1) for part in (0, 1))
    return Complex(*(t.reshape(part, t.out.shape) for part in parts))


COMPLEX: Mapping[str, Row] = MappingProxyType(
    {
        "aten.mul.Tensor": _complex_product,
        "aten.add.Tensor": _complex_sum("add"),
        "aten.sub.Tensor": _complex_sum("sub"),
        "aten.view_as_real.default": lambda t, x: t.rejoin(x),
        "aten.real.default": lambda t, x: x.re,
        "aten.imag.default": lambda t, x: x.im,
        "aten.conj.default": lambda t, x: Complex(x.re, t.call("neg", x.im)),
        "aten._conj.default": lambda t, x: Complex(x.re, t.call("neg", x.im)),
        "aten.conj_physical.default": lambda t, x: Complex(x.re, t.call("neg", x.im)),
        "aten.abs.default": lambda t, x: t.call(
            "sqrt", t.call("add", t.call("square", x.re), t.call("square", x.im))
        ),
    }
)
"""Rows for operators when an operand is complex. Rows of `VIEWS` serve each part as they are."""


def declared_row(definition: OpDef) -> Row:
    """The row of `dsc::name`, an operator of the IR that a program calls directly."""
    count = len(definition.operands)

    def row(t: Lowering, *args: Any, **attrs: Any) -> Any:
        first = args[0] if definition.operands[-1:] and definition.operands[-1].variadic else None
        operands = tuple(first) if first is not None else args[:count]
        rest = args[1:] if first is not None else args[count:]
        named = dict(zip((a.name for a in definition.attrs), rest, strict=False)) | attrs
        return t.calls(definition.name, *operands, **_declared_attrs(definition, named))

    return row


def _declared_attrs(definition: OpDef, given: Mapping[str, Any]) -> dict[str, Any]:
    attrs = {k: v for k, v in given.items() if v is not None}
    for attr in definition.attrs:
        if attr.kind == "float" and attr.name in attrs:
            attrs[attr.name] = float(attrs[attr.name])
    return attrs
