"""Functions element by element: of one tensor, of two, of a tensor and a number; promotion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.functions import Door, attempt, case, numbers, over

X, Y = numbers(6, 4), numbers(6, 4, seed=1)
POSITIVE = X.abs() + 0.1
UNIT = X.sigmoid()
WHOLE, OTHER = numbers(6, 4, dtype=torch.int64), numbers(6, 4, dtype=torch.int64, seed=1)
NONZERO = torch.where(OTHER == 0, 3, OTHER)
B, C = numbers(6, 4, dtype=torch.bool), numbers(6, 4, dtype=torch.bool, seed=1)
ODD = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]] * 6) + X * 0

INTEGER = ("empty", "scalar", "transposed", "strided", "expanded", "one")

for name in (
    "abs neg exp exp2 expm1 sigmoid tanh sin cos tan sinh cosh atan asinh erf erfc sign floor ceil"
    " round trunc frac square relu relu6 silu gelu softplus elu selu celu mish hardtanh hardswish"
    " hardsigmoid leaky_relu softsign tanhshrink logsigmoid softshrink hardshrink sinc sgn positive"
    " nan_to_num isnan isfinite isinf signbit deg2rad"
).split():
    function = getattr(F, name, None) if not hasattr(torch, name) else getattr(torch, name)
    over("elementwise", name, function or getattr(torch, name), X)
for name in "log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma".split():
    over("elementwise", name, getattr(torch, name), POSITIVE)
for name in "asin acos atanh logit erfinv".split():
    over("elementwise", name, getattr(torch, name), UNIT)
for name in "nan_to_num sign floor relu tanh exp sigmoid isnan isfinite abs".split():
    over("odd values", f"{name}_of_nan_and_inf", getattr(torch, name), ODD, variants=("f64",))
over("odd values", "maximum_of_nan", torch.maximum, ODD, Y, variants=("f64",))
over("odd values", "clamp_of_nan", lambda x: x.clamp(-1, 1), ODD, variants=("f64",))
over("odd values", "amax_of_nan", lambda x: x.amax(-1), ODD, variants=("f64",))
over("odd values", "argmax_of_nan", lambda x: x.argmax(-1), ODD, variants=("f64",))
over("odd values", "compare_nan", lambda x, y: (x < y, x == x, x != x), ODD, Y, variants=("f64",))
over(
    "odd values",
    "softmax_of_a_row_of_minus_inf",
    lambda x: torch.softmax(x.masked_fill(x < 9, -math.inf), -1),
    X,
    variants=("bf16",),
)

for name in "add sub mul maximum minimum atan2 fmax fmin hypot copysign logaddexp dist".split():
    over("two tensors", name, getattr(torch, name), X, Y)
for name in "div fmod remainder floor_divide true_divide".split():
    over("two tensors", name, getattr(torch, name), X, POSITIVE)
over("two tensors", "pow", torch.pow, POSITIVE, Y)
over("two tensors", "xlogy", torch.xlogy, X, POSITIVE)
over("two tensors", "lerp", lambda x, y: torch.lerp(x, y, 0.3), X, Y)
over("two tensors", "addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.5), X, Y)
over("two tensors", "addcdiv", lambda x, y: torch.addcdiv(x, x, y, value=2), X, POSITIVE)
over("two tensors", "isclose", torch.isclose, X, X + 1e-6)
over("two tensors", "equal_to", torch.eq, WHOLE, OTHER, variants=INTEGER)
over(
    "two tensors", "trunc_divide", lambda x, y: torch.div(x, y, rounding_mode="trunc"), X, POSITIVE
)
over("two tensors", "row_of_numbers", lambda x, y: x * y[0] + y[:, :1], X, Y)
over("two tensors", "masked_fill", lambda x, y: x.masked_fill(y > 0, -1.0), X, Y)
over("two tensors", "where_numbers", lambda x: torch.where(x > 0, 1.0, 0.0), X)
over("two tensors", "clamp_by_tensors", lambda x, y: x.clamp(min=-y, max=y), X, POSITIVE)
over("two tensors", "threshold", lambda x: F.threshold(x, 0.1, -2.0), X)
over("two tensors", "heaviside", torch.heaviside, X, Y)
over(
    "two tensors",
    "cross_product",
    lambda x, y: torch.linalg.cross(x[:, :3], y[:, :3]),
    X,
    Y,
    variants=("f64", "empty", "strided"),
)

for name in "add sub mul maximum gcd bitwise_and bitwise_or bitwise_xor".split():
    over("integers", f"integer_{name}", getattr(torch, name), WHOLE, OTHER, variants=INTEGER)
for name in "floor_divide remainder fmod true_divide".split():
    over("integers", f"integer_{name}", getattr(torch, name), WHOLE, NONZERO, variants=INTEGER)
over(
    "integers",
    "integer_trunc_divide",
    lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    WHOLE,
    NONZERO,
    variants=INTEGER,
)
over("integers", "integer_powers", lambda x: (x**2, x**3, x**0), WHOLE, variants=INTEGER)
over("integers", "integer_abs_neg_sign", lambda x: (x.abs(), -x, x.sign()), WHOLE, variants=INTEGER)
over("integers", "shifts", lambda x: (x << 2, x >> 1), WHOLE, variants=INTEGER)
over("integers", "bitwise_not", lambda x: ~x, WHOLE, variants=INTEGER)
over("integers", "integer_clamp", lambda x: x.clamp(-2, 3), WHOLE, variants=INTEGER)
over(
    "integers",
    "integer_compare",
    lambda x, y: (x < y, x >= 2, x != y),
    WHOLE,
    OTHER,
    variants=INTEGER,
)
for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
    short = str(dtype).removeprefix("torch.")
    over(
        "integers",
        f"{short}_arithmetic",
        lambda x, y: (x + y, x * y, x - 1, x.sum()),
        numbers(6, 4, dtype=dtype),
        numbers(6, 4, dtype=dtype, seed=2),
        variants=INTEGER,
    )
    over(
        "integers",
        f"{short}_to_float",
        lambda x: (x / 2, x.float(), x.exp()),
        numbers(6, 4, dtype=dtype),
        variants=INTEGER,
    )

for name in "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor eq".split():
    over("truth values", f"bool_{name}", getattr(torch, name), B, C, variants=INTEGER)
over("truth values", "bool_not", lambda x: (~x, torch.logical_not(x)), B, variants=INTEGER)
over("truth values", "bool_any_all", lambda x: (x.any(), x.all(-1), x.sum()), B, variants=INTEGER)
over(
    "truth values",
    "bool_times_float",
    lambda x, y: (x * y, y.masked_fill(x, 0)),
    B,
    X,
    variants=("empty", "strided"),
)
over(
    "truth values",
    "bool_plus_bool",
    lambda x, y: (x + y, x * y, x.int() - y.int()),
    B,
    C,
    variants=INTEGER,
)
over("truth values", "logical_of_floats", lambda x, y: (x.logical_and(y), x.logical_not()), X, Y)


@case("promotion")
def mixed_element_types(door: Door) -> Iterator[Any]:
    """Every pair of element types added, multiplied and compared."""
    f = door(lambda a, b: (a + b, a * b, a < b, torch.where(a < b, a, b)))
    kinds = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64)
    for i, a in enumerate(kinds):
        b = kinds[(i + 2) % len(kinds)]
        yield attempt(f, numbers(3, 4, dtype=a), numbers(3, 4, dtype=b, seed=1))


@case("promotion")
def numbers_and_tensors(door: Door) -> Iterator[Any]:
    """A Python number beside tensors of each kind."""
    f = door(lambda x: (x + 1, x * 2.5, x / 3, 2 - x, x > 0.5))
    for dtype in (torch.int64, torch.float32, torch.float16, torch.float64):
        yield attempt(f, numbers(3, 4, dtype=dtype))


@case("promotion")
def a_scalar_tensor_promotes_less(door: Door) -> Iterator[Any]:
    """A tensor without axes gives way to one with."""
    f = door(lambda x, s: (x + s, x * s, s - x))
    yield attempt(f, numbers(3, 4), torch.tensor(2.5, dtype=torch.float64))
    yield attempt(f, numbers(3, 4, dtype=torch.int32), torch.tensor(7))
    yield attempt(f, numbers(3, 4, dtype=torch.bfloat16), torch.tensor(0.1))


@case("promotion")
def casts(door: Door) -> Iterator[Any]:
    """To and from every element type."""
    f = door(lambda x: [x.to(t) for t in (torch.int64, torch.int32, torch.float64, torch.bool)])
    for dtype in (torch.float32, torch.int8, torch.bool, torch.bfloat16):
        yield attempt(
            f,
            numbers(3, 4, dtype=dtype) * 3
            if dtype.is_floating_point
            else numbers(3, 4, dtype=dtype),
        )


@case("promotion")
def double_all_through(door: Door) -> Iterator[Any]:
    """A small network in float64."""
    f = door(lambda x, w: F.gelu(F.linear(x, w)).softmax(-1).log().tanh())
    for rows in (3, 5, 6):
        yield attempt(f, numbers(rows, 4, dtype=torch.float64), numbers(7, 4, dtype=torch.float64))


@case("promotion")
def half_all_through(door: Door) -> Iterator[Any]:
    """The same in 16 bits."""
    f = door(lambda x, w: F.gelu(F.linear(x, w)).softmax(-1).tanh())
    for dtype in (torch.float16, torch.bfloat16):
        yield attempt(f, numbers(3, 4, dtype=dtype), numbers(7, 4, dtype=dtype))


@case("promotion")
def large_integers(door: Door) -> Iterator[Any]:
    """Integers that floats do not hold."""
    f = door(lambda x: (x + 1, x * 3, x - 2**53, x // 7, x % 1000))
    yield attempt(f, torch.tensor([2**53 + 1, 2**60 + 3, -(2**61) - 1]))
    yield attempt(f, torch.tensor([2**62, 5]))


@case("promotion")
def broadcasting(door: Door) -> Iterator[Any]:
    """Shapes that stretch against each other, and some that do not."""
    f = door(lambda a, b: a * b + a)
    for a, b in (
        ((3, 1), (1, 4)),
        ((2, 3, 4), (4,)),
        ((1,), (3, 4)),
        ((3, 4), ()),
        ((0, 4), (1, 4)),
    ):
        yield attempt(f, numbers(*a), numbers(*b))
    yield attempt(f, numbers(3, 4), numbers(3, 5))


@case("promotion")
def complex_numbers(door: Door) -> Iterator[Any]:
    """Complex in the middle, and at the borders."""
    f = door(lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x)))
    yield attempt(f, numbers(3, 4, 2))
    g = door(lambda x: x * 2 + 1j)
    yield attempt(g, torch.complex(numbers(3), numbers(3, seed=1)))
