"""Where the elements of a region's rows lie: row numbers to positions, inside a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from dsc.backends.tvm.shapes import sized
from dsc.backends.tvm.tir import Expr, bind, integer, tirx
from dsc.ir.dims import Dim
from dsc.ir.region_steps import Lines


class Rows:
    """Row numbers to positions: of all lines each row is located once."""

    def __init__(self, sizes: Sequence[Expr]) -> None:
        self.sizes = sizes
        self._known: dict[Lines, Expr] = {}

    def at(self, dim: Dim) -> Expr:
        """A dim of the kernel's key: a Python int, or a run-time size."""
        return sized(dim, self.sizes)

    def forget(self) -> None:
        """Start a new row: what was bound in the last one's scope is gone."""
        self._known.clear()

    def start(self, lines: Lines, row: Expr) -> Expr:
        """The position of a row's first element, bound once a row."""
        if lines not in self._known:
            position = self.unravelled(lines.rows, row, lines.view.offset)
            self._known[lines] = bind(integer(position))
        return self._known[lines]

    def unravelled(self, axes: Sequence[tuple[Dim, Dim]], number: Expr, offset: Dim = 0) -> Expr:
        """`offset` plus the position that a number over `axes` stands for."""
        position: Expr = integer(self.at(offset))
        for k, (size, stride) in enumerate(reversed(axes)):
            index = number
            if k < len(axes) - 1:
                size = integer(self.at(size))
                index = tirx.truncmod(number, size)
                number = bind(tirx.truncdiv(number, size))
            position = position + index * integer(self.at(stride))
        return position
