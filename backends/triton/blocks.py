"""Block sizes: how large a tile each kernel works on, by target.

On a GPU a tile must fit shared memory and registers and leave enough programs to fill the machine.
The interpreter runs programs one after another at about a millisecond each, whatever they hold, so
there the best tile is the largest: whole weight matrices where they fit `INTERPRET_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.backends.triton.devices import ARCHS, Arch
from dsc.ir.dims import Dim

INTERPRET = "interpret"
INTERPRET_ELEMENTS = 1 << 18
DOT_MINIMUM = 16  # the smallest tile edge that tl.dot takes on every target


def next_power(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: Dim, block: int) -> Dim:
    """N / block rounded up: the number of tiles."""
    return (n + (block - 1)) // block if block > 1 else n


def clamp_power(n: int, low: int, high: int) -> int:
    """`next_power(n)` kept within `low` and `high`."""
    return min(max(next_power(n), low), high)


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile m x n x k with the warps and pipeline stages that suit it.

    `ahead` is of flash attention: a tile's scores are multiplied during the softmax of another.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 1
    ahead: bool = False


FLASH: Mapping[str, Tile] = {
    "cuda": Tile(128, 64, 0, 8, 2),
    "sm_90": Tile(128, 64, 0, 8, 3, ahead=True),
    "hip": Tile(128, 64, 0, 8, 2),
}
"""Tiles of flash attention for many queries of heads up to 128 wide, by architecture or kind
(docs/decisions/triton-attention.md)."""
FLASH_OF_256: Mapping[str, Tile] = {
    "cuda": Tile(64, 32, 0, 8, 2),
    "sm_90": Tile(128, 32, 0, 8, 2),
    "hip": Tile(64, 32, 0, 4, 2),
}
"""The same for wider heads."""


LARGE_GEMM: Mapping[str, Tile] = {
    "sm_90": Tile(128, 256, 64, 8, 3),
    "sm_100": Tile(128, 256, 64, 8, 3),
    "gfx942": Tile(256, 256, 32, 8, 2),
    "gfx950": Tile(256, 256, 32, 8, 2),
}
"""Tiles of large products, by architecture: of 128 by 128 they would read too much
(docs/decisions/triton-attention.md)."""
FILLED = 256
"""Programs that fill a card once: it has 130 to 300 multiprocessors."""


@dataclass(frozen=True, slots=True)
class RowTile:
    """A tile of `rows` rows by `columns` columns."""

    rows: int
    columns: int
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """The block-size policy of one target: `interpret`, `cuda:sm_90`, `hip:gfx942`."""

    target: str

    @property
    def interprets(self) -> bool:
        """Whether the target is Triton's interpreter."""
        return self.target == INTERPRET

    @property
    def fp8(self) -> str:
        """Which kind of e4m3 the target converts and multiplies: e4m3fn, e4m3fnuz, or none."""
        return "" if self.interprets else self.arch.fp8

    @property
    def arch(self) -> Arch:
        """What is known of the target's architecture."""
        return ARCHS[self.target.partition(":")[2]]

    @property
    def promoted(self) -> int:
        """Rows of a tile of 256 columns whose sums are promoted, so that both sums fit registers.

        CUDA's FP8 units read operands from shared memory, f16 has them in registers too. On AMD
        only 16 rows would fit, which reads weights too often: there is no such tile.
        """
        if self.target.startswith("hip:"):
            return 0
        return 64 if self.fp8 and not self.tight else 32

    @property
    def tight(self) -> bool:
        """Whether FP8 is multiplied from registers, which both sums of a product lie in too."""
        return self.target.endswith(("sm_89", "sm_120", "gfx942"))

    @property
    def deep_stages(self) -> int:
        """Pipeline stages for a long loop over k: AMD's loop pipeliner wants two."""
        return 2 if self.target.startswith("hip:") else 3

    def gemm(
        self, m: int, n: int, k: int, itemsize: int, batch: int = 1, numbers: bool = False
    ) -> Tile:
        """A tile for at most `m` rows by `n` columns, `batch` times; operands of `itemsize` bytes.

        Where both operands are `numbers`, and there are tiles enough for all multiprocessors, tiles
        are as large as registers hold: what a tile reads is then the least for its products.
        Few rows mean a stream of weights: narrow column tiles, so that many programs read at once,
        and for the fewest rows deep ones, so that each has much on its way. fp32 products have no
        tensor cores to feed, and code that grows with the tile.
        """
        if self.interprets:
            edge_k = clamp_power(k, DOT_MINIMUM, 512)
            edge_n = clamp_power(n, DOT_MINIMUM, INTERPRET_ELEMENTS // edge_k)
            return Tile(clamp_power(m, DOT_MINIMUM, 64), edge_n, edge_k)
        if itemsize >= 4:
            return Tile(clamp_power(m, 16, 32), clamp_power(n, 16, 64), 16, 4, 1)
        if m <= 16 and n * batch < 8192 and k > 512 and self.target.startswith("cuda:"):
            return Tile(16, clamp_power(n, 16, 32 if n > 3072 else 16), 256, 4, 4)
        if m <= 64:
            wide = 64 if n >= 8192 else 32
            return Tile(clamp_power(m, 16, 64), clamp_power(n, 16, wide), 128, 4, self.deep_stages)
        large = LARGE_GEMM.get(self.target.partition(":")[2]) if numbers else None
        if large is not None and batch * (m // large.m) * (n // large.n) >= FILLED:
            return large
        tile_n = clamp_power(n, 16, 128)
        return Tile(clamp_power(m, 64, 128), tile_n, 64, 8, self.deep_stages)

    def gemv(self, n: int, k: int, bits: int = 16) -> Tile:
        """A tile of `n` rows of a matrix with rows of `k`, times a vector: a stream of weights.

        Of codes of fewer bits there are more, so that as many bytes are on their way.
        """
        if self.interprets:
            edge_k = clamp_power(k, 1, 512)
            return Tile(1, clamp_power(n, 1, INTERPRET_ELEMENTS // edge_k), edge_k)
        edge_k = clamp_power(k, 32, 1024)
        return Tile(1, clamp_power(n, 1, 2048 * (1 if bits >= 16 else 2) // edge_k), edge_k)

    def flash(self, queries: int, keys: int, head: int, itemsize: int) -> Tile:
        """Query rows (m) and keys (n) of a flash-attention tile for heads of `head` numbers."""
        if self.interprets:
            return Tile(clamp_power(queries, 16, 128), clamp_power(keys, 16, 512), 0)
        if itemsize >= 4:
            return Tile(16, 16, 0, 4, 1)
        tall = clamp_power(queries, 16, 128)
        if tall > 64:
            wide = FLASH_OF_256 if head > 128 else FLASH
            return wide.get(self.target.partition(":")[2], wide[self.target.partition(":")[0]])
        return Tile(tall, 64 if head <= 128 and tall < 64 else 32, 0, 4, 2)

    def latent(
        self, heads: int, tokens: int, width: int, itemsize: int, coded: bool = False
    ) -> Tile:
        """Heads (m) and cached tokens (n) of an absorbed-attention tile; rows of `width` numbers.

        One token tile lies in shared memory as key and as value, twice when loads run ahead. Rows
        that are `coded` become numbers in registers, of which AMD's waves have enough for 16.
        """
        if self.interprets:
            return Tile(clamp_power(heads, 16, 128), clamp_power(tokens, 16, 512), 0)
        if itemsize >= 4:
            return Tile(16, 16, 0, 4, 1)
        fits = self.arch.program_shared // 2 // (next_power(width) * itemsize)
        most = max(16, min(64, next_power(fits + 1) // 2))
        if self.target.startswith("hip:"):
            most = 16 if coded else min(most, 32)
        # An accumulator of 16 x 512 spills in four warps of 32. In four of 64 it does not, and
        # eight of those would have half the registers each.
        warps = 8 if width > 128 and self.target.startswith("cuda:") else 4
        return Tile(16, clamp_power(tokens, 16, most), 0, warps, 1 if most < 64 else 2)

    def splits(self, programs: int, tokens: int) -> int:
        """Spans that a cache of up to `tokens` rows is cut into, for `programs` other programs.

        `FILLED` programs in all, and no span below the rows of a tile.
        """
        if self.interprets:
            return 1
        wanted = max(1, FILLED // max(programs, 1))
        return max(1, min(wanted, tokens // 64, 128))

    def merge(self, spans: int, columns: int) -> int:
        """Columns that a program merges, of `spans` partial results at once."""
        return clamp_power(columns, 16, max(16, 8192 // spans))

    def rows(self, rows: int, columns: int) -> RowTile:
        """A tile of whole rows: `columns` numbers each, at most `rows` of them."""
        width = next_power(columns)
        if self.interprets:
            return RowTile(clamp_power(rows, 1, max(1, (1 << 15) // width)), width)
        height = clamp_power(rows, 1, max(1, min(16, 1024 // width)))
        return RowTile(height, width, 8 if width >= 4096 else 4)

    def copy(self, rows: int, columns: int) -> RowTile:
        """A tile of parts of rows, for kernels whose columns are independent."""
        part = self.rows(rows, min(columns, 4096 if self.interprets else 1024))
        return RowTile(part.rows, part.columns, 4)

    def loop(self, rows: int, columns: int) -> RowTile:
        """A tile for kernels that walk along their rows in steps."""
        return self.rows(rows, min(columns, 4096))

    def flat(self, elements: int) -> int:
        """Elements a program of a pointwise kernel takes."""
        return clamp_power(elements, 1, 1 << 14) if self.interprets else 1024

    def scan(self, elements: int, lanes: int) -> int:
        """Elements that the expert sort looks at in one step, for `lanes` experts a program."""
        return clamp_power(elements, 1, max(1, (1 << 15 if self.interprets else 1 << 10) // lanes))

    def lanes(self, experts: int) -> int:
        """Experts that one program of the sort numbers."""
        return clamp_power(experts, 1, 64) if self.interprets else 1
