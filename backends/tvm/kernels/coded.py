"""Products with weights that are codes, 16 rows of them side by side (`../codes.py`).

Rows of x are taken once a kernel, and multiplied in one of four ways (`coded_rows`). A task
multiplies tiles of them with a few tiles of columns (`multiply`): sums of a range of x, times the
scales of that range, added in fp32 in the order of ranges. So a token's result depends on nothing
that shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dsc.backends.tvm.bf16 import prefetch_far
from dsc.backends.tvm.byte_products import SIGNED
from dsc.backends.tvm.codes import LANES
from dsc.backends.tvm.kernels.bf16_product import ceil_div
from dsc.backends.tvm.launch import Unsupported, static_dim
from dsc.backends.tvm.machine import LONGEST_RUN, Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    Tensor,
    bind,
    cast,
    integer,
    lanes_of,
    loop,
    reinterpret,
    select,
    splat,
    tirx,
    when,
)
from dsc.ir.formats import CODINGS, ROWS, STEP, WHOLE
from dsc.ir.graph import Node
from dsc.ir.types import DType, TensorType

HEIGHTS: tuple[int, ...] = (6, 4, 2, 1)
"""Rows of x that a tile may take; missing ones are the last again."""
TILE_ROWS = 16
"""The same where bytes are multiplied by AMX."""
TILES = 2
"""Tiles of columns that many rows multiply at a time: with 6 rows 24 accumulators."""
ALONE = 2
"""Rows up to which it is one tile: their bound is memory, which is read best as one stream."""
AHEAD = 8192
"""Bytes of weights between what they multiply and what is asked for (Zen 4: 7 to 15% faster)."""
VECTORS = 32
"""Vectors of 16 numbers that registers hold for that; with fewer tiles are lower, one at a time."""
BLOCK, WIDE = LONGEST_RUN, 64
"""Columns of a task at most, and with many rows; with few it is the machine's `run`."""
FEW = 6
"""Rows that are few: memory is the bound."""
INTEGERS, FLOATS, PAIRS, WIDENED = "integers", "floats", "pairs", "widened"
"""Ways to multiply: bytes by bytes, in fp32, bf16 by pairs, and in fp32 what was fp16."""


@dataclass(frozen=True, slots=True)
class Coded:
    """What a kernel is specialised to: the codes, their blocks, extents, and how they multiply.

    `high` columns of the result and `group` of x share a scale (0: all); `zeros` is the element
    type of zero points; `rows` what rows of x are taken as, of which tiles have some of `heights`;
    `signed` says that 8-bit codes are multiplied as they are stored.
    """

    dtype: DType
    scales: DType
    zeros: DType | None
    high: int
    group: int
    columns: int
    depth: int
    matrices: int
    rows: str
    way: str
    signed: bool
    heights: tuple[int, ...]
    tiles_at_once: int

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
        """By how much a code is too large as it is multiplied."""
        return 0 if self.signed else -int(CODINGS[self.dtype].least)

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

    @property
    def bands(self) -> int:
        """Scales along the columns of a matrix, of which `high` share one; padded to tiles."""
        if self.high == 1:
            return self.tiles * LANES
        return -(-self.columns // self.high) if self.high else 1


def coded(node: Node, x: DType, weight: TensorType, machine: Machine) -> Coded | None:
    """What a product's kernel is specialised to, of weights in codes. Raises `Unsupported`."""
    format, said = weight.format, node.attrs["activations"]
    if format is None:
        if said:
            raise Unsupported(f"activations {said} for weights in {weight.dtype}")
        return None
    integers = weight.dtype.is_int
    if format.tile != LANES:
        raise Unsupported(f"weights in {weight.dtype}{format}")
    if format.scales not in (DType.f16, DType.f32, DType.bf16, DType.f8e8m0):
        raise Unsupported(f"scales in {format.scales}")
    if format.zeros not in (None, DType.i8):
        raise Unsupported(f"zero points in {format.zeros}")
    if format.zeros is not None and not integers:
        raise Unsupported(f"zero points beside {weight.dtype}")
    if said not in ("", ROWS[weight.dtype.value]):
        raise Unsupported(f"activations {said} for weights in {weight.dtype}")
    *matrices, columns, depth = (static_dim(d, "a weight's axis") for d in weight.shape)
    high, group = (
        WHOLE if size >= extent else size
        for size, extent in zip(format.block, (columns, depth), strict=True)
    )
    way = FLOATS
    if integers and said:
        way = INTEGERS
    elif not integers and machine.bf16 and machine.vbmi and (x is DType.bf16 or said):
        way = PAIRS
    elif not integers and machine.f16:
        way = WIDENED
    heights, at_once = HEIGHTS, TILES
    if machine.vectors < VECTORS:
        heights, at_once = HEIGHTS[2 if way == WIDENED else 1 :], 1
    many = matrices[0] if matrices else 1
    kinds = (weight.dtype, format.scales, format.zeros)
    high = 1 if format.block[0] == 1 else high
    if way == INTEGERS and machine.byte_tiles:
        heights = (TILE_ROWS, *heights)
    signed = way == INTEGERS and machine.dots in SIGNED and CODINGS[weight.dtype].together == 1
    return Coded(*kinds, high, group, columns, depth, many, said, way, signed, heights, at_once)


STORED = {DType.f8e8m0: DType.u8}
"""What is read instead of element types that kernels do not know."""


class Codes:
    """The weights in memory."""

    def __init__(self, of: Coded, parts: Sequence[Expr]) -> None:
        self.of = of
        words = of.matrices * of.tiles * of.steps * of.vectors * LANES
        self.words = Tensor(parts[0], DType.i32, (words,))
        shared = of.matrices * of.bands * of.groups
        self.scales = Tensor(parts[1], STORED.get(of.scales, of.scales), (shared,))
        self.zeros = Tensor(parts[2], of.zeros, (shared,)) if of.zeros else None

    def tile(self, matrix: Expr, number: Expr) -> Expr:
        """A tile of columns by its number in all."""
        return bind(matrix * self.of.tiles + tirx.min(number, integer(self.of.tiles - 1)))

    def vectors(self, tile: Expr, step: Expr) -> Expr:
        """Where the codes of a step begin."""
        return (tile * self.of.steps + step) * (self.of.vectors * LANES)

    def begin(self, tile: Expr, step: Expr, rows: int) -> Expr:
        """As `vectors`; where rows are few, what memory gives later is asked for."""
        start = bind(self.vectors(tile, step))
        if rows <= ALONE:
            for v in range(self.of.vectors):
                prefetch_far(self.words, start + (v * LANES + AHEAD // DType.i32.itemsize))
        return start

    def shared(self, x: Tensor, tile: Expr, group: Expr) -> Expr:
        """The scales, or zero points, of a tile in a range of x, as fp32 in all lanes."""
        of = self.of
        if of.high == 1:
            return _in_fp32(x, x.at((tile * of.groups + group) * LANES, LANES))
        matrix, number = (op(tile, integer(of.tiles)) for op in (tirx.truncdiv, tirx.truncmod))
        band = tirx.truncdiv(number * LANES, integer(of.high)) if of.high else integer(0)
        return splat(_in_fp32(x, x.at((matrix * of.bands + band) * of.groups + group)), LANES)

    def group(self, step: Expr) -> Expr:
        """The range of x that a step lies in."""
        per = self.of.group // STEP
        return tirx.truncdiv(step, integer(per)) if per > 1 else step if per else integer(0)


def _in_fp32(x: Tensor, stored: Expr) -> Expr:
    """What was read of scales or zero points as fp32; a scale in a byte is an exponent."""
    if x.dtype is not STORED[DType.f8e8m0]:
        return bind(cast(stored, "float32"))
    lanes = lanes_of(stored)
    bits = cast(stored, "int32") << splat(tirx.const(23, "int32"), lanes)
    least = splat(tirx.const(1 << 22, "int32"), lanes)  # the exponent 0 is of a subnormal number
    return bind(reinterpret(tirx.max(bits, least), "float32"))


class Taken(Protocol):
    """Rows of x as they are multiplied (`coded_rows`)."""

    def sums(
        self, places: Sequence[Expr], weights: Codes, tiles: Sequence[Expr]
    ) -> list[list[Expr]]:
        """For each of some rows its products with each of some tiles of columns."""


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


def grain(rows: Expr, run: int, limit: int) -> Expr:
    """Columns that a task takes, `run` with few rows."""
    few = integer(rows) <= integer(FEW)
    return bind(select(few, integer(min(run, limit)), integer(min(WIDE, limit))))


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
    (n * heights[0] + r) * BLOCK + j. The tile has a row more at both ends, for what whole tiles of
    columns have beside a block.
    """
    most = weights.of.heights[0]
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
    heights = weights.of.heights
    lower = (*heights[1:], 0)
    number = bind(tirx.truncdiv(block.column, integer(LANES)))
    spill = bind(block.column - number * LANES)
    count = bind(tirx.truncdiv(spill + block.width + (LANES - 1), integer(LANES)))
    for height, less in zip(heights, lower, strict=True):
        with when(tirx.all(here <= integer(height), here > integer(less))):
            places = [
                bind(rows.at(bind(first + tirx.min(integer(r), here - 1)))) for r in range(height)
            ]
            wide = 1 if height <= ALONE else weights.of.tiles_at_once
            with loop(ceil_div(count, wide)) as part:
                numbers = [bind(tirx.min(part * wide + c, count - 1)) for c in range(wide)]
                tiles = [weights.tile(block.matrix, number + c) for c in numbers]
                for r, line in enumerate(rows.taken.sums(places, weights, tiles)):
                    for c, value in zip(numbers, line, strict=True):
                        tile.store(start + r * BLOCK + c * LANES - spill, value)
