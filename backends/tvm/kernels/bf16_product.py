"""Micro-kernels of bf16 products: tiles of sums in registers, operands read as they lie.

dot form   out[i, j] = sum_k x[i, k] w[j, k]: both rows contiguous in k, vectors run along k. A
           tile of 6 x 4 sums does 24 pair products for 10 loads; four lane sums cost 13
           instructions, 78 a tile for 1536 products at k = 2048. So weights need no packing: a
           checkpoint's rows are streamed once for one row of x (bound: memory bandwidth, 1 flop a
           byte and row), and stay in the second-level cache while more rows pass by (bound: pair
           products).
           Where products are widened (see `bf16`), the rows of x are widened once for all columns,
           and 8 x 2 sums take 32 FMAs, 18 loads and 4 instructions that widen w.
mix form   out[i, j] = sum_t p[i, t] v[t, j]: rows of v contiguous in j, vectors run along j. Two
           rows of v are zipped into pairs of one column each, once for all rows of p. Where p is
           in fp32 (`Widened`), even and odd columns of a row of v have sums of their own.

Every sum is taken in an order that depends on k alone, not on the number of rows, on the place in
a tile or on threads: a token's result does not change with what shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsc.backends.tvm.bf16 import (
    LANES,
    SUMS,
    Pairs,
    Widened,
    bits,
    by_pairs,
    even,
    fma,
    odd,
    pair_dot,
    prefetch,
    prefetch_far,
    sum4,
    zipped,
)
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    Tensor,
    bind,
    f32,
    integer,
    loop,
    select,
    splat,
    tirx,
    when,
)

HEIGHT, WIDTH = 6, 4
"""Rows and columns of a dot tile: 24 accumulators, 4 vectors of w and one of x in 32 registers."""
BLOCK = 64
"""Columns at most that a task takes: at k = 2048, 256 KiB of weights in the second-level cache."""
WIDENED_HEIGHT = 8
"""Rows of a tile whose rows of x are widened: sums, w and a row of x take 22 registers."""
DEPTH = 2048
"""Elements of k that are summed before the lanes are: a tile's rows of x stay in 24 KiB."""
WIDENED_DEPTH = DEPTH // 2
"""The same for rows of x in fp32."""


def tile_height() -> int:
    """Rows of x that a tile of the kernel being built takes."""
    return HEIGHT if by_pairs() else WIDENED_HEIGHT


@dataclass(frozen=True, slots=True)
class Factor:
    """One range of the summed axis: rows of x and of w by the positions where they start."""

    x: Tensor
    x_rows: Sequence[Expr]
    w: Tensor
    w_rows: Sequence[Expr]
    depth: Expr
    later: Sequence[Expr] = ()
    """Where rows of w start that will be read next: they are prefetched.

    That is into the second-level cache: four rows of 4 KiB and the four that are read now leave no
    room in the first, and what is asked for there too early came 20% slower (Zen 4).
    """


def dot_sums(factors: Sequence[Factor]) -> list[Expr]:
    """For each row of x the vector of its four sums with the rows of w, over all factors."""
    height = len(factors[0].x_rows)
    sums = [[Local(1, width=SUMS) for _ in range(WIDTH)] for _ in range(height)]
    for line in sums:
        for acc in line:
            acc[0] = acc.zero
    for factor in factors:
        with loop(factor.depth // LANES) as step:
            k = step * LANES
            ws = [bind(bits(factor.w, row + k)) for row in factor.w_rows]
            for row in factor.later:
                prefetch_far(factor.w, row + k)
            for line, row in zip(sums, factor.x_rows, strict=True):
                a = bind(bits(factor.x, row + k))
                for acc, b in zip(line, ws, strict=True):
                    acc[0] = pair_dot(acc[0], a, b)
    return [sum4([acc[0] for acc in line]) for line in sums]


@dataclass(frozen=True, slots=True)
class Weights:
    """`columns` rows of a matrix [*, depth], `stride` apart: the columns of the product.

    `following` is where the rows start that are read after these, `ahead` where those of the task
    after this one; right behind these if not said.
    """

    tensor: Tensor
    start: Expr
    stride: Expr
    columns: Expr
    depth: Expr
    following: Expr | None = None
    ahead: Expr | None = None

    def rows(self, j: Expr, k: Expr) -> list[Expr]:
        """Where WIDTH rows start; the last one stands in for rows past the end."""
        last = integer(self.columns) - 1
        picked = [tirx.min(j + c, last) for c in range(WIDTH)]
        return [bind(self.start + row * self.stride + k) for row in picked]

    @property
    def behind(self) -> Expr:
        """Where the rows right behind these start."""
        return self.start + integer(self.columns) * self.stride

    def next_rows(self, j: Expr, k: Expr, depth: Expr, width: int) -> list[Expr]:
        """Where the rows start that come after `width` columns from j in a range of k.

        They are the next columns, then the next range of k, then what follows. At the edge of a
        prefetch all memory streams start anew, so that a wrong guess there costs a good part of
        the bandwidth where blocks are small.
        """
        columns, end = integer(self.columns), bind(k + depth)
        follow = self.behind if self.following is None else self.following
        deeper = select(end < integer(self.depth), self.start + end, follow)
        beside = self.start + (j + width) * self.stride + k
        first = bind(select(j + width < columns, beside, deeper))
        return [bind(first + c * self.stride) for c in range(width)]


def dot_block(x: Tensor, x_rows: Sequence[Expr], w: Weights) -> Local:
    """The products of a few rows of x with up to BLOCK columns: fp32 [rows, BLOCK]."""
    tile = Local(len(x_rows) * BLOCK)
    fill_block(tile, integer(0), x, x_rows, w)
    return tile


def fill_block(tile: Local, start: Expr, x: Tensor, x_rows: Sequence[Expr], w: Weights) -> None:
    """As `dot_block`, into `tile` from `start` on."""
    clear_block(tile, start, len(x_rows))
    add_block(tile, start, x, x_rows, w)


def clear_block(tile: Local, start: Expr, rows: int) -> None:
    """Zeros for some rows of a tile."""
    with loop(rows * BLOCK // SUMS) as i:
        tile.store(start + i * SUMS, splat(f32(0.0), SUMS))


def add_block(tile: Local, start: Expr, x: Tensor, x_rows: Sequence[Expr], w: Weights) -> None:
    """Add the products to what `tile` holds from `start` on."""
    step = DEPTH if by_pairs() else WIDENED_DEPTH
    with loop(ceil_div(w.depth, step)) as part:
        k = bind(part * step)
        depth = bind(tirx.min(integer(step), integer(w.depth) - k))
        here = Part(x, [bind(row + k) for row in x_rows], w, k, depth)
        if by_pairs():
            _pair_columns(tile, start, here)
        else:
            widened_columns(tile, start, [here])


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the summed axis: k .. k + depth - 1 of `w`, and rows of x from there on."""

    x: Tensor
    rows: Sequence[Expr]
    w: Weights
    k: Expr
    depth: Expr


def _pair_columns(tile: Local, start: Expr, part: Part) -> None:
    """Add the products over one range of k to `tile`, four columns at a time."""
    w, k, depth = part.w, part.k, part.depth
    with loop(ceil_div(w.columns, WIDTH)) as group:
        j = bind(group * WIDTH)
        later = w.next_rows(j, k, depth, WIDTH)
        sums = dot_sums([Factor(part.x, part.rows, w.tensor, w.rows(j, k), depth, later)])
        for r, four in enumerate(sums):
            at = start + j + r * BLOCK
            tile.store(at, tile.load(at, WIDTH) + four)


def widened_columns(tile: Local, start: Expr, parts: Sequence[Part]) -> None:
    """Add the products over all parts to `tile`, with the rows of x in fp32.

    Even lanes come before odd ones, row by row in a step of k. Two columns at a time are enough for
    high tiles: what is loaded of x costs no arithmetic. The parts, WIDENED_DEPTH deep at most in
    all, have the same columns.
    """
    height = len(parts[0].rows)
    width = WIDTH if height < WIDTH else WIDTH // 2
    halves = Local(height * (WIDENED_DEPTH // SUMS), width=SUMS)
    firsts: list[Expr] = []
    first: Expr = integer(0)
    for part in parts:
        firsts.append(first)
        with loop(part.depth // LANES) as step:
            at = bind((first + step) * (2 * height))
            for r, row in enumerate(part.rows):
                value = bind(bits(part.x, row + step * LANES))
                halves[at + 2 * r] = even(value)
                halves[at + (2 * r + 1)] = odd(value)
        first = bind(first + integer(part.depth) // LANES)
    with loop(ceil_div(parts[0].w.columns, width)) as group:
        j = bind(group * width)
        sums = [[Local(1, width=SUMS) for _ in range(width)] for _ in parts[0].rows]
        for line in sums:
            for acc in line:
                acc[0] = acc.zero
        for part, first in zip(parts, firsts, strict=True):
            w, k, depth = part.w, part.k, part.depth
            w_rows, later = w.rows(j, k)[:width], w.next_rows(j, k, depth, width)
            with loop(depth // LANES) as step:
                columns = []
                for row, next_row in zip(w_rows, later, strict=True):
                    value = bind(bits(w.tensor, row + step * LANES))
                    columns.append((bind(even(value)), bind(odd(value))))
                    prefetch(w.tensor, next_row + step * LANES)
                at = bind((first + step) * (2 * height))
                for r, line in enumerate(sums):
                    low, high = bind(halves[at + 2 * r]), bind(halves[at + (2 * r + 1)])
                    for acc, (b_low, b_high) in zip(line, columns, strict=True):
                        acc[0] = fma(fma(acc[0], low, b_low), high, b_high)
        if width == WIDTH:
            for r, line in enumerate(sums):
                at = start + j + r * BLOCK
                tile.store(at, tile.load(at, WIDTH) + sum4([acc[0] for acc in line]))
        else:
            for r in range(0, height, 2):
                pair = (sums[r], sums[min(r + 1, height - 1)])
                four = bind(sum4([acc[0] for line in pair for acc in line]))
                for i, half in enumerate((tirx.vectorlow, tirx.vectorhigh)[: height - r]):
                    at = start + j + (r + i) * BLOCK
                    tile.store(at, tile.load(at, width) + half("float32x2", four))


def ceil_div(a: Expr, b: int) -> Expr:
    """a / b, rounded up."""
    return -(-a // b) if isinstance(a, int) else tirx.truncdiv(a + (b - 1), integer(b))


def row_tiles(rows: Expr, height: int, body: Callable[[Expr, int], None]) -> None:
    """Cover 0 .. rows-1 by `body(start, height)` and one lower tile for what is left."""
    with loop(tirx.truncdiv(rows, integer(height))) as i:
        body(i * height, height)
    rest = bind(tirx.truncmod(rows, integer(height)))
    for low in range(1, height):
        with when(tirx.EQ(rest, integer(low))):
            body(rows - low, low)


def mix_sums(
    p: Pairs | Widened, p_rows: Sequence[Expr], v: Tensor, v_row: Callable[[Expr], Expr],
    count: Expr, columns: int, start: Callable[[int, int], Expr] | None = None, ahead: int = 0,
) -> list[list[Local]]:  # fmt: skip
    """sum_t p[i, t] v[t, j] over `count` rows of v (even), `columns` vectors of 32 columns.

    Sums stay zipped (see `bf16.zipped`), or even and odd columns apart where p is widened: two
    accumulators for a vector of columns. `v_row(t)` is where the wanted columns of row t lie;
    `start(i, a)` is what accumulator a of row i begins with. Rows of v that come `ahead` rows
    later, if that is said, are prefetched.
    """
    sums = [[Local(1, width=SUMS) for _ in range(2 * columns)] for _ in p_rows]
    for i, line in enumerate(sums):
        for a, acc in enumerate(line):
            acc[0] = acc.zero if start is None else start(i, a)
    if isinstance(p, Widened):
        with loop(integer(count)) as t:
            row = bind(v_row(t))
            vectors = [bind(bits(v, row + c * LANES)) for c in range(columns)]
            halves = [bind(f(x)) for x in vectors for f in (even, odd)]
            for line, at in zip(sums, p_rows, strict=True):
                share = bind(p.everywhere(at + t))
                for acc, half in zip(line, halves, strict=True):
                    acc[0] = fma(acc[0], share, half)
        return sums
    with loop(tirx.truncdiv(integer(count), integer(2))) as half:
        t = bind(half * 2)
        first, second = bind(v_row(t)), bind(v_row(t + 1))
        for row in (v_row(t + ahead), v_row(t + (ahead + 1))) if ahead else ():
            for c in range(columns):
                prefetch_far(v, row + c * LANES)
        pairs = []
        for c in range(columns):
            a, b = bits(v, first + c * LANES), bits(v, second + c * LANES)
            pairs += [bind(z) for z in zipped(bind(a), bind(b))]
        for line, row in zip(sums, p_rows, strict=True):
            share = bind(p.everywhere(row + t))
            for acc, pair in zip(line, pairs, strict=True):
                acc[0] = pair_dot(acc[0], share, pair)
    return sums
