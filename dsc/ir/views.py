"""Strided views: where a value's elements lie in its buffer.

Reshape, permute, expand, slice and split move nothing: they change strides and an offset. Kernels
take strides, so most views cost no launch; what a kernel cannot address is copied, by the caller.
All numbers are in elements and may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsc.ir.dims import Dim, product
from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class View:
    """Element [i, j, …] of the value is element `offset + i*strides[0] + …` of `buffer`."""

    buffer: int
    type: TensorType
    strides: tuple[Dim, ...]
    offset: Dim = 0

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the value."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """The element type of the value."""
        return self.type.dtype

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        dense = dense_strides(self.shape)
        pairs = zip(self.shape, self.strides, dense, strict=True)
        return all(d == 1 or s == w for d, s, w in pairs)

    def strided(self, shape: tuple[Dim, ...], strides: tuple[Dim, ...], offset: Dim = 0) -> View:
        """The view with another shape and strides, `offset` further into the buffer."""
        moved = self.offset + offset
        return View(self.buffer, self.type.with_shape(shape), strides, moved)


def extent(view: View) -> Dim:
    """How many elements lie between a view's first and its last, both included."""
    reach: Dim = 1
    for dim, stride in zip(view.shape, view.strides, strict=True):
        reach = reach + (dim - 1) * stride
    return reach


def dense_strides(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides of a shape."""
    strides: list[Dim] = []
    step: Dim = 1
    for dim in reversed(shape):
        strides.append(step)
        step = step * dim
    return tuple(reversed(strides))


def permute(view: View, dims: Sequence[int]) -> View:
    """Axis i of the result is axis dims[i]."""
    shape = tuple(view.shape[d] for d in dims)
    return view.strided(shape, tuple(view.strides[d] for d in dims))


def expand(view: View, shape: tuple[Dim, ...]) -> View:
    """Broadcast to `shape`: new axes and axes of one element get stride 0."""
    lead = len(shape) - len(view.shape)
    strides: list[Dim] = [0] * lead
    for have, want, stride in zip(view.shape, shape[lead:], view.strides, strict=True):
        strides.append(0 if have == 1 and want != 1 else stride)
    return view.strided(shape, tuple(strides))


def narrow(view: View, axis: int, start: Dim, extent: Dim, step: int = 1) -> View:
    """`extent` elements of one axis from `start`, every `step`-th."""
    axis %= len(view.shape)
    shape = (*view.shape[:axis], extent, *view.shape[axis + 1 :])
    strides = (*view.strides[:axis], view.strides[axis] * step, *view.strides[axis + 1 :])
    return view.strided(shape, strides, view.strides[axis] * start)


def merge(shape: Sequence[Dim], strides: Sequence[Dim]) -> tuple[Dim, Dim] | None:
    """Axes as one axis (extent, stride), or `None` when their elements are not evenly spaced."""
    kept = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    if not kept:
        return 1, 0
    extent, stride = kept[-1]
    for dim, step in reversed(kept[:-1]):
        if step != stride * extent:
            return None
        extent = extent * dim
    return extent, stride


def joined(axes: Sequence[tuple[Dim, Dim]]) -> list[tuple[Dim, Dim]]:
    """Axes (extent, stride) without those of one element, neighbours joined where evenly spaced."""
    found: list[tuple[Dim, Dim]] = []
    for extent, stride in axes:
        if extent == 1:
            continue
        if found and found[-1][1] == stride * extent:
            extent = found.pop()[0] * extent
        found.append((extent, stride))
    return found


def reshape(view: View, shape: tuple[Dim, ...]) -> View | None:
    """The view under another shape, or `None` when that needs a copy.

    Axes are matched in runs of equal element count, from the front; a run of the old shape must be
    evenly spaced to be cut anew.
    """
    old = [(d, s) for d, s in zip(view.shape, view.strides, strict=True) if d != 1]
    new = [d for d in shape if d != 1]
    strides: list[Dim] = []
    i = j = 0
    while j < len(new):
        if i >= len(old):
            return None
        run, cut = [old[i]], [new[j]]
        i, j = i + 1, j + 1
        while product(tuple(d for d, _ in run)) != product(tuple(cut)):
            have, want = product(tuple(d for d, _ in run)), product(tuple(cut))
            grow_new = isinstance(have, int) and isinstance(want, int) and want < have
            if not grow_new and i < len(old) and (j >= len(new) or _divides(want, have)):
                run.append(old[i])
                i += 1
            elif j < len(new):
                cut.append(new[j])
                j += 1
            else:
                return None
        merged = merge([d for d, _ in run], [s for _, s in run])
        if merged is None:
            return None
        step = merged[1]
        strides.extend(s * step for s in dense_strides(cut))
    if i != len(old):
        return None
    walk = iter(strides)
    full = tuple(0 if d == 1 else next(walk) for d in shape)
    return replace(view, type=view.type.with_shape(shape), strides=full)


def _divides(large: Dim, small: Dim) -> bool:
    """Whether `small` is known to divide `large`, so that the old run is the one to grow."""
    quotient = large // small
    return quotient * small == large


def fold(view: View, axes: int) -> tuple[Dim, Dim] | None:
    """The first `axes` axes as one (rows, stride), or `None`."""
    return merge(view.shape[:axes], view.strides[:axes])


def has_unit_rows(view: View) -> bool:
    """Whether the innermost axis is contiguous."""
    return view.shape[-1] == 1 or view.strides[-1] == 1
