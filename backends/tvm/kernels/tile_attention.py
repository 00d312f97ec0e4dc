"""latent_attention and mla_attention in bf16 on tile registers.

latent_attention   bound: 2 (c + r) bytes a visible row over bandwidth, or 2 heads (2c + r) flops
    over the peak of tiles. A task is a token's share of the context with all heads, up to 16 of
    them a tile; a block's latents are paired once for all heads as values.
mla_attention      bound: 2 (n + v) c flops a row and head to expand the cache, then 2 (n + r + v)
    for each pair of row and token that causality leaves. A task is a head of a sequence: its keys
    [rows, n + r] and values, in tiles, are made from the latents; then 32 tokens at a time attend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import LANES, SUMS, bits, instructions, narrow, put_bits
from dsc.backends.tvm.kernels import coded_cache
from dsc.backends.tvm.kernels.bf16_attention import PARTS, SharedParts, part_floats, part_of
from dsc.backends.tvm.kernels.bf16_product import ceil_div
from dsc.backends.tvm.kernels.coded_cache import CodedRows, Kind
from dsc.backends.tvm.kernels.latent_cache import LatentCache, arguments
from dsc.backends.tvm.kernels.tile_softmax import (
    DEPTH,
    KEYS,
    ROW,
    TILE,
    TILE_BYTES,
    Ahead,
    Attention,
    Keys,
    pack_queries,
    paired,
    panel_bytes,
)
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    Local,
    PrimFunc,
    Scratch,
    Tensor,
    bind,
    build,
    cast,
    for_each,
    integer,
    loop,
    select,
    splat,
    tirx,
    when,
)
from dsc.ir.types import DType


def lanes_of_heads(heads: int) -> int:
    """Heads of a tile: as many as divide all."""
    return next(n for n in range(amx.TOKENS, 0, -1) if heads % n == 0)


class _Rows:
    """Tiles of 32 rows of a cache. One that is not whole is copied, and its last row repeated."""

    def __init__(self, cache: LatentCache, rope: bool = True) -> None:
        self.cache = cache
        both = ((cache.latent, cache.c), (cache.rope, cache.r))
        self.parts = [(amx.address(x, 0), x, width) for x, width in both]
        self.tails = [Scratch(DType.bf16, DEPTH * w) for _, _, w in self.parts[: 1 + rope]]

    def fill_tail(self, slots: Sequence[Expr], last: Expr) -> None:
        """Copy a tile of which `last` + 1 rows exist, from a slot of each part on."""
        for slot, tail, (_, source, width) in zip(slots, self.tails, self.parts, strict=False):
            with loop(DEPTH) as t:
                row = bind((slot + tirx.min(t, last)) * width)
                with loop(width // LANES) as j:
                    put_bits(tail, t * width + j * LANES, bits(source, row + j * LANES))

    def part(self, number: int, slot: Callable[[Expr], Expr], here: Expr) -> Keys:
        """The latents (0) or rope keys (1) of a block of `here` rows; `slot(t)` is row t's."""
        base, _, width = self.parts[number]
        tail = self.tails[number]
        whole = bind(tirx.truncdiv(here, integer(DEPTH)) * DEPTH)

        def address(t: Expr) -> Expr:
            return select(t < whole, base + slot(t) * (2 * width), amx.address(tail, 0))

        return Keys(address, width)


def tile_latent(
    heads: int, c: int, r: int, scale: float, split: bool, page: int, kind: Kind | None
) -> PrimFunc:
    """The kernel, with scratch memory when `split`, or for numbers when rows are of a `kind`.

    With `page` it takes a block table, and t counts pages.
    """
    unit = 2 * DEPTH if page else DEPTH
    lanes, parts = lanes_of_heads(heads), PARTS if split else 1
    groups, panel, floats = heads // lanes, panel_bytes(lanes, c + r), part_floats(heads, c)
    rest = "out scratch" if split else "out" if kind is None else "out numbers"
    names = arguments("q_latent q_rope latent rope lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        cache = LatentCache.of(given, DType.bf16, c, r, page)
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, c))
        shared = SharedParts(given["scratch"], heads, c, b * s) if split else None
        coded = CodedRows(kind, given["latent"], True) if kind is not None and split else None

        def task(n: Expr) -> None:
            token, part = bind(tirx.truncdiv(n, parts)), bind(tirx.truncmod(n, parts))
            batch = bind(tirx.truncdiv(token, s))
            source, stride = (cache.latent, c) if coded is None else (coded.codes, coded.kind.bytes)
            limit = bind(tirx.min(used.load(batch) + (token - batch * s) + 1, cache.extent))
            begin, count = part_of(part, parts, limit, unit)
            state = Attention(groups, lanes, c, scale)
            panels = Scratch(DType.u8, groups * panel)
            values = Scratch(DType.i32, KEYS // DEPTH * (c // SUMS) * TILE)
            near = cache
            if coded is not None:
                near = replace(cache, latent=Scratch(DType.bf16, KEYS * c))
            rows = _Rows(near)
            state.clear()
            with loop(groups) as g:
                head = bind(token * heads + g * lanes)
                places = [
                    lambda q: given["q_latent"] + (head + q) * (2 * c),
                    lambda q: given["q_rope"] + (head + q) * (2 * r),
                ]
                pack_queries(places, (c, r), lanes, bind(amx.address(panels, g * panel)))
            with loop(ceil_div(count, KEYS)) as block:
                first = bind(begin + block * KEYS)
                here = bind(tirx.min(integer(KEYS), count - block * KEYS))

                def slot(t: Expr) -> Expr:
                    return cache.slot(batch, first + t)

                def place(t: Expr) -> Expr:
                    """Where the latents of a row lie: in order, where they were widened."""
                    return slot(t) if coded is None else t

                def later(tile: Expr) -> Expr:
                    row = tirx.min(first + KEYS + tile * DEPTH, limit - 1)
                    return cache.slot(batch, row) * stride

                if coded is not None:
                    with loop(here) as t:
                        coded.widen(slot(t), near.latent, bind(t * c))
                _pair_latents(near, place, here, values)
                rest = bind(tirx.truncmod(here, integer(DEPTH)))
                with when(rest > 0):
                    rows.fill_tail([place(here - rest), slot(here - rest)], rest - 1)
                keys = [rows.part(i, each, here) for i, each in enumerate((place, slot))]
                seen = splat(cast(here, "float32"), SUMS)
                with loop(groups // state.pair) as i:
                    group = bind(i * state.pair)
                    queries = [
                        bind(amx.address(panels, (group + g) * panel)) for g in range(state.pair)
                    ]
                    ahead = Ahead(source, later, stride, tirx.EQ(i, integer(0)))
                    at = amx.address(values, 0)
                    state.attend(group, queries, keys, at, here, lambda g: seen, ahead)
            with loop(groups) as g, loop(lanes) as lane:
                head = bind(g * lanes + lane)
                if shared is None:
                    state.store(y, bind((token * heads + head) * c), g, lane)
                else:
                    start = bind(n * floats + head * c)
                    state.copy(shared.tensor, start, g, lane)
                    shared.put(n, head, state.peak[g * SUMS + lane], state.mass[g * SUMS + lane])

        with instructions(), coded_cache.instructions(kind):
            if kind is not None and coded is None:
                coded_cache.widen_all(kind, given, cache, native=True)
            for_each(b * s * parts, bind(heads * (cache.extent * (c // parts))), task)
            if shared is not None:
                for_each(b * s * heads, parts * c, lambda n: shared.join(y, n, False))

    return build(body, names)


def _pair_latents(
    cache: LatentCache, slot: Callable[[Expr], Expr], here: Expr, values: Scratch
) -> None:
    """The latents of a block as tiles of values; missing rows are the last one, to weigh 0."""
    columns = cache.c // SUMS
    with loop(ceil_div(here, DEPTH)) as tile:
        start = bind(slot(tile * DEPTH))
        last = bind(here - 1 - tile * DEPTH)
        with loop(DEPTH // 2) as p:
            at = [bind((start + tirx.min(2 * p + i, last)) * cache.c) for i in range(2)]
            with loop(columns // 2) as v:
                low, high = (bind(bits(cache.latent, row + v * LANES)) for row in at)
                for i, words in enumerate(amx.pairs(low, high)):
                    values.put((tile * columns + 2 * v + i) * TILE + p * SUMS, words)


def tile_mla(
    heads: int, n: int, r: int, v: int, c: int, scale: float, page: int, kind: Kind | None
) -> PrimFunc:
    """The kernel; kv_b is [heads*(n+v), c]. With `page` it takes a block table; t counts pages."""
    depth, together = n + r, 2 * amx.TOKENS
    panel = panel_bytes(amx.TOKENS, depth)
    rest = "out" if kind is None else "out numbers"
    names = arguments("q_nope q_rope latent rope kv_b lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        q_nope, q_rope, b, s = (given[name] for name in ("q_nope", "q_rope", "b", "s"))
        cache = LatentCache.of(given, DType.bf16, c, r, page)
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, v))

        def task(i: Expr) -> None:
            batch, head = bind(tirx.truncdiv(i, heads)), bind(tirx.truncmod(i, heads))
            past = bind(used.load(batch))
            shown = bind(tirx.min(past + s, cache.extent))
            tiles = bind(ceil_div(shown, DEPTH))
            keys = Scratch(DType.bf16, tiles * (DEPTH * depth))
            values = Scratch(DType.i32, tiles * (v // SUMS * TILE))
            up = bind(given["kv_b"] + head * ((n + v) * c * 2))
            rows = _Rows(cache, rope=False)
            _expand(rows, batch, shown, up, (n, v), keys, values)
            state = Attention(2, amx.TOKENS, v, scale)
            panels = Scratch(DType.u8, 2 * panel)
            queries = [bind(amx.address(panels, g * panel)) for g in range(2)]
            lane = cast(tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), SUMS), "float32")
            with loop(ceil_div(s, together)) as group:
                start = bind(group * together)
                for g in range(2):

                    def row(q: Expr, base: Expr, width: int, g: int = g) -> Expr:
                        token = tirx.min(start + (q + g * amx.TOKENS), s - 1)
                        return base + ((batch * s + token) * heads + head) * (2 * width)

                    parts = [lambda q: row(q, q_nope, n), lambda q: row(q, q_rope, r)]
                    pack_queries(parts, (n, r), amx.TOKENS, queries[g])
                state.clear()
                limit = bind(tirx.min(past + tirx.min(start + together, s), shown))
                with loop(ceil_div(limit, KEYS)) as block:
                    first = bind(block * KEYS)
                    here = bind(tirx.min(integer(KEYS), limit - first))

                    def visible(g: int) -> Expr:
                        base = past + start + (g * amx.TOKENS + 1) - first
                        return lane + splat(cast(base, "float32"), SUMS)

                    at = amx.address(values, first // DEPTH * (v // SUMS * TILE))
                    part = Keys(lambda k: amx.address(keys, (first + k) * depth), depth)
                    state.attend(integer(0), queries, [part], bind(at), here, visible)
                with loop(together) as q, when(start + q < s):
                    place = bind(((batch * s + start + q) * heads + head) * v)
                    state.store(y, place, q // amx.TOKENS, q % amx.TOKENS)

        with instructions(), coded_cache.instructions(kind):
            if kind is not None:
                coded_cache.widen_all(kind, given, cache, native=True)
            for_each(b * heads, PARALLEL_WORK, task)

    return build(body, names)


def _expand(
    rows: _Rows, batch: Expr, shown: Expr, up: Expr, sizes: tuple[int, int], keys: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """A head's keys [rows, n + r] and values, as tiles, from `shown` latent rows."""
    cache, (n, v) = rows.cache, sizes
    c, r, depth = cache.c, cache.r, n + cache.r
    panel = panel_bytes(amx.TOKENS, c)
    panels = Scratch(DType.u8, (n + v) // SUMS * panel)
    square = Local(4 * TILE)
    with loop((n + v) // SUMS) as j:
        row = bind(up + j * (SUMS * 2 * c))
        target = bind(amx.address(panels, j * panel))
        pack_queries([lambda i: row + i * (2 * c)], (c,), amx.TOKENS, target)
    amx.configure(integer(amx.TOKENS), integer(amx.COLUMNS))
    with loop(ceil_div(shown, DEPTH)) as tile:
        first = bind(tile * DEPTH)
        slot = bind(cache.slot(batch, first))
        last = bind(shown - 1 - first)
        with when(last < DEPTH - 1):
            rows.fill_tail([slot], last)
        latents = rows.part(0, lambda _: slot, select(last < DEPTH - 1, integer(0), integer(DEPTH)))
        base, stride = bind(latents.address(integer(0))), latents.stride

        def products(j: Expr) -> None:
            """32 columns from 32 j on of the tile's 32 rows, as squares (row half, column half)."""
            for a, b in product(range(2), range(2)):
                amx.zero(2 * a + b)
            with loop(c // DEPTH) as k:
                for b in range(2):
                    at = amx.address(panels, (2 * j + b) * panel + k * TILE_BYTES)
                    amx.load(amx.PAIRS[b], at, ROW)
                for a in range(2):
                    row = base + k * (2 * DEPTH) + stride * (a * SUMS)
                    amx.load(amx.WEIGHTS[a], row, stride)
                    for b in range(2):
                        amx.multiply(2 * a + b, amx.WEIGHTS[a], amx.PAIRS[b])
            for a, b in product(range(2), range(2)):
                amx.save(2 * a + b, amx.address(square, (2 * a + b) * TILE), ROW)

        def made(t: Expr, b: int) -> Expr:
            """Row t, 0 .. 31, of a column half."""
            return square.load((t // SUMS * 2 + b) * TILE + t % SUMS * SUMS, SUMS)

        with loop(n // DEPTH) as j:
            products(j)
            with loop(DEPTH) as t:
                for b in range(2):
                    place = (first + t) * depth + j * DEPTH + b * SUMS
                    put_bits(keys, place, narrow(made(t, b)))
        with loop(v // DEPTH) as j:
            products(j + n // DEPTH)
            with loop(DEPTH // 2) as p:
                for b in range(2):
                    at = (tile * (v // SUMS) + 2 * j + b) * TILE + p * SUMS
                    values.put(at, paired(made(2 * p, b), made(2 * p + 1, b)))
        with loop(DEPTH) as t:
            row = bind((slot + tirx.min(t, last)) * r)
            with loop(r // LANES) as j:
                put_bits(
                    keys, (first + t) * depth + n + j * LANES, bits(cache.rope, row + j * LANES)
                )
