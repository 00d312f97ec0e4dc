"""All rows of x against blocks of columns, tile by tile, by whatever way the machine multiplies.

What bf16's instructions do not take, for its element type or on a `plain` machine, goes by `dots`.

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
from itertools import product
from typing import Any

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import LANES, by_tiles, columns_of_tasks, prefetch_far
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights, ceil_div, fill_block, tile_height
from dsc.backends.tvm.kernels.dots import dots
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    T,
    Tensor,
    bind,
    for_each,
    integer,
    loop,
    select,
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.types import DType, TensorType

PANELS = 2
"""Panels that a tile of rows takes: with two blocks of 16 columns, four independent sums."""
WIDE = 2 * amx.COLUMNS
"""Columns of two weight tiles."""
NEAR = 4
"""Steps of k ahead of which lines are asked for where memory is the bound."""
RUN = 8
"""Blocks of columns of an expert that follow each other."""
CHUNK = 32
"""Steps of k that a task packs."""
FEW = 16
"""Rows up to which a task takes few columns."""
LEAST = 16
"""Columns of a task at least, however deep they are."""
HELD = 640 << 10
"""Bytes of weights at most that a task reads again for each tile of a few rows.

At a depth of 8960, 64 columns are 1.1 MB, and 32 take 8% less time (Zen 4, 1 MiB a core).
"""


def fits(machine: Machine, depth: int, *types: TensorType) -> bool:
    """Whether all operands are bf16, the machine multiplies it, and rows are whole vectors."""
    return machine.bf16 and depth % LANES == 0 and all(t.dtype is DType.bf16 for t in types)


def grain(rows: Expr, depth: Expr, limit: int = BLOCK, copies: int = 1) -> Expr:
    """Columns that a task takes, `limit` at most, of each of `copies` blocks.

    Few where there are few rows, so that small matrices occupy all threads; many where there are
    many, so that x is read seldom, unless their weights leave no room in the second-level cache.
    """
    narrow, wide = (min(n, limit) for n in columns_of_tasks())
    many, row = integer(wide), integer(depth) * (2 * copies)
    while wide > LEAST and not by_tiles():
        many = select(row * wide <= integer(HELD), many, integer(wide // 2))
        wide //= 2
    return bind(select(rows <= integer(FEW), integer(narrow), many))


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


def tile_rows(plain: Machine | None = None) -> int:
    """Rows of x that a tile takes."""
    if plain is not None:
        return plain.rows
    return PANELS * amx.TOKENS if by_tiles() else tile_height()


def panel_bytes(rows: Dim | Expr, depth: Dim, experts: int = 1) -> Any:
    """Scratch bytes of all panels, for a number of rows that is a dim or a run-time value."""
    return (rows // amx.TOKENS + (experts + 1)) * depth * (2 * amx.TOKENS)


def first_panel(start: Expr, expert: Expr) -> Expr:
    """The number of an expert's first panel, where its rows begin at `start` of all: none overlap.

    Between the panels of neighbours stays at least (start + count) // 16 + 1 - start // 16 of room
    for ceil(count / 16).
    """
    return tirx.truncdiv(integer(start), integer(amx.TOKENS)) + integer(expert)


@dataclass(frozen=True)
class Stacked:
    """Tasks over `blocks` of columns of each of some experts' weights, in their order.

    A few blocks of an expert follow each other, so that its rows of x stay in the second-level
    cache; then comes the next expert, so that threads stay level however uneven the loads are.
    """

    experts: int
    blocks: Expr

    @property
    def count(self) -> Expr:
        """How many tasks there are; some at the end have no block."""
        return ceil_div(self.blocks, RUN) * (RUN * self.experts)

    def place(self, task: Expr) -> tuple[Expr, Expr]:
        """The expert and the block of a task."""
        run = tirx.truncdiv(task, integer(RUN))
        first = tirx.truncdiv(run, integer(self.experts)) * RUN
        block = first + tirx.truncmod(task, integer(RUN))
        return bind(tirx.truncmod(run, integer(self.experts))), bind(block)

    def step(self, task: Expr, expert: Expr, size: Expr, block: Expr) -> Expr:
        """How far the next task's weights are; `size` of an expert's, `block` of a block's."""
        size, block = integer(size), integer(block)
        over = select(expert + 1 < integer(self.experts), size, -size * (self.experts - 1))
        inside = tirx.truncmod(task, integer(RUN)) + 1 < integer(RUN)
        wrap = select(expert + 1 < integer(self.experts), -block * (RUN - 1), block)
        return select(inside, block, over + wrap)


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
    plain: Machine | None = None,
) -> None:
    """The rows times `blocks` <= `copies` blocks of columns, of equal width: `block(n)`.

    `finish(tile, r, i)` gets row i of x: its sums with column j of block n are at
    (n * tile_rows(plain) + r) * BLOCK + j.
    """
    height, count = tile_rows(plain), integer(rows.count)
    tile = Local(copies * height * BLOCK)
    tiles = _Tiles(rows, tile) if by_tiles() and plain is None else None
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
                _fill(rows, tile, start, first, here, block(n), plain)
        with loop(here) as r:
            finish(tile, r, bind(first + r))


def _fill(
    rows: Rows,
    tile: Local,
    start: Expr,
    first: Expr,
    here: Expr,
    w: Weights,
    plain: Machine | None,
) -> None:
    """The sums of a tile's rows on vectors: a body for each number of rows."""
    most = plain.rows if plain is not None else tile_height()
    for height in range(most, 0, -1):
        with when(tirx.EQ(here, integer(height))):
            x_rows = [bind(integer(rows.at(first + r))) for r in range(height)]
            if plain is None:
                fill_block(tile, start, rows.x, x_rows, w)
            else:
                _fill_plainly(tile, start, rows.x, x_rows, w, plain)


def _fill_plainly(
    tile: Local, start: Expr, x: Tensor, x_rows: Sequence[Expr], w: Weights, machine: Machine
) -> None:
    """As `fill_block`, on a machine's vectors of fp32."""
    columns, last = machine.columns, integer(w.columns) - 1
    assert isinstance(w.depth, int)
    with loop(ceil_div(w.columns, columns)) as group:
        j = bind(group * columns)
        picked = [bind(w.start + tirx.min(j + c, last) * w.stride) for c in range(columns)]
        for r, line in enumerate(dots(x, x_rows, w.tensor, picked, w.depth, machine.lanes)):
            for c, value in enumerate(line):
                tile[start + j + (r * BLOCK + c)] = value


class _Tiles:
    """A task's products on tile registers.

    While a task runs it fetches the next one's weights, a share with each tile of rows, so that
    memory is read all the time and not only while weights are new.
    """

    def __init__(self, rows: Rows, tile: Local) -> None:
        self.rows, self.tile = rows, tile
        self.square = Local(amx.TOKENS * amx.COLUMNS)
        self.tokens = bind(rows.tokens)
        self.pair_stride = bind(self.tokens * 4)
        self.tiles = bind(ceil_div(rows.count, PANELS * amx.TOKENS))

    def begin(self, columns: Expr) -> None:
        """Size the tiles for blocks of so many columns.

        Nobody releases them: to take them up again costs a task 1 us, as much as 25 KB of weights.
        """
        self.columns = bind(tirx.min(integer(columns), integer(amx.COLUMNS)))
        with when(self.tokens > 0):
            amx.configure(self.tokens, self.columns)

    def fill(self, start: Expr, t: Expr, here: Expr, w: Weights) -> None:
        """The sums of a tile of rows with a block of columns."""
        first = bind(self.rows.panel(t * PANELS))
        panels = first, bind(first + self.rows.panel_bytes)
        with T.If(here > integer(amx.TOKENS)):
            with T.Then():
                self._columns(start, t, panels, w)
            with T.Else():
                self._columns(start, t, panels[:1], w)

    def _columns(self, start: Expr, t: Expr, panels: Sequence[Expr], w: Weights) -> None:
        """All columns of the block, in groups of two tiles; the last may overlap the one before."""
        columns = integer(w.columns)
        last = bind(columns - self.columns)
        ahead = bind(w.behind if w.ahead is None else w.ahead)
        with loop(ceil_div(columns, WIDE)) as group:
            j = bind(group * WIDE)
            at = [bind(tirx.min(j + a * amx.COLUMNS, last)) for a in range(2)]
            rows = [bind(w.start + column * w.stride) for column in at]
            later = bind(ahead + j * w.stride)
            beside = bind(select(j + WIDE < columns, rows[0] + WIDE * w.stride, later))
            with T.If(tirx.EQ(self.tiles, integer(1))):
                with T.Then():
                    self._stream(panels, w, rows, beside)
                with T.Else():
                    self._share(panels, w, rows, t, later)
            for q in range(len(panels)):
                for a, column in enumerate(at):
                    self._save(2 * q + a, bind(start + column + q * (amx.TOKENS * BLOCK)))

    def _stream(
        self, panels: Sequence[Expr], w: Weights, rows: Sequence[Expr], beside: Expr
    ) -> None:
        """The sums of a group that one tile of rows meets: a few steps ahead is far enough.

        Farther ahead, memory streams no faster, and a kernel begins with as many lines that nobody
        has asked for and ends with as many that nobody wants (measured: 4 to 25% of its time).
        """
        self._clear(panels)
        steps = bind(tirx.truncdiv(integer(w.depth), integer(amx.DEPTH)))
        near = bind(tirx.min(steps, integer(NEAR)))
        most = bind(steps - near)
        for first, count, target in (
            (integer(0), most, bind(rows[0] + near * amx.DEPTH)),
            (most, near, bind(beside - most * amx.DEPTH)),
        ):
            with loop(count) as i:
                step = bind(first + i)
                self._step(panels, w, rows, step)
                for c in range(WIDE):
                    prefetch_far(w.tensor, target + step * amx.DEPTH + c * w.stride)

    def _share(
        self, panels: Sequence[Expr], w: Weights, rows: Sequence[Expr], t: Expr, later: Expr
    ) -> None:
        """The sums of a group with tile t of rows, and a share of what the next task multiplies.

        Each tile asks for a range of k of the group at `later`, a line of each row at a time.
        """
        self._clear(panels)
        steps = bind(tirx.truncdiv(integer(w.depth), integer(amx.DEPTH)))
        begin = bind(tirx.truncdiv(t * steps, self.tiles))
        count = tirx.truncdiv((t + 1) * steps, self.tiles) - begin
        count = bind(tirx.max(count, integer(1)))  # with fewer steps than tiles some ask twice
        with loop(count) as part:
            first = bind(tirx.truncdiv(part * steps, count))
            end = tirx.truncdiv((part + 1) * steps, count)
            for c in range(WIDE):
                prefetch_far(w.tensor, later + (begin + part) * amx.DEPTH + c * w.stride)
            with loop(bind(end - first)) as i:
                self._step(panels, w, rows, bind(first + i))

    def _clear(self, panels: Sequence[Expr]) -> None:
        for q, a in product(range(len(panels)), range(2)):
            amx.zero(2 * q + a)

    def _step(self, panels: Sequence[Expr], w: Weights, rows: Sequence[Expr], step: Expr) -> None:
        """32 products more for tiles 2 q + a, for panel q and columns a."""
        pairs_at = bind(step * self.tokens * (4 * amx.TOKENS))
        for q, panel in enumerate(panels):
            amx.load(amx.PAIRS[q], panel + pairs_at, self.pair_stride)
        for a, row in enumerate(rows):
            at = amx.address(w.tensor, row + step * amx.DEPTH)
            amx.load(amx.WEIGHTS[a], at, integer(w.stride) * 2)
            for q in range(len(panels)):
                amx.multiply(2 * q + a, amx.WEIGHTS[a], amx.PAIRS[q])

    def _save(self, sums: int, at: Expr) -> None:
        """Sums to rows of the tile: one token's lie in order, more are transposed."""
        target, square = amx.address(self.tile, at), amx.address(self.square, 0)
        with T.If(tirx.EQ(self.tokens, integer(1))):
            with T.Then():
                amx.save(sums, target, 4)
            with T.Else():
                amx.save(sums, square, 4 * amx.TOKENS)
                amx.unpack(square, target, 4 * BLOCK)
