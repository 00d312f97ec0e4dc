"""A thin layer over TVM's TIR builder: typed memory, vectors and loops, so that kernels read well.

A kernel is a private function over `int64` arguments: addresses of tensors, then run-time sizes.
`build` turns a Python function of that shape into a `PrimFunc`; inside it, Python's own `for` and
`if` run while the kernel is built (they unroll and specialise), and `loop`, `for_each` and `when`
become control flow of the kernel. Arithmetic is fp32 whatever the storage; bf16 lies in memory as
uint16 and is widened by a shift, because TVM's bfloat16 vectors do not reach the vector units.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias

from dsc.ir.lazy import LazyModule
from dsc.ir.types import DType

ir: Any = LazyModule("tvm.ir")
ir_builder: Any = LazyModule("tvm.script.ir_builder")
tirx: Any = LazyModule("tvm.tirx")
T: Any = LazyModule("tvm.tirx.script.builder.ir")
"""TVM's compiler takes more than a second to import, and kernels that are kept need none of it."""

Expr: TypeAlias = Any
"""A TVM expression; TVM has no static types."""
PrimFunc: TypeAlias = Any

MAX_LANES = 16
PARALLEL_WORK = 1 << 15
"""Elements of work below which a loop stays on one thread: starting threads costs about 1 us."""

STORAGE = {
    DType.f32: "float32", DType.f64: "float64", DType.f16: "float16", DType.bf16: "uint16",
    DType.i64: "int64", DType.i32: "int32", DType.i16: "int16", DType.i8: "int8", DType.u8: "uint8",
    DType.boolean: "uint8",
}  # fmt: skip
"""What an element is in memory. Element types that are missing here have no kernels."""

VALUE = {
    DType.f32: "float32", DType.f64: "float64", DType.f16: "float32", DType.bf16: "float32",
    DType.i64: "int64", DType.i32: "int32", DType.i16: "int32", DType.i8: "int32",
    DType.u8: "int32",
    DType.boolean: "bool",
}  # fmt: skip
"""What an element is in a register."""


def build(body: Callable[..., None], names: Sequence[str] | None = None) -> PrimFunc:
    """The private kernel that `body` describes; its parameters are `int64`, named as in Python.

    The function returns 0, and carries the device attributes that TVM otherwise adds to functions
    with a packed interface; without both, thread launches and local arrays do not lower.
    """
    with (
        LazyModule("tvm.script.ir_builder").IRBuilder() as builder,
        T.prim_func(private=True, s_tir=True),
    ):
        given = names or tuple(inspect.signature(body).parameters)
        arguments = [T.arg(name, tirx.Var(name, "int64")) for name in given]
        T.func_ret(ir.PrimType("int32"))
        with T.attr("default", "device_id", 0), T.attr("default", "device_type", 1):
            body(*arguments)
            T.Return(tirx.const(0, "int32"))
    return builder.get()


def integer(value: Expr) -> Expr:
    """`value` as an int64 expression."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def f32(value: float) -> Expr:
    """An fp32 constant."""
    return tirx.FloatImm("float32", value)


def lanes_for(extent: int, limit: int = MAX_LANES) -> int:
    """The widest vector (a power of two) that divides `extent`: no loop needs a tail."""
    lanes = limit
    while extent % lanes:
        lanes //= 2
    return lanes


def vector_type(name: str, lanes: int) -> str:
    """The name of a vector type: `float32x16`; of one lane, the scalar's."""
    return name if lanes == 1 else f"{name}x{lanes}"


def lanes_of(value: Expr) -> int:
    """Number of lanes of an expression."""
    return int(value.ty.dtype.lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 or lanes_of(value) == lanes else tirx.Broadcast(value, lanes)


def cast(value: Expr, name: str) -> Expr:
    """`value` converted to element type `name`, lane by lane."""
    return T.Cast(vector_type(name, lanes_of(value)), value)


def reinterpret(value: Expr, name: str) -> Expr:
    """The bits of `value` as element type `name` of the same width."""
    return T.reinterpret(vector_type(name, lanes_of(value)), value)


def bind(value: Expr) -> Expr:
    """`value`, computed once here and named."""
    return T.Bind(value)


class Tensor:
    """Row-major memory at an address: loads widen to `VALUE`, stores round to nearest even."""

    def __init__(self, address: Expr, dtype: DType, shape: Sequence[Expr]) -> None:
        self.dtype = dtype
        self.shape = [integer(d) for d in shape]
        storage = STORAGE[dtype]
        pointer = ir.Call(
            "tirx.reinterpret", [address], ret_ty=ir.PointerType(ir.PrimType(storage))
        )
        numel = reduce(lambda a, b: a * b, self.shape, integer(1))
        self.buffer = T.decl_buffer((numel,), storage, data=pointer)

    def offset(self, *index: Expr) -> Expr:
        """The position of an element; missing trailing indices are 0."""
        position = integer(0)
        for axis, extent in enumerate(self.shape):
            position = position * extent
            if axis < len(index):
                position = position + index[axis]
        return position

    def load(self, *index: Expr, lanes: int = 1) -> Expr:
        """The element at `index`, or `lanes` consecutive ones, as a `VALUE`."""
        return self.at(self.offset(*index), lanes)

    def store(self, value: Expr, *index: Expr) -> None:
        """Write a `VALUE` (scalar or vector) at `index`."""
        self.put(self.offset(*index), value)

    def at(self, position: Expr, lanes: int = 1) -> Expr:
        """As `load`, at a flat position."""
        return decode(self.buffer[span(position, lanes)], self.dtype)

    def put(self, position: Expr, value: Expr) -> None:
        """As `store`, at a flat position."""
        where = span(position, lanes_of(value))
        T.buffer_store(self.buffer, encode(value, self.dtype), [where])

    def copy(self, position: Expr, source: Tensor, start: Expr, lanes: int) -> None:
        """Take `lanes` consecutive elements of a tensor of this element type as they are."""
        stored = source.buffer[span(start, lanes)]
        T.buffer_store(self.buffer, stored, [span(position, lanes)])


_ON_STACK = {"disable_lower_builtin": 1}
"""Without it TVM takes local arrays from a pool on the heap, and sums never reach registers."""


class Local:
    """A small array on a thread's stack: accumulators, or a tile; `width` lanes an element."""

    def __init__(self, count: int, name: str = "float32", width: int = 1) -> None:
        self.name, self.width = name, width
        self.zero = splat(tirx.const(0, name), width)
        self.buffer = T.alloc_buffer((count,), vector_type(name, width), annotations=_ON_STACK)

    def __getitem__(self, index: Expr) -> Expr:
        return self.buffer[index]

    def __setitem__(self, index: Expr, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [index])

    def load(self, position: Expr, lanes: int) -> Expr:
        """`lanes` consecutive elements."""
        return self.buffer[span(position, lanes)]

    def store(self, position: Expr, value: Expr) -> None:
        """Write a vector to consecutive elements."""
        T.buffer_store(self.buffer, value, [span(position, lanes_of(value))])


def hold(value: Expr) -> Expr:
    """An fp32 `value`, computed once here; TVM's simplifier may put what `bind` names in its uses.

    Where values build on each other, that would make expressions of exponential size.
    """
    cell = Local(1, width=lanes_of(value))
    cell[0] = value
    return cell[0]


def decode(stored: Expr, dtype: DType) -> Expr:
    """What was read from memory, as a `VALUE`."""
    if dtype is DType.bf16:
        bits = cast(stored, "uint32") << splat(tirx.const(16, "uint32"), lanes_of(stored))
        return reinterpret(bits, "float32")
    if dtype is DType.boolean:
        return tirx.NE(stored, splat(tirx.const(0, "uint8"), lanes_of(stored)))
    return stored if STORAGE[dtype] == VALUE[dtype] else cast(stored, VALUE[dtype])


def encode(value: Expr, dtype: DType) -> Expr:
    """A `VALUE`, as memory of `dtype` holds it."""
    if dtype is DType.bf16:
        return _round_to_bf16(value)
    return value if STORAGE[dtype] == VALUE[dtype] else cast(value, STORAGE[dtype])


def _round_to_bf16(value: Expr) -> Expr:
    """The upper half of fp32, rounded to nearest even; a NaN stays one."""
    lanes = lanes_of(value)

    def word(n: int) -> Expr:
        return splat(tirx.const(n, "uint32"), lanes)

    bits = reinterpret(value, "uint32")
    rounded = (bits + word(0x7FFF) + ((bits >> word(16)) & word(1))) >> word(16)
    return cast(tirx.Select(tirx.EQ(value, value), rounded, word(0x7FC0)), "uint16")


def span(position: Expr, lanes: int) -> Expr:
    """The index of `lanes` consecutive elements."""
    return position if lanes == 1 else tirx.Ramp(integer(position), integer(1), lanes)


@contextmanager
def loop(extent: Expr) -> Iterator[Expr]:
    """A serial loop of the kernel over 0 .. extent-1."""
    with T.serial(integer(0), integer(extent)) as i:
        yield i


def for_each(extent: Expr, work: Expr, body: Callable[[Expr], None]) -> None:
    """Run `body(i)` for 0 .. extent-1, on all threads when extent * work elements are worth it.

    Where that is not known before run time, the choice is made there and the body emitted twice.
    """
    always = isinstance(work, int) and work >= PARALLEL_WORK
    total = PARALLEL_WORK if always else extent * work
    if not isinstance(total, int):
        with T.If(total >= integer(PARALLEL_WORK)):
            with T.Then(), T.parallel(integer(0), integer(extent)) as i:
                body(i)
            with T.Else(), T.serial(integer(0), integer(extent)) as i:
                body(i)
        return
    kind = T.parallel if total >= PARALLEL_WORK else T.serial
    with kind(integer(0), integer(extent)) as i:
        body(i)


def tiles(extent: Expr, size: int, body: Callable[[Expr, int], None]) -> None:
    """Cover 0 .. extent-1 by `body(start, size)`, and what is left by narrower calls."""
    if isinstance(extent, int):
        if extent >= size:
            with loop(extent // size) as i:
                body(i * size, size)
        if extent % size:
            body(integer(extent - extent % size), extent % size)
        return
    with loop(tirx.truncdiv(extent, integer(size))) as i:
        body(i * size, size)
    with loop(tirx.truncmod(extent, integer(size))) as i:
        body(extent - tirx.truncmod(extent, integer(size)) + i, 1)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the block when `condition` holds."""
    with T.If(condition), T.Then():
        yield


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    """`a` where the condition holds, else `b`; both are computed."""
    return tirx.Select(condition, a, b)


def total(vector: Expr) -> Expr:
    """The sum of the lanes."""
    return fold(vector, lambda a, b: a + b)


def is_nan(x: Expr) -> Expr:
    """Whether floats are not a number, by their bits: TVM takes `x == x` to be true."""
    wide = x.ty.dtype.with_lanes(1) == "float64"
    name, width = ("uint64", 64) if wide else ("uint32", 32)
    infinity = 0x7FF << 52 if wide else 0xFF << 23

    def word(value: int) -> Expr:
        return splat(tirx.const(value, name), lanes_of(x))

    return (reinterpret(x, name) & word((1 << (width - 1)) - 1)) > word(infinity)


def number(value: float, like: Expr) -> Expr:
    """A constant of the element type and the lanes of a float value."""
    return splat(tirx.FloatImm(str(like.ty.dtype.with_lanes(1)), value), lanes_of(like))


def largest(vector: Expr) -> Expr:
    """The largest lane."""
    return fold(vector, tirx.max)


def fold(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine the halves of a vector until one lane is left.

    LLVM's own reductions add the lanes in order, one after another.
    """
    lanes = lanes_of(vector)
    while lanes > 2:
        lanes //= 2
        named, kind = bind(vector), vector_type("float32", lanes)
        vector = combine(tirx.vectorlow(kind, named), tirx.vectorhigh(kind, named))
    if lanes == 1:
        return vector
    named = bind(vector)
    return combine(tirx.Shuffle([named], [0]), tirx.Shuffle([named], [1]))


_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_EXP_MIN, _EXP_MAX = -87.33654, 88.72283


def exp(x: Expr) -> Expr:
    """e^x of fp32, scalar or vector, without a library call: 2^n times a polynomial, about 2 ulp.

    Underflows to 0 and overflows to infinity where fp32 does (subnormal results are 0).
    """
    lanes = lanes_of(x)

    def c(value: float) -> Expr:
        return splat(f32(value), lanes)

    inside = bind(tirx.min(tirx.max(x, c(_EXP_MIN)), c(_EXP_MAX)))
    n = bind(tirx.floor(inside * c(_LOG2_E) + c(0.5)))
    r = bind(inside - n * c(_LN2_HIGH) - n * c(_LN2_LOW))
    p = reduce(lambda acc, term: acc * r + c(term), _EXP_TERMS[1:], c(_EXP_TERMS[0]))
    # 2^n in two factors: n = 128 would leave the exponent's range.
    half = cast(n, "int32") >> splat(tirx.const(1, "int32"), lanes)
    rest = cast(n, "int32") - half
    result = bind(p * _power_of_two(half, lanes) * _power_of_two(rest, lanes))
    above = select(x > c(_EXP_MAX), c(float("inf")), result)
    return select(x < c(_EXP_MIN), c(0.0), above)


def _power_of_two(n: Expr, lanes: int) -> Expr:
    shifted = (n + splat(tirx.const(127, "int32"), lanes)) << splat(tirx.const(23, "int32"), lanes)
    return reinterpret(shifted, "float32")


def exp_of_any(x: Expr) -> Expr:
    """e^x of fp32 or fp64, where a NaN stays one."""
    if x.ty.dtype.with_lanes(1) == "float64":
        return libm("expf", x)
    return keep_nan(x, exp(x))


def keep_nan(x: Expr, y: Expr) -> Expr:
    """x where it is a NaN, else y."""
    return select(is_nan(x), x, y)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    one = number(1.0, x)
    if x.ty.dtype.with_lanes(1) == "float64":
        return one / (one + libm("expf", -x))
    return one / (one + exp(-x))


def silu(x: Expr) -> Expr:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def relu(x: Expr) -> Expr:
    """max(x, 0); a NaN stays one."""
    zero = splat(tirx.const(0, str(x.ty.dtype.with_lanes(1))), lanes_of(x))
    return select(x < zero, zero, x)


def gelu(x: Expr) -> Expr:
    """x times the normal distribution's CDF, by erf."""
    return x * number(0.5, x) * (number(1.0, x) + erf(x * number(0.5**0.5, x)))


def gelu_tanh(x: Expr) -> Expr:
    """x * sigmoid(2u), which is x/2 * (1 + tanh u), with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    x = bind(x)
    inner = x + x * x * x * number(0.044715, x)
    return x * sigmoid(inner * number(1.5957691216057308, x))


def erf(x: Expr) -> Expr:
    """The error function."""
    return libm("erff", x)


def libm(name: str, *xs: Expr) -> Expr:
    """A function of the C library, `name` on fp32, lane by lane."""
    lanes = max(lanes_of(x) for x in xs)
    kind = str(xs[0].ty.dtype.with_lanes(1))
    name = name.removesuffix("f") if kind == "float64" else name
    if lanes == 1:
        return tirx.call_pure_extern(kind, name, *xs)
    named = [bind(splat(x, lanes)) for x in xs]

    def lane(i: int) -> Expr:
        scalars = [tirx.Shuffle([v], [i]) for v in named]
        return tirx.call_pure_extern(kind, name, *scalars)

    return tirx.Shuffle([lane(i) for i in range(lanes)], list(range(lanes)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu,
}  # fmt: skip


class Scratch(Tensor):
    """Memory of a task, taken from the thread's pool and given back when the task ends."""

    def __init__(self, dtype: DType, count: Expr) -> None:
        self.dtype, self.shape = dtype, [integer(count)]
        self.buffer = T.alloc_buffer((integer(count),), STORAGE[dtype], scope="global")
