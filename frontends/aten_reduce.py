"""Rows of the ATen table that reduce, scan or order: sums, extremes, softmax, topk."""

from __future__ import annotations

import math
from typing import Any

from dsc.frontends.aten_math import NARROW, Row, truth, widened
from dsc.frontends.lowering import Lowering, Unsupported
from dsc.ir.dims import Dim, Sym
from dsc.ir.graph import Operand, Value
from dsc.ir.types import DType


def _axes(x: Operand, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(x.type.rank))
    if not x.type.rank:  # torch lets a single number have the axes 0 and -1
        return ()
    return tuple(d % x.type.rank for d in ([dim] if isinstance(dim, int) else dim))


def _refuse_nothing(x: Operand, dim: Any) -> None:
    if 0 in (x.type.shape[a] for a in _axes(x, dim)):
        raise Unsupported("the extreme of no numbers, which is an error")


def reduction(op: str) -> Row:
    """`op` over the axes in `dim`, all by default."""

    def row(t: Lowering, x: Operand, dim: Any = None, keepdim: bool = False, **_: Any) -> Operand:
        x = t.cast(x, t.out.dtype)
        if op in ("amax", "amin"):
            _refuse_nothing(x, dim)
        return t.call(op, x, axes=_axes(x, dim), keepdims=keepdim) if x.type.rank else x

    return row


def any_of(t: Lowering, x: Operand, dim: Any = None, keepdim: bool = False) -> Operand:
    """any, as the largest of 0 and 1."""
    if not x.type.rank:
        return t.cast(truth(t, x), t.out.dtype)
    if 0 in (x.type.shape[a] for a in _axes(x, dim)):  # any of nothing: no
        return t.full(t.out.shape, False, t.out.dtype)
    numbers = t.cast(truth(t, x), DType.i64)
    largest = t.call("amax", numbers, axes=_axes(x, dim), keepdims=keepdim)
    return t.cast(largest, t.out.dtype)


def _descending(t: Lowering, x: Operand) -> Operand:
    """Values in the opposite order: negatives, of integers the complement, which all have."""
    if x.type.dtype.is_float:
        return t.call("neg", x)
    if x.type.dtype in (DType.u8, DType.boolean):
        return t.call("neg", t.cast(x, DType.i32))
    return t.call("sub", t.number(-1, x.type.dtype), x)


def arg(sign: int) -> Row:
    """argmax (1) or argmin (-1), of the whole tensor when no axis is given."""

    def row(t: Lowering, x: Operand, dim: int | None = None, keepdim: bool = False) -> Operand:
        x = x if sign > 0 else _descending(t, x)
        if not x.type.rank:
            return t.number(0, DType.i64)
        flat = t.reshape(x, (x.type.numel,)) if dim is None else x
        return t.reshape(t.call("argmax", flat, axis=0 if dim is None else dim), t.out.shape)

    return row


def extreme(op: str, sign: int) -> Row:
    """max.dim and min.dim: values and indices."""

    def row(t: Lowering, x: Operand, dim: int, keepdim: bool = False) -> tuple[Operand, Operand]:
        if not x.type.rank:
            return x, t.number(0, DType.i64)
        _refuse_nothing(x, dim)
        values = t.call(op, x, axes=_axes(x, dim), keepdims=keepdim)
        found = t.call("argmax", x if sign > 0 else _descending(t, x), axis=dim)
        return values, t.reshape(found, values.type.shape)

    return row


def variance(
    t: Lowering, x: Operand, dim: Any = None, correction: float | None = 1, *,
    keepdim: bool = False, **_: Any,
) -> Operand:  # fmt: skip
    """Mean square distance from the mean, over count - correction."""
    axes = _axes(x, dim)
    count: Dim = 1
    for axis in axes:
        count = count * x.type.shape[axis]
    wide = t.cast(x, DType.f32) if x.type.dtype in NARROW else x
    mean = t.call("mean", wide, axes=axes, keepdims=True) if axes else wide
    total = t.call("square", t.call("sub", wide, mean))
    if axes:
        total = t.call("sum", total, axes=axes, keepdims=keepdim)
    free = _degrees_of_freedom(t, count, 1 if correction is None else correction, wide.type.dtype)
    return t.cast(t.call("div", total, free), x.type.dtype)


def _degrees_of_freedom(t: Lowering, count: Dim, correction: float, dtype: DType) -> Operand:
    """count - correction, at least 0 as ATen has it."""
    if isinstance(count, int):
        return t.number(max(0.0, count - correction), dtype)
    free = t.call("sub", t.number(count, dtype), t.number(correction, dtype))
    return t.call("maximum", free, t.number(0, dtype))


def softmax(t: Lowering, x: Operand, dim: int, *_: Any) -> Operand:
    """Softmax along an axis."""
    x = t.cast(x, t.out.dtype)
    if not x.type.rank:  # 1, unless it is no number
        return t.call("exp", t.call("sub", x, x))
    return t.call("softmax", x, axis=dim)


def log_softmax(t: Lowering, x: Operand, dim: int, *_: Any) -> Operand:
    """log(softmax(x)), in fp32 or wider."""
    wide, _dtype = widened(t, x)
    if not wide.type.rank:
        return t.cast(t.call("sub", wide, wide), t.out.dtype)
    shifted = t.call("sub", wide, t.call("amax", wide, axes=(dim,), keepdims=True))
    total = t.call("sum", t.call("exp", shifted), axes=(dim,), keepdims=True)
    return t.cast(t.call("sub", shifted, t.call("log", total)), t.out.dtype)


def topk(
    t: Lowering, x: Operand, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Operand, ...]:
    """Sorted or not: an order is always allowed where none is asked for."""
    if isinstance(k, Sym):
        raise Unsupported("topk of a symbolic count")
    last, axis = x.type.rank - 1, dim % x.type.rank
    swap = [last if i == axis else axis if i == last else i for i in range(x.type.rank)]
    x = t.permute(x, swap)
    if largest:
        values, indices = t.calls("topk", x, k=k)
    else:
        order = _descending(t, x)
        if x.type.dtype.is_float:  # no number comes last, as the largest
            order = t.call("where", t.call("ne", x, x), t.number(-math.inf, x.type.dtype), order)
        _, indices = t.calls("topk", order, k=k)
        values = t.call("gather", x, indices, axis=last)
    return t.permute(values, swap), t.permute(indices, swap)


def sort(t: Lowering, x: Operand, dim: int = -1, descending: bool = False) -> tuple[Value, ...]:
    """Stable, ascending or descending; values and indices."""
    return t.calls("sort", x, axis=dim % x.type.rank, descending=descending)


def histogram(t: Lowering, x: Operand, bins: int = 100, min: float = 0, max: float = 0) -> Operand:
    """Counts of the integers 0 .. bins-1; other histograms are refused."""
    if (min, max) != (0, bins - 1):
        raise Unsupported("histc, except as a count of the integers 0 .. bins-1")
    return t.call("histc", x, bins=bins)
