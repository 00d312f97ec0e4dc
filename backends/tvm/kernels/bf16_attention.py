"""latent_attention and mla_attention in bf16, tile by tile.

latent_attention   bound: 2 heads (2c + r) flops a visible row over the peak of pair products, or
    its 2 (c + r) bytes over bandwidth. A task is a token's share of the context with all heads: a
    tile of 64 rows stays in the second-level cache while tiles of eight heads pass by. A decode
    step cuts the context into PARTS shares of equal size, whatever the number of threads, and joins
    them by their maxima.
mla_attention      bound: 2 (n + v) c flops a row and head to expand the cache, then 2 (n + r + v)
    for each pair of row and token that causality leaves. A task is a head of a sequence: its keys
    are made transposed, [n + r, rows], so that scores are vectors along rows, and its values
    [rows, v]; then eight tokens at a time attend, up to their own row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsc.backends.tvm.bf16 import (
    LANES,
    SUMS,
    Pairs,
    by_pairs,
    instructions,
    narrow,
    prefetch_far,
    put_bits,
    unzipped,
)
from dsc.backends.tvm.kernels import bf16_product as product
from dsc.backends.tvm.kernels import coded_cache
from dsc.backends.tvm.kernels.attend import inverse_of
from dsc.backends.tvm.kernels.bf16_product import Factor, Part, Weights, ceil_div, dot_sums
from dsc.backends.tvm.kernels.bf16_softmax import (
    BLOCK,
    Running,
    Tile,
    add_values,
    in_order,
    store_output,
    weigh,
)
from dsc.backends.tvm.kernels.coded_cache import CodedRows, Kind
from dsc.backends.tvm.kernels.latent_cache import LatentCache, arguments
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Scratch,
    Tensor,
    bind,
    build,
    exp,
    f32,
    for_each,
    hold,
    integer,
    lanes_for,
    loop,
    splat,
    tirx,
    when,
)
from dsc.ir.types import DType

QUERIES = 8
"""Queries of a tile: 16 accumulators of 32 columns."""
PARTS = 8
"""Shares of the context in a decode step."""


def part_floats(heads: int, c: int) -> int:
    """Floats of one share's result: sums, then maxima and masses of all heads."""
    return heads * (c + 2)


def part_of(part: Expr, parts: int, limit: Expr, unit: int) -> tuple[Expr, Expr]:
    """Where a share of `limit` rows begins, and its number of rows: whole units but at the end."""
    units = bind(ceil_div(limit, unit))
    begin = bind(tirx.truncdiv(part * units, integer(parts)) * unit)
    end = tirx.truncdiv((part + 1) * units, integer(parts)) * unit
    return begin, bind(tirx.min(end, limit) - begin)


class SharedParts:
    """What the shares of the context come to: sums, maxima and masses of all heads of each.

    `place(head, v)` is where vector v of a head's sums lies among a share's, side by side if not
    said.
    """

    def __init__(
        self, at: Expr, heads: int, c: int, tokens: Expr,
        place: Callable[[Expr, Expr], Expr] | None = None,
    ) -> None:  # fmt: skip
        self.heads, self.c, self.floats = heads, c, part_floats(heads, c)
        self.tensor = Tensor(at, DType.f32, (tokens, PARTS, self.floats))
        self.place = place or (lambda head, v: head * c + v * SUMS)

    def put(self, share: Expr, head: Expr, peak: Expr, mass: Expr) -> None:
        """Keep a head's maximum and mass; sums are written to `tensor`."""
        at = bind(share * self.floats + self.heads * self.c + head)
        self.tensor.put(at, peak)
        self.tensor.put(at + self.heads, mass)

    def join(
        self, y: Tensor, n: Expr, zipped: bool, sinks: Tensor | None = None, careful: bool = False
    ) -> None:
        """The output of one head of one token; `zipped` sums are in the order of `mix_sums`.

        A sink takes its share of the mass. `careful`: zeros where nothing was seen.
        """
        heads, c, parts = self.heads, self.c, self.tensor
        token, head = bind(tirx.truncdiv(n, heads)), bind(tirx.truncmod(n, heads))
        peaks = [hold(parts.load(token, p, heads * c + head)) for p in range(PARTS)]
        sink = None if sinks is None else hold(sinks.load(head))
        top = peaks[0]
        for peak in peaks[1:] if sink is None else [*peaks[1:], sink]:
            top = hold(tirx.max(top, peak))
        shares = [hold(exp(peak - top)) for peak in peaks]
        mass = f32(0.0) if sink is None else hold(exp(sink - top))
        for p, weight in enumerate(shares):
            mass = hold(mass + weight * parts.load(token, p, heads * c + heads + head))
        inverse = hold(inverse_of(mass, careful))
        with loop(c // LANES) as i:
            halves = []
            for half in range(2):
                value = splat(f32(0.0), SUMS)
                for p, weight in enumerate(shares):
                    at = self.place(head, 2 * i + half)
                    got = parts.load(token, p, at, lanes=SUMS)
                    value = hold(value + got * splat(weight * inverse, SUMS))
                halves.append(value)
            for half, value in enumerate(in_order(*halves) if zipped else halves):
                put_bits(y, n * c + i * LANES + half * SUMS, narrow(value))


def bf16_latent(
    heads: int, c: int, r: int, scale: float, split: bool, page: int, kind: Kind | None
) -> PrimFunc:
    """The kernel, with scratch memory when `split`, or for numbers when rows are of a `kind`.

    With `page` it takes a block table, and t counts pages.
    """
    unit = BLOCK if page else LANES
    group, parts = lanes_for(heads, QUERIES), PARTS if split else 1
    floats = part_floats(heads, c)
    rest = "out scratch" if split else "out" if kind is None else "out numbers"
    names = arguments("q_latent q_rope latent rope lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        q = Tensor(given["q_latent"], DType.bf16, (b, s, heads, c))
        q_r = Tensor(given["q_rope"], DType.bf16, (b, s, heads, r))
        cache = LatentCache.of(given, DType.bf16, c, r, page)
        coded = CodedRows(kind, given["latent"], True) if kind is not None and split else None
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, c))
        shared = SharedParts(given["scratch"], heads, c, b * s) if split else None

        def task(n: Expr) -> None:
            token, part = bind(tirx.truncdiv(n, parts)), bind(tirx.truncmod(n, parts))
            batch = bind(tirx.truncdiv(token, s))
            limit = bind(tirx.min(used.load(batch) + (token - batch * s) + 1, cache.extent))
            begin, count = part_of(part, parts, limit, unit)
            running, tile = Running(heads, c), Tile.of(group)
            running.clear()
            wide = cache.latent if coded is None else Scratch(DType.bf16, BLOCK * c)
            blocks = bind(ceil_div(count, BLOCK))
            with loop(blocks) as block:
                first = cache.slot(batch, begin + block * BLOCK)
                later = cache.slot(batch, begin + tirx.min(block + 1, blocks - 1) * BLOCK)
                here = bind(tirx.min(integer(BLOCK), count - block * BLOCK))
                if coded is not None:
                    next_one = tirx.min(begin + (block + 1) * BLOCK, limit - 1)
                    later = cache.slot(batch, next_one)
                    with loop(here) as t:
                        coded.widen(bind(first + t), wide, bind(t * c))
                        coded.ahead(bind(later + t))
                        for line in range(0, r, LANES):
                            prefetch_far(cache.rope, (later + t) * r + line)
                near = first if coded is None else integer(0)
                with loop(heads // group) as g:
                    head = bind(g * group)
                    query = bind(token * heads + head)
                    ahead = None if coded is not None else _Ahead(later, head, heads)
                    _latent_scores(q, q_r, cache, query, (wide, near), first, here, ahead, tile)
                    weigh(tile, running, head, [here] * group, scale)
                    add_values(tile, running, head, wide, lambda row: (near + row) * c, here)
            if shared is None:
                with loop(heads) as head:
                    store_output(y, bind((token * heads + head) * c), running, head)
                return
            with loop(heads * c // SUMS) as i:
                shared.tensor.put(n * floats + i * SUMS, running.sums.at(i * SUMS, SUMS))
            with loop(heads) as head:
                shared.put(n, head, running.peak[head], running.mass[head])

        with instructions(), coded_cache.instructions(kind):
            if kind is not None and coded is None:
                coded_cache.widen_all(kind, given, cache, native=True)
            for_each(b * s * parts, bind(heads * (cache.extent * (c // parts))), task)
            if shared is not None:
                for_each(b * s * heads, parts * c, lambda n: shared.join(y, n, True))

    return build(body, names)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """The rows of the next block, from slot `later` on, for tiles of heads from `head` on.

    Each tile asks for some of them, so that they arrive while all heads multiply these.
    """

    later: Expr
    head: Expr
    heads: int

    def rows(self, t: Expr, part: Expr, height: int) -> list[Expr]:
        """Slots that a tile of `height` heads asks for beside rows t .. t + 3."""
        count = max(1, product.WIDTH * height // self.heads)
        number = bind(tirx.truncdiv(self.head, integer(height)) + part)
        first = tirx.truncmod(number * count, integer(product.WIDTH))
        return [bind(self.later + t + first + i) for i in range(count)]


def _latent_scores(
    q: Tensor, q_r: Tensor, cache: LatentCache, query: Expr, wide: tuple[Tensor, Expr],
    first: Expr, here: Expr, ahead: _Ahead | None, tile: Tile,
) -> None:  # fmt: skip
    """Scores of the tile's heads, from `query` on, with `here` rows from slot `first` on.

    Their latents are rows of `wide`, from one on. Those that are read next are asked for.
    """
    latent, near = wide
    c, r = cache.c, cache.r
    if not by_pairs():
        heads = [bind(query + i) for i in range(tile.queries)]
        latents = Weights(latent, bind(near * c), integer(c), here, c)
        keys = Weights(cache.rope, bind(first * r), integer(r), here, r)
        q_rows, q_r_rows = [bind(h * c) for h in heads], [bind(h * r) for h in heads]
        product.clear_block(tile.scores, integer(0), tile.queries)
        if c + r <= product.WIDENED_DEPTH:
            none = integer(0)
            parts = [Part(q, q_rows, latents, none, c), Part(q_r, q_r_rows, keys, none, r)]
            product.widened_columns(tile.scores, none, parts)
        else:
            product.add_block(tile.scores, integer(0), q, q_rows, latents)
            product.add_block(tile.scores, integer(0), q_r, q_r_rows, keys)
        return
    height = min(tile.queries, 4)
    with loop(ceil_div(here, product.WIDTH)) as four, loop(tile.queries // height) as part:
        t = bind(four * product.WIDTH)
        rows = [bind(tirx.min(t + i, here - 1)) for i in range(product.WIDTH)]
        later = [] if ahead is None else ahead.rows(t, part, height)
        heads = [bind(query + part * height + i) for i in range(height)]
        sums = dot_sums([
            Factor(q, [bind(h * c) for h in heads],
                   latent, [bind((near + n) * c) for n in rows], integer(c),
                   [bind(n * c) for n in later]),
            Factor(q_r, [bind(h * r) for h in heads],
                   cache.rope, [bind((first + n) * r) for n in rows], integer(r)),
        ])  # fmt: skip
        for i, scores in enumerate(sums):
            tile.scores.store((part * height + i) * BLOCK + t, scores)


def bf16_mla(
    heads: int, n: int, r: int, v: int, c: int, scale: float, page: int, kind: Kind | None
) -> PrimFunc:
    """The kernel; kv_b is [heads*(n+v), c]. With `page` it takes a block table; t counts pages."""
    depth = n + r
    rest = "out" if kind is None else "out numbers"
    names = arguments("q_nope q_rope latent rope kv_b lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        q_nope = Pairs.at(given["q_nope"], b * s * heads * n)
        q = q_nope, Pairs.at(given["q_rope"], b * s * heads * r)
        cache = LatentCache.of(given, DType.bf16, c, r, page)
        up = Tensor(given["kv_b"], DType.bf16, (heads * (n + v), c))
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, v))

        def task(i: Expr) -> None:
            batch, head = bind(tirx.truncdiv(i, heads)), bind(tirx.truncmod(i, heads))
            past = bind(used.load(batch))
            shown = bind(tirx.min(past + s, cache.extent))
            wide = bind(ceil_div(shown, BLOCK) * BLOCK)
            keys, values = Scratch(DType.bf16, wide * depth), Scratch(DType.bf16, wide * v)
            _expand(cache, batch, shown, up, head * (n + v) * c, (n, v), keys, values)
            with loop(shown) as row:
                rope_row = bind(cache.slot(batch, row) * r)
                with loop(r) as j:
                    put_bits(keys, (n + j) * wide + row, cache.rope.buffer[rope_row + j])
            running, tile = Running(QUERIES, v), Tile.of(QUERIES)

            def score_columns(tokens: list[Expr], first: Expr, column: Expr) -> None:
                """Scores of the tile's tokens with 32 rows from first + column on."""
                rows = [bind((batch * s + token) * heads + head) for token in tokens]
                at = bind(first + column)
                sums = product.mix_sums(
                    q[0], [bind(row * n) for row in rows], keys, lambda d: d * wide + at, n, 1
                )
                sums = product.mix_sums(
                    q[1], [bind(row * r) for row in rows], keys,
                    lambda d: (d + n) * wide + at, r, 1, lambda i, a: sums[i][a][0],
                )  # fmt: skip
                for i, line in enumerate(sums):
                    for half, value in enumerate(unzipped(line[0][0], line[1][0])):
                        tile.scores.store(column + (i * BLOCK + half * SUMS), value)

            with loop(ceil_div(s, QUERIES)) as group:
                start = bind(group * QUERIES)
                tokens = [bind(tirx.min(start + a, s - 1)) for a in range(QUERIES)]
                limits = [bind(tirx.min(past + token + 1, shown)) for token in tokens]
                running.clear()
                with loop(ceil_div(limits[-1], BLOCK)) as block:
                    first = bind(block * BLOCK)
                    with loop(BLOCK // LANES) as half:
                        score_columns(tokens, first, bind(half * LANES))
                    weigh(tile, running, integer(0), [x - first for x in limits], scale)
                    here = bind(tirx.min(integer(BLOCK), limits[-1] - first))
                    add_values(
                        tile, running, integer(0), values, lambda row: (first + row) * v, here
                    )
                for a, token in enumerate(tokens):
                    with when(start + a < s):
                        at = bind(((batch * s + token) * heads + head) * v)
                        store_output(y, at, running, integer(a))

        with instructions(), coded_cache.instructions(kind):
            if kind is not None:
                coded_cache.widen_all(kind, given, cache, native=True)
            for_each(b * heads, PARALLEL_WORK, task)

    return build(body, names)


def _expand(
    cache: LatentCache, batch: Expr, shown: Expr, up: Tensor, up_at: Expr,
    sizes: tuple[int, int], keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    """A head's keys, transposed [n, wide], and values [shown, v], from `shown` latent rows."""
    (n, v), c = sizes, cache.c
    wide = bind(ceil_div(shown, BLOCK) * BLOCK)
    with loop(ceil_div(shown, BLOCK)) as block:
        first = bind(block * BLOCK)
        count = bind(tirx.min(integer(BLOCK), shown - first))
        start = bind(cache.slot(batch, first) * c)
        latent = Weights(cache.latent, start, integer(c), count, c)

        def key_rows(j: Expr, height: int) -> None:
            rows = [bind(up_at + (j + i) * c) for i in range(height)]
            made = product.dot_block(up, rows, latent)
            for i in range(height):
                for column in range(0, BLOCK, SUMS):
                    value = narrow(made.load(integer(i * BLOCK + column), SUMS))
                    put_bits(keys, (j + i) * wide + first + column, value)

        product.row_tiles(integer(n), product.tile_height(), key_rows)

    def value_columns(column: int) -> None:
        width = min(BLOCK, v - column)
        block = Weights(up, bind(up_at + (n + column) * c), integer(c), width, c)

        def value_rows(row: Expr, height: int) -> None:
            starts = [bind(cache.slot(batch, row + i) * c) for i in range(height)]
            made = product.dot_block(cache.latent, starts, block)
            for i in range(height):
                for j in range(0, width, SUMS):
                    value = narrow(made.load(integer(i * BLOCK + j), SUMS))
                    put_bits(values, (row + i) * v + column + j, value)

        product.row_tiles(shown, product.tile_height(), value_rows)

    for column in range(0, v, BLOCK):
        value_columns(column)
