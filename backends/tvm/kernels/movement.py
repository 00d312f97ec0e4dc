"""Operators that place elements: permute, expand, slice, split, concat, stack, full, gather, take.

Each is the map from a result index to the operand's index; the copy itself is shared, and runs in
vectors when neighbours in the result are neighbours in the operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from dsc.backends.tvm.launch import Launch, Unsupported, operand
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import (
    Pattern,
    SizeTable,
    count,
    each_index,
    resolve,
    size_names,
)
from dsc.backends.tvm.tir import (
    VALUE,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    integer,
    lanes_for,
    loop,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType

IndexMap = Callable[[Sequence[Expr]], list[Expr]]


def copy_region(
    source: Tensor, index: IndexMap, target: Tensor, to: IndexMap, extents: list[Expr], lanes: int
) -> None:
    """target[to(i)] = source[index(i)] for every index i of a region.

    `lanes` says how many neighbours along the region's last axis are neighbours in both tensors.
    """
    last = extents[-1] if extents else 1
    width = lanes_for(last, lanes) if isinstance(last, int) else 1

    def row(outer: list[Expr]) -> None:
        with loop(last // width if isinstance(last, int) else last) as i:
            full = [*outer, i * width] if extents else []
            target.store(source.load(*index(full), lanes=width), *to(full))

    each_index(extents[:-1], count([last]), row)


def _same(index: Sequence[Expr]) -> list[Expr]:
    return list(index)


def lower_permute(node: Node, machine: Machine) -> Launch:
    """The launch of `permute`."""
    table, x = SizeTable(), operand(node, 0).type
    dims = node.attrs["dims"]
    lanes = machine.lanes if dims and dims[-1] == len(dims) - 1 else 1
    static = (x.dtype, table.shape(x.shape), dims, lanes)
    return Launch(permute, (*static, len(table.dims)), tuple(table.dims))


def permute(
    dtype: DType, shape: Pattern, dims: tuple[int, ...], lanes: int, sizes: int
) -> PrimFunc:
    """Arguments: x, y; sizes."""

    def body(x: Expr, y: Expr, *given: Expr) -> None:
        extents = resolve(shape, given)
        moved = [extents[d] for d in dims]

        def index(out: Sequence[Expr]) -> list[Expr]:
            return [out[dims.index(axis)] for axis in range(len(dims))]

        target = Tensor(y, dtype, moved)
        copy_region(Tensor(x, dtype, extents), index, target, _same, moved, lanes)

    return build(body, ["x", "y", *size_names(sizes)])


def lower_expand(node: Node, machine: Machine) -> Launch:
    """The launch of `expand`."""
    table, x, out = SizeTable(), operand(node, 0).type, node.output.type
    same = x.rank > 0 and x.shape[-1] == out.shape[-1]
    static = (x.dtype, table.shape(x.shape), table.shape(out.shape), machine.lanes if same else 1)
    return Launch(expand, (*static, len(table.dims)), tuple(table.dims))


def expand(dtype: DType, shape: Pattern, wide: Pattern, lanes: int, sizes: int) -> PrimFunc:
    """Arguments: x, y; sizes."""

    def body(x: Expr, y: Expr, *given: Expr) -> None:
        def index(out: Sequence[Expr]) -> list[Expr]:
            own = out[len(out) - len(shape) :]
            return [integer(0) if d == 1 else i for d, i in zip(shape, own, strict=True)]

        source, extents = Tensor(x, dtype, resolve(shape, given)), resolve(wide, given)
        copy_region(source, index, Tensor(y, dtype, extents), _same, extents, lanes)

    return build(body, ["x", "y", *size_names(sizes)])


def lower_slice(node: Node, machine: Machine) -> Launch:
    """The launch of `slice`."""
    table, x = SizeTable(), operand(node, 0).type
    axis, step = node.attrs["axis"] % x.rank, node.attrs["step"]
    part = (table.dim(node.attrs["start"]), axis, step)
    static = (x.dtype, table.shape(x.shape), table.shape(node.output.type.shape), part)
    lanes = machine.lanes if step == 1 or axis != x.rank - 1 else 1
    return Launch(slice_axis, (*static, lanes, len(table.dims)), tuple(table.dims))


def slice_axis(
    dtype: DType,
    shape: Pattern,
    out: Pattern,
    part: tuple[int | str, int, int],
    lanes: int,
    sizes: int,
) -> PrimFunc:
    """Arguments: x, y; sizes. `part` is (start, axis, step)."""

    def body(x: Expr, y: Expr, *given: Expr) -> None:
        (start,), axis, step = resolve((part[0],), given), part[1], part[2]

        def index(at: Sequence[Expr]) -> list[Expr]:
            return [start + i * step if d == axis else i for d, i in enumerate(at)]

        source, extents = Tensor(x, dtype, resolve(shape, given)), resolve(out, given)
        copy_region(source, index, Tensor(y, dtype, extents), _same, extents, lanes)

    return build(body, ["x", "y", *size_names(sizes)])


def lower_split(node: Node, machine: Machine) -> Launch:
    """The launch of `split`: all parts in one kernel."""
    table, x = SizeTable(), operand(node, 0).type
    axis = node.attrs["axis"] % x.rank
    parts = tuple(table.shape(v.type.shape) for v in node.outputs)
    static = (x.dtype, table.shape(x.shape), parts, axis, machine.lanes)
    return Launch(split, (*static, len(table.dims)), tuple(table.dims))


def split(
    dtype: DType, shape: Pattern, parts: tuple[Pattern, ...], axis: int, lanes: int, sizes: int
) -> PrimFunc:
    """Arguments: x, one result for each part; sizes."""

    def body(x: Expr, *rest: Expr) -> None:
        results, given = rest[: len(parts)], rest[len(parts) :]
        source, start = Tensor(x, dtype, resolve(shape, given)), integer(0)
        for address, part in zip(results, parts, strict=True):
            extents = resolve(part, given)
            target, index = Tensor(address, dtype, extents), _shifted(axis, start)
            copy_region(source, index, target, _same, extents, lanes)
            start = start + extents[axis]

    results = [f"y{i}" for i in range(len(parts))]
    return build(body, ["x", *results, *size_names(sizes)])


def _shifted(axis: int, start: Expr) -> IndexMap:
    return lambda index: [i + start if d == axis else i for d, i in enumerate(index)]


def lower_concat(node: Node, machine: Machine) -> Launch:
    """The launch of `concat`."""
    table, first = SizeTable(), operand(node, 0).type
    parts = tuple(table.shape(x.type.shape) for x in node.operands)
    out = table.shape(node.output.type.shape)
    static = (first.dtype, parts, out, node.attrs["axis"] % first.rank, machine.lanes)
    return Launch(concat, (*static, len(table.dims)), tuple(table.dims))


def lower_stack(node: Node, machine: Machine) -> Launch:
    """The launch of `stack`: a concat of operands with a leading axis of 1."""
    table, first = SizeTable(), operand(node, 0).type
    parts = tuple((1, *table.shape(x.type.shape)) for x in node.operands)
    out = table.shape(node.output.type.shape)
    static = (first.dtype, parts, out, 0, machine.lanes if first.rank else 1)
    return Launch(concat, (*static, len(table.dims)), tuple(table.dims))


def concat(
    dtype: DType, parts: tuple[Pattern, ...], out: Pattern, axis: int, lanes: int, sizes: int
) -> PrimFunc:
    """Arguments: the parts, the result; sizes."""

    def body(*arguments: Expr) -> None:
        xs, y = arguments[: len(parts)], arguments[len(parts)]
        given = arguments[len(parts) + 1 :]
        target, start = Tensor(y, dtype, resolve(out, given)), integer(0)
        for address, part in zip(xs, parts, strict=True):
            extents = resolve(part, given)
            source, to = Tensor(address, dtype, extents), _shifted(axis, start)
            copy_region(source, _same, target, to, extents, lanes)
            start = start + extents[axis]

    xs = [f"x{i}" for i in range(len(parts))]
    return build(body, [*xs, "y", *size_names(sizes)])


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
        return tirx.FloatImm(name, value)
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
    axis = node.attrs["axis"] % x.rank
    static = (x.dtype, table.shape(x.shape), table.shape(index.shape), axis)
    return Launch(gather, (*static, len(table.dims)), tuple(table.dims))


def gather(dtype: DType, shape: Pattern, index: Pattern, axis: int, sizes: int) -> PrimFunc:
    """Arguments: x, index, y; sizes."""

    def body(x: Expr, index_at: Expr, y: Expr, *given: Expr) -> None:
        extents = resolve(index, given)
        source = Tensor(x, dtype, resolve(shape, given))
        chosen = Tensor(index_at, DType.i64, extents)

        def place(at: Sequence[Expr]) -> list[Expr]:
            return [chosen.load(*at) if d == axis else i for d, i in enumerate(at)]

        copy_region(source, place, Tensor(y, dtype, extents), _same, extents, 1)

    return build(body, ["x", "index", "y", *size_names(sizes)])


def lower_take(node: Node, machine: Machine) -> Launch:
    """The launch of `take`."""
    table, x, index = SizeTable(), operand(node, 0).type, operand(node, 1).type
    axis = node.attrs["axis"] % x.rank
    lanes = machine.lanes if axis != x.rank - 1 else 1
    static = (x.dtype, table.shape(x.shape), table.shape(index.shape), axis, lanes)
    return Launch(take, (*static, len(table.dims)), tuple(table.dims))


def take(
    dtype: DType, shape: Pattern, index: Pattern, axis: int, lanes: int, sizes: int
) -> PrimFunc:
    """Arguments: x, index, y; sizes."""

    def body(x: Expr, index_at: Expr, y: Expr, *given: Expr) -> None:
        own, wanted = resolve(shape, given), resolve(index, given)
        source, chosen = Tensor(x, dtype, own), Tensor(index_at, DType.i64, wanted)
        extents = [*own[:axis], *wanted, *own[axis + 1 :]]

        def place(at: Sequence[Expr]) -> list[Expr]:
            end = axis + len(wanted)
            return [*at[:axis], bind(chosen.load(*at[axis:end])), *at[end:]]

        copy_region(source, place, Tensor(y, dtype, extents), _same, extents, lanes)

    return build(body, ["x", "index", "y", *size_names(sizes)])
