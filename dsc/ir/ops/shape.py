"""Operators that only move or view elements: reshape, permute, slice, concat, gather, fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsc.ir.dims import Dim, Sym, product
from dsc.ir.extents import Extent
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op
from dsc.ir.placement import PlacedCall, Placing, Split, linear_map, other_axes
from dsc.ir.sized import Shape, Sized
from dsc.ir.traits import ASCENDING, Role, Traits, Within, each_result, nothing
from dsc.ir.types import DType, TensorType

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front. Raises `TypeMismatch` outside of -rank..rank-1."""
    if not -rank <= axis < rank:
        raise TypeMismatch(f"axis {axis} of a value of rank {rank}")
    return axis % rank


def _infer_reshape(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    if product(attrs["shape"]) != x.numel:
        raise TypeMismatch(
            f"{x.numel} elements cannot take the shape {list(map(str, attrs['shape']))}"
        )
    return (x.with_shape(attrs["shape"]),)


def _infer_permute(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    if sorted(attrs["dims"]) != list(range(x.rank)):
        raise TypeMismatch(f"{attrs['dims']} is no permutation of {x.rank} axes")
    return (x.with_shape(tuple(x.shape[d] for d in attrs["dims"])),)


def _infer_expand(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    shape = attrs["shape"]
    if len(shape) < x.rank:
        raise TypeMismatch(f"rank {x.rank} does not expand to rank {len(shape)}")
    for given, wanted in zip(x.shape, shape[len(shape) - x.rank :], strict=True):
        if given not in (1, wanted):
            raise TypeMismatch(f"a dim of {given} does not expand to {wanted}")
    return (x.with_shape(shape),)


def slice_extent(dim: Dim, start: Dim, end: Dim, step: int) -> Dim:
    """Number of elements that `start:end:step` takes of an axis of `dim` elements."""
    if step < 1:
        raise TypeMismatch(f"a slice step of {step}; it must be positive")
    if all(isinstance(d, int) for d in (dim, start, end)) and not 0 <= start <= end <= dim:  # type: ignore[operator]
        raise TypeMismatch(f"slice {start}:{end} of an axis of {dim}")
    return (end - start + step - 1) // step if step > 1 else end - start


def _infer_slice(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    axis = axis_of(attrs["axis"], x.rank)
    extent = slice_extent(x.shape[axis], attrs["start"], attrs["end"], attrs["step"])
    return (x.with_shape((*x.shape[:axis], extent, *x.shape[axis + 1 :])),)


def _slice(x: Any, axis: int, start: int, end: int, step: int) -> Any:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _infer_concat(types: Types, attrs: Mapping[str, Any]) -> Result:
    first = types[0]
    axis = axis_of(attrs["axis"], first.rank)
    total: Dim = 0
    for t in types:
        same = t.rank == first.rank and all(
            a == b for i, (a, b) in enumerate(zip(t.shape, first.shape, strict=True)) if i != axis
        )
        if not same:
            raise TypeMismatch(f"{t} and {first} differ outside of axis {axis}")
        total = total + t.shape[axis]
    return (first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1 :])),)


def _infer_split(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    axis = axis_of(attrs["axis"], x.rank)
    total: Dim = 0
    for size in attrs["sizes"]:
        total = total + size
    if total != x.shape[axis]:
        raise TypeMismatch(f"sizes sum to {total}, the axis has {x.shape[axis]}")
    return tuple(
        x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in attrs["sizes"]
    )


def _infer_gather(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, index = types
    check_index(x, index, attrs["axis"])
    return (x.with_shape(index.shape),)


def check_index(x: TensorType, index: TensorType, axis: int) -> None:
    """Raise `TypeMismatch` unless `index` looks up elements of `x` along `axis`, torch's way."""
    axis = axis_of(axis, x.rank)
    if index.rank != x.rank:
        raise TypeMismatch(f"the index has rank {index.rank}, the operand {x.rank}")
    for i, (wanted, there) in enumerate(zip(index.shape, x.shape, strict=True)):
        known = isinstance(wanted, int) and isinstance(there, int)
        if i != axis and known and wanted > there:  # type: ignore[operator]
            raise TypeMismatch(f"the index {index} is larger than {x} outside of axis {axis}")


def _infer_take(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, index = types
    axis = axis_of(attrs["axis"], x.rank)
    return (x.with_shape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])),)


def _take(x: Any, index: Any, axis: int) -> Any:
    axis %= x.dim()
    flat = x.index_select(axis, index.reshape(-1))
    return flat.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _infer_arange(types: Types, attrs: Mapping[str, Any]) -> Result:
    extent = attrs["end"] - attrs["start"]
    if isinstance(extent, int) and extent < 0:
        raise TypeMismatch(f"arange of {extent} elements")
    return (TensorType(attrs["dtype"], (extent,)),)


def _infer_full(types: Types, attrs: Mapping[str, Any]) -> Result:
    dtype, value = attrs["dtype"], attrs["value"]
    if not dtype.is_float:
        low = 0 if dtype in (DType.boolean, DType.u8) else -(1 << (dtype.bits - 1))
        high = 1 if dtype is DType.boolean else low + (1 << dtype.bits) - 1
        if value // 1 != value or not low <= value <= high:
            raise TypeMismatch(f"{value} is no {dtype}")
    return (TensorType(dtype, attrs["shape"]),)


def _full(shape: tuple[int, ...], value: float, dtype: DType) -> Any:
    return torch.full(shape, value, dtype=dtype.torch)


def outside(shape: Shape, axis: int) -> Shape:
    """The extents of all axes but one."""
    return shape[:axis] + shape[axis + 1 :]


def _numel(shape: Shape) -> Extent:
    total = Extent.number(1)
    for extent in shape:
        total = total * extent
    return total


def _demand_reshape(call: Sized) -> None:
    x, out = call["x"], call.outs[0]
    call.same(call.extents["shape"], out)
    before, after = call.operands["x"].shape, call.results[0].shape
    for side in (1, -1):  # equal axes at either end are the same axes
        pairs = zip(before[::side], after[::side], x[::side], out[::side], strict=False)
        for given, wanted, mine, theirs in pairs:
            if given != wanted:
                break
            call.system.equate(mine, theirs)
    call.system.equate(_numel(x), _numel(out))


def _place_reshape(call: PlacedCall) -> Placing | str:
    """The split axis must begin an axis of the result that can be split as well."""
    lies = call.lies.get("x")
    if not isinstance(lies, Split):
        return linear_map(call)
    shape: tuple[Dim, ...] = call.attrs["shape"]
    before = product(call["x"].shape[: lies.axis])
    for axis, extent in enumerate(shape):
        if product(shape[:axis]) == before and extent != 1 and call.divides(extent):
            local = (*shape[:axis], extent // call.ranks, *shape[axis + 1 :])
            return Placing((Split(axis),), attrs={"shape": local})
    return f"the split axis begins no axis of the result that parts into {call.ranks}"


def _place_permute(call: PlacedCall) -> Placing | str:
    lies = call.lies.get("x")
    if not isinstance(lies, Split):
        return linear_map(call)
    return Placing((Split(call.attrs["dims"].index(lies.axis)),))


def _demand_expand(call: Sized) -> None:
    call.same(call.extents["shape"], call.outs[0])
    call.broadcast(call.operands["x"], call["x"], call.outs[0], call.results[0].shape)


def _demand_slice(call: Sized) -> None:
    axis = axis_of(call.attrs["axis"], call.operands["x"].rank)
    x, out = call["x"], call.outs[0]
    call.same(outside(x, axis), outside(out, axis))
    start, end, step = call.extents["start"], call.extents["end"], call.attrs["step"]
    call.system.at_most(end, x[axis])
    first, last, taken = call.attrs["start"], call.attrs["end"], call.results[0].shape[axis]
    over = taken * step - (last - first)  # 0:63:2 takes 32 elements, one step beyond its end
    spare = Extent.number(over if isinstance(over, int) else 0)
    call.system.equate(end + spare, start + Extent.number(step) * out[axis])


def demand_parts(call: Sized, parts: Sequence[Shape], whole: Shape) -> None:
    """`whole` is the parts, one after another along the axis that an attribute names."""
    axis = axis_of(call.attrs["axis"], len(whole))
    total = Extent.number(0)
    for part in parts:
        call.same(outside(part, axis), outside(whole, axis))
        total = total + part[axis]
    call.system.equate(total, whole[axis])


def _demand_split(call: Sized) -> None:
    axis = axis_of(call.attrs["axis"], len(call["x"]))
    call.same(call.extents["sizes"], [out[axis] for out in call.outs])
    demand_parts(call, call.outs, call["x"])


def _demand_stack(call: Sized) -> None:
    out = call.outs[0]
    for _, x in call.given():
        call.same(x, out[1:])
    if not call.in_weights:  # in a weight expression, operands are dropped
        call.system.equate(out[0], Extent.number(len(call.ins)))


def demand_index(call: Sized) -> None:
    """An index has at most the extents of what it looks into, outside of its axis."""
    axis = axis_of(call.attrs["axis"], len(call["x"]))
    for wanted, there in zip(outside(call["index"], axis), outside(call["x"], axis), strict=True):
        call.system.at_most(wanted, there)


def _demand_gather(call: Sized) -> None:
    call.same(call["index"], call.outs[0])
    demand_index(call)


def _demand_take(call: Sized) -> None:
    x, index = call["x"], call["index"]
    axis = axis_of(call.attrs["axis"], len(x))
    call.same([*x[:axis], *index, *x[axis + 1 :]], call.outs[0])


reshape = op(
    "reshape(x: T[...]; shape: dims) -> T[...]",
    Traits(
        Role.VIEW,
        flops=nothing,
        arrays=lambda x, shape: x.reshape(shape),
        demand=_demand_reshape,
        place=_place_reshape,
    ),
    reference=lambda x, shape: x.reshape(shape),
    doc="The same elements in row-major order under another shape.",
    example="f32[2,3,4] {shape=[6,4]}",
    infer=_infer_reshape,
    elements="order",
)
permute = op(
    "permute(x: T[...]; dims: ints) -> T[...]",
    Traits(
        Role.VIEW,
        flops=nothing,
        arrays=lambda x, dims: x.transpose(dims),
        demand=lambda c: c.same([c["x"][d] for d in c.attrs["dims"]], c.outs[0]),
        place=_place_permute,
    ),
    reference=lambda x, dims: x.permute(dims),
    doc="Axis i of the result is axis dims[i] of x.",
    example="f32[2,3,4] {dims=[2,0,1]}",
    infer=_infer_permute,
    elements="all",
)
expand = op(
    "expand(x: T[...]; shape: dims) -> T[...]",
    Traits(Role.VIEW, flops=nothing, demand=_demand_expand),
    reference=lambda x, shape: x.expand(shape),
    doc="Broadcast x to a shape.",
    example="f32[3,1] {shape=[2,3,4]}",
    infer=_infer_expand,
    elements="all",
)
slice_ = op(
    "slice(x: T[...]; axis: int, start: dim, end: dim, step: int = 1) -> T[...]",
    Traits(Role.VIEW, flops=nothing, arrays=_slice, demand=_demand_slice, place=other_axes),
    reference=_slice,
    doc="Elements start, start+step, … below end of one axis.",
    example="f32[2,7] {axis=1, start=1, end=6, step=2}",
    infer=_infer_slice,
    elements="some",
)
concat = op(
    "concat(xs: T[...]...; axis: int) -> T[...]",
    Traits(
        Role.JOIN,
        flops=nothing,
        arrays=lambda *xs, axis: np.concatenate(xs, axis),
        demand=lambda c: demand_parts(c, [x for _, x in c.given()], c.outs[0]),
    ),
    reference=lambda *xs, axis: torch.cat(xs, axis),
    doc="Operands one after another along an axis.",
    example="f32[2,3], f32[2,1], f32[2,2] {axis=-1}",
    infer=_infer_concat,
)
stack = op(
    "stack(xs: T[*n]...) -> T[...]",
    Traits(Role.JOIN, flops=nothing, arrays=lambda *xs: np.stack(xs), demand=_demand_stack),
    reference=lambda *xs: torch.stack(xs),
    doc="Operands of one shape along a new leading axis.",
    example="f32[2,3], f32[2,3]",
    infer=lambda types, attrs: (types[0].with_shape((len(types), *types[0].shape)),),
)
split = op(
    "split(x: T[...]; sizes: dims, axis: int = -1) -> T[...]",
    Traits(Role.VIEW, flops=nothing, demand=_demand_split, place=other_axes),
    reference=lambda x, sizes, axis: x.split(list(sizes), axis),
    doc="Consecutive parts of one axis, one result each.",
    example="f32[2,7] {sizes=[3,4]}",
    infer=_infer_split,
    elements="some",
)
gather = op(
    "gather(x: T[...], index: i64[...]; axis: int) -> T[...]",
    Traits(Role.LOOKUP, flops=nothing, reads={"x": each_result}, demand=_demand_gather),
    reference=lambda x, index, axis: x.gather(axis, index),
    doc="Element-wise lookup along an axis (torch.gather).",
    example="f32[2,3], i64[2,2]=1 {axis=1}",
    infer=_infer_gather,
    within={"index": Within("0", "extent-1")},
    elements="some",
)
take = op(
    "take(x: T[...], index: i64[...]; axis: int) -> T[...]",
    Traits(Role.LOOKUP, flops=nothing, reads={"x": each_result}, demand=_demand_take),
    reference=_take,
    doc="Whole slices of an axis by index; the axis becomes the index's axes.",
    example="f32[4,3], i64[2,2]=3 {axis=0}",
    infer=_infer_take,
    within={"index": Within("0", "extent-1")},
    elements="some",
)
select_rows = op(
    "select_rows(x: T[b, s, d], index: i64[b, l]) -> T[b, l, d]",
    Traits(Role.LOOKUP, flops=nothing, reads={"x": each_result}, place=linear_map),
    reference=lambda x, index: x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])),
    doc="Rows index[b, :] of each sequence: the tokens whose logits are wanted.",
    example="f32[2,5,3], i64[2,2]=4",
    within={"index": Within("0", "s-1", "the place of a new token")},
)
full = op(
    "full(; shape: dims, value: float, dtype: dtype) -> T[...]",
    Traits(Role.CONSTANT, flops=nothing, demand=lambda c: c.same(c.extents["shape"], c.outs[0])),
    reference=_full,
    doc="A tensor of one value; a scalar constant has the shape [].",
    example=" {shape=[2,3], value=0.5, dtype=f32}",
    infer=_infer_full,
)
arange = op(
    "arange(; start: dim, end: dim, dtype: dtype) -> T[...]",
    Traits(
        Role.CONSTANT,
        flops=nothing,
        demand=lambda c: c.system.equate(c.extents["end"], c.extents["start"] + c.outs[0][0]),
    ),
    reference=lambda start, end, dtype: torch.arange(start, end, dtype=dtype.torch),
    doc="start, start+1, … below end.",
    example=" {start=2, end=7, dtype=i64}",
    infer=_infer_arange,
    gives={0: Within("start", "end-1", order=ASCENDING)},
)


def normalised_dims(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """`shape` without its ones."""
    return tuple(d for d in shape if isinstance(d, Sym) or d != 1)
