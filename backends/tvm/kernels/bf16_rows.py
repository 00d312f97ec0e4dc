"""All rows of x against blocks of columns, tile by tile, by whatever way the machine multiplies.

A kernel says where its rows lie (`Rows`), packs them once for all of its tasks where products go by
tiles (`pack`), and in a task multiplies them (`multiply`): each tile of rows with the task's blocks
of columns into fp32 sums, which `finish` turns into results row by row.

Packed rows lie in panels of 16: for each 32 values of k, 16 pairs of all tokens (see `amx`). One
row is its own panel. A panel is packed once a kernel and read by every task, so it lies in scratch
memory; rows of stacked weights have panels of their own for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import by_tiles, prefetch_far
from dsc.backends.tvm.kernels import bf16_product as product
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights, ceil_div
from dsc.backends.tvm.tir import Expr, Local, Tensor, bind, for_each, integer, loop, select, when
from dsc.ir.dims import Dim

PANELS = 2
"""Panels that a tile of rows takes: with two blocks of 16 columns, four independent sums."""
WIDE = 2 * amx.COLUMNS
"""Columns of two weight tiles."""
CHUNK = 32
"""Steps of k that a task packs."""


@dataclass(frozen=True)
class Rows:
    """Rows `first` .. first + count - 1 of x: row i starts at address 2 `at(i)` behind `base`.

    `panels` is where their panels lie, `depth` the length of a row.
    """

    x: Tensor
    base: Expr
    at: Callable[[Expr], Expr]
    first: Expr
    count: Expr
    depth: Expr
    panels: Expr

    @property
    def tokens(self) -> Expr:
        """Rows of a panel."""
        return tirx.min(integer(self.count), integer(amx.TOKENS))

    @property
    def panel_bytes(self) -> Expr:
        """From a panel of 16 rows to the next."""
        return integer(self.depth) * (2 * amx.TOKENS)

    def address(self, row: Expr) -> Expr:
        """Where a row starts."""
        return self.base + integer(self.at(row)) * 2

    def panel(self, number: Expr) -> Expr:
        """The address of a panel; of a row on its own, the row's."""
        packed = self.panels + number * self.panel_bytes
        return select(integer(self.count) > 1, packed, self.address(self.first))


def tile_rows() -> int:
    """Rows of x that a tile takes."""
    return PANELS * amx.TOKENS if by_tiles() else product.tile_height()


def panel_bytes(rows: Dim | Expr, depth: Dim, experts: int = 1) -> Any:
    """Scratch bytes of all panels, for a number of rows that is a dim or a run-time value."""
    return (rows // amx.TOKENS + (experts + 1)) * depth * (2 * amx.TOKENS)


def first_panel(start: Expr, expert: Expr) -> Expr:
    """The number of an expert's first panel, where its rows begin at `start` of all: none overlap.

    Between the panels of neighbours stays at least (start + count) // 16 + 1 - start // 16 of room
    for ceil(count / 16).
    """
    return tirx.truncdiv(integer(start), integer(amx.TOKENS)) + integer(expert)


def pack(rows: Rows) -> None:
    """Pack all rows, on all threads where that is worth it; a row on its own stays as it is."""
    if not by_tiles():
        return
    parts = ceil_div(rows.depth, amx.DEPTH * CHUNK)
    panels = bind(select(integer(rows.count) > 1, ceil_div(rows.count, amx.TOKENS), integer(0)))

    def task(i: Expr) -> None:
        _pack_panel(rows, tirx.truncdiv(i, integer(parts)), tirx.truncmod(i, integer(parts)), parts)

    for_each(panels * parts, integer(amx.TOKENS * amx.DEPTH * CHUNK), task)


def pack_stacked(experts: Expr, work: Expr, rows: Callable[[Expr], Rows]) -> None:
    """Pack the rows of each of some experts; `work` is the elements of one."""
    if not by_tiles():
        return

    def task(i: Expr) -> None:
        mine = rows(i)
        with when(integer(mine.count) > 1), loop(ceil_div(mine.count, amx.TOKENS)) as panel:
            _pack_panel(mine, panel, integer(0), 1)

    for_each(experts, work, task)


def _pack_panel(rows: Rows, panel: Expr, part: Expr, parts: Expr) -> None:
    """Pack a share of the steps of k of 16 rows; the last row stands in for missing ones."""
    tokens, panel = bind(rows.tokens), bind(panel)
    steps = bind(tirx.truncdiv(integer(rows.depth), integer(amx.DEPTH)))
    begin = bind(tirx.truncdiv(part * steps, integer(parts)))
    end = bind(tirx.truncdiv((part + 1) * steps, integer(parts)))
    last = bind(rows.count - 1 - panel * amx.TOKENS)
    first = bind(rows.first + panel * amx.TOKENS)
    places = [tirx.min(integer(i), last) for i in range(amx.TOKENS)]
    starts = [bind(rows.address(first + place)) for place in places]
    target = bind(rows.panels + panel * rows.panel_bytes)
    with loop(end - begin) as i:
        step = bind(begin + i)
        moved = [start + step * (2 * amx.DEPTH) for start in starts]
        amx.pack(moved, target + step * tokens * (4 * amx.TOKENS), tokens)


def multiply(
    rows: Rows,
    blocks: Expr,
    block: Callable[[Expr], Weights],
    finish: Callable[[Local, Expr, Expr], None],
    copies: int = 1,
) -> None:
    """The rows times `blocks` <= `copies` blocks of columns, of equal width: `block(n)`.

    `finish(tile, r, i)` gets row i of x: its sums with column j of block n are at
    (n * tile_rows() + r) * BLOCK + j.
    """
    height, count = tile_rows(), integer(rows.count)
    tile = Local(copies * height * BLOCK)
    tiles = _Tiles(rows, tile) if by_tiles() else None
    if tiles is not None:
        tiles.begin(block(integer(0)).columns)
    with loop(ceil_div(count, height)) as t:
        first = bind(rows.first + t * height)
        here = bind(tirx.min(integer(height), count - t * height))
        with loop(blocks) as n:
            start = bind(n * (height * BLOCK))
            if tiles is not None:
                tiles.fill(start, t, here, block(n))
            else:
                _fill(rows, tile, start, first, here, block(n))
        with loop(here) as r:
            finish(tile, r, bind(first + r))


def _fill(rows: Rows, tile: Local, start: Expr, first: Expr, here: Expr, w: Weights) -> None:
    """The sums of up to `tile_height()` rows on vectors: a body for each number of rows."""
    for height in range(product.tile_height(), 0, -1):
        with when(tirx.EQ(here, integer(height))):
            x_rows = [bind(integer(rows.at(first + r))) for r in range(height)]
            product.fill_block(tile, start, rows.x, x_rows, w)


class _Tiles:
    """A task's products on tile registers."""

    def __init__(self, rows: Rows, tile: Local) -> None:
        self.rows, self.tile = rows, tile
        self.square = Local(amx.TOKENS * amx.COLUMNS)
        self.tokens = bind(rows.tokens)
        self.pair_stride = bind(self.tokens * 4)

    def begin(self, columns: Expr) -> None:
        """Size the tiles for blocks of so many columns.

        Nobody releases them: to take them up again costs a task 1 us, as much as 25 KB of weights.
        """
        self.columns = bind(tirx.min(integer(columns), integer(amx.COLUMNS)))
        with when(self.tokens > 0):
            amx.configure(self.tokens, self.columns)

    def fill(self, start: Expr, t: Expr, here: Expr, w: Weights) -> None:
        """The sums of a tile of rows with a block of columns. The first tile fetches ahead."""
        first = bind(self.rows.panel(t * PANELS))
        second = bind(first + self.rows.panel_bytes)
        panels = first, second
        with T.If(tirx.EQ(t, integer(0))):
            with T.Then():
                self._panels(start, here, panels, w, True)
            with T.Else():
                self._panels(start, here, panels, w, False)

    def _panels(
        self, start: Expr, here: Expr, panels: tuple[Expr, Expr], w: Weights, ahead: bool
    ) -> None:
        with T.If(here > integer(amx.TOKENS)):
            with T.Then():
                self._columns(start, panels, w, ahead)
            with T.Else():
                self._columns(start, panels[:1], w, ahead)

    def _columns(self, start: Expr, panels: Sequence[Expr], w: Weights, ahead: bool) -> None:
        """All columns of the block: groups of 16, of which the last may overlap the one before."""
        columns = integer(w.columns)
        last = bind(columns - self.columns)
        stride = bind(integer(w.stride) * 2)
        steps = bind(tirx.truncdiv(integer(w.depth), integer(amx.DEPTH)))
        with loop(ceil_div(columns, WIDE)) as group:
            j = bind(group * WIDE)
            at = [bind(tirx.min(j + i * amx.COLUMNS, last)) for i in range(2)]
            rows = [bind(w.start + column * w.stride) for column in at]
            later = bind(w.next_start(j, WIDE)) if ahead else None
            self._sums(panels, w, rows, stride, steps, later)
            for q in range(len(panels)):
                for a, column in enumerate(at):
                    self._save(2 * q + a, bind(start + column + q * (amx.TOKENS * BLOCK)))

    def _sums(
        self, panels: Sequence[Expr], w: Weights, rows: Sequence[Expr], stride: Expr, steps: Expr,
        later: Expr | None,
    ) -> None:  # fmt: skip
        """Sums over all of k, in tiles 2 q + a for panel q and columns a."""
        for sums in range(2 * len(panels)):
            amx.zero(sums)
        with loop(steps) as step:
            pairs_at = bind(step * self.tokens * 64)
            for q, panel in enumerate(panels):
                amx.load_pairs(amx.PAIRS[q], panel + pairs_at, self.pair_stride)
            for a, row in enumerate(rows):
                amx.load_weights(amx.WEIGHTS[a], w.tensor, row + step * amx.DEPTH, stride)
                for q in range(len(panels)):
                    amx.multiply(2 * q + a, amx.WEIGHTS[a], amx.PAIRS[q])
            if later is not None:
                for c in range(WIDE):
                    prefetch_far(w.tensor, later + c * w.stride + step * amx.DEPTH)

    def _save(self, sums: int, at: Expr) -> None:
        """Sums to rows of the tile: one token's lie in order, more are transposed."""
        with T.If(tirx.EQ(self.tokens, integer(1))):
            with T.Then():
                amx.save(sums, self.tile, at, integer(4))
            with T.Else():
                amx.save(sums, self.square, integer(0), integer(4 * amx.TOKENS))
                amx.unpack(self.square, self.tile, at, integer(4 * BLOCK))
