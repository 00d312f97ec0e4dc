"""Attention over keys and values, of which groups of query heads share a head.

A task is some tokens of a group of heads of a sequence. Its queries are pairs (token, head), tiles
of which attend together, so that a row that was loaded serves all of them: the heads of a token
where several share a head, else tokens of one head. bf16 has kernels of its own.
"""

from __future__ import annotations

from dsc.backends.tvm.bf16 import LANES
from dsc.backends.tvm.kernels import bf16_grouped, bf16_softmax
from dsc.backends.tvm.kernels.attend import BLOCK, Queries, Rows, attend
from dsc.backends.tvm.kernels.latent_cache import CacheRows, page_of
from dsc.backends.tvm.kernels.panels import fits
from dsc.backends.tvm.kernels.sight import Sight
from dsc.backends.tvm.launch import Launch, Unsupported, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    for_each,
    integer,
    loop,
    tiles,
    tirx,
)
from dsc.ir.graph import Node
from dsc.ir.paging import cached_rows
from dsc.ir.types import DType

HEADS, TOKENS = 16, 4
"""Queries that share a loaded row: heads of a group at most, or tokens of a head."""
TASK = 32
"""Tokens of a task."""


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `attention`, over a cache in order or in pages."""
    for x in node.operands[:3]:
        if x.type.dtype is DType.f64:
            raise Unsupported(f"attention of {x.type.dtype}; f32, bf16 and f16 have it")
    q, k, value = (operand(node, i).type for i in range(3))
    axes = (*q.shape[2:], k.shape[2], value.shape[3])
    heads, d, groups, e = (static_dim(x, "a head axis") for x in axes)
    b, s, t = *q.shape[:2], cached_rows(node, "k")
    page, sight = page_of(node, BLOCK), Sight.of(node)
    flops = b * s * t * (2 * heads * (d + e) * (page or 1))
    whole = e % LANES == 0 and page % bf16_softmax.BLOCK == 0
    if whole and fits(machine, d, q, k, value):
        wide = (heads, groups, d, e, sight, page)
        if s == 1:
            scratch = b * (4 * bf16_grouped.floats(heads, e))
            return Launch(bf16_grouped.decode, wide, (b, s, t), scratch=scratch, flops=flops)
        return Launch(bf16_grouped.prompt, wide, (b, s, t), flops=flops)
    static = (q.dtype, heads, groups, d, e, sight, page, machine.lanes)
    return Launch(attention, static, (b, s, t), flops=flops)


def attention(
    dtype: DType, heads: int, groups: int, d: int, e: int, sight: Sight, page: int, lanes: int
) -> PrimFunc:
    """Arguments: q, k, v, those of lengths, sinks and block table that there are, out; b, s, t.

    With a block table, t counts pages.
    """
    share = heads // groups
    parts = -(-share // HEADS)
    together = -(-share // parts)
    names = ["q", "k", "v", *sight.names(page), "out", "b", "s", "t"]

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        cache = CacheRows.of(given, page)
        slots = (1, page) if page else (b, given["t"])
        q, y = (Tensor(given[name], dtype, (b, s, heads, w)) for name, w in (("q", d), ("out", e)))
        k, v = (Tensor(given[n], dtype, (*slots, groups, w)) for n, w in (("k", d), ("v", e)))
        sinks = Tensor(given["sinks"], dtype, (heads,)) if sight.sinks else None
        shown = sight.rows(given, cache.extent)

        def run(batch: Expr, group: Expr, queries: list[tuple[Expr, Expr]]) -> None:
            """Attend for (token, head) pairs whose heads share the keys of `group`."""
            rows = [bind((batch * s + token) * heads + head) for token, head in queries]
            attend(
                Queries(
                    [q],
                    [[row * d for row in rows]],
                    [shown.limit(batch, token) for token, _ in queries],
                    [shown.first(batch, token) for token, _ in queries] if sight.bounded else [],
                    [] if sinks is None else [bind(sinks.load(head)) for _, head in queries],
                    sight.careful,
                ),
                [Rows(k, lambda r: (cache.slot(batch, r) * groups + group) * d, d, groups * d)],
                Rows(v, lambda r: (cache.slot(batch, r) * groups + group) * e, e, groups * e),
                sight.scale,
                lanes,
                lambda i, column, vector: y.put(rows[i] * e + column, vector),
                softcap=sight.softcap,
            )

        def task(n: Expr) -> None:
            group, rest = bind(tirx.truncmod(n, groups)), bind(tirx.truncdiv(n, groups))
            batch, start = bind(tirx.truncmod(rest, b)), bind(tirx.truncdiv(rest, b) * TASK)
            count = bind(tirx.min(s - start, integer(TASK)))
            if share == 1:
                tiles(
                    count,
                    TOKENS,
                    lambda first, n: run(
                        batch, group, [(bind(start + first + a), group) for a in range(n)]
                    ),
                )
                return
            with loop(count) as i, loop(parts) as part:
                token, first = bind(start + i), bind(part * together)
                heads_of = [
                    bind(group * share + tirx.min(first + a, share - 1)) for a in range(together)
                ]
                run(batch, group, [(token, head) for head in heads_of])

        for_each(b * groups * tirx.truncdiv(s + (TASK - 1), integer(TASK)), PARALLEL_WORK, task)

    return build(body, names)
