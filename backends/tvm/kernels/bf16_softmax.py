"""Online softmax over tiles of scores, and the weighted sum of value rows, for bf16 attention.

A tile is a few queries against BLOCK rows. Scores and sums are fp32; the weights are rounded to
bf16 for pair products with the values (relative error 2^-9 each), their sum is taken unrounded. A
running maximum lets tiles follow each other (Milakov & Gimelshein 2018); what was summed under the
old maximum is rescaled when the next product begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsc.backends.tvm.bf16 import (
    LANES,
    SUMS,
    Pairs,
    Widened,
    by_pairs,
    meshed,
    narrow,
    put_bits,
    unzipped,
)
from dsc.backends.tvm.kernels.attend import capped, inverse_of
from dsc.backends.tvm.kernels.bf16_product import mix_sums
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    Scratch,
    Tensor,
    bind,
    exp,
    f32,
    hold,
    integer,
    largest,
    loop,
    select,
    splat,
    tirx,
    total,
)
from dsc.ir.types import DType

BLOCK = 64
"""Rows of a tile: scores of eight queries take 2 KiB, their weights 1 KiB."""


@dataclass(frozen=True)
class Tile:
    """Scores f32 [queries, BLOCK] of a few queries, and the weights that become of them."""

    queries: int
    scores: Local
    weights: Pairs | Widened

    @staticmethod
    def of(queries: int) -> Tile:
        """A tile on the stack."""
        size = queries * BLOCK
        return Tile(queries, Local(size), Pairs.local(size) if by_pairs() else Widened(size))


class Running:
    """What is kept of each query between tiles.

    The largest score, the mass of the weights, the factor of the last rescaling, and the sums over
    values, fp32 [queries, width] in the order of
    `mix_sums`, which `in_order` undoes.
    """

    def __init__(self, queries: int, width: int) -> None:
        self.queries, self.width = queries, width
        self.peak, self.mass, self.shrink = (Local(queries) for _ in range(3))
        self.sums = Scratch(DType.f32, queries * width)

    def clear(self, least: float = float("-inf")) -> None:
        """Nothing seen yet; `least` is below every score."""
        with loop(self.queries) as q:
            self.peak[q] = f32(least)
            self.mass[q] = f32(0.0)
        with loop(self.queries * self.width // SUMS) as i:
            self.sums.put(i * SUMS, splat(f32(0.0), SUMS))


def weigh(
    tile: Tile, running: Running, first: Expr, visible: Sequence[Expr], scale: float,
    hidden: Sequence[Expr] = (), softcap: float = 0.0,
) -> None:  # fmt: skip
    """Scores to weights: query q of the tile is query first + q of `running`.

    It sees the first `visible[q]` rows of the tile, but for the first `hidden[q]`: any number, but
    at least one in the tiles up to this one, or `running` began with a number below every score.
    Weights of rows that it does not see are 0.
    """
    lanes, nothing = tirx.Ramp(integer(0), integer(1), SUMS), splat(f32(float("-inf")), SUMS)
    for q, limit in enumerate(visible):
        best, scores = nothing, []
        for j in range(0, BLOCK, SUMS):
            score = tile.scores.load(integer(q * BLOCK + j), SUMS) * splat(f32(scale), SUMS)
            if softcap:
                score = capped(hold(score), softcap)
            seen = lanes < splat(limit - j, SUMS)
            if hidden:
                seen = tirx.And(seen, lanes >= splat(hidden[q] - j, SUMS))
            scores.append(hold(select(seen, score, nothing)))
            best = hold(tirx.max(best, scores[-1]))
        before = hold(running.peak[first + q])
        top = hold(tirx.max(before, largest(best)))
        added = splat(f32(0.0), SUMS)
        for j, score in zip(range(0, BLOCK, SUMS), scores, strict=True):
            weight = hold(exp(score - splat(top, SUMS)))
            tile.weights.put(integer(q * BLOCK + j), weight)
            added = hold(added + weight)
        shrink = hold(exp(before - top))
        running.peak[first + q] = top
        running.shrink[first + q] = shrink
        running.mass[first + q] = running.mass[first + q] * shrink + total(added)


def add_values(
    tile: Tile, running: Running, first: Expr, v: Tensor, row: Callable[[Expr], Expr], count: Expr
) -> None:
    """Rescale the sums and add weights times value rows; `row(t)` is where row t starts."""
    positions = [integer(q * BLOCK) for q in range(tile.queries)]
    even = bind(tirx.truncdiv(count + 1, integer(2)) * 2)
    with loop(running.width // LANES) as c:
        at = [bind((first + q) * running.width + c * LANES) for q in range(tile.queries)]

        def start(q: int, a: int) -> Expr:
            old = running.sums.at(at[q] + a * SUMS, SUMS)
            return old * splat(running.shrink[first + q], SUMS)

        def columns(t: Expr) -> Expr:
            return row(tirx.min(t, count - 1)) + c * LANES

        sums = mix_sums(tile.weights, positions, v, columns, even, 1, start)
        for q, line in enumerate(sums):
            for a, acc in enumerate(line):
                running.sums.put(at[q] + a * SUMS, acc[0])


def store_output(
    y: Tensor, position: Expr, running: Running, query: Expr, careful: bool = False
) -> None:
    """Write a query's sums over its mass, columns in order, as bf16; `careful`: or zeros."""
    inverse = hold(splat(inverse_of(running.mass[query], careful), SUMS))
    with loop(running.width // LANES) as c:
        at = bind(query * running.width + c * LANES)
        low, high = running.sums.at(at, SUMS), running.sums.at(at + SUMS, SUMS)
        for i, part in enumerate(in_order(bind(low * inverse), bind(high * inverse))):
            put_bits(y, position + c * LANES + i * SUMS, narrow(part))


def in_order(low: Expr, high: Expr) -> tuple[Expr, Expr]:
    """Two accumulators of weighted values as columns 0 .. 15 and 16 .. 31."""
    return unzipped(low, high) if by_pairs() else meshed(low, high)
