"""Attention on tile registers: scores, online softmax and weighted values, a query a lane.

Keys are rows of A as they lie, queries are packed (see `amx`), so scores come as 16 keys by 16
queries and softmax runs down the rows: a lane is a query, and no lane is ever summed. Weights are
rounded to bf16, paired and transposed back: 16 queries by 32 keys, rows of A for the product with
the values, which are packed by pairs of keys. Their sum is taken unrounded. A running maximum lets
blocks of keys follow each other (Milakov & Gimelshein 2018); sums are rescaled when it moves.

    S  f32 [groups, KEYS, 16]            scores of a block, then weights
    P  words [groups, KEYS/32, 16, 16]   weights, as tiles of A
    V  words [KEYS/32, width/16, 16, 16] values, as tiles of B: pairs of keys of 16 columns
    O  f32 [queries, width/16, 16, 16]   sums, as tiles; tile rows are queries
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import SUMS, narrow, prefetch_far, put_bits
from dsc.backends.tvm.kernels.bf16_product import ceil_div
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    Scratch,
    Tensor,
    bind,
    cast,
    exp,
    f32,
    hold,
    integer,
    loop,
    select,
    splat,
    tirx,
    when,
)
from dsc.ir.types import DType

KEYS = 256
"""Keys of a block: scores of 32 queries take 32 KiB, values of width 512 take 256 KiB."""
DEPTH = amx.DEPTH
TILE = 256
"""Words of a tile."""
TILE_BYTES = 4 * TILE
ROW = 64
"""Bytes of a tile's row."""


@dataclass(frozen=True)
class Keys:
    """One part of the keys' depth: the address of 32 rows from key t on, which lie side by side."""

    address: Callable[[Expr], Expr]
    depth: int

    @property
    def stride(self) -> int:
        """Bytes from a row to the next."""
        return 2 * self.depth


@dataclass(frozen=True)
class Ahead:
    """Rows that are asked for while a block is multiplied: those of the next one.

    `start(tile)` is where the 32 rows of a tile lie in `x`, `stride` apart. `wanted` says whether.
    """

    x: Tensor
    start: Callable[[Expr], Expr]
    stride: int
    wanted: Expr

    def ask(self, starts: Sequence[Expr], half: int, column: Expr) -> None:
        """A cache line of half of the rows of some tiles."""
        with when(self.wanted):
            for start, row in product(starts, range(half * SUMS, (half + 1) * SUMS)):
                prefetch_far(self.x, start + row * self.stride + column)


class Attention:
    """What a task keeps: `groups` groups of up to 16 queries, `lanes` each, over values of `width`.

    `pair` groups are multiplied at once.
    """

    def __init__(self, groups: int, lanes: int, width: int, scale: float) -> None:
        self.groups, self.lanes, self.width, self.scale = groups, lanes, width, scale
        self.pair = 2 if groups % 2 == 0 else 1
        self.peak, self.mass = (Local(groups * SUMS) for _ in range(2))
        self.shrink = Local(SUMS)
        self.scores = Local(self.pair * KEYS * SUMS)
        self.words = Local(KEYS // 2 * SUMS, "int32")
        self.weights = Local(self.pair * KEYS // DEPTH * TILE, "int32")
        self.sums = Scratch(DType.f32, groups * (width // SUMS) * TILE)

    def clear(self) -> None:
        """Nothing seen yet. Lanes without a query stay 0."""
        with loop(self.groups) as g:
            self.peak.store(g * SUMS, splat(f32(float("-inf")), SUMS))
            self.mass.store(g * SUMS, splat(f32(0.0), SUMS))
        with loop(self.pair * KEYS) as i:
            self.scores.store(i * SUMS, splat(f32(0.0), SUMS))
        with loop(self.groups * (self.width // SUMS) * SUMS) as i:
            self.sums.put(i * SUMS, splat(f32(0.0), SUMS))

    def attend(
        self, first: Expr, queries: Sequence[Expr], keys: Sequence[Keys], values: Expr, here: Expr,
        visible: Callable[[int], Expr], ahead: Ahead | None = None,
    ) -> None:  # fmt: skip
        """Let `pair` groups from `first` on see a block of `here` keys.

        `queries` are the addresses of their panels, `values` that of V; lane i of group g sees the
        first `visible(g)[i]` keys of the block, a vector of fp32: any number, but at least one in
        the blocks up to this one.
        """
        tiles = bind(ceil_div(here, DEPTH))
        self._score(queries, keys, tiles, ahead)
        for g in range(self.pair):
            self._weigh(g, bind(first + g), tiles, visible(g))
        self._add(first, values, tiles, ahead)

    def _score(
        self, queries: Sequence[Expr], keys: Sequence[Keys], tiles: Expr, ahead: Ahead | None
    ) -> None:
        """S = keys times queries, four tiles of sums at a time: 64 keys a group, 32 a pair."""
        amx.configure(integer(self.lanes), integer(amx.COLUMNS))
        stride, together = 4 * self.lanes, 2 // self.pair
        with loop(ceil_div(tiles, together)) as i:
            chosen = [bind(tirx.min(i * together + a, tiles - 1)) for a in range(together)]
            rows = list(product(range(together), range(2)))
            for sums in range(4):
                amx.zero(sums)
            step = 0
            later = [bind(ahead.start(tile)) for tile in chosen] if ahead is not None else []
            for part in keys:
                starts = [bind(part.address(bind(tile * DEPTH))) for tile in chosen]
                with loop(part.depth // DEPTH) as k:
                    at = bind((k + step) * (SUMS * stride))
                    for g in range(self.pair):
                        amx.load(amx.PAIRS[g], queries[g] + at, stride)
                    for n, (tile, half) in enumerate(rows):
                        row = starts[tile] + k * (2 * DEPTH) + part.stride * (half * SUMS)
                        amx.load(amx.WEIGHTS[n % 2], row, part.stride)
                        for g in range(self.pair):
                            amx.multiply(len(rows) * g + n, amx.WEIGHTS[n % 2], amx.PAIRS[g])
                    if ahead is not None and step == 0:
                        ahead.ask(later, 0, k * DEPTH)
                step += part.depth // DEPTH
            for g, (n, (tile, half)) in product(range(self.pair), enumerate(rows)):
                place = (g * KEYS + chosen[tile] * DEPTH + half * SUMS) * SUMS
                amx.save(len(rows) * g + n, amx.address(self.scores, place), ROW)

    def _weigh(self, g: int, group: Expr, tiles: Expr, visible: Expr) -> None:
        """Scores of a group to weights; keys that a lane does not see weigh 0."""
        nothing, scale = splat(f32(float("-inf")), SUMS), splat(f32(self.scale), SUMS)
        limits, base = hold(visible), g * KEYS * SUMS
        before = hold(self.peak.load(group * SUMS, SUMS))
        top = Local(1, width=SUMS)
        top[0] = before
        with loop(tiles * DEPTH) as t:
            at = bind(base + t * SUMS)
            seen = splat(cast(t, "float32"), SUMS) < limits
            score = hold(select(seen, self.scores.load(at, SUMS) * scale, nothing))
            self.scores.store(at, score)
            top[0] = tirx.max(top[0], score)
        peak = hold(top[0])
        self.peak.store(group * SUMS, peak)
        mass = Local(1, width=SUMS)
        mass[0] = mass.zero
        with loop(tiles * SUMS) as pair:
            halves = []
            for i in range(2):
                at = bind(base + pair * (2 * SUMS) + i * SUMS)
                halves.append(hold(exp(self.scores.load(at, SUMS) - peak)))
            mass[0] = mass[0] + (halves[0] + halves[1])
            self.words.store(pair * SUMS, paired(*halves))
        shrink = hold(exp(before - peak))
        total = self.mass.load(group * SUMS, SUMS) * shrink + mass[0]
        self.mass.store(group * SUMS, total)
        with loop(tiles) as tile:
            source = amx.address(self.words, tile * TILE)
            target = amx.address(self.weights, (g * (KEYS // DEPTH) + tile) * TILE)
            amx.unpack(source, target, ROW)
        self.shrink.store(integer(0), shrink)
        moved = Local(1)
        moved[0] = f32(0.0)
        with loop(self.lanes) as q:
            moved[0] = tirx.max(moved[0], select(self.shrink[q] < f32(1.0), f32(1.0), f32(0.0)))
        with when(moved[0] > f32(0.0)), loop(self.width // SUMS) as v, loop(self.lanes) as q:
            at = bind((group * (self.width // SUMS) + v) * TILE + q * SUMS)
            self.sums.put(at, self.sums.at(at, SUMS) * splat(bind(self.shrink[q]), SUMS))

    def _add(self, first: Expr, values: Expr, tiles: Expr, ahead: Ahead | None) -> None:
        """O += P V, four tiles of sums at a time where the width allows it."""
        columns = self.width // SUMS
        together = 4 // self.pair if columns % 4 == 0 else 2
        amx.configure(integer(amx.TOKENS), integer(self.lanes))
        with loop(columns // together) as v:
            places = [
                bind(amx.address(self.sums, ((first + g) * columns + v * together + b) * TILE))
                for g, b in product(range(self.pair), range(together))
            ]
            for sums, place in enumerate(places):
                amx.load(sums, place, ROW)
            with loop(tiles) as tile:
                at = bind(values + (tile * columns + v * together) * TILE_BYTES)
                for g in range(self.pair):
                    weights = (g * (KEYS // DEPTH) + tile) * TILE
                    amx.load(amx.WEIGHTS[g], amx.address(self.weights, weights), ROW)
                for b in range(together):
                    amx.load(amx.PAIRS[b % 2], at + b * TILE_BYTES, ROW)
                    for g in range(self.pair):
                        amx.multiply(together * g + b, amx.WEIGHTS[g], amx.PAIRS[b % 2])
                if ahead is not None:
                    start = bind(ahead.start(tile))
                    for line in range(0, together * SUMS, DEPTH):
                        ahead.ask([start], 1, v * (together * SUMS) + line)
            for sums, place in enumerate(places):
                amx.save(sums, place, ROW)

    def store(self, y: Tensor, position: Expr, group: Expr, lane: Expr) -> None:
        """Write a query's sums over its mass as bf16."""
        inverse = hold(splat(f32(1.0) / self.mass[group * SUMS + lane], SUMS))
        with loop(self.width // SUMS) as v:
            value = self.sums.at(self._row(group, lane, v), SUMS) * inverse
            put_bits(y, position + v * SUMS, narrow(value))

    def copy(self, target: Tensor, position: Expr, group: Expr, lane: Expr) -> None:
        """Write a query's sums as they are."""
        with loop(self.width // SUMS) as v:
            target.put(position + v * SUMS, self.sums.at(self._row(group, lane, v), SUMS))

    def _row(self, group: Expr, lane: Expr, v: Expr) -> Expr:
        return bind((group * (self.width // SUMS) + v) * TILE + lane * SUMS)


def paired(a: Expr, b: Expr) -> Expr:
    """Two vectors of floats as words of two bf16."""
    low, high = (cast(narrow(x), "int32") for x in (a, b))
    return low | (high << splat(tirx.const(16, "int32"), SUMS))


def pack_queries(
    rows: Sequence[Callable[[Expr], Expr]], depths: Sequence[int], lanes: int, panel: Expr
) -> None:
    """A panel of up to 16 queries: `rows[i](q)` is the address of part i of query q."""
    step = 0
    for row, depth in zip(rows, depths, strict=True):
        starts = [bind(row(integer(min(q, lanes - 1)))) for q in range(SUMS)]
        with loop(depth // DEPTH) as k:
            at = panel + (k + step) * (SUMS * 4 * lanes)
            amx.pack([start + k * (2 * DEPTH) for start in starts], at, lanes)
        step += depth // DEPTH


def panel_bytes(lanes: int, depth: int) -> int:
    """The size of a panel of queries."""
    return 2 * depth * lanes
