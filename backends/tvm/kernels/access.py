"""Where the elements of a value lie, seen from a fused region: strides over rows and over columns.

A region runs over rows; the leading axes of each of its values make up the row, the inner ones what
a row holds. An `Access` says how a row number and inner indices lead to an element of a buffer, for
values that views (`dsc.ir.views`) took apart without moving anything. Its numbers are integers or
`$i` for a run-time size, so that equal regions of other layers and entries share a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from dsc.backends.tvm.launch import Unsupported
from dsc.backends.tvm.shapes import SizeTable, resolve
from dsc.backends.tvm.tir import Expr, bind, integer
from dsc.ir import views
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.ops.shape import axis_of
from dsc.ir.types import DType
from dsc.ir.views import View

Number = int | str
"""An integer, or `$i` for run-time size i."""
Axis = tuple[Dim, Dim]
"""Extent and stride."""


@dataclass(frozen=True, slots=True)
class Access:
    """Element [i, …] of row r is element `offset + r by lead + sum i*inner` of `buffer`.

    `lead` lists (extent, stride) of the axes that a row number unravels into, outermost first.
    """

    buffer: int
    dtype: DType
    lead: tuple[tuple[Number, Number], ...]
    inner: tuple[Number, ...]
    offset: Number

    @property
    def unit(self) -> bool:
        """Whether neighbours in a row are neighbours in memory."""
        return self.inner[-1:] == (1,)

    @property
    def constant(self) -> bool:
        """Whether a row holds one value only."""
        return all(s == 0 for s in self.inner)


def access(view: View, lead: int, table: SizeTable) -> Access:
    """The access of a view whose first `lead` axes are the row."""
    pairs = list(zip(view.shape, view.strides, strict=True))
    return make_access(view, pairs[:lead], [s for _, s in pairs[lead:]], view.offset, table)


def make_access(
    view: View, lead: Sequence[Axis], inner: Sequence[Dim], offset: Dim, table: SizeTable
) -> Access:
    """The access of `view`'s buffer with these row axes (outermost first) and inner strides."""
    rows = tuple((table.dim(d), table.dim(s)) for d, s in merged(lead))
    strides = tuple(table.dim(s) for s in inner)
    return Access(view.buffer, view.dtype, rows, strides, table.dim(offset))


def merged(axes: Sequence[Axis]) -> list[Axis]:
    """Axes without those of one element, neighbours joined where they are evenly spaced."""
    found: list[Axis] = []
    for extent, stride in axes:
        if extent == 1:
            continue
        if found and found[-1][1] == stride * extent:
            extent = found.pop()[0] * extent
        found.append((extent, stride))
    return found


def apply_view(node: Node, view: View) -> list[View]:
    """What a view operator makes of a view. Raises `Unsupported` where elements would move."""
    attrs = node.attrs
    match node.op:
        case "reshape":
            found = views.reshape(view, attrs["shape"])
            if found is None:
                raise Unsupported("a reshape that moves elements")
            return [found]
        case "permute":
            return [views.permute(view, attrs["dims"])]
        case "expand":
            return [views.expand(view, attrs["shape"])]
        case "slice":
            extent = node.output.type.shape[axis_of(attrs["axis"], len(view.shape))]
            step = int(attrs["step"])
            return [views.narrow(view, attrs["axis"], attrs["start"], extent, step)]
        case "split":
            axis, start = axis_of(attrs["axis"], len(view.shape)), 0
            parts, position = [], start
            for value in node.outputs:
                extent = value.type.shape[axis]
                parts.append(views.narrow(view, axis, position, extent))
                position = position + extent  # type: ignore[assignment]
            return parts
    raise Unsupported(f"{node.op} is no view of a region's kernel")


def unapply_view(node: Node, result: View) -> View:
    """Where the operand's elements lie in the buffer of `result`, which the node's result fills."""
    shape = node.operands[0].type.shape
    if node.op == "reshape":
        found = views.reshape(result, shape)
        if found is None:
            raise Unsupported("a reshape that moves elements")
        return found
    if node.op == "permute":
        dims = node.attrs["dims"]
        return views.permute(result, [dims.index(a) for a in range(len(dims))])
    raise Unsupported(f"a {node.op} of what the region computes")


class Rows:
    """Row numbers to positions inside a kernel: each access's row is located once."""

    def __init__(self, sizes: Sequence[Expr]) -> None:
        self.sizes = sizes
        self._known: dict[Access, Expr] = {}

    def at(self, number: Number) -> Expr:
        """A number of an access: a Python int, or a run-time size."""
        return resolve((number,), self.sizes)[0]

    def forget(self) -> None:
        """Start a new row: what was bound in the last one's scope is gone."""
        self._known.clear()

    def start(self, found: Access, row: Expr) -> Expr:
        """The position of a row's first element, bound once a row."""
        if found not in self._known:
            self._known[found] = bind(integer(self.unravelled(found.lead, row, found.offset)))
        return self._known[found]

    def unravelled(
        self, axes: Sequence[tuple[Number, Number]], number: Expr, offset: Number = 0
    ) -> Expr:
        """`offset` plus the position that a number over `axes` stands for."""
        position: Expr = integer(self.at(offset))
        for k, (extent, stride) in enumerate(reversed(axes)):
            index = number
            if k < len(axes) - 1:
                size = integer(self.at(extent))
                index = tirx.truncmod(number, size)
                number = bind(tirx.truncdiv(number, size))
            position = position + index * integer(self.at(stride))
        return position
