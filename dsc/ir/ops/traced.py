"""Operators that only a freshly traced graph may hold; the raise passes remove every one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.calls import Call
from dsc.ir.dims import Dim
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op
from dsc.ir.ops.pointwise import broadcast
from dsc.ir.ops.shape import axis_of, check_index, demand_index, outside, slice_extent
from dsc.ir.sized import Sized
from dsc.ir.traits import ASCENDING, Form, Role, Traits, Within, nothing
from dsc.ir.types import DType, TensorType

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]


def _sdpa(
    q: Any, k: Any, v: Any, mask: Any = None, *, scale: float, causal: bool, grouped: bool
) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _infer_slice_scatter(types: Types, attrs: Mapping[str, Any]) -> Result:
    x = types[0]
    axis = axis_of(attrs["axis"], x.rank)
    extent = slice_extent(x.shape[axis], attrs["start"], attrs["end"], 1)
    wanted = x.with_shape((*x.shape[:axis], extent, *x.shape[axis + 1 :]))
    if types[1] != wanted:
        raise TypeMismatch(f"the part is {types[1]}, {wanted} fits")
    return (x,)


def _infer_scatter(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, index, values = types
    check_index(x, index, attrs["axis"])
    if broadcast(values.shape, index.shape) != index.shape:
        raise TypeMismatch(f"{values} for the index {index}")
    return (x,)


def _infer_index_put(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, index, values = types
    if x.rank == 0:
        raise TypeMismatch(f"{x} has no rows")
    target = (*index.shape, *x.shape[1:])
    if broadcast(values.shape, target) != target:
        raise TypeMismatch(f"{values} for rows of shape ({', '.join(map(str, target))})")
    return (x,)


def _infer_sort(types: Types, attrs: Mapping[str, Any]) -> Result:
    axis_of(attrs["axis"], types[0].rank)
    return types[0], types[0].with_dtype(DType.i64)


def _grouped_mm(x: Any, weight: Any, ends: Any) -> Any:
    out = x.new_zeros(x.shape[0], weight.shape[-1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ weight[group]
        start = end
    return out


def _index_put(x: Any, index: Any, values: Any, accumulate: bool) -> Any:
    return x.index_put((index,), values, accumulate=accumulate)


def _histc(x: Any, bins: int) -> Any:
    return torch.bincount(x.long().reshape(-1), minlength=bins)[:bins].to(x.dtype)


def _sdpa_flops(call: Call) -> Dim:
    return 2 * call.dim("t") * (call["q"].numel + call.results[0].numel)


def _demand_sdpa(call: Sized) -> None:
    q, k = call.operands["q"].shape, call.operands["k"].shape
    batch = [*zip(call.dims["*b"], call.dims["*c"], q[:-2], k[:-2], strict=True)]
    for mine, theirs, many, few in batch:
        call.in_proportion(mine, theirs, (many, few))
    if "mask" in call:
        scores = [*call.dims["*b"], call.dims["s"], call.dims["t"]]
        call.broadcast(call.operands["mask"], call["mask"], scores, (*q[:-1], k[-2]))


def _demand_slice_scatter(call: Sized) -> None:
    x, part = call["x"], call["part"]
    axis = axis_of(call.attrs["axis"], len(x))
    call.same(x, call.outs[0])
    call.same(outside(x, axis), outside(part, axis))
    call.system.at_most(call.extents["end"], x[axis])
    call.system.equate(call.extents["end"], call.extents["start"] + part[axis])


def _demand_scatter(call: Sized) -> None:
    demand_index(call)
    call.broadcast(
        call.operands["values"], call["values"], call["index"], call.operands["index"].shape
    )


def _demand_index_put(call: Sized) -> None:
    x, index = call["x"], call["index"]
    call.same(x, call.outs[0])
    dims = (*call.operands["index"].shape, *call.operands["x"].shape[1:])
    call.broadcast(call.operands["values"], call["values"], [*index, *x[1:]], dims)


sdpa = op(
    "sdpa(q: F[*b, s, d], k: F[*c, t, d], v: F[*c, t, e], mask: any[...]?; scale: float,"
    " causal: bool = false, grouped: bool = false) -> F[*b, s, e]",
    Traits(
        Role.ATTENTION,
        Form.TRACED,
        flops=_sdpa_flops,
        of_nothing=0.0,
        demand=_demand_sdpa,
    ),
    reference=_sdpa,
    doc="torch's scaled_dot_product_attention; a bool mask keeps what is true, a float one adds.",
    example="f32[2,4,3,5], f32[2,4,7,5], f32[2,4,7,6], bool[2,1,3,7] {scale=0.5}",
)
slice_scatter = op(
    "slice_scatter(x: T[...], part: T[...]; axis: int, start: dim, end: dim) -> T[...]",
    Traits(
        Role.WRITE,
        Form.TRACED,
        flops=nothing,
        updates="part",
        demand=_demand_slice_scatter,
    ),
    reference=lambda x, part, axis, start, end: torch.slice_scatter(x, part, axis, start, end),
    doc="A copy of x with start..end-1 of an axis replaced by part.",
    example="f32[2,7], f32[2,3] {axis=1, start=2, end=5}",
    infer=_infer_slice_scatter,
)
scatter = op(
    "scatter(x: T[*n], index: i64[...], values: T[...]; axis: int) -> T[*n]",
    Traits(Role.WRITE, Form.TRACED, flops=nothing, updates="index", demand=_demand_scatter),
    reference=lambda x, index, values, axis: x.scatter(axis, index, values.expand(index.shape)),
    doc="A copy of x with values placed by index along an axis (torch.scatter).",
    example="f32[2,4], i64[2,1]=3, f32[] {axis=1}",
    infer=_infer_scatter,
    within={"index": Within("0", "extent-1")},
)
index_put = op(
    "index_put(x: T[...], index: i64[...], values: T[...]; accumulate: bool = false) -> T[...]",
    Traits(Role.WRITE, Form.TRACED, flops=nothing, updates="index", demand=_demand_index_put),
    reference=_index_put,
    doc="A copy of x with rows x[index] set to values, or increased by them.",
    example="f32[4,3], i64[2]=3, f32[2,3] {accumulate=true}",
    infer=_infer_index_put,
    within={"index": Within("0", "extent-1")},
)
sort = op(
    "sort(x: T[*n]; axis: int, descending: bool = false) -> (T[*n], i64[*n])",
    Traits(Role.OTHER, Form.TRACED),
    reference=lambda x, axis, descending: tuple(
        torch.sort(x, dim=axis, descending=descending, stable=True)
    ),
    doc="A stable sort along an axis, with indices.",
    example="f32[2,4] {axis=-1}",
    infer=_infer_sort,
    gives={1: Within("0", "extent-1")},
)
histc = op(
    "histc(x: T[...]; bins: extent) -> T[bins]",
    Traits(
        Role.OTHER,
        Form.TRACED,
        of_nothing=0.0,
        samples={"x": Within("0", "bins")},
        demand=lambda c: None,  # counts do not depend on how the numbers lie
    ),
    reference=_histc,
    doc="Counts of the integers 0 .. bins-1.",
    example="i64[6]=4 {bins=5}",
)
grouped_mm = op(
    "grouped_mm(x: T[m, k], weight: T[e, k, n], ends: I[e]) -> T[m, n]",
    Traits(
        Role.PRODUCT,
        Form.TRACED,
        flops=lambda c: 2 * c["x"].numel * c.dim("n"),
        reads={"weight": lambda c: c["x"].numel * c.dim("n")},
        of_nothing=0.0,
    ),
    reference=_grouped_mm,
    doc="Rows up to ends[g] times weight[g]; rows past the last end are zero (torch._grouped_mm).",
    example="f32[4,3], f32[2,3,5], i64[2]=4",
    within={"ends": Within("0", "m", "the end of a group's rows", ASCENDING)},
)
