"""Operators that place elements, with all of their bits.

permute, expand, slice, split, concat and stack are copies between strided views, in vectors where
neighbours in one are neighbours in the other. take, embedding and select_rows look up whole rows,
gather each element; append puts new rows where each sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc.backends.tvm.kernels.access import Rows
from dsc.backends.tvm.launch import Launch, Unsupported, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable, each_index, resolve, size_names, sized
from dsc.backends.tvm.tir import (
    VALUE,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    f32,
    for_each,
    integer,
    lanes_for,
    loop,
    splat,
    tirx,
)
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.region_steps import Lines, apply_view, dense
from dsc.ir.types import DType
from dsc.ir.views import View, narrow


@dataclass(frozen=True, slots=True)
class Copy:
    """`rows` rows of `width` elements between two views."""

    source: Lines
    target: Lines
    rows: Dim
    width: Dim


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of what moves elements to places that are known: a copy for each part."""
    given = [dense(x, i) for i, x in enumerate(node.operands)]
    made = [dense(v, len(given) + i) for i, v in enumerate(node.outputs)]
    parameters = len(given) + len(made)
    if node.op in ("concat", "stack"):
        axis = node.attrs.get("axis", 0) % len(made[0].shape)
        if node.op == "stack":
            given = [v.strided((1, *v.shape), (0, *v.strides)) for v in given]
        made = _parts(made[0], axis, [v.shape[axis] for v in given])
    else:
        given = apply_view(node, given[0])
    table = SizeTable()
    copies = table.numbered(tuple(map(_copy, given, made)))
    static = (copies, parameters, len(table.dims), _lanes(node, machine))
    return Launch(strided_copies, static, tuple(table.dims), title=node.op)


def _lanes(node: Node, machine: Machine) -> int:
    """Elements that a vector register holds."""
    return machine.lanes * 4 // node.outputs[0].type.dtype.itemsize


def _parts(whole: View, axis: int, extents: Sequence[Dim]) -> list[View]:
    """A view cut along an axis."""
    starts: list[Dim] = [0]
    for extent in extents[:-1]:
        starts.append(starts[-1] + extent)
    return [narrow(whole, axis, *part) for part in zip(starts, extents, strict=True)]


def _copy(source: View, target: View) -> Copy:
    """The copy between two views of one shape; their last axis is the row."""
    if not source.shape:
        source, target = source.strided((1,), (1,)), target.strided((1,), (1,))
    *rows, width = source.shape
    origin, place = (Lines.of(view, len(rows)) for view in (source, target))
    return Copy(origin, place, product(tuple(rows)), width)


def strided_copies(copies: tuple[Copy, ...], parameters: int, sizes: int, lanes: int) -> PrimFunc:
    """Arguments: operands, then results; sizes."""

    def body(*arguments: Expr) -> None:
        places = Rows(arguments[parameters:])
        for copy in copies:
            _emit(copy, arguments, places, lanes)

    return build(body, [*(f"x{i}" for i in range(parameters)), *size_names(sizes)])


def _emit(copy: Copy, addresses: Sequence[Expr], places: Rows, lanes: int) -> None:
    """One copy, its rows over threads where that is worth it."""
    both, width = (copy.source, copy.target), places.at(copy.width)
    source, target = (Tensor(addresses[a.view.buffer], a.view.dtype, (1,)) for a in both)
    stride, step = (integer(places.at(a.inner[0])) for a in both)
    whole = isinstance(width, int) and all(a.unit for a in both)
    vector = lanes_for(width, lanes) if whole else 1

    def row(r: Expr) -> None:
        places.forget()
        start, to = (places.start(a, r) for a in both)
        with loop(width // vector if whole else width) as i:
            at = i * vector
            target.copy(to + at * step, source, start + at * stride, vector)

    for_each(places.at(copy.rows), width, row)


def lower_full(node: Node, machine: Machine) -> Launch:
    """The launch of `full`."""
    out = node.output.type
    return Launch(full, (out.dtype, float(node.attrs["value"])), (out.numel,))


def full(dtype: DType, value: float) -> PrimFunc:
    """Arguments: y; number of elements."""

    def body(y: Expr, elements: Expr) -> None:
        target = Tensor(y, dtype, (elements,))
        with loop(elements) as i:
            target.store(constant(value, dtype), i)

    return build(body)


def constant(value: float, dtype: DType) -> Expr:
    """A register constant of an element type."""
    name = VALUE[dtype]
    if name.startswith("float"):
        return tirx.FloatImm(name, float(value))
    return tirx.const(bool(value) if name == "bool" else int(value), name)


def lower_arange(node: Node, machine: Machine) -> Launch:
    """The launch of `arange`."""
    out = node.output.type
    if VALUE[out.dtype] == "bool":
        raise Unsupported("arange of bool")
    return Launch(arange, (out.dtype,), (node.attrs["start"], out.shape[0]))


def arange(dtype: DType) -> PrimFunc:
    """Arguments: y; start, number of elements."""

    def body(y: Expr, start: Expr, elements: Expr) -> None:
        target = Tensor(y, dtype, (elements,))
        with loop(elements) as i:
            target.store(cast(start + i, VALUE[dtype]), i)

    return build(body)


def lower_gather(node: Node, machine: Machine) -> Launch:
    """The launch of `gather` (torch.gather)."""
    table, x, index = SizeTable(), operand(node, 0).type, operand(node, 1).type
    static = (
        x.dtype,
        table.numbered(x.shape),
        table.numbered(index.shape),
        node.attrs["axis"] % x.rank,
    )
    return Launch(gather, (*static, len(table.dims)), tuple(table.dims))


def gather(
    dtype: DType, shape: tuple[Dim, ...], index: tuple[Dim, ...], axis: int, sizes: int
) -> PrimFunc:
    """Arguments: x, index, y; sizes."""

    def body(x: Expr, index_at: Expr, y: Expr, *given: Expr) -> None:
        extents = resolve(index, given)
        source, target = Tensor(x, dtype, resolve(shape, given)), Tensor(y, dtype, extents)
        chosen = Tensor(index_at, DType.i64, extents)

        def element(at: list[Expr]) -> None:
            place = source.offset(*at[:axis], chosen.load(*at), *at[axis + 1 :])
            target.copy(target.offset(*at), source, place, 1)

        each_index(extents, 1, element)

    return build(body, ["x", "index", "y", *size_names(sizes)])


def lower_take(node: Node, machine: Machine) -> Launch:
    """The launch of take, embedding and select_rows, as lookups in x [outer, extent, width]."""
    table, x, index = SizeTable(), operand(node, 0).type, operand(node, 1).type
    if node.op == "embedding":
        x, index = index, x
    own = node.op == "select_rows"
    axis = 1 if own else node.attrs.get("axis", 0) % x.rank
    for dim in (product(x.shape[:axis]), x.shape[axis], index.shape[1] if own else index.numel):
        table.size(dim)
    width = table.numbered(product(x.shape[axis + 1 :]))
    static = (x.dtype, width, node.op == "embedding", own, _lanes(node, machine), len(table.dims))
    return Launch(take, static, tuple(table.dims), title=node.op)


def take(dtype: DType, width: Dim, swapped: bool, own: bool, lanes: int, sizes: int) -> PrimFunc:
    """Arguments: x, index, y; outer, extent, count of places, width where it is no number.

    The index is [outer, count] where each outer one has its `own`, else [count]. It comes before x
    where they are `swapped`.
    """

    def body(x: Expr, index: Expr, y: Expr, *given: Expr) -> None:
        x, index = (index, x) if swapped else (x, index)
        outer, extent, count = given[:3]
        wide = sized(width, given)
        vector = lanes_for(wide, lanes) if isinstance(wide, int) else 1
        source, target = Tensor(x, dtype, (1,)), Tensor(y, dtype, (1,))
        chosen = Tensor(index, DType.i64, (1,))

        def row(r: Expr) -> None:
            place = chosen.at(r if own else tirx.truncmod(r, count))
            start = bind((tirx.truncdiv(r, count) * extent + place) * wide)
            with loop(wide // vector if isinstance(wide, int) else wide) as i:
                target.copy(r * wide + i * vector, source, start + i * vector, vector)

        for_each(outer * count, wide, row)

    return build(body, ["x0", "x1", "y", *size_names(sizes)])


def lower_append(node: Node, machine: Machine) -> Launch:
    """The launch of `append`: copies the past, so it is for programs without in-place caches."""
    past, new = operand(node, 0).type, operand(node, 1).type
    width = static_dim(past.shape[2], "a cache row")
    sizes = (*new.shape[:2], past.shape[1])
    return Launch(append, (past.dtype, width, machine.lanes), sizes)


def append(dtype: DType, width: int, lanes: int) -> PrimFunc:
    """Arguments: past [b, p, width], new [b, s, width], lengths [b], y [b, p+s, width]; b, s, p."""
    step = lanes_for(width, lanes)

    def body(past: Expr, new: Expr, lengths: Expr, y: Expr, b: Expr, s: Expr, p: Expr) -> None:
        old, fresh = Tensor(past, dtype, (b, p, width)), Tensor(new, dtype, (b, s, width))
        target, used = Tensor(y, dtype, (b, p + s, width)), Tensor(lengths, DType.i64, (b,))

        def rows(to: Expr, source: Tensor, start: Expr, count: Expr) -> None:
            with loop(count * (width // step)) as i:
                target.copy(to + i * step, source, start + i * step, step)

        with loop(b) as batch:
            rows(target.offset(batch), old, old.offset(batch), p)
            with loop(s * (width // step)) as i:
                target.put(target.offset(batch, p) + i * step, splat(f32(0.0), step))
            with loop(s) as t:
                place = target.offset(batch, used.load(batch) + t)
                rows(place, fresh, fresh.offset(batch, t), integer(1))

    return build(body)
