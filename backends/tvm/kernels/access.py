"""Where the elements of a value lie, seen from a fused region: strides over rows and over columns.

A region runs over rows; the leading axes of each of its values make up the row, the inner ones what
a row holds. An `Access` says how a row number and inner indices lead to an element of a buffer, for
values that views (`dsc.ir.views`) took apart without moving anything. Its numbers are integers or
`$i` for a run-time size, so that equal regions of other layers and entries share a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc.backends.tvm.shapes import SizeTable, resolve
from dsc.backends.tvm.tir import (
    Expr,
    bind,
    integer,
    tirx,
)
from dsc.ir.region_steps import Lines
from dsc.ir.types import DType
from dsc.ir.views import joined

Number = int | str
"""An integer, or `$i` for run-time size i."""


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


def access(lines: Lines, table: SizeTable) -> Access:
    """The access of lines, its numbers in a table."""
    view, lead = lines.view, lines.lead
    axes = list(zip(view.shape, view.strides, strict=True))[:lead]
    rows = tuple((table.dim(d), table.dim(s)) for d, s in joined(axes))
    strides = tuple(table.dim(s) for s in lines.inner)
    return Access(view.buffer, view.dtype, rows, strides, table.dim(view.offset))


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
