"""What a row of the ATen table works with: the graph under construction, constants and casts.

ATen promotes element types silently, mixes tensors with Python numbers and knows complex tensors.
The IR has none of this. `Lowering` makes casts explicit, turns numbers into `full {shape=[]}`,
sizes that are used as numbers into `arange`, and carries a complex tensor as a pair of real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from dsc.frontends.symbolic import NotADim, SizeReader
from dsc.ir.dims import Dim, Range, Sym, bounds, free_symbols
from dsc.ir.graph import GraphBuilder, Operand, Value, Weight
from dsc.ir.index_ranges import known_span
from dsc.ir.limits import OPEN
from dsc.ir.types import DType, TensorType


class Unsupported(Exception):
    """An operator, or this use of it, that the table cannot translate; the text says why."""


class Complex(NamedTuple):
    """A complex tensor: its real and its imaginary part, of equal real types."""

    re: Operand
    im: Operand


class SymbolicNumber(NamedTuple):
    """A Python float that was computed from sizes, such as `x.shape[1] ** 0.5`."""

    expr: Any


Scalar: TypeAlias = int | float | bool | Sym | SymbolicNumber
Number: TypeAlias = Operand | Scalar

_PART = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Lowering:
    """One graph being built from one FX graph; rows append to it.

    `out` holds the result types that the tracer recorded for the node being translated.
    """

    def __init__(self, name: str, sizes: SizeReader) -> None:
        self.builder = GraphBuilder(name)
        self.sizes = sizes
        self.outs: tuple[TensorType, ...] = ()
        self.constants: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._starts: dict[str, tuple[Dim, Dim]] = {}
        self._known: dict[str, float] = {}

    @property
    def out(self) -> TensorType:
        """The type of the only result."""
        return self.outs[0]

    def type_of(self, fake: torch.Tensor) -> TensorType:
        """The type of a traced tensor; of a complex one, the type of its parts."""
        dtype = _PART.get(fake.dtype, fake.dtype)
        try:
            return TensorType(DType.of(dtype), self.sizes.shape(fake.shape))
        except KeyError:
            raise Unsupported(f"the element type {dtype} is not in the IR") from None
        except (NotADim, ValueError) as problem:
            raise Unsupported(str(problem)) from None

    def calls(self, op: str, *operands: Operand | None, **attrs: Any) -> tuple[Value, ...]:
        """Append `op` and return all its results."""
        count = self._counts[op] = self._counts.get(op, 0) + 1
        return self.builder.call(op, *operands, hint=f"{op}_{count}", **attrs)

    def call(self, op: str, *operands: Operand | None, **attrs: Any) -> Value:
        """Append `op`, which has one result, and return it."""
        (value,) = self.calls(op, *operands, **attrs)
        return value

    def cast(self, x: Operand, dtype: DType) -> Operand:
        """`x` with another element type."""
        return x if x.type.dtype == dtype else self.call("cast", x, dtype=dtype)

    def reshape(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """`x` with another shape."""
        return x if x.type.shape == tuple(shape) else self.call("reshape", x, shape=tuple(shape))

    def permute(self, x: Operand, dims: Sequence[int]) -> Operand:
        """`x` with axes in another order; negative axes count from the back."""
        dims = tuple(d % x.type.rank for d in dims)
        return x if dims == tuple(range(x.type.rank)) else self.call("permute", x, dims=dims)

    def expand(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """`x` broadcast to a shape."""
        return x if x.type.shape == tuple(shape) else self.call("expand", x, shape=tuple(shape))

    def slice(self, x: Operand, axis: int, start: Dim, end: Dim, step: int = 1) -> Operand:
        """`x[start:end:step]` along an axis, with start and end inside of it."""
        axis %= x.type.rank
        if (start, end, step) == (0, x.type.shape[axis], 1):
            return x
        return self.call("slice", x, axis=axis, start=start, end=end, step=step)

    def full(self, shape: Sequence[Dim], value: Scalar, dtype: DType) -> Operand:
        """A tensor of one number."""
        if isinstance(value, (Sym, SymbolicNumber)):
            return self.expand(self.number(value, dtype), shape)
        return self.call("full", shape=tuple(shape), value=_plain(value, dtype), dtype=dtype)

    def arange(self, start: Dim, end: Dim, dtype: DType = DType.i64) -> Operand:
        """start, start+1, ... below end. Remembered, so that a shifted range stays a range."""
        value = self.call("arange", start=start, end=end, dtype=dtype)
        self._starts[value.name] = (start, end)
        return value

    def is_position(self, x: Operand) -> bool:
        """Whether no element of `x` is negative, as far as the operators before it tell."""
        span = known_span(x, self.builder.nodes)
        if span is None:
            return False
        sizes = dict.fromkeys(free_symbols(span.low), Range(0, OPEN))
        return bounds(span.low, sizes).lo >= 0

    def shifted(self, x: Number, by: Number) -> Operand | None:
        """`x + by` as another range, when `x` is a range and `by` a size; else `None`."""
        known = self._starts.get(x.name) if isinstance(x, Value) else None
        if known is None or not isinstance(by, (int, Sym)) or isinstance(by, bool):
            return None
        assert isinstance(x, Value)
        if by == 0:
            return x
        return self.arange(known[0] + by, known[1] + by, x.type.dtype)

    def number(self, value: Scalar, dtype: DType) -> Operand:
        """A number as a value of shape []. A size becomes a range of one element."""
        if isinstance(value, SymbolicNumber):
            return self._computed(value.expr, dtype)
        if isinstance(value, Sym):
            point = self.call("arange", start=value, end=value + 1, dtype=DType.i64)
            return self.cast(self.call("reshape", point, shape=()), dtype)
        found = self.call("full", shape=(), value=_plain(value, dtype), dtype=dtype)
        self._known[found.name] = value
        return found

    def known(self, x: Number) -> Number:
        """The number that a value of shape [] was made of; other values as they are."""
        return self._known.get(x.name, x) if isinstance(x, Value) else x

    def operand(self, x: Number, dtype: DType) -> Operand:
        """`x` as a value of the given element type, be it a tensor or a number."""
        return self.cast(x, dtype) if isinstance(x, (Value, Weight)) else self.number(x, dtype)

    def constant(self, name: str, tensor: torch.Tensor) -> Operand:
        """A tensor known when tracing, as a weight with a value of its own."""
        while name in self.constants:
            name += "_"
        self.constants[name] = tensor
        return Weight(name, TensorType(DType.of(tensor.dtype), tuple(tensor.shape)))

    def rejoin(self, parts: Complex) -> Operand:
        """A complex value as torch.view_as_real shows it: [..., 2]."""
        shape = (*parts.re.type.shape, 1)
        pair = (self.reshape(parts.re, shape), self.reshape(parts.im, shape))
        return self.call("concat", *pair, axis=len(shape) - 1)

    def _computed(self, expr: Any, dtype: DType) -> Operand:
        """A float expression over sizes, evaluated on scalars."""
        if expr.is_number:
            return self.number(float(expr), dtype)
        kind, terms = type(expr).__name__, expr.args
        if expr.is_Symbol or kind == "ToFloat":
            return self.number(self.sizes._dim(terms[0] if terms else expr), dtype)
        if kind in ("Pow", "FloatPow", "PowByNatural"):
            if terms[1] == 0.5:
                return self.call("sqrt", self._computed(terms[0], dtype))
            return self.call("pow", *(self._computed(t, dtype) for t in terms))
        if kind in ("OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_log", "OpaqueUnaryFn_exp"):
            return self.call(kind.rpartition("_")[2], self._computed(terms[0], dtype))
        op = {"Add": "add", "Mul": "mul", "FloatTrueDiv": "div", "IntTrueDiv": "div"}.get(kind)
        if op is None:
            raise Unsupported(f"the number {expr}, computed from sizes")
        result = self._computed(terms[0], dtype)
        for term in terms[1:]:
            result = self.call(op, result, self._computed(term, dtype))
        return result


def _plain(value: float, dtype: DType) -> float:
    """A Python number as the attribute of a `full` of type `dtype`, wrapped as torch does."""
    if not dtype.is_float and int(float(value)) != value:
        raise Unsupported(f"the constant {value}, which fp64 does not hold exactly")
    return float(value if dtype.is_float else torch.tensor(int(value)).to(dtype.torch))
