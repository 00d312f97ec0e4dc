"""linear and grouped_linear with what follows them, done on a tile before it leaves the core.

A task is a block of columns that are treated alike: a family of columns is what one result of the
region is made of (a head's part of q, the gate's half), so splits and reshapes of the product cost
nothing, and the halves of a merged gate|up, which lie far apart, are computed by the same task. The
tile holds fp32 sums; from there on every value is rounded as the operators alone would round it.
Sums are taken in the order of the kernels alone: a region has the bits of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dsc.backends.tvm import bf16, codes
from dsc.backends.tvm.amx import TOKENS
from dsc.backends.tvm.kernels import coded, panels
from dsc.backends.tvm.kernels.access import Rows
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights
from dsc.backends.tvm.kernels.coded import Coded, Codes
from dsc.backends.tvm.kernels.coded_rows import taken
from dsc.backends.tvm.kernels.values import compute, held, literal, put, rounded
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import size_names
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    for_each,
    integer,
    loop,
    splat,
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.region_columns import PRODUCT, Family
from dsc.ir.region_steps import Lines, Literal, Read
from dsc.ir.types import DType

NARROW = 16
"""Columns of a task where bf16 has no kernels of its own."""


@dataclass(frozen=True, slots=True)
class Product:
    """The GEMM of a region: which parameters are its operands, and its extents.

    `offsets` is the parameter that says which rows belong to which of `experts` weights, or -1.
    `heavy` products are always worth all threads.
    """

    dtype: DType
    x: int
    weight: int
    bias: int
    offsets: int
    experts: int
    rows: Dim
    m: int
    depth: Dim
    heavy: bool
    codes: Coded | None = None


def product_region(
    product: Product,
    families: tuple[Family, ...],
    parameters: tuple[int, ...],
    sizes: int,
    machine: Machine,
) -> PrimFunc:
    """Arguments: the region's operands and results; scratch memory for rows of x; sizes.

    `parameters` are the addresses of each operand and result: several where it has parts. Scratch
    memory is for panels by tiles, or for rows that meet codes. A task is a part of the last axis of
    a family's walk.
    """
    wants = machine.tiles or product.codes is not None
    names = [f"x{i}" for i in range(sum(parameters))] + ["scratch"] * wants

    def body(*arguments: Expr) -> None:
        addresses, given = arguments[: len(names)], arguments[len(names) :]
        with ExitStack() as stack:
            if machine.bf16:
                stack.enter_context(bf16.instructions())
            if product.codes is not None:
                stack.enter_context(codes.instructions(machine))
            firsts = list(accumulate(parameters, initial=0))
            parts = [addresses[a:b] for a, b in pairwise(firsts)]
            _Tasks(product, families, parts, addresses[-1], given, machine).run()

    return build(body, [*names, *size_names(sizes)])


class _Tasks:
    """The tasks of a region: blocks of the columns of its families, for all rows."""

    def __init__(
        self,
        product: Product,
        families: Sequence[Family],
        parts: Sequence[Sequence[Expr]],
        scratch: Expr,
        sizes: Sequence[Expr],
        machine: Machine,
    ) -> None:
        self.product, self.families, self.machine = product, families, machine
        addresses = [each[0] for each in parts]
        self.places = Rows(sizes)
        self.native = machine.bf16 and product.dtype is DType.bf16
        self.rows, self.depth = map(self.places.at, (product.rows, product.depth))
        dtype, (rows, m, k) = product.dtype, (self.rows, product.m, self.depth)
        self.x = Tensor(addresses[product.x], dtype, (rows, k))
        self.codes: Codes | None = None
        if product.codes is None:
            self.w = Tensor(addresses[product.weight], dtype, (max(product.experts, 1), m, k))
        else:
            self.codes = Codes(product.codes, parts[product.weight])
            self.taken = taken(product.codes, scratch, self.rows)
        self.bias = Tensor(addresses[product.bias], dtype, (m,)) if product.bias >= 0 else None
        self.offsets = (
            Tensor(addresses[product.offsets], DType.i64, (product.experts + 1,))
            if product.offsets >= 0
            else None
        )
        self.tensors = {
            (a.view.buffer, a.view.dtype): Tensor(addresses[a.view.buffer], a.view.dtype, (1,))
            for family in families
            for a in _lines(family)
        }
        self.x_at = addresses[product.x]
        self.panels = scratch if machine.tiles else integer(0)
        self.plain = None if self.native else machine
        of = product.codes
        self.height = panels.tile_rows(self.plain) if of is None else of.heights[0]
        self.block = BLOCK if self.codes is None else coded.BLOCK
        self.copies = max(1 + len(f.shifts) for f in families)

    def run(self) -> None:
        """All tasks, over threads where they are worth it."""
        wide = self.block // (2 if self.copies > 1 else 1)
        self.grain = integer(NARROW)
        if self.codes is not None:
            wide = min(wide, coded.columns_at_once(self._starts()))
            self.grain = coded.grain(self.rows, self.machine.run, wide)
            self.taken.take(self.x, lambda i: i * self.depth, self.rows)
        elif self.native:
            self.grain = integer(wide)  # stacked weights have blocks for all threads
            if self.offsets is None:
                self.grain = panels.grain(self.rows, self.depth, wide, self.copies)
            self._pack()
        ends: list[Expr] = []
        count: Expr = integer(0)
        for family in self.families:
            count = bind(count + ceil_up(family.width, self.grain) * family.blocks)
            ends.append(count)
        work = PARALLEL_WORK if self.product.heavy else self.rows * self.depth * 16
        offsets = self.offsets
        if offsets is None:
            for_each(count, work, lambda i: self._task(integer(0), i, ends, None))
            return
        stacked = panels.Stacked(self.product.experts, count)

        def task(i: Expr) -> None:
            expert, g = stacked.place(i)
            first, end = (offsets.load(expert + n) for n in range(2))
            with when(tirx.all(g < count, first < end)):
                size = self.product.m * integer(self.depth)
                block = self.grain * integer(self.depth)
                self._task(expert, g, ends, bind(stacked.step(i, expert, size, block)))

        for_each(stacked.count, work, task)

    def _starts(self) -> list[int]:
        """Columns at which blocks of all families may begin, but for whole grains further on."""
        return [
            start for f in self.families for shift in (0, *f.shifts)
            for start in (f.start + shift, *(stride for _, stride in f.walk[:-1]))
        ]  # fmt: skip

    def _task(self, expert: Expr, g: Expr, ends: Sequence[Expr], step: Expr | None) -> None:
        """One block of columns: find its family, then its rows.

        `step` is the distance of the next task's weights, where they do not lie right behind.
        """
        cells = Local(5 + self.copies, "int64")
        first: Expr = integer(0)
        for number, (family, end) in enumerate(zip(self.families, ends, strict=True)):
            inside = tirx.all(g >= first, g < end)
            with when(inside) if len(self.families) > 1 else nullcontext():
                self._locate(family, number, bind(g - first), cells)
            first = end
        family, block, at, width, copies = (bind(cells[n]) for n in range(5))
        task = _Task(family, block, at, width, copies, cells)

        def finish(tile: Local, r: Expr, row: Expr) -> None:
            self._finish(tile, r, row, task)

        if self.codes is not None:
            self._multiply_codes(self.codes, expert, task, finish)
            return
        weight = bind(expert * (self.product.m * integer(self.depth)))
        rows = self._rows(expert)

        def columns(n: Expr) -> Weights:
            at = bind(weight + task.column(n) * self.depth)
            ahead = None if step is None else at + step
            return Weights(self.w, at, integer(self.depth), task.width, self.depth, ahead=ahead)

        panels.multiply(rows, task.copies, columns, finish, self.copies, self.plain)

    def _multiply_codes(
        self, weights: Codes, expert: Expr, task: _Task, finish: Callable[[Local, Expr, Expr], None]
    ) -> None:
        """A task's product where weights are codes."""
        first, count = self._range(expert)
        rows = coded.Rows(self.taken, first, count, lambda i: i)

        def block(n: Expr) -> coded.Block:
            return coded.Block(expert, bind(task.column(n)), task.width)

        coded.multiply(rows, weights, task.copies, block, finish, self.copies)

    def _range(self, expert: Expr) -> tuple[Expr, Expr]:
        """The first row of x that an expert's weights meet, and how many; all of one weight."""
        if self.offsets is None:
            return integer(0), integer(self.rows)
        first = bind(self.offsets.load(expert))
        return first, bind(self.offsets.load(expert + 1) - first)

    def _rows(self, expert: Expr) -> panels.Rows:
        """The rows of x that an expert's weights meet."""
        depth, packed = integer(self.depth), self.panels
        first, count = self._range(expert)
        if self.offsets is not None:
            packed = packed + panels.first_panel(first, expert) * (depth * (2 * TOKENS))
        at = self.x_at
        return panels.Rows(self.x, at, lambda i: i * depth, first, count, depth, packed)

    def _pack(self) -> None:
        """Panels of x, where products go by tiles."""
        if self.offsets is None:
            panels.pack(self._rows(integer(0)))
        else:
            experts = integer(self.product.experts)
            panels.pack_stacked(experts, self.rows * self.depth, self._rows)

    def _locate(self, family: Family, number: int, g: Expr, cells: Local) -> None:
        """Where a family's task g lies: family, block of the walk, place in it, columns.

        Tasks that follow each other read what lies side by side.
        """
        parts = bind(ceil_up(family.width, self.grain))
        block = bind(tirx.truncdiv(g, parts))
        at = bind(tirx.truncmod(g, parts) * self.grain)
        axes = family.walk[:-1]
        column = bind(family.start + at + self.places.unravelled(axes, block))
        cells[0], cells[1], cells[2] = integer(number), block, at
        cells[3] = tirx.min(self.grain, family.width - at)
        cells[4] = integer(1 + len(family.shifts))
        for n, shift in enumerate((0, *family.shifts)):
            cells[5 + n] = column + shift

    def _finish(self, tile: Local, r: Expr, row: Expr, task: _Task) -> None:
        """What follows the product, on row r of the tile, and the stores."""
        for number, family in enumerate(self.families):
            only = len(self.families) == 1
            with nullcontext() if only else when(tirx.EQ(task.family, integer(number))):
                self.places.forget()
                _Finish(self, family, tile, r, row, task).run()


@dataclass(frozen=True, slots=True)
class _Task:
    """A block of columns: of which family, which block of its walk, from where, how many.

    There are `copies` of it, at the family's shifts; `cells` end with the columns they begin at.
    """

    family: Expr
    block: Expr
    at: Expr
    width: Expr
    copies: Expr
    cells: Local

    def column(self, copy: Expr) -> Expr:
        """The first column of a copy."""
        return self.cells[copy + 5]


class _Finish:
    """A family's operators on one row of a tile."""

    def __init__(
        self, tasks: _Tasks, family: Family, tile: Local, r: Expr, row: Expr, task: _Task
    ) -> None:
        self.tasks, self.family, self.tile, self.r, self.row = tasks, family, tile, r, row
        self.task = task
        self.starts: dict[Lines, Expr] = {}
        places = tasks.places
        for a in _lines(family):
            if a not in self.starts:
                axes = [(e, s) for (e, _), s in zip(family.walk[:-1], a.inner, strict=False)]
                inner = integer(places.at(a.inner[-1]))
                position = places.start(a, row) + places.unravelled(axes, task.block)
                self.starts[a] = bind(position + task.at * inner)

    def run(self) -> None:
        """Vectors over the task's columns, then what is left one by one."""
        family, width = self.family, self.task.width
        plain = all(a.unit or a.inner[-1] == 0 for a in _lines(family))
        plain = plain and all(a.unit for _, a in family.writes)
        dtypes = {x.dtype for step in family.steps for x in step.reads}
        dtypes |= {step.dtype for step in family.steps}
        lanes = 16 if plain and DType.boolean not in dtypes else 1
        if not self.tasks.native and lanes > 1:
            lanes = min(lanes, self.tasks.machine.lanes)
        with loop(tirx.truncdiv(width, integer(lanes))) as i:
            self._columns(i * lanes, lanes)
        if lanes > 1 and family.width % NARROW:
            whole = bind(tirx.truncdiv(width, integer(lanes)) * lanes)
            with loop(width - whole) as i:
                self._columns(whole + i, 1)

    def _columns(self, j: Expr, lanes: int) -> None:
        known: dict[tuple[int, int], Expr] = {}
        for copy, shift in enumerate((0, *self.family.shifts)):
            known[PRODUCT, shift] = held(self._product(copy, j, lanes))
        for step in self.family.steps:
            values = [self._value(x, step.shift, known, j, lanes) for x in step.reads]
            known[step.number, step.shift] = compute(step, values, self.tasks.native)
        for number, lines in self.family.writes:
            where = self.starts[lines] + j * integer(self.tasks.places.at(lines.inner[-1]))
            put(self.tensor(lines), where, known[number, 0], self.tasks.native)

    def _product(self, copy: int, j: Expr, lanes: int) -> Expr:
        """Columns of the product at a copy, with the bias, rounded."""
        at = j + (self.r + copy * self.tasks.height) * self.tasks.block
        value = self.tile.load(at, lanes)
        if self.tasks.bias is not None:
            value = value + self.tasks.bias.at(self.task.column(copy) + j, lanes)
        return rounded(value, self.tasks.product.dtype, self.tasks.native)

    def _value(
        self, read: Read, shift: int, known: dict[tuple[int, int], Expr], j: Expr, lanes: int
    ) -> Expr:
        source = read.source
        if isinstance(source, Literal):
            return literal(source, read.dtype, lanes)
        if isinstance(source, int):
            return known[source, shift + read.shift]
        stride = self.tasks.places.at(source.inner[-1])
        if isinstance(stride, int) and stride == 0:
            return held(splat(bind(self.tensor(source).at(self.starts[source])), lanes))
        where = self.starts[source] + j * integer(stride)
        return held(self.tensor(source).at(where, lanes))

    def tensor(self, lines: Lines) -> Tensor:
        """The buffer that lines lie in."""
        return self.tasks.tensors[lines.view.buffer, lines.view.dtype]


def _lines(family: Family) -> list[Lines]:
    """What a family's operators read and write, in a fixed order."""
    sources = [x.source for step in family.steps for x in step.reads]
    read = [s for s in sources if isinstance(s, Lines)]
    return list(dict.fromkeys([*read, *(a for _, a in family.writes)]))


def ceil_up(a: int, b: Expr) -> Expr:
    """a / b, rounded up, of a run-time b."""
    return tirx.truncdiv(a + b - 1, b)
