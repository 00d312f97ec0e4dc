"""Attention of grouped heads in bf16, tile by tile: keys and values read as they lie.

bound: 2 (d + e) bytes a visible row and head of keys over bandwidth in a decode step, which reads
each row once for all the heads that share it; 2 (d + e) flops for each pair of row and query over
the peak of pair products in a prompt.

decode   a task is a token's share of the rows in sight with all heads: a block of 64 rows stays in
         the second-level cache while tiles of eight heads pass by. PARTS shares of equal size,
         whatever the number of threads, are joined by their maxima.
prompt   a task is a chunk of the queries of a group, pairs (token, head), with all rows that one of
         them sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.backends.tvm.bf16 import LANES, SUMS, by_pairs, instructions, prefetch_far
from dsc.backends.tvm.kernels import bf16_product as product
from dsc.backends.tvm.kernels.attend import LEAST
from dsc.backends.tvm.kernels.bf16_attention import PARTS, SharedParts, part_floats, part_of
from dsc.backends.tvm.kernels.bf16_product import Factor, Part, Weights, ceil_div, dot_sums
from dsc.backends.tvm.kernels.bf16_softmax import (
    BLOCK,
    Running,
    Tile,
    add_values,
    store_output,
    weigh,
)
from dsc.backends.tvm.kernels.latent_cache import CacheRows
from dsc.backends.tvm.kernels.sight import Sight
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    f32,
    for_each,
    integer,
    loop,
    tirx,
    when,
)
from dsc.ir.types import DType

QUERIES = 8
"""Queries of a tile: 16 accumulators of 32 columns."""
CHUNK = 64
"""Queries of a task of a prompt: their sums take 32 KiB at a width of 128."""


def tile_of(share: int) -> int:
    """Heads of a tile: as few tiles as possible, of equal size."""
    return -(-share // -(-share // QUERIES))


def floats(heads: int, e: int) -> int:
    """Scratch memory of a decode step's token, in floats."""
    return PARTS * part_floats(heads, e)


@dataclass(frozen=True)
class Keys:
    """Keys and values as a kernel's arguments give them."""

    k: Tensor
    v: Tensor
    rows: CacheRows
    groups: int
    d: int
    e: int

    @staticmethod
    def of(given: Mapping[str, Expr], groups: int, d: int, e: int, page: int) -> Keys:
        """Those among a kernel's arguments."""
        slots = (1, page) if page else (given["b"], given["t"])
        k, v = (
            Tensor(given[name], DType.bf16, (*slots, groups, width))
            for name, width in (("k", d), ("v", e))
        )
        return Keys(k, v, CacheRows.of(given, page), groups, d, e)

    def scores(
        self, tile: Tile, q: Tensor, starts: list[Expr], group: Expr, slot: Expr, here: Expr,
        later: Expr | None = None,
    ) -> None:  # fmt: skip
        """Scores of a tile's queries, which start there, with `here` rows from a slot on.

        Rows from the slot `later` on, if that is said, are asked for, and their values.
        """
        stride = self.groups * self.d
        first = bind((slot * self.groups + group) * self.d)
        if not by_pairs():
            keys = Weights(self.k, first, integer(stride), here, self.d)
            product.clear_block(tile.scores, integer(0), tile.queries)
            none = integer(0)
            if self.d <= product.WIDENED_DEPTH:
                parts = [Part(q, starts, keys, none, self.d)]
                product.widened_columns(tile.scores, none, parts)
            else:
                product.add_block(tile.scores, none, q, starts, keys)
            return
        height = next(n for n in (6, 5, 4, 3, 2, 1) if tile.queries % n == 0)
        with loop(ceil_div(here, product.WIDTH)) as four:
            t = bind(four * product.WIDTH)
            rows = [bind(first + tirx.min(t + i, here - 1) * stride) for i in range(product.WIDTH)]
            if later is not None:
                self._ask(group, bind(later + t))
            for part in range(0, tile.queries, height):
                several = starts[part : part + height]
                sums = dot_sums([Factor(q, several, self.k, rows, integer(self.d))])
                for i, scores in enumerate(sums):
                    tile.scores.store((part + i) * BLOCK + t, scores)

    def _ask(self, group: Expr, slot: Expr) -> None:
        """Ask for a few rows of a group."""
        for x, width in ((self.k, self.d), (self.v, self.e)):
            at = bind((slot * self.groups + group) * width)
            for row in range(product.WIDTH):
                for line in range(0, width, LANES):
                    prefetch_far(x, at + (row * self.groups * width + line))

    def add(
        self, tile: Tile, running: Running, first: Expr, place: tuple[Expr, Expr, Expr]
    ) -> None:
        """Add weighted values of a group's rows: `place` is group, slot of the first, and count."""
        group, slot, here = place
        start, stride = bind((slot * self.groups + group) * self.e), self.groups * self.e
        add_values(tile, running, first, self.v, lambda row: start + row * stride, here)


def decode(heads: int, groups: int, d: int, e: int, sight: Sight, page: int) -> PrimFunc:
    """The kernel of one new token a sequence, with scratch memory."""
    share = heads // groups
    height = tile_of(share)
    tiles = -(-share // height)
    padded = tiles * height
    names = ["q", "k", "v", *sight.names(page), "out", "scratch", "b", "s", "t"]
    unit = BLOCK if page else 32

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b = given["b"]
        keys = Keys.of(given, groups, d, e, page)
        q = Tensor(given["q"], DType.bf16, (b, heads, d))
        y = Tensor(given["out"], DType.bf16, (b, heads, e))
        sinks = Tensor(given["sinks"], DType.bf16, (heads,)) if sight.sinks else None
        shown = sight.rows(given, keys.rows.extent)
        shared = SharedParts(given["scratch"], heads, e, b)

        def task(n: Expr) -> None:
            batch, part = bind(tirx.truncdiv(n, PARTS)), bind(tirx.truncmod(n, PARTS))
            limit, lowest = shown.limit(batch, integer(0)), shown.first(batch, integer(0))
            base = bind(tirx.truncdiv(lowest, integer(unit)) * unit)
            begin, count = part_of(part, PARTS, bind(tirx.max(limit - base, integer(0))), unit)
            begin = bind(begin + base)
            running, tile = Running(groups * padded, e), Tile.of(height)
            running.clear(LEAST)
            with loop(ceil_div(count, BLOCK)) as block, loop(groups) as group:
                first = bind(begin + block * BLOCK)
                slot = keys.rows.slot(batch, first)
                here = bind(tirx.min(integer(BLOCK), count - block * BLOCK))
                later = keys.rows.slot(batch, tirx.min(first + BLOCK, limit - 1))
                with loop(tiles) as i:
                    head = bind(group * padded + i * height)
                    starts = [
                        bind(
                            (batch * heads + group * share + tirx.min(i * height + j, share - 1))
                            * d
                        )
                        for j in range(height)
                    ]
                    keys.scores(tile, q, starts, group, slot, here, later if tiles == 1 else None)
                    hidden = [bind(lowest - first)] * height if sight.bounded else []
                    weigh(tile, running, head, [here] * height, sight.scale, hidden, sight.softcap)
                    keys.add(tile, running, head, (group, slot, here))
            with loop(groups) as group, loop(share) as i:
                head, own = bind(group * share + i), bind(group * padded + i)
                with loop(e // SUMS) as c:
                    sums = running.sums.at(own * e + c * SUMS, SUMS)
                    shared.tensor.put(n * shared.floats + head * e + c * SUMS, sums)
                shared.put(n, head, running.peak[own], running.mass[own])

        with instructions():
            for_each(b * PARTS, bind(heads * (keys.rows.extent * (d // PARTS))), task)
            careful = sight.careful
            for_each(b * heads, PARTS * e, lambda n: shared.join(y, n, True, sinks, careful))

    return build(body, names)


def prompt(heads: int, groups: int, d: int, e: int, sight: Sight, page: int) -> PrimFunc:
    """The kernel of any number of new tokens."""
    share = heads // groups
    names = ["q", "k", "v", *sight.names(page), "out", "b", "s", "t"]

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        keys = Keys.of(given, groups, d, e, page)
        q = Tensor(given["q"], DType.bf16, (b, s, heads, d))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, e))
        sinks = Tensor(given["sinks"], DType.bf16, (heads,)) if sight.sinks else None
        shown = sight.rows(given, keys.rows.extent)
        pairs = bind(s * share)

        def see(
            state: tuple[Running, Tile], of: tuple[Expr, Expr], first: Expr,
            queries: tuple[Expr, Expr],
        ) -> None:  # fmt: skip
            """Let a tile of queries see the rows of a block, unless none is in sight."""
            (running, tile), (batch, group), (start, part) = state, of, queries
            chosen = [bind(tirx.min(start + part * QUERIES + i, pairs - 1)) for i in range(QUERIES)]
            tokens = [bind(tirx.truncdiv(pair, share)) for pair in chosen]
            limits = [bind(shown.limit(batch, token) - first) for token in tokens]
            hidden = [bind(shown.first(batch, token) - first) for token in tokens]
            here = bind(tirx.min(limits[-1], integer(BLOCK)))
            with when(tirx.And(here > 0, hidden[0] < BLOCK)):
                starts = [
                    bind(((batch * s + token) * heads + group * share
                          + tirx.truncmod(pair, share)) * d)
                    for pair, token in zip(chosen, tokens, strict=True)
                ]  # fmt: skip
                slot = keys.rows.slot(batch, first)
                keys.scores(tile, q, starts, group, slot, here)
                at = bind(part * QUERIES)
                below = hidden if sight.bounded else []
                weigh(tile, running, at, limits, sight.scale, below, sight.softcap)
                keys.add(tile, running, at, (group, slot, here))

        def task(n: Expr) -> None:
            group, rest = bind(tirx.truncmod(n, groups)), bind(tirx.truncdiv(n, groups))
            batch, start = bind(tirx.truncmod(rest, b)), bind(tirx.truncdiv(rest, b) * CHUNK)
            count = bind(tirx.min(pairs - start, integer(CHUNK)))
            running, tile = Running(CHUNK, e), Tile.of(QUERIES)
            running.clear(LEAST)
            if sinks is not None:
                with loop(count) as i:
                    head = bind(group * share + tirx.truncmod(start + i, share))
                    running.peak[i], running.mass[i] = sinks.load(head), f32(1.0)
            tokens = [bind(tirx.truncdiv(start + i, share)) for i in (0, count - 1)]
            limit = shown.limit(batch, tokens[1])
            skipped = bind(tirx.truncdiv(shown.first(batch, tokens[0]), integer(BLOCK)))
            blocks = bind(ceil_div(limit, BLOCK) - skipped)
            with loop(blocks) as block, loop(ceil_div(count, QUERIES)) as part:
                first = bind((skipped + block) * BLOCK)
                see((running, tile), (batch, group), first, (start, part))
            with loop(count) as i:
                pair = bind(start + i)
                token, head = tirx.truncdiv(pair, share), tirx.truncmod(pair, share)
                at = bind(((batch * s + token) * heads + group * share + head) * e)
                store_output(y, at, running, i, sight.careful)

        with instructions():
            for_each(b * groups * ceil_div(pairs, CHUNK), PARALLEL_WORK, task)

    return build(body, names)
