"""Attention over a latent cache, and expanded from it.

latent_attention   all heads share the latent rows: a task is a group of heads of one token.
mla_attention      a task is a head of a sequence: it rebuilds that head's keys and values for the
                   visible rows only, then every token of the step attends to them.
"""

from __future__ import annotations

from dsc.backends.tvm.bf16 import LANES, SUMS
from dsc.backends.tvm.kernels import bf16_attention, bf16_softmax, lane_attention, tile_attention
from dsc.backends.tvm.kernels.attend import BLOCK, Queries, Rows, attend
from dsc.backends.tvm.kernels.coded_cache import (
    CodedRows,
    Kind,
    instructions,
    scratch_bytes,
    widen_all,
)
from dsc.backends.tvm.kernels.dots import product_rows
from dsc.backends.tvm.kernels.latent_cache import LatentCache, arguments, page_of
from dsc.backends.tvm.kernels.panels import fits
from dsc.backends.tvm.launch import Launch, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Scratch,
    Tensor,
    bind,
    build,
    for_each,
    integer,
    lanes_for,
    loop,
    tiles,
    tirx,
)
from dsc.ir.graph import Node
from dsc.ir.paging import cached_rows
from dsc.ir.types import DType

HEADS, TOKENS = 8, 4
"""Queries that share a loaded row: heads over a latent, tokens of one head."""


def lower_latent(node: Node, machine: Machine) -> Launch:
    """The launch of `latent_attention`, over a cache in order or in pages."""
    q, q_rope, latent = (operand(node, i).type for i in range(3))
    heads, c, r = (static_dim(d, "a head axis") for d in (*q.shape[2:], q_rope.shape[3]))
    b, s, t, page = *q.shape[:2], cached_rows(node, "latent"), page_of(node, BLOCK)
    scale, flops = float(node.attrs["scale"]), b * s * t * (heads * (4 * c + 2 * r) * (page or 1))
    kind = Kind.of(latent, machine)
    whole = 0 if s == 1 else scratch_bytes(kind, latent, q.dtype)
    if fits(machine, c, q, q_rope) and r % LANES == 0 and page % bf16_softmax.BLOCK == 0:
        split = s == 1
        floats = bf16_attention.PARTS * bf16_attention.part_floats(heads, c) if split else 0
        wide = (heads, c, r, scale, split, page, kind)
        maker = bf16_attention.bf16_latent
        if machine.tiles:
            maker = tile_attention.tile_latent
        elif machine.pairs and heads % SUMS == 0:
            maker = lane_attention.lane_latent
        return Launch(maker, wide, (b, s, t), scratch=b * (4 * floats) + whole, flops=flops)
    static = (q.dtype, heads, c, r, scale, machine.lanes, page, kind, s == 1)
    return Launch(latent_attention, static, (b, s, t), scratch=whole, flops=flops)


def latent_attention(
    dtype: DType,
    heads: int,
    c: int,
    r: int,
    scale: float,
    lanes: int,
    page: int,
    kind: Kind | None,
    one: bool,
) -> PrimFunc:
    """The kernel; with `page` it takes a block table, and t counts pages; `one`: s is 1."""
    group = lanes_for(heads, HEADS)
    numbers = kind is not None and not one
    rest = "out numbers" if numbers else "out"
    names = arguments("q_latent q_rope latent rope lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        q_latent = Tensor(given["q_latent"], dtype, (b, s, heads, c))
        q = q_latent, Tensor(given["q_rope"], dtype, (b, s, heads, r))
        cache = LatentCache.of(given, dtype, c, r, page)
        coded = None if kind is None else CodedRows(kind, given["latent"])
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], dtype, (b, s, heads, c))

        def task(n: Expr) -> None:
            head = bind(tirx.truncmod(n, heads // group) * group)
            token = bind(tirx.truncdiv(n, heads // group))
            batch = bind(tirx.truncdiv(token, s))
            limit = bind(tirx.min(used.load(batch) + (token - batch * s) + 1, cache.extent))
            rows = [bind(token * heads + head + i) for i in range(group)]
            queries = Queries(q, [[i * c for i in rows], [i * r for i in rows]], [limit] * group)
            latents = _latents(cache, batch)
            if coded is not None and one:
                tile = Scratch(dtype, BLOCK * c)
                latents = Rows(tile, lambda row: integer(0), c, c)

            def begin(first: Expr, here: Expr) -> None:
                """Widen the rows of a block to the tile."""
                if coded is not None and one:
                    slot = cache.slot(batch, first)
                    with loop(here) as t:
                        coded.widen(bind(slot + t), tile, bind(t * c))

            attend(
                queries,
                [latents, _ropes(cache, batch)],
                latents,
                scale,
                lanes,
                lambda i, column, v: y.put(rows[i] * c + column, v),
                begin,
            )

        with instructions(kind):
            if kind is not None and numbers:
                widen_all(kind, given, cache)
            for_each(b * s * (heads // group), PARALLEL_WORK, task)

    return build(body, names)


def lower_mla(node: Node, machine: Machine) -> Launch:
    """The launch of `mla_attention`, over a cache in order or in pages."""
    q, q_rope, latent, _, kv_b = (operand(node, i).type for i in range(5))
    axes = (*q.shape[2:], q_rope.shape[3], *kv_b.shape)
    heads, n, r, m, c = (static_dim(d, "a head axis") for d in axes)
    b, s, t, page = *q.shape[:2], cached_rows(node, "latent"), page_of(node, BLOCK)
    width = m // heads
    flops = (b * t * (2 * m * c) + b * s * t * (2 * heads * (width + r))) * (page or 1)
    scale = float(node.attrs["scale"])
    tiled = page % bf16_softmax.BLOCK == 0 and not any(d % LANES for d in (n, r, width - n))
    kind = Kind.of(latent, machine)
    whole = scratch_bytes(kind, latent, q.dtype)
    if fits(machine, c, q, q_rope, kv_b) and tiled:
        wide = (heads, n, r, width - n, c, scale, page, kind)
        maker = tile_attention.tile_mla if machine.tiles else bf16_attention.bf16_mla
        return Launch(maker, wide, (b, s, t), scratch=whole, flops=flops)
    static = (q.dtype, heads, n, r, width - n, c, scale, machine, page, kind)
    return Launch(mla_attention, static, (b, s, t), scratch=whole, flops=flops)


def mla_attention(
    dtype: DType,
    heads: int,
    n: int,
    r: int,
    v: int,
    c: int,
    scale: float,
    machine: Machine,
    page: int,
    kind: Kind | None,
) -> PrimFunc:
    """The kernel; kv_b is [heads*(n+v), c]. With `page` it takes a block table; t counts pages."""
    width = n + v
    rest = "out" if kind is None else "out numbers"
    names = arguments("q_nope q_rope latent rope kv_b lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        q_nope = Tensor(given["q_nope"], dtype, (b, s, heads, n))
        q = q_nope, Tensor(given["q_rope"], dtype, (b, s, heads, r))
        cache = LatentCache.of(given, dtype, c, r, page)
        up = Tensor(given["kv_b"], dtype, (heads * width, c))
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], dtype, (b, s, heads, v))

        def task(i: Expr) -> None:
            batch, head = bind(tirx.truncdiv(i, heads)), bind(tirx.truncmod(i, heads))
            past = bind(used.load(batch))
            shown = bind(tirx.min(past + s, cache.extent))
            kv = Scratch(DType.f32, shown * width)
            product_rows(
                cache.latent, lambda row: cache.slot(batch, row) * c, shown,
                up, lambda j: (head * width + j) * c, width, c, machine,
                lambda row, j, value: kv.put(row * width + j, value),
            )  # fmt: skip

            def tokens(first: Expr, count: int) -> None:
                rows = [bind((batch * s + first + a) * heads + head) for a in range(count)]
                limits = [bind(tirx.min(past + first + (a + 1), shown)) for a in range(count)]
                attend(
                    Queries(q, [[a * n for a in rows], [a * r for a in rows]], limits),
                    [Rows(kv, lambda row: row * width, n, width), _ropes(cache, batch)],
                    Rows(kv, lambda row: row * width + n, v, width),
                    scale,
                    machine.lanes,
                    lambda a, column, vector: y.put(rows[a] * v + column, vector),
                )

            tiles(s, TOKENS, tokens)

        with instructions(kind):
            if kind is not None:
                widen_all(kind, given, cache)
            for_each(b * heads, PARALLEL_WORK, task)

    return build(body, names)


def _latents(cache: LatentCache, batch: Expr) -> Rows:
    return Rows(cache.latent, lambda row: cache.slot(batch, row) * cache.c, cache.c, cache.c)


def _ropes(cache: LatentCache, batch: Expr) -> Rows:
    return Rows(cache.rope, lambda row: cache.slot(batch, row) * cache.r, cache.r, cache.r)
