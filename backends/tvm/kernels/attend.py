"""Softmax attention of a few queries over the same rows, block by block, in one pass.

A running maximum and sum (Milakov & Gimelshein 2018) let scores live in a block that stays in the
cache, whatever the context. Queries are heads that share keys, or positions of one head: a row of
keys or values that was loaded serves all of them. Scores and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from dsc.backends.tvm.kernels.dots import Position
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    Tensor,
    bind,
    exp,
    f32,
    integer,
    lanes_for,
    lanes_of,
    largest,
    loop,
    select,
    splat,
    tirx,
    total,
)

BLOCK = 32
"""Cache rows whose scores are held at a time; a multiple of every vector width."""

LEAST = -3e38
"""A number below every score."""
_TANH = (-1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)
_NEAR = 0.25
"""Up to where the terms of tanh are as good as fp32."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a cache: row t starts at flat position `at(t)` and has `width` elements.

    From a row whose number is a multiple of BLOCK on, as many lie `stride` elements apart.
    """

    tensor: Tensor
    at: Position
    width: int
    stride: Expr


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of one call: `parts[p][q]` is where query q's part p starts in `tensors[p]`.

    `visible[q]` is the number of rows that query q may see, at least 1 but where `careful`. Of
    these it sees none before `firsts[q]`. `sinks` are logits that it sees beside its rows.
    """

    tensors: Sequence[Tensor]
    parts: Sequence[Sequence[Expr]]
    visible: Sequence[Expr]
    firsts: Sequence[Expr] = ()
    sinks: Sequence[Expr] = ()
    careful: bool = False

    def shown(self, q: int, row: Expr) -> Expr:
        """Whether query q sees a row."""
        below = row < self.visible[q]
        return tirx.And(below, row >= self.firsts[q]) if self.firsts else below

    def begin(self, peak: Local, mass: Local) -> None:
        """The largest score so far and the mass: of a sink, or of nothing.

        Where a query may see no row of a block, less than any score stands in for -inf.
        """
        for q in range(len(self.visible)):
            nothing = LEAST if self.careful else float("-inf")
            peak[q] = self.sinks[q] if self.sinks else f32(nothing)
            mass[q] = f32(1.0 if self.sinks else 0.0)


def attend(
    queries: Queries,
    keys: Sequence[Rows],
    values: Rows,
    scale: float,
    lanes: int,
    store: Callable[[int, Expr, Expr], None],
    begin: Callable[[Expr, Expr], None] = lambda first, here: None,
    softcap: float = 0.0,
) -> None:
    """`store(q, column, vector)` for the output of each query.

    Before a block of `here` rows from `first` on is read, `begin(first, here)` runs.

    A score is the sum over parts of query part times key part: part p of a key is `keys[p]`.
    """
    count = len(queries.visible)
    packed = _pack(queries, keys, scale, lanes)
    width = lanes_for(values.width, lanes)
    out = Local(count * values.width)
    peak, mass = Local(count), Local(count)
    queries.begin(peak, mass)
    with loop(count * values.width // width) as i:
        out.store(i * width, splat(f32(0.0), width))
    scores, step = Local(count * BLOCK), lanes_for(BLOCK, lanes)
    seen = queries.visible[0]
    for other in queries.visible[1:]:
        seen = tirx.max(seen, other)
    seen = bind(seen)
    skipped = integer(0)
    if queries.firsts:
        skipped = bind(tirx.truncdiv(reduce(tirx.min, queries.firsts), integer(BLOCK)))
    with loop(tirx.truncdiv(seen + (BLOCK - 1), integer(BLOCK)) - skipped) as block:
        first = bind((skipped + block) * BLOCK)
        here = bind(tirx.min(integer(BLOCK), seen - first))
        begin(first, here)
        with loop(count * BLOCK // step) as i:
            scores.store(i * step, splat(f32(float("-inf")), step))
        starts = [bind(rows.at(first)) for rows in keys]
        start = bind(values.at(first))
        with loop(here) as t:
            at = [s + t * rows.stride for s, rows in zip(starts, keys, strict=True)]
            dot = _dot(packed, keys, at, count, lanes)
            for q in range(count):
                shown = queries.shown(q, first + t)
                scores[q * BLOCK + t] = select(shown, dot[q], f32(float("-inf")))
        if softcap:
            with loop(count * BLOCK // step) as i:
                score = bind(scores.load(i * step, step))
                scores.store(i * step, capped(score, softcap))
        for q in range(count):
            _fold(scores, q, peak, mass, out, values.width, lanes)
        with loop(values.width // width) as c:
            sums = [Local(1, width=width) for _ in range(count)]
            for q, acc in enumerate(sums):
                acc[0] = out.load(q * values.width + c * width, width)
            with loop(here) as t:
                row = bind(values.tensor.at(start + t * values.stride + c * width, width))
                for q, acc in enumerate(sums):
                    acc[0] = acc[0] + splat(scores[q * BLOCK + t], width) * row
            for q, acc in enumerate(sums):
                out.store(q * values.width + c * width, acc[0])
    for q in range(count):
        inverse = bind(inverse_of(mass[q], queries.careful))
        with loop(values.width // width) as c:
            vector = out.load(q * values.width + c * width, width)
            store(q, c * width, vector * splat(inverse, width))


def capped(score: Expr, softcap: float) -> Expr:
    """softcap * tanh(score / softcap); what is hidden stays -inf.

    By e^2x, and near 0, where that would cancel, by the first terms of the series.
    """
    lanes = lanes_of(score)

    def c(value: float) -> Expr:
        return splat(f32(value), lanes)

    x = bind(score * c(1.0 / softcap))
    square = bind(x * x)
    series = x * reduce(lambda acc, term: acc * square + c(term), _TANH[1:], c(_TANH[0]))
    grown = c(1.0) - c(2.0) / (exp(x + x) + c(1.0))
    value = c(softcap) * select(square < c(_NEAR * _NEAR), series, grown)
    return select(score < c(LEAST), c(float("-inf")), value)


def inverse_of(mass: Expr, careful: bool) -> Expr:
    """1 / mass; 0 where nothing was seen."""
    inverse = f32(1.0) / mass
    return select(mass > f32(0.0), inverse, f32(0.0)) if careful else inverse


def _pack(queries: Queries, keys: Sequence[Rows], scale: float, lanes: int) -> list[Local]:
    """The queries as contiguous fp32, times the scale: one array [query, width] for each part."""
    packed = []
    for tensor, starts, rows in zip(queries.tensors, queries.parts, keys, strict=True):
        width = lanes_for(rows.width, lanes)
        part = Local(len(starts) * rows.width)
        for q, start in enumerate(starts):
            at = bind(start)
            with loop(rows.width // width) as i:
                vector = tensor.at(at + i * width, width)
                part.store(q * rows.width + i * width, vector * splat(f32(scale), width))
        packed.append(part)
    return packed


def _dot(
    packed: Sequence[Local], keys: Sequence[Rows], at: Sequence[Expr], count: int, lanes: int
) -> list[Expr]:
    """The scores of all queries with one row; `at` says where the row's parts start.

    Parts of one vector width share accumulators.
    """
    shared = {lanes_for(rows.width, lanes) for rows in keys}
    sums: list[Local] = []
    scores: list[Expr] = [f32(0.0)] * count
    parts = zip(packed, keys, at, strict=True)
    for last, (part, rows, position) in enumerate(parts, 1 - len(keys)):
        width = lanes_for(rows.width, lanes)
        if not sums:
            sums = [Local(1, width=width) for _ in range(count)]
            for acc in sums:
                acc[0] = acc.zero
        start = bind(position)
        with loop(rows.width // width) as i:
            key = bind(rows.tensor.at(start + i * width, width))
            for q, acc in enumerate(sums):
                acc[0] = acc[0] + part.load(q * rows.width + i * width, width) * key
        if len(shared) > 1 or last == 0:
            scores = [s + total(acc[0]) for s, acc in zip(scores, sums, strict=True)]
            sums = []
    return scores


def _fold(
    scores: Local, q: int, peak: Local, mass: Local, out: Local, width: int, lanes: int
) -> None:
    """Turn query q's scores into weights and rescale what was summed under the old maximum."""
    step = lanes_for(BLOCK, lanes)
    top = peak[q]
    for i in range(0, BLOCK, step):
        top = tirx.max(top, largest(scores.load(q * BLOCK + i, step)))
    top = bind(top)
    shrink = bind(exp(peak[q] - top))
    added = splat(f32(0.0), step)
    for i in range(0, BLOCK, step):
        weight = bind(exp(scores.load(q * BLOCK + i, step) - splat(top, step)))
        scores.store(q * BLOCK + i, weight)
        added = added + weight
    mass[q] = mass[q] * shrink + total(added)
    peak[q] = top
    wide = lanes_for(width, lanes)
    with loop(width // wide) as c:
        at = q * width + c * wide
        out.store(at, out.load(at, wide) * splat(shrink, wide))
