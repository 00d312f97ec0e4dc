"""What scans an axis element by element: argmax, cumsum, topk."""

from __future__ import annotations

from collections.abc import Sequence

from dsc.backends.tvm.launch import Launch, Unsupported, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable, each_index, resolve, size_names
from dsc.backends.tvm.tir import (
    VALUE,
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    integer,
    is_nan,
    loop,
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.types import DType

LOWEST = {"float32": float("-inf"), "float64": float("-inf"), "int64": -(2**63), "int32": -(2**31)}


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `argmax`, `cumsum` and `topk`."""
    table, x = SizeTable(), operand(node, 0).type
    attrs = node.attrs
    if VALUE[x.dtype] == "bool":
        raise Unsupported(f"{node.op} of {x.dtype}")
    if node.op == "topk":
        static_dim(x.shape[-1], "the axis of topk")
    axis = int(attrs.get("axis", -1)) % x.rank
    static = (node.op, x.dtype, table.numbered(x.shape), axis, attrs.get("k", 0))
    return Launch(scan_axis, (*static, len(table.dims)), tuple(table.dims), flops=x.numel)


def scan_axis(
    op: str, dtype: DType, shape: tuple[Dim, ...], axis: int, k: int, sizes: int
) -> PrimFunc:
    """Arguments: x, the results; sizes."""
    outer_axes = [a for a in range(len(shape)) if a != axis]
    results = ["y", "indices"] if op == "topk" else ["y"]

    def body(x: Expr, *rest: Expr) -> None:
        addresses, given = rest[: len(results)], rest[len(results) :]
        extents = resolve(shape, given)
        source, n = Tensor(x, dtype, extents), extents[axis]

        def line(outer: list[Expr]) -> Line:
            return Line(source, outer, axis, n)

        kept = [extents[a] for a in outer_axes]
        full = Tensor(addresses[0], dtype, extents)
        match op:
            case "cumsum":
                each_index(kept, n, lambda outer: _cumsum(line(outer), full, VALUE[dtype]))
            case "argmax":
                where = Tensor(addresses[0], DType.i64, kept)
                each_index(kept, n, lambda o: where.store(_argmax(line(o), VALUE[dtype]), *o))
            case _:
                best = Tensor(addresses[0], dtype, [*kept, k])
                places = Tensor(addresses[1], DType.i64, [*kept, k])
                each_index(kept, n * k, lambda o: _topk(line(o), o, best, places, k, dtype))

    return build(body, ["x", *results, *size_names(sizes)])


class Line:
    """One line of a tensor along an axis."""

    def __init__(self, source: Tensor, outer: Sequence[Expr], axis: int, extent: Expr) -> None:
        self.source, self.outer, self.axis, self.extent = source, outer, axis, extent

    def index(self, i: Expr) -> list[Expr]:
        """The index of the line's element i."""
        return [*self.outer[: self.axis], i, *self.outer[self.axis :]]

    def load(self, i: Expr) -> Expr:
        """Element i."""
        return self.source.load(*self.index(i))


def _cumsum(line: Line, target: Tensor, name: str) -> None:
    acc = Local(1, "float64" if name == "float32" else name)
    acc[0] = acc.zero
    with loop(line.extent) as i:
        acc[0] = acc[0] + cast(line.load(i), acc.name)
        target.store(cast(acc[0], name), *line.index(i))


def _argmax(line: Line, name: str) -> Expr:
    best, where = Local(1, name), Local(1, "int64")
    best[0], where[0] = line.load(integer(0)), integer(0)
    with loop(line.extent) as i:
        value = bind(line.load(i))
        with when(_before(value, best[0])):
            best[0] = value
            where[0] = i
    return where[0]


def _before(value: Expr, best: Expr) -> Expr:
    """Whether a value comes before the best one so far: larger, or the first NaN."""
    if not value.ty.dtype.is_float:
        return value > best
    return tirx.Or(value > best, tirx.And(is_nan(value), tirx.Not(is_nan(best))))


def _topk(
    line: Line, outer: Sequence[Expr], best: Tensor, places: Tensor, k: int, dtype: DType
) -> None:
    """Scan for the largest that was not taken, k times."""
    name = VALUE[dtype]
    taken = Local(line.extent, "int32")
    with loop(line.extent) as i:
        taken[i] = tirx.const(0, "int32")
    with loop(k) as slot:
        top, where = Local(1, name), Local(1, "int64")
        top[0], where[0] = tirx.const(LOWEST[name], name), integer(-1)
        with loop(line.extent) as i:
            better = tirx.any(where[0] < 0, _before(line.load(i), top[0]))
            with when(tirx.all(tirx.EQ(taken[i], 0), better)):
                top[0] = line.load(i)
                where[0] = i
        taken[where[0]] = tirx.const(1, "int32")
        best.store(top[0], *outer, slot)
        places.store(where[0], *outer, slot)
