"""Rows of the ATen table that move elements: views, slices, joins, fills, indexing.

Result shapes come from the tracer (`t.out`), which has resolved every -1 and every default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dsc.frontends.lowering import Lowering, Number, Scalar, Unsupported
from dsc.ir.dims import Dim, Sym, product
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.types import DType

Row: TypeAlias = Callable[..., Any]


def broadcast_in_dim(t: Lowering, x: Operand, shape: Any, dims: Sequence[int]) -> Operand:
    """Axis i of x becomes axis dims[i] of the traced shape."""
    ones: list[Dim] = [1] * t.out.rank
    for extent, axis in zip(x.type.shape, dims, strict=True):
        ones[axis] = extent
    return t.expand(t.reshape(x, ones), t.out.shape)


def transpose(t: Lowering, x: Operand, a: int = 0, b: int = 1) -> Operand:
    """Two axes exchanged; `t()` too."""
    if x.type.rank < 2:
        return x
    dims = list(range(x.type.rank))
    dims[a], dims[b] = dims[b], dims[a]
    return t.permute(x, dims)


def _bounded(position: Any, extent: Dim) -> Dim:
    """A start counted from the front. The end of a slice follows from the traced extent."""
    if isinstance(position, int) and position < 0:
        return max(extent + position, 0) if isinstance(extent, int) else extent + position
    if isinstance(position, int) and isinstance(extent, int):
        return min(position, extent)
    if not isinstance(position, (int, Sym)):
        raise Unsupported("a slice at a position that depends on data")
    return position


def slice_axis(
    t: Lowering, x: Operand, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Operand:
    """`x[..., start:end:step, ...]`."""
    first = _bounded(0 if start is None else start, x.type.shape[dim])
    wanted, extent = t.out.shape[dim], x.type.shape[dim]
    if step == 1:
        return t.slice(x, dim, first, first + wanted)
    if isinstance(wanted, int):
        return t.slice(x, dim, first, first + (wanted - 1) * step + 1, step)
    unbounded = end is None or (isinstance(end, int) and end >= 2**62)
    return t.slice(x, dim, first, extent if unbounded else _bounded(end, extent), step)


def select(t: Lowering, x: Operand, dim: int, index: Any) -> Operand:
    """`x[..., index, ...]`."""
    first = _bounded(index, x.type.shape[dim])
    return t.reshape(t.slice(x, dim, first, first + 1), t.out.shape)


def broadcast_along(t: Lowering, x: Operand, axis: int, shape: Sequence[Dim]) -> Operand:
    """A vector along an axis of `shape`, the same everywhere else."""
    ones = [extent if place == axis else 1 for place, extent in enumerate(shape)]
    return t.expand(t.reshape(x, ones), tuple(shape))


def slice_scatter(
    t: Lowering, x: Operand, part: Operand, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Operand:  # fmt: skip
    """A copy of x with part of an axis replaced."""
    first = _bounded(0 if start is None else start, x.type.shape[dim])
    extent = part.type.shape[dim]
    if extent == x.type.shape[dim]:
        return t.cast(part, x.type.dtype)
    part = t.cast(part, x.type.dtype)
    axis = dim % x.type.rank
    if step != 1:
        places = t.call("mul", t.arange(0, extent), t.number(step, DType.i64))
        places = t.call("add", places, t.number(first, DType.i64))
        index = broadcast_along(t, places, axis, part.type.shape)
        return t.call("scatter", x, index, part, axis=axis)
    return t.call("slice_scatter", x, part, axis=axis, start=first, end=first + extent)


def split(t: Lowering, x: Operand, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """split_with_sizes and chunk: the traced extents say where."""
    axis = dim % x.type.rank
    return t.calls("split", x, sizes=tuple(o.shape[axis] for o in t.outs), axis=axis)


def concat(t: Lowering, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """torch.cat, without operands that are empty along the axis."""
    rank = t.out.rank
    filled = [x for x in tensors if x.type.rank == rank and x.type.shape[dim] != 0]
    if not filled:
        return t.full(t.out.shape, 0, t.out.dtype)
    parts = [t.cast(x, t.out.dtype) for x in filled]
    return parts[0] if len(parts) == 1 else t.call("concat", *parts, axis=dim % rank)


def repeat(t: Lowering, x: Operand, repeats: Sequence[Dim]) -> Operand:
    """torch.Tensor.repeat: tile."""
    shape = (*(1,) * (len(repeats) - x.type.rank), *x.type.shape)
    if all(n == 1 for n in repeats):
        return t.reshape(x, shape)
    paired = [d for n in shape for d in (1, n)]
    tiled = [d for n, m in zip(repeats, shape, strict=True) for d in (n, m)]
    return t.reshape(t.expand(t.reshape(x, paired), tiled), t.out.shape)


def flip(t: Lowering, x: Operand, dims: Sequence[int]) -> Operand:
    """Axes in reverse."""
    for dim in dims:
        last = t.number(x.type.shape[dim] - 1, DType.i64)
        order = t.call("sub", last, t.arange(0, x.type.shape[dim]))
        x = t.call("take", x, order, axis=dim % x.type.rank)
    return x


def roll(t: Lowering, x: Operand, shifts: Any, dims: Any = ()) -> Operand:
    """Axes rotated."""
    shifts = [shifts] if isinstance(shifts, (int, Sym)) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        flat = roll(t, t.reshape(x, (x.type.numel,)), shifts, [0])
        return t.reshape(flat, t.out.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        extent = x.type.shape[dim]
        at = -shift % extent if isinstance(shift, int) and isinstance(extent, int) else None
        if at is None and not (isinstance(shift, int) and abs(shift) == 1):
            raise Unsupported("roll by a count that may exceed the axis")
        at = at if at is not None else (extent - 1 if shift == 1 else 1)
        parts = (t.slice(x, dim, at, extent), t.slice(x, dim, 0, at))
        filled = [p for p in parts if p.type.shape[dim] != 0]
        x = filled[0] if len(filled) == 1 else t.call("concat", *filled, axis=dim % x.type.rank)
    return x


def pad(t: Lowering, x: Operand, widths: Sequence[Dim], value: Scalar = 0.0) -> Operand:
    """torch.nn.functional.pad with a constant; negative widths crop."""
    for i in range(len(widths) // 2):
        axis = x.type.rank - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        if not isinstance(before, int) or not isinstance(after, int):
            raise Unsupported("padding by a symbolic width")
        extent = x.type.shape[axis]
        x = t.slice(x, axis, max(-before, 0), extent - max(-after, 0))
        shape = x.type.shape
        sides = [
            t.full((*shape[:axis], n, *shape[axis + 1 :]), value, x.type.dtype) if n > 0 else None
            for n in (before, after)
        ]
        parts = [p for p in (sides[0], x, sides[1]) if p is not None]
        x = parts[0] if len(parts) == 1 else t.call("concat", *parts, axis=axis)
    return x


# Fills.


def zeros(t: Lowering, *_: Any, **__: Any) -> Operand:
    """zeros in its forms, and what `empty` holds here."""
    return t.full(t.out.shape, 0, t.out.dtype)


def fill(t: Lowering, _: Any, value: Scalar, **__: Any) -> Operand:
    """full and full_like."""
    return t.full(t.out.shape, value, t.out.dtype)


def arange(
    t: Lowering, start: Number, end: Number | None = None, step: Number = 1, **_: Any
) -> Operand:
    """torch.arange; a step or a float range is computed from an integer one."""
    start, end = (0, start) if end is None else (start, end)
    dtype = t.out.dtype
    integral = all(isinstance(x, (int, Sym)) for x in (start, end))
    if integral and step == 1:
        return t.cast(t.arange(start, end), dtype)  # type: ignore[arg-type]
    counted = t.cast(t.arange(0, t.out.shape[0]), dtype)
    scaled = counted if step == 1 else t.call("mul", counted, t.operand(step, dtype))
    return scaled if start == 0 else t.call("add", scaled, t.operand(start, dtype))


# Indexing.


def take(t: Lowering, x: Operand, dim: int, index: Operand) -> Operand:
    """index_select."""
    return t.call("take", x, t.cast(index, DType.i64), axis=dim % x.type.rank)


def _from_front(t: Lowering, index: Operand, extent: Dim) -> Operand:
    """An index as i64, negative entries counted from the front.

    Those of a constant here and now; of what is known to start at 0 or later there are none.
    """
    if index.type.dtype is DType.boolean:
        raise Unsupported("indexing by a mask, whose result has a length that depends on data")
    known = t.constants.get(index.name) if isinstance(index, Weight) else None
    if known is not None and bool((known < 0).any()):
        if not isinstance(extent, int):
            at = t.call("lt", index, t.number(0, index.type.dtype))
            wrapped = t.call("add", index, t.number(extent, index.type.dtype))
            return t.cast(t.call("where", at, wrapped, index), DType.i64)
        assert isinstance(index, Weight)
        index = t.constant(index.name, known.where(known >= 0, known + extent))
    elif known is None and not t.is_position(index):
        wide = t.cast(index, DType.i64)
        at = t.call("lt", wide, t.number(0, DType.i64))
        return t.call("where", at, t.call("add", wide, t.number(extent, DType.i64)), wide)
    return t.cast(index, DType.i64)


def _linear_index(
    t: Lowering, x: Operand, axes: Sequence[int], indices: Sequence[Operand | None]
) -> Operand:
    """One index over the product of `axes` from one index an axis."""
    given = (_from_front(t, indices[a], x.type.shape[a]) for a in axes)  # type: ignore[arg-type]
    total: Operand = next(given)
    for axis, index in zip(axes[1:], given, strict=True):
        scaled = t.call("mul", total, t.number(x.type.shape[axis], DType.i64))
        total = t.call("add", scaled, index)
    return total


def _indexed_first(t: Lowering, x: Operand, axes: Sequence[int]) -> tuple[list[int], Operand]:
    """x with `axes` as one axis in front, and the order of axes before they were joined."""
    rest = [i for i in range(x.type.rank) if i not in axes]
    rows = product(tuple(x.type.shape[a] for a in axes))
    moved = t.permute(x, [*axes, *rest])
    return [*axes, *rest], t.reshape(moved, (rows, *(x.type.shape[i] for i in rest)))


def index(t: Lowering, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    """Advanced indexing by integers: one index an axis, broadcast against each other."""
    axes = [i for i, one in enumerate(indices) if one is not None]
    at = _linear_index(t, x, axes, indices)
    if len(axes) == 1:
        return t.call("take", x, at, axis=axes[0])
    adjacent = axes == list(range(axes[0], axes[-1] + 1))
    _, flat = _indexed_first(t, x, axes)
    taken = t.call("take", flat, at, axis=0)
    if not adjacent or axes[0] == 0:
        return taken
    n = at.type.rank
    order = [*range(n, n + axes[0]), *range(n), *range(n + axes[0], taken.type.rank)]
    return t.permute(taken, order)


def index_put(
    t: Lowering, x: Operand, indices: Sequence[Operand | None], values: Operand,
    accumulate: bool = False, *_: Any,
) -> Operand:  # fmt: skip
    """Rows replaced, or increased, at integer indices into neighbouring axes."""
    axes = [i for i, one in enumerate(indices) if one is not None]
    first = indices[axes[0]]
    if first is not None and first.type.dtype is DType.boolean:
        return _masked_put(t, x, axes, first, values, accumulate)
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Unsupported("index_put that skips an axis between two indices")
    at = _linear_index(t, x, axes, indices)
    order, flat = _indexed_first(t, x, axes)
    values = _indices_first(t, t.cast(values, x.type.dtype), x, axes, at)
    put = t.call("index_put", flat, at, values, accumulate=accumulate)
    apart = t.reshape(put, [x.type.shape[i] for i in order])
    return t.permute(apart, [order.index(i) for i in range(len(order))])


def _indices_first(
    t: Lowering, values: Operand, x: Operand, axes: Sequence[int], at: Operand
) -> Operand:
    """Values of an index_put with the index's axes in front, where they are not yet."""
    before, n = axes[0], at.type.rank
    if before == 0:
        return values
    shape = (*x.type.shape[:before], *at.type.shape, *x.type.shape[axes[-1] + 1 :])
    order = [*range(before, before + n), *range(before), *range(before + n, len(shape))]
    return t.permute(t.expand(values, shape), order)


def _masked_put(
    t: Lowering, x: Operand, axes: Sequence[int], mask: Operand, value: Operand, accumulate: bool
) -> Operand:
    """`x[mask] = number`."""
    if value.type.numel != 1 or accumulate or len(axes) > 1:
        raise Unsupported("index_put of several values under a mask")
    ones = x.type.rank - axes[0] - mask.type.rank
    wide = t.reshape(mask, (*mask.type.shape, *(1,) * ones))
    return t.call("where", wide, t.reshape(t.cast(value, x.type.dtype), ()), x)


def scatter(t: Lowering, x: Operand, dim: int, index: Operand, values: Any, **_: Any) -> Operand:
    """torch.scatter of a tensor or a number."""
    values = t.operand(values, x.type.dtype)
    if values.type.rank and values.type.shape != index.type.shape:
        for axis, extent in enumerate(index.type.shape):
            values = t.slice(values, axis, 0, extent)
    axis = dim % x.type.rank
    return t.call("scatter", x, t.cast(index, DType.i64), values, axis=axis)


def one_hot(t: Lowering, x: Operand, classes: Dim = -1) -> Operand:
    """Indicator rows; read through a range, so that an index outside of it is an error."""
    if not isinstance(classes, int) or classes < 0:
        raise Unsupported("one_hot without a number of classes")
    numbers = t.arange(0, classes)
    inside = t.call("take", numbers, t.cast(x, DType.i64), axis=0)
    spread = t.reshape(inside, (*x.type.shape, 1))
    return t.cast(t.call("eq", spread, numbers), DType.i64)
