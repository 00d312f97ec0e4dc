"""Block sizes: how large a tile each kernel works on, by target.

This is the one place where tiles are chosen. A choice has a *key*, which says the kernel and all
numbers that the rule reads, and besides the rule's tile it has others that could be faster: the
search space of `tuning`, and the tables below. Where somebody measured, `choices` has the tile that
was found under a key, and the rule is not asked.

On a GPU a tile must fit shared memory and registers and leave enough programs to fill the machine.
The interpreter runs programs one after another at about a millisecond each, whatever they hold, so
there the best tile is the largest: whole weight matrices where they fit `INTERPRET_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

from dsc.backends.triton.devices import ARCHS, Arch
from dsc.ir.dims import Dim

INTERPRET = "interpret"
INTERPRET_ELEMENTS = 1 << 18
DOT_MINIMUM = 16  # the smallest tile edge that tl.dot takes on every target


def next_power(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def powers(width: int) -> tuple[int, int]:
    """The blocks that so many columns lie in: powers of two of which the second may be 0.

    >>> [powers(n) for n in (8, 40, 80, 96, 112, 128, 192)]
    [(16, 0), (32, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 64)]
    """
    whole = max(DOT_MINIMUM, next_power(width))
    first = whole // 2
    rest = max(DOT_MINIMUM, next_power(width - first))
    return (first, rest) if first >= DOT_MINIMUM and first + rest < whole else (whole, 0)


def ceil_div(n: Dim, block: int) -> Dim:
    """N / block rounded up: the number of tiles."""
    return (n + (block - 1)) // block if block > 1 else n


def clamp_power(n: int, low: int, high: int) -> int:
    """`next_power(n)` kept within `low` and `high`."""
    return min(max(next_power(n), low), high)


def spelled(*words: object) -> str:
    """A kernel in words, as the beginning of a key; what is empty is left out."""
    return " ".join(str(word) for word in words if word)


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile m x n x k with the warps and pipeline stages that suit it.

    `ahead` is of flash attention: a tile's scores are multiplied during the softmax of another;
    `spans` of absorbed attention: programs that share a cache. `choice` says what it was taken for.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 1
    ahead: bool = False
    spans: int = 1
    choice: Choice | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RowTile:
    """A tile of `rows` rows by `columns` columns."""

    rows: int
    columns: int
    warps: int = 4
    choice: Choice | None = field(default=None, compare=False, repr=False)
    stages: ClassVar[int] = 1


AnyTile: TypeAlias = Tile | RowTile
T = TypeVar("T", bound="Tile | RowTile")


@dataclass(frozen=True, slots=True)
class Choice:
    """A place where several tiles would do: its key, the tiles, the rule's first, and which it is.

    A choice of several stages is `taken` before any of them are dropped for want of shared memory.
    """

    key: str
    tiles: tuple[AnyTile, ...]
    taken: AnyTile

    @property
    def others(self) -> list[AnyTile]:
        """The tiles that were not taken."""
        return [tile for tile in self.tiles if tile != self.taken]

    def as_json(self) -> dict[str, Any]:
        """The record written to the plan."""
        taken = self.tiles.index(self.taken)
        return {"taken": taken, "tiles": [tile_json(tile) for tile in self.tiles]}

    @staticmethod
    def from_json(key: str, data: Mapping[str, Any]) -> Choice:
        """Read back what `as_json` wrote."""
        tiles = tuple(map(tile_of, data["tiles"]))
        return Choice(key, tiles, tiles[data["taken"]])


def tile_json(tile: AnyTile) -> dict[str, int]:
    """A tile by the names of its numbers."""
    return {name: int(x) for name, x in asdict(replace(tile, choice=None)).items() if x is not None}


def tile_of(data: Mapping[str, int]) -> AnyTile:
    """Read back what `tile_json` gave. Raises `TypeError` where it is none."""
    numbers: dict[str, Any] = {**data}
    if "rows" in data:
        return RowTile(**numbers)
    return Tile(**{**numbers, "ahead": bool(data["ahead"])})


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
HELD = 1 << 14
"""Numbers that a program looks at at once."""
MANY_HEADS = 64
"""From so many heads on there are programs enough with one for all of a head's columns."""

OTHERS: Mapping[str, tuple[Tile, ...]] = {
    "few": (
        Tile(0, 16, 256, 4, 4),
        Tile(0, 32, 256, 4, 4),
        Tile(0, 16, 512, 4, 3),
        Tile(0, 32, 128, 4, 6),
        Tile(0, 64, 128, 4, 4),
    ),
    "medium": (
        Tile(0, 32, 128, 4, 4),
        Tile(0, 64, 128, 4, 3),
        Tile(0, 32, 256, 4, 3),
        Tile(0, 64, 64, 4, 5),
        Tile(0, 128, 64, 4, 4),
    ),
    "many": (
        Tile(64, 128, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 32, 8, 4),
    ),
    "many hip": (
        Tile(64, 128, 64, 4, 2),
        Tile(128, 128, 32, 4, 2),
        Tile(128, 128, 64, 8, 1),
    ),
    "large sm_90": (Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4)),
    "large sm_100": (Tile(128, 256, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    "large hip": (Tile(128, 256, 64, 8, 2), Tile(256, 128, 64, 8, 2)),
    "flash sm_90": (Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2), Tile(128, 32, 0, 8, 3)),
    "flash cuda": (Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 4, 2)),
    "flash hip": (Tile(64, 32, 0, 4, 2), Tile(64, 64, 0, 4, 2)),
}
"""Tiles to be measured beside the rule's, by the range of rows and by what the target is; a height
of 0 is the rule's. What does not compile for some widths, or spills, is left out where it is found
(docs/tuning.md)."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The block-size policy of one target: `interpret`, `cuda:sm_90`, `hip:gfx942`.

    `choices` are tiles by key that stand in place of the rules'.
    """

    target: str
    choices: Mapping[str, AnyTile] = field(default_factory=dict)

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
        self, m: int, n: int, k: int, itemsize: int, batch: int = 1, numbers: bool = False,
        of: str = "gemm",
    ) -> Tile:  # fmt: skip
        """A tile for at most `m` rows by `n` columns, `batch` times; operands of `itemsize` bytes.

        Where both operands are `numbers`, and there are tiles enough for all multiprocessors, tiles
        are as large as registers hold: what a tile reads is then the least for its products.
        Few rows mean a stream of weights: narrow column tiles, so that many programs read at once,
        and for the fewest rows deep ones, so that each has much on its way. fp32 products have no
        tensor cores to feed, and code that grows with the tile. `of` says what else the kernel is.
        """
        if self.interprets:
            edge_k = clamp_power(k, DOT_MINIMUM, 512)
            edge_n = clamp_power(n, DOT_MINIMUM, INTERPRET_ELEMENTS // edge_k)
            return Tile(clamp_power(m, DOT_MINIMUM, 64), edge_n, edge_k)
        key = f"{of} m={m} n={n} k={k} z={batch} bytes={itemsize}"
        if itemsize >= 4:
            return Tile(clamp_power(m, 16, 32), clamp_power(n, 16, 64), 16, 4, 1)
        kind, arch = self._kind, self.target.partition(":")[2]
        if m <= 16 and n * batch < 8192 and k > 512 and kind == "cuda":
            rule = Tile(16, clamp_power(n, 16, 32 if n > 3072 else 16), 256, 4, 4)
            return self._taken(key, rule, self._fitting(OTHERS["few"], rule, n))
        if m <= 64:
            wide = 64 if n >= 8192 else 32
            rule = Tile(clamp_power(m, 16, 64), clamp_power(n, 16, wide), 128, 4, self.deep_stages)
            return self._taken(key, rule, self._fitting(OTHERS["medium"], rule, n))
        large = LARGE_GEMM.get(arch) if numbers else None
        if large is not None and batch * (m // large.m) * (n // large.n) >= FILLED:
            return self._taken(key, large, OTHERS[f"large {arch if kind == 'cuda' else kind}"])
        rule = Tile(clamp_power(m, 64, 128), clamp_power(n, 16, 128), 64, 8, self.deep_stages)
        others = OTHERS["many" if kind == "cuda" else "many hip"]
        return self._taken(key, rule, self._fitting(others, rule, n))

    def of_codes(self, tile: Tile, columns: int, f16: bool) -> Tile:
        """A product's tile whose steps along k are the `columns` of a row that share a scale.

        In f16 codes take twice the registers, and both sums of a tile of 128 x 128 spill; where
        registers are tight they do in any type.
        """
        stages = min(8, tile.stages * max(1, tile.k // columns))
        wide = min(tile.n, 64) if self.tight or f16 else tile.n
        return replace(tile, k=columns, n=wide, stages=stages)

    def made_numbers(self, tile: Tile) -> Tile:
        """A product's tile whose rows are made as they come, and its weight's numbers of bytes.

        On sm_90 four warps spill with 64 columns by 128.
        """
        return replace(tile, warps=8) if tile.n > 32 and self._kind == "cuda" else tile

    def of_groups(self, tile: Tile, columns: int) -> Tile:
        """A product's tile that stores codes of whole groups of `columns`, where there is one."""
        tall = min(tile.m, self.promoted)
        return replace(tile, m=tall, n=columns) if tile.n < columns and tall else tile

    def merging(self, tile: Tile, rows: int, spans: int, heads: int) -> Tile:
        """The tile of a product that merges `spans` partial results of `rows` rows a head.

        Few programs read a head's spans again.
        """
        if self.interprets:
            return tile
        deep = max(16, min(tile.k, HELD // 2 // (next_power(spans) * next_power(rows))))
        return replace(tile, n=128 if heads >= MANY_HEADS else tile.n, k=deep, warps=8)

    def squares(self, rows: int, columns: int) -> int:
        """Columns of all `rows` rows that a product sums the squares of at once."""
        return min(next_power(columns), HELD // rows)

    def gemv(self, n: int, k: int, bits: int = 16, of: str = "gemv") -> Tile:
        """A tile of `n` rows of a matrix with rows of `k`, times a vector: a stream of weights.

        Of codes of fewer bits there are more, so that as many bytes are on their way.
        """
        if self.interprets:
            edge_k = clamp_power(k, 1, 512)
            return Tile(1, clamp_power(n, 1, INTERPRET_ELEMENTS // edge_k), edge_k)
        edge_k = clamp_power(k, 32, 1024)
        held = 2048 * (1 if bits >= 16 else 2)
        rule = Tile(1, clamp_power(n, 1, held // edge_k), edge_k)
        others = [
            Tile(1, clamp_power(n, 1, max(1, elements // deep)), deep, warps)
            for elements, deep, warps in (
                (2 * held, edge_k, 4), (held, max(32, edge_k // 2), 4), (2 * held, edge_k, 8),
                (4 * held, edge_k, 8),
            )
        ]  # fmt: skip
        return self._taken(f"{of} n={n} k={k} bits={bits}", rule, others)

    def vector_of_codes(self, tile: Tile, columns: int, fp8: bool) -> Tile:
        """A tile with as many codes of the weight as it had numbers, in steps of `columns`."""
        wide = tile.n * tile.k // columns // (2 if self.tight and fp8 else 1)
        return replace(tile, k=columns, n=max(1, wide))

    def flash(self, queries: int, keys: int, head: int, itemsize: int, of: str = "flash") -> Tile:
        """Query rows (m) and keys (n) of a flash-attention tile for heads of `head` numbers."""
        if self.interprets:
            return Tile(clamp_power(queries, 16, 128), clamp_power(keys, 16, 512), 0)
        if itemsize >= 4:
            return Tile(16, 16, 0, 4, 1)
        tall, arch = clamp_power(queries, 16, 128), self.target.partition(":")[2]
        key = f"{of} queries={queries} keys={keys} head={head} bytes={itemsize}"
        if tall > 64:
            wide = FLASH_OF_256 if head > 128 else FLASH
            rule = wide.get(arch, wide[self._kind])
            known = f"flash {arch}" if f"flash {arch}" in OTHERS else f"flash {self._kind}"
            others = OTHERS[known] if head <= 128 else ()
            return self._taken(key, rule, others)
        rule = Tile(tall, 64 if head <= 128 and tall < 64 else 32, 0, 4, 2)
        others = (replace(rule, n=32), replace(rule, n=64), replace(rule, stages=3))
        return self._taken(key, rule, others)

    def latent(
        self,
        heads: int,
        tokens: int,
        width: int,
        itemsize: int,
        coded: bool = False,
        queries: int = 1,
        of: str = "latent",
    ) -> Tile:
        """Heads (m), cached tokens (n) and spans of absorbed attention; rows of `width` numbers.

        One token tile lies in shared memory as key and as value, twice when loads run ahead. Rows
        that are `coded` become numbers in registers, of which AMD's waves have enough for 16.
        """
        if self.interprets:
            return Tile(clamp_power(heads, 16, 128), clamp_power(tokens, 16, 512), 0)
        spans = self._spans(queries * -(-heads // 16), tokens)
        if itemsize >= 4:
            return Tile(16, 16, 0, 4, 1, spans=spans)
        fits = self.arch.program_shared // 2 // (next_power(width) * itemsize)
        most = max(16, min(64, next_power(fits + 1) // 2))
        if self._kind == "hip":
            most = 16 if coded else min(most, 32)
        # An accumulator of 16 x 512 spills in four warps of 32. In four of 64 it does not, and
        # eight of those would have half the registers each.
        warps = 8 if width > 128 and self._kind == "cuda" else 4
        tall = clamp_power(tokens, 16, most)
        rule = Tile(16, tall, 0, warps, 1 if most < 64 else 2, spans=spans)
        fewer, more = max(1, spans // 2), max(1, min(2 * spans, tokens // 64, 128))
        others = (
            replace(rule, spans=fewer),
            replace(rule, spans=more),
            replace(rule, n=max(16, tall // 2)),
            replace(rule, n=max(16, tall // 2), spans=more),
            replace(rule, stages=3 - rule.stages),
        )
        key = f"{of} heads={heads} tokens={tokens} width={width} queries={queries}"
        return self._taken(f"{key} bytes={itemsize}", rule, others)

    def _spans(self, programs: int, tokens: int) -> int:
        """Spans that a cache of up to `tokens` rows is cut into, for `programs` other programs.

        `FILLED` programs in all, and no span below the rows of a tile.
        """
        wanted = max(1, FILLED // max(programs, 1))
        return max(1, min(wanted, tokens // 64, 128))

    def merge(self, spans: int, columns: int) -> RowTile:
        """Columns that a program merges, of `spans` partial results at once."""
        rule = RowTile(1, clamp_power(columns, 16, max(16, 8192 // spans)))
        others = [
            RowTile(1, clamp_power(columns, 16, max(16, held // spans)), warps)
            for held, warps in ((2048, 4), (4096, 4), (8192, 8))
        ]
        return self._taken(f"merge spans={spans} columns={columns}", rule, others)

    def rows(self, rows: int, columns: int, of: str) -> RowTile:
        """A tile of whole rows: `columns` numbers each, at most `rows` of them.

        `of` names the kernel; so below.
        """
        rule = self._rows(rows, columns)
        lower = replace(rule, rows=max(1, rule.rows // 2))
        others = (lower, replace(rule, warps=12 - rule.warps), replace(lower, warps=2))
        return self._taken(f"{of} rows={rows} columns={columns}", rule, others)

    def copy(self, rows: int, columns: int, of: str) -> RowTile:
        """A tile of parts of rows, for kernels whose columns are independent."""
        part = self._rows(rows, min(columns, 4096 if self.interprets else 1024))
        rule = RowTile(part.rows, part.columns)
        half = max(1, rule.columns // 2)
        others = (replace(rule, columns=half), replace(rule, warps=8), replace(rule, warps=2))
        return self._taken(f"{of} rows={rows} columns={columns} in parts", rule, others)

    def loop(self, rows: int, columns: int, of: str) -> RowTile:
        """A tile for kernels that walk along their rows in steps."""
        rule = self._rows(rows, min(columns, 4096))
        half = max(1, rule.columns // 2)
        others = (replace(rule, columns=half), replace(rule, warps=12 - rule.warps))
        return self._taken(f"{of} rows={rows} columns={columns} in steps", rule, others)

    def flat(self, elements: int, of: str) -> RowTile:
        """Elements (rows) that a program of a pointwise kernel takes."""
        if self.interprets:
            return RowTile(clamp_power(elements, 1, 1 << 14), 0)
        others = (RowTile(256, 0, 2), RowTile(512, 0), RowTile(2048, 0), RowTile(4096, 0, 8))
        return self._taken(f"{of} elements={elements}", RowTile(1024, 0), others)

    def quantised(self, rows: int, of: str) -> RowTile:
        """Rows of which a program makes codes, of the columns that share a scale."""
        rule = RowTile(clamp_power(rows, 1, 512 if self.interprets else 32), 0)
        others = (RowTile(min(rule.rows, 16), 0), RowTile(min(rule.rows, 8), 0, 2))
        return self._taken(f"{of} rows={rows}", rule, others)

    def sort(self, elements: int, experts: int) -> RowTile:
        """Elements (rows) that the expert sort reads in a step, and experts (columns) a program."""
        lanes = clamp_power(experts, 1, 64) if self.interprets else 1
        held = 1 << 15 if self.interprets else 1 << 10
        rule = RowTile(clamp_power(elements, 1, max(1, held // lanes)), lanes)
        others = (replace(rule, rows=min(rule.rows, 512)), replace(rule, warps=2))
        return self._taken(f"sort elements={elements} experts={experts}", rule, others)

    def parts(self, columns: int) -> RowTile:
        """Columns of each part of a row of logits."""
        most = 1 << 14 if self.interprets else 1024
        return RowTile(1, min(next_power(columns), most))

    def limits(self, columns: int) -> RowTile:
        """Columns of a row that are looked at at once for what sampling leaves out."""
        return RowTile(1, self._rows(1, min(columns, 4096)).columns, 16)

    @property
    def _kind(self) -> str:
        return self.target.partition(":")[0]

    def _rows(self, rows: int, columns: int) -> RowTile:
        width = next_power(columns)
        if self.interprets:
            return RowTile(clamp_power(rows, 1, max(1, (1 << 15) // width)), width)
        height = clamp_power(rows, 1, max(1, min(16, 1024 // width)))
        return RowTile(height, width, 8 if width >= 4096 else 4)

    def _taken(self, key: str, rule: T, others: Iterable[T]) -> T:
        """The tile that was chosen under a key, else the rule's; it says what else there is."""
        tiles = [rule, *(tile for tile in dict.fromkeys(others) if tile != rule)]
        if self.interprets or len(tiles) == 1:
            return rule
        chosen = self.choices.get(key, rule)
        taken = next((tile for tile in tiles if tile == chosen), rule)
        return replace(taken, choice=Choice(key, tuple(tiles), taken))

    def _fitting(self, tiles: Iterable[Tile], rule: Tile, columns: int) -> list[Tile]:
        """Tiles no wider than a product has columns, of the rule's height where they say none."""
        wide, most = next_power(max(columns, DOT_MINIMUM)), 2 if self._kind == "hip" else 8
        return [
            replace(x, m=x.m or rule.m, n=min(x.n, wide), stages=min(x.stages, most)) for x in tiles
        ]
