"""The text of a kernel over rows as it is written: names, numbers, columns, and where elements lie.

Lines are said one after another; what was computed has a name and is computed once. A position is
an index over rows and one over columns, unravelled into the axes of a view (`rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dsc.backends.triton.pointwise import widen
from dsc.ir.dims import Dim
from dsc.ir.region_steps import Lines
from dsc.ir.views import View, joined


@dataclass(frozen=True)
class RowColumns:
    """Columns of one number: their index is [1, BLOCK], their mask [BLOCK_ROWS, BLOCK]."""

    count: Dim
    index: str
    mask: str
    block: str


class RowText:
    """Lines of a kernel, and its parameters: pointers by view and numbers by dim.

    `flat` ones have an element for a row, `walks` those that go along rows in blocks.
    """

    flat = walks = False

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = 1
        self.pointers: dict[View, str] = {}
        self.numbers: dict[Dim, str] = {}
        self.known: dict[str, str] = {}
        """Names of what was computed before, by expression."""

    # --- names ------------------------------------------------------------------------------------

    def _say(self, *lines: str) -> None:
        self.lines += ["    " * self.indent + line for line in lines]

    def _named(self, expression: str) -> str:
        """The name of a value that is computed where it is first asked for."""
        if expression not in self.known:
            self.known[expression] = f"t{len(self.known)}"
            self._say(f"{self.known[expression]} = {expression}")
        return self.known[expression]

    def _pointer(self, view: View) -> str:
        return self.pointers.setdefault(view, f"p{len(self.pointers)}")

    def _number(self, dim: Dim) -> str:
        return self.numbers.setdefault(dim, f"n{len(self.numbers)}")

    def _index(self, columns: RowColumns, start: str) -> None:
        index = columns.index
        self._say(f"{index} = {start}tl.arange(0, {columns.block})[None, :]")
        self._say(f"{columns.mask} = live & ({index} < {self._number(columns.count)})")

    @contextmanager
    def _along(self, columns: RowColumns) -> Iterator[None]:
        """What is said of all columns: of one block, or of each in turn."""
        if not self.walks:
            yield
            return
        self._say(f"for start in range(0, {self._number(columns.count)}, {columns.block}):")
        before = dict(self.known)
        self.indent += 1
        self._index(columns, "start + ")
        yield
        self.indent -= 1
        self.known = before

    # --- memory -----------------------------------------------------------------------------------

    def _terms(self, index: str, axes: Sequence[tuple[Dim, Dim]]) -> list[str]:
        """The parts of a position that an index over axes, each (extent, stride), stands for."""
        terms = []
        merged = joined(axes)
        wide = "" if self.flat else ".to(tl.int64)"
        for k in reversed(range(len(merged))):
            extent, stride = merged[k]
            own = index
            if k > 0:
                own, index = (
                    f"{index} % {self._number(extent)}",
                    f"({index} // {self._number(extent)})",
                )
            if stride == 1:
                terms.append(own)
            elif stride != 0:
                terms.append(f"({own}){wide} * {self._number(stride)}")
        return terms

    def _place(
        self,
        lines: Lines,
        columns: RowColumns,
        inner: Sequence[tuple[str, int]] = (),
        each: bool = False,
    ) -> tuple[str, str]:
        """Where elements lie, and the argument that says which there are.

        `inner` are indices of the axes of a row with their positions, else the columns unravel. One
        element for all is a scalar, unless `each` is to have an address.
        """
        view, lead = lines.view, lines.lead
        axes = list(zip(view.shape, view.strides, strict=True))
        outer = self._terms("row", axes[:lead])
        if inner:
            within = [t for index, k in inner for t in self._terms(index, [axes[lead + k]])]
        else:
            within = self._terms(columns.index, axes[lead:])
        pointer = self._pointer(view)
        if each and not outer and not within:
            outer = ["row * 0"]
        mask = ""
        if outer:
            mask = f", mask={columns.mask if within else 'live'}"
        elif within:
            mask = f", mask={columns.index} < {self._number(columns.count)}"
        return " + ".join([pointer, *outer, *within]), mask

    def _load(
        self, lines: Lines, columns: RowColumns, inner: Sequence[tuple[str, int]] = ()
    ) -> str:
        place, mask = self._place(lines, columns, inner)
        return self._named(
            f"tl.load({place}{mask and mask + ', other=0'}){widen(lines.view.dtype)}"
        )
