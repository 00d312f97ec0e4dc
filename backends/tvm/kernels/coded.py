"""Products with weights that are integer codes, 16 rows of them side by side (`../codes.py`).

Rows of x are taken once a kernel (`take`): as codes with a scale for each 32 columns, where the
product says so, else in fp32. A task multiplies tiles of them with a few tiles of columns
(`multiply`), 32 columns of x at a time: a sum of integers, or of fp32, then times the scales, added
in fp32 in the order of columns. So a token's result depends on nothing that shares its batch.

With 8-bit codes and one row: 8 products of 64 and four instructions that scale for 544 bytes of
weights, so memory is the bound from two rows down; with many rows 64 products an instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsc.backends.tvm import codes
from dsc.backends.tvm.codes import LANES
from dsc.backends.tvm.kernels.bf16_product import BLOCK, ceil_div
from dsc.backends.tvm.launch import Unsupported, static_dim
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    T,
    Tensor,
    bind,
    cast,
    f32,
    for_each,
    integer,
    loop,
    select,
    splat,
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.formats import CODINGS, STEP, WHOLE
from dsc.ir.graph import Node
from dsc.ir.types import DType, TensorType

HEIGHTS = (6, 4, 2, 1)
"""Rows of x that a tile may take; missing ones are the last again."""
TILES = 2
"""Tiles of columns that are multiplied at a time: with 6 rows 24 accumulators."""
NARROW, WIDE = 32, BLOCK
"""Columns of a task with few rows and with many."""
FEW = 6
"""Rows up to which a task takes few columns."""
ACTIVATIONS = f"i8:{STEP}"
"""What rows may be taken as, beside fp32."""


@dataclass(frozen=True, slots=True)
class Coded:
    """What a kernel is specialised to: the codes, columns that share a scale (0: all), extents.

    `zeros`: the element type of zero points. `rows`: whether rows of x are taken as codes too.
    """

    dtype: DType
    scales: DType
    zeros: DType | None
    group: int
    columns: int
    depth: int
    matrices: int
    rows: bool

    @property
    def steps(self) -> int:
        """Steps of 32 columns of x."""
        return -(-self.depth // STEP)

    @property
    def addresses(self) -> int:
        """Parts of the weights."""
        return 2 if self.zeros is None else 3

    @property
    def together(self) -> int:
        """Codes in a byte."""
        return CODINGS[self.dtype].together

    @property
    def excess(self) -> int:
        """By how much an unsigned code is too large."""
        return 8 if self.together > 1 else 128

    @property
    def vectors(self) -> int:
        """Vectors of 64 bytes of a tile in a step."""
        return STEP // 4 // self.together

    @property
    def tiles(self) -> int:
        """Tiles of columns of a matrix."""
        return -(-self.columns // LANES)

    @property
    def groups(self) -> int:
        """Scales of a column."""
        return -(-self.depth // self.group) if self.group else 1


def coded(node: Node, weight: TensorType) -> Coded | None:
    """What a product's kernel is specialised to, of weights in codes. Raises `Unsupported`."""
    format, said = weight.format, node.attrs["activations"]
    if format is None:
        if said:
            raise Unsupported(f"activations {said} for weights in {weight.dtype}")
        return None
    if weight.dtype not in (DType.i8, DType.i4):
        raise Unsupported(f"weights in {weight.dtype}")
    if format.tile != LANES or format.block[0] != 1:
        raise Unsupported(f"weights in {weight.dtype}{format}")
    if format.scales not in (DType.f16, DType.f32, DType.bf16):
        raise Unsupported(f"scales in {format.scales}")
    if format.zeros not in (None, DType.i8, DType.u8):
        raise Unsupported(f"zero points in {format.zeros}")
    if said not in ("", ACTIVATIONS):
        raise Unsupported(f"activations {said}")
    *matrices, columns, depth = (static_dim(d, "a weight's axis") for d in weight.shape)
    group = format.block[1]
    group = WHOLE if group >= depth else group
    many = matrices[0] if matrices else 1
    return Coded(weight.dtype, format.scales, format.zeros, group, columns, depth, many, bool(said))


def addresses_of(t: TensorType) -> int:
    """How many addresses an operand has: one for each of its parts."""
    return len(t.parts)


def scratch_bytes(of: Coded, rows: Dim | Expr) -> Any:
    """What rows of x take in memory: codes, a scale and a sum for each step; or fp32."""
    return rows * (of.steps * ((STEP + 8) if of.rows else 4 * STEP))


class Codes:
    """The weights in memory."""

    def __init__(self, of: Coded, parts: Sequence[Expr]) -> None:
        self.of = of
        words = of.matrices * of.tiles * of.steps * of.vectors * LANES
        self.words = Tensor(parts[0], DType.i32, (words,))
        shared = of.matrices * of.tiles * of.groups * LANES
        self.scales = Tensor(parts[1], of.scales, (shared,))
        self.zeros = Tensor(parts[2], of.zeros, (shared,)) if of.zeros else None

    def tile(self, matrix: Expr, number: Expr) -> Expr:
        """A tile of columns by its number in all."""
        return bind(matrix * self.of.tiles + tirx.min(number, integer(self.of.tiles - 1)))

    def vectors(self, tile: Expr, step: Expr) -> Expr:
        """Where the codes of a step begin."""
        return (tile * self.of.steps + step) * (self.of.vectors * LANES)

    def shared(self, x: Tensor, tile: Expr, step: Expr) -> Expr:
        """The scales, or zero points, of a tile in a step, as fp32."""
        per = self.of.group // STEP
        group = tirx.truncdiv(step, integer(per)) if per > 1 else step if per else integer(0)
        return bind(cast(x.at((tile * self.of.groups + group) * LANES, LANES), "float32"))


class Taken:
    """Rows of x as they are multiplied, in scratch memory."""

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        self.of, self.rows = of, integer(rows)
        depth = of.steps * STEP
        if not of.rows:
            self.values = Tensor(address, DType.f32, (rows, depth))
            return
        self.bytes = Tensor(address, DType.i8, (rows, depth))
        self.words = Tensor(address, DType.i32, (rows, depth // 4))
        after = bind(address + self.rows * depth)
        self.scales = Tensor(after, DType.f32, (rows, of.steps))
        self.sums = Tensor(bind(after + self.rows * (4 * of.steps)), DType.i32, (rows, of.steps))

    def take(self, x: Tensor, start: Callable[[Expr], Expr], rows: Expr) -> None:
        """All rows of x: row i begins at `start(i)`."""

        def row(i: Expr) -> None:
            begin = bind(integer(start(i)))
            whole = self.of.depth // STEP
            with loop(whole) as step:
                self._take(i, step, [x.at(begin + step * STEP + at, LANES) for at in (0, LANES)])
            rest = self.of.depth - whole * STEP
            if rest:
                last = Local(STEP)
                for at in range(0, STEP, LANES):
                    last.store(integer(at), splat(f32(0.0), LANES))
                with loop(rest) as j:
                    last[j] = x.at(begin + (whole * STEP) + j)
                self._take(i, integer(whole), [last.load(integer(at), LANES) for at in (0, LANES)])

        for_each(rows, integer(self.of.depth), row)

    def _take(self, i: Expr, step: Expr, halves: list[Expr]) -> None:
        a, b = (bind(half) for half in halves)
        if not self.of.rows:
            self.values.put(self.values.offset(i, step * STEP), a)
            self.values.put(self.values.offset(i, step * STEP + LANES), b)
            return
        scale = bind(codes.largest(a, b) / f32(127.0))
        scale = bind(select(tirx.EQ(scale, f32(0.0)), f32(1.0), scale))
        whole = splat(scale, LANES)
        a, b = (bind(codes.nearest(each / whole)) for each in (a, b))
        joined = codes.join(a, b, even_first=self.of.together > 1)
        at = self.bytes.offset(i, step * STEP)
        T.buffer_store(self.bytes.buffer, joined, [tirx.Ramp(at, integer(1), STEP)])
        self.scales.store(scale, i, step)
        self.sums.store(codes.total(a, b), i, step)


@dataclass(frozen=True)
class Rows:
    """Rows of a product: `at(i)` is where row `first` + i of it lies among those that are taken."""

    taken: Taken
    first: Expr
    count: Expr
    at: Callable[[Expr], Expr]


@dataclass(frozen=True)
class Block:
    """`width` columns of a matrix, from one on."""

    matrix: Expr
    column: Expr
    width: Expr


def grain(rows: Expr, limit: int) -> Expr:
    """Columns that a task takes: few with few rows, so that small matrices occupy all threads."""
    few = integer(rows) <= integer(FEW)
    return bind(select(few, integer(min(NARROW, limit)), integer(min(WIDE, limit))))


def columns_at_once(starts: list[int]) -> int:
    """The columns of a block at most, where blocks begin at these.

    One that begins inside of a tile spills as much to both sides (`multiply`).
    """
    return BLOCK if all(start % LANES == 0 for start in starts) else BLOCK // 2


def multiply(
    rows: Rows,
    weights: Codes,
    blocks: Expr,
    block: Callable[[Expr], Block],
    finish: Callable[[Local, Expr, Expr], None],
    copies: int = 1,
) -> None:
    """The rows times `blocks` <= `copies` blocks of columns, of equal width.

    `finish(tile, r, i)` gets row i: its sums with column j of block n are at
    (n * HEIGHTS[0] + r) * BLOCK + j. The tile has a row more at both ends, for what whole tiles of
    columns have beside a block.
    """
    most = HEIGHTS[0]
    tile = Local((copies * most + 2) * BLOCK)
    count = integer(rows.count)
    with loop(ceil_div(count, most)) as t:
        begin = bind(t * most)
        here = bind(tirx.min(integer(most), count - begin))
        with loop(blocks) as n:
            start = bind((1 + n * most) * BLOCK)
            _fill(tile, start, rows, weights, bind(rows.first + begin), here, block(n))
        with loop(here) as r:
            finish(tile, bind(1 + r), bind(rows.first + begin + r))


def _fill(
    tile: Local, start: Expr, rows: Rows, weights: Codes, first: Expr, here: Expr, block: Block
) -> None:
    """The sums of a tile's rows: a body for each height."""
    lower = (*HEIGHTS[1:], 0)
    number = bind(tirx.truncdiv(block.column, integer(LANES)))
    spill = bind(block.column - number * LANES)
    count = bind(tirx.truncdiv(spill + block.width + (LANES - 1), integer(LANES)))
    for height, less in zip(HEIGHTS, lower, strict=True):
        with when(tirx.all(here <= integer(height), here > integer(less))):
            places = [
                bind(rows.at(bind(first + tirx.min(integer(r), here - 1)))) for r in range(height)
            ]
            with loop(ceil_div(count, TILES)) as pair:
                numbers = [bind(tirx.min(pair * TILES + c, count - 1)) for c in range(TILES)]
                tiles = [weights.tile(block.matrix, number + c) for c in numbers]
                for r, line in enumerate(_sums(rows.taken, places, weights, tiles)):
                    for c, value in zip(numbers, line, strict=True):
                        tile.store(start + r * BLOCK + c * LANES - spill, value)


def _sums(taken: Taken, places: list[Expr], weights: Codes, tiles: list[Expr]) -> list[list[Expr]]:
    """For each row of x its sums with each tile of columns."""
    sums = [[Local(1, width=LANES) for _ in tiles] for _ in places]
    for line in sums:
        for total in line:
            total[0] = total.zero
    step_sums = _integers if taken.of.rows else _floats
    with loop(weights.of.steps) as step:
        found = step_sums(taken, places, weights, tiles, step)
        scales = [weights.shared(weights.scales, tile, step) for tile in tiles]
        for line, values in zip(sums, found, strict=True):
            for total, value, scale in zip(line, values, scales, strict=True):
                total[0] = codes.fma(total[0], value, scale)
    return [[total[0] for total in line] for line in sums]


def _integers(
    taken: Taken, places: list[Expr], weights: Codes, tiles: list[Expr], step: Expr
) -> list[list[Expr]]:
    """The sums of one step with rows in codes, times the rows' scales."""
    of = weights.of
    accs = [[Local(1, "int32", LANES) for _ in tiles] for _ in places]
    given = [bind(taken.sums.load(place, step)) for place in places]
    for line, total in zip(accs, given, strict=True):
        for acc in line:
            acc[0] = acc.zero if of.zeros else splat(bind(total * (-of.excess)), LANES)
    words = [bind(taken.words.offset(place, step * (STEP // 4))) for place in places]
    starts = [bind(weights.vectors(tile, step)) for tile in tiles]
    for v in range(of.vectors):
        found = [_unsigned(weights, start + v * LANES) for start in starts]
        for h in range(of.together):
            for line, word in zip(accs, words, strict=True):
                x = bind(splat(bind(taken.words.at(word + (v * of.together + h))), LANES))
                for acc, halves in zip(line, found, strict=True):
                    acc[0] = codes.dot4(acc[0], halves[h], x)
    results = []
    zeros = [_zeros(weights, tile, step) for tile in tiles]
    for line, place, total in zip(accs, places, given, strict=True):
        scale = bind(splat(bind(taken.scales.load(place, step)), LANES))
        values = []
        for acc, zero in zip(line, zeros, strict=True):
            value = cast(acc[0], "float32")
            if zero is not None:  # both are whole numbers below 2^24
                value = value - zero * splat(cast(total, "float32"), LANES)
            values.append(bind(value * scale))
        results.append(values)
    return results


def _unsigned(weights: Codes, at: Expr) -> list[Expr]:
    """The codes of a vector as unsigned bytes; where two share one, the low halves come first."""
    both = bind(weights.words.at(at, LANES))
    if weights.of.together == 1:
        return [bind(both ^ splat(tirx.const(-0x7F7F7F80, "int32"), LANES))]
    nibbles = splat(tirx.const(0x0F0F0F0F, "int32"), LANES)
    four = splat(tirx.const(4, "int32"), LANES)
    return [bind(both & nibbles), bind((both >> four) & nibbles)]


def _zeros(weights: Codes, tile: Expr, step: Expr) -> Expr | None:
    """The zero points of a tile, as unsigned codes have them; `None` where there are none."""
    if weights.zeros is None:
        return None
    excess = splat(f32(float(weights.of.excess)), LANES)
    return bind(weights.shared(weights.zeros, tile, step) + excess)


def _floats(
    taken: Taken, places: list[Expr], weights: Codes, tiles: list[Expr], step: Expr
) -> list[list[Expr]]:
    """The sums of one step with rows in fp32: codes are widened."""
    of = weights.of
    sums = [[Local(1, width=LANES) for _ in tiles] for _ in places]
    for line in sums:
        for total in line:
            total[0] = total.zero
    zeros = [_zeros(weights, tile, step) for tile in tiles]
    with loop(of.vectors) as v:
        found = [_unsigned(weights, weights.vectors(tile, step) + v * LANES) for tile in tiles]
        rows = [bind(taken.values.offset(p, step * STEP + v * (4 * of.together))) for p in places]
        for h in range(of.together):
            for byte in range(4):
                columns = []
                for halves, zero in zip(found, zeros, strict=True):
                    moved = halves[h] >> splat(tirx.const(8 * byte, "int32"), LANES)
                    value = cast(moved & splat(tirx.const(255, "int32"), LANES), "float32")
                    less = splat(f32(float(of.excess)), LANES) if zero is None else zero
                    columns.append(bind(value - less))
                for line, row in zip(sums, rows, strict=True):
                    x = bind(splat(bind(taken.values.at(row + (byte * of.together + h))), LANES))
                    for total, column in zip(line, columns, strict=True):
                        total[0] = codes.fma(total[0], column, x)
    return [[bind(total[0]) for total in line] for line in sums]
