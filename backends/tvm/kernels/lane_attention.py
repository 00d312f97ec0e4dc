"""latent_attention in bf16 by pairs, a head in each lane: for multiples of 16 heads.

bound: heads (2c + r) / 32 pair products a visible row, one a cycle (Zen 4), or its 2 (c + r) bytes
over bandwidth. A task is a token's share of the context with all heads.

scores   S[t, h] = sum_j K[t, j] Q[h, j], a row of K and 16 heads at a time. Queries are packed, so
         that a vector holds a pair of each head; the pair of K that meets all of them comes with
         the instruction. No lanes are summed, and softmax runs down the rows.
values   O[h, v] = sum_t P[h, t] V[t, v], 16 heads and 16 columns at a time. Two rows of V are
         zipped into pairs of one column each; what meets them is a pair of weights of a head, which
         lie as softmax leaves them.

Loads come with the instructions or beside them, so that what is not a product costs: the softmax,
and sums that are stored. Scores are counted in powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import e, log2

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import (
    LANES,
    SUMS,
    Pairs,
    bits,
    exp2,
    instructions,
    narrow,
    pair_dot,
    prefetch_far,
    put_bits,
    zipped,
)
from dsc.backends.tvm.kernels import bf16_softmax, coded_cache
from dsc.backends.tvm.kernels.bf16_attention import PARTS, SharedParts, part_floats, part_of
from dsc.backends.tvm.kernels.bf16_product import ceil_div
from dsc.backends.tvm.kernels.bf16_softmax import in_order
from dsc.backends.tvm.kernels.coded_cache import CodedRows, Kind
from dsc.backends.tvm.kernels.latent_cache import LatentCache, arguments
from dsc.backends.tvm.kernels.tile_softmax import pack_queries, paired
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    Scratch,
    Tensor,
    bind,
    build,
    f32,
    for_each,
    hold,
    integer,
    loop,
    splat,
    tirx,
    when,
)
from dsc.ir.types import DType

ROWS = 8
"""Rows whose scores are summed at once: their sums hide the latency of a product (6 cycles), and
their addresses stay in registers."""
BLOCK = 128
"""Rows after which sums are rescaled, loaded and stored; they stay in the second-level cache."""
AHEAD = 16
"""Rows that are asked for ahead of those whose scores are summed: 1.2 us. The first of a share come
unasked, so that with 48 a step takes 3% more, where 8 and 16 take the same (Zen 4)."""
LOG2_E = log2(e)
STEP = LANES // 2
"""Pairs of a row that lie in a line of memory."""


def lane_latent(
    heads: int, c: int, r: int, scale: float, split: bool, page: int, kind: Kind | None
) -> PrimFunc:
    """The kernel, with scratch memory when `split`, or for numbers when rows are of a `kind`.

    With `page` it takes a block table, and t counts pages.
    """
    unit, parts = bf16_softmax.BLOCK if page else LANES, PARTS if split else 1
    panel = SUMS * (c + r)
    rest = "out scratch" if split else "out" if kind is None else "out numbers"
    names = arguments("q_latent q_rope latent rope lengths", page, rest)

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        cache = LatentCache.of(given, DType.bf16, c, r, page)
        coded = CodedRows(kind, given["latent"], True) if kind is not None and split else None
        used = Tensor(given["lengths"], DType.i64, (b,))
        y = Tensor(given["out"], DType.bf16, (b, s, heads, c))
        shared = None
        if split:
            shared = SharedParts(given["scratch"], heads, c, b * s, lambda h, v: _place(h, v, c))

        def task(n: Expr) -> None:
            token, part = bind(tirx.truncdiv(n, parts)), bind(tirx.truncmod(n, parts))
            batch = bind(tirx.truncdiv(token, s))
            limit = bind(tirx.min(used.load(batch) + (token - batch * s) + 1, cache.extent))
            begin, count = part_of(part, parts, limit, unit)
            panels = Scratch(DType.bf16, heads // SUMS * panel)
            latent = cache.latent if coded is None else Scratch(DType.bf16, BLOCK * c)
            sums = Scratch(DType.f32, heads * c) if shared is None else shared.tensor
            base = integer(0) if shared is None else bind(n * part_floats(heads, c))
            state = _State(heads, scale, sums, base)
            state.clear(c, count)

            def slot(row: Expr) -> Expr:
                """The slot of a row of the share, or of its last one."""
                return cache.slot(batch, begin + tirx.min(row, count - 1))

            with when(count > 0), loop(heads // SUMS) as g:
                head = bind(token * heads + g * SUMS)
                places = [
                    lambda q: given["q_latent"] + (head + q) * (2 * c),
                    lambda q: given["q_rope"] + (head + q) * (2 * r),
                ]
                pack_queries(places, (c, r), SUMS, bind(amx.address(panels, g * panel)))
            with loop(ceil_div(count, BLOCK)) as block:
                first = bind(block * BLOCK)
                here = bind(tirx.min(integer(BLOCK), count - first))
                rows = _Rows(cache, latent, lambda t: slot(first + t), here)
                if coded is not None:
                    with loop(here) as t:
                        coded.widen(rows.slot(t), latent, bind(t * c))
                        later = slot(first + AHEAD + t)
                        coded.ahead(later)
                        for line in range(0, r, LANES):
                            prefetch_far(cache.rope, later * r + line)
                with loop(heads // SUMS) as g:
                    state.score(g, rows, panels, g * panel)
                    state.weigh(g, here)
                    state.add(g, rows, block > 0)
            with loop(heads) as head:
                if shared is None:
                    state.store(y, (token * heads + head) * c, head, c)
                else:
                    peak = state.peak[head] * f32(1.0 / LOG2_E)
                    shared.put(n, head, peak, state.mass[head])

        with instructions(), coded_cache.instructions(kind):
            if kind is not None and coded is None:
                coded_cache.widen_all(kind, given, cache, native=True)
            for_each(b * s * parts, bind(heads * (cache.extent * (c // parts))), task)
            if shared is not None:
                for_each(b * s * heads, parts * c, lambda n: shared.join(y, n, True))

    return build(body, names)


def _place(head: Expr, v: Expr, c: int) -> Expr:
    """Where vector v of a head's sums lies: 16 heads side by side."""
    group, lane = tirx.truncdiv(head, integer(SUMS)), tirx.truncmod(head, integer(SUMS))
    return bind(((group * (c // SUMS) + v) * SUMS + lane) * SUMS)


@dataclass(frozen=True)
class _Rows:
    """`here` rows of a cache. Latents lie in its own, or one after another where they are widened.

    `slot(t)` is that of row t, or of the last one; eight that begin at a multiple of that follow
    each other.
    """

    cache: LatentCache
    latent: Tensor
    slot: Callable[[Expr], Expr]
    here: Expr

    @property
    def widened(self) -> bool:
        """Whether latents were copied."""
        return self.latent is not self.cache.latent

    def few(self, t: Expr, count: int) -> tuple[list[Expr], list[Expr]]:
        """Numbers of some rows from t on among latents, and among rope keys."""
        last = bind(self.here - 1 - t)
        more = [tirx.min(integer(i), last) if i else integer(0) for i in range(count)]
        slot = self.slot(t)
        ropes = [bind(slot + i) for i in more]
        return [bind(t + i) for i in more] if self.widened else ropes, ropes


class _State:
    """What a task keeps: of each head a maximum, in powers of two, a mass, and sums.

    `sums` has those from `base` on, in the order of `_place`; columns are in that of `zipped`.
    """

    def __init__(self, heads: int, scale: float, sums: Tensor, base: Expr) -> None:
        self.heads, self.sums, self.base = heads, sums, base
        self.scale = splat(f32(scale * LOG2_E), SUMS)
        self.peak, self.mass = Local(heads), Local(heads)
        self.top, self.shrink = Local(1, width=SUMS), Local(SUMS)
        self.scores, self.weights = Local(BLOCK * SUMS), Local(BLOCK // 2 * SUMS, "int32")

    def clear(self, c: int, count: Expr) -> None:
        """Nothing seen yet; sums are cleared where no rows will be seen, or else by the first."""
        with loop(self.heads // SUMS) as g:
            self.peak.store(g * SUMS, splat(f32(float("-inf")), SUMS))
            self.mass.store(g * SUMS, splat(f32(0.0), SUMS))
        with when(count < 1), loop(self.heads * c // SUMS) as i:
            self.sums.put(self.base + i * SUMS, splat(f32(0.0), SUMS))

    def score(self, g: Expr, rows: _Rows, panels: Tensor, panel: Expr) -> None:
        """The scores of 16 heads with some rows, and their maxima.

        The last row stands in for rows past the end, up to a multiple of ROWS.
        """
        cache = rows.cache
        self.top[0] = self.peak.load(g * SUMS, SUMS)
        with loop(ceil_div(rows.here, ROWS)) as step:
            t = bind(step * ROWS)
            later = rows.slot(t + AHEAD)
            sums = [Local(1, width=SUMS) for _ in range(ROWS)]
            for each in sums:
                each[0] = each.zero
            first = bind(panel)
            both = ((rows.latent, cache.c), (cache.rope, cache.r))
            for (x, width), numbers in zip(both, rows.few(t, ROWS), strict=True):
                words = Pairs.at(amx.address(x, 0), 2)
                starts = [bind(n * (width // 2)) for n in numbers]
                with loop(width // LANES) as line:
                    if not rows.widened:
                        for i in range(ROWS):
                            prefetch_far(x, (later + i) * width + line * LANES)
                    for j in range(STEP):
                        pairs = bind(bits(panels, first + (line * STEP + j) * LANES))
                        for each, start in zip(sums, starts, strict=True):
                            word = words.pair(start + line * STEP + j)
                            each[0] = pair_dot(each[0], pairs, word)
                first = bind(first + width * SUMS)
            for i, each in enumerate(sums):
                score = hold(each[0] * self.scale)
                self.scores.store((t + i) * SUMS, score)
                self.top[0] = tirx.max(self.top[0], score)

    def weigh(self, g: Expr, here: Expr) -> None:
        """Scores to weights, two rows a vector; rows past the end weigh 0."""
        peak = hold(self.top[0])
        even = bind(ceil_div(here, ROWS) * ROWS)
        with loop(even - here) as i:
            self.scores.store((here + i) * SUMS, splat(f32(float("-inf")), SUMS))
        mass = Local(1, width=SUMS)
        mass[0] = mass.zero
        with loop(tirx.truncdiv(even, integer(2))) as pair:
            at = bind(pair * (2 * SUMS))
            low, high = (hold(exp2(self.scores.load(at + i * SUMS, SUMS) - peak)) for i in range(2))
            mass[0] = mass[0] + (low + high)
            self.weights.store(pair * SUMS, paired(low, high))
        shrink = hold(exp2(self.peak.load(g * SUMS, SUMS) - peak))
        self.mass.store(g * SUMS, self.mass.load(g * SUMS, SUMS) * shrink + mass[0])
        self.peak.store(g * SUMS, peak)
        self.shrink.store(integer(0), shrink)

    def add(self, g: Expr, rows: _Rows, begun: Expr) -> None:
        """Rescale the sums of 16 heads, where they have `begun`, and add weights times values."""
        c, words = rows.cache.c, Pairs(self.weights)
        pairs = bind(tirx.truncdiv(rows.here + 1, integer(2)))
        with loop(c // LANES) as v:
            for half in range(2):
                at = bind(self.base + (g * (c // SUMS) + 2 * v + half) * (SUMS * SUMS))
                sums = [Local(1, width=SUMS) for _ in range(SUMS)]
                for each in sums:
                    each[0] = each.zero
                with when(begun):
                    for lane, each in enumerate(sums):
                        old = self.sums.at(at + lane * SUMS, SUMS)
                        each[0] = old * splat(self.shrink[lane], SUMS)
                with loop(pairs) as p:
                    numbers, _ = rows.few(p * 2, 2)
                    two = [bind(bits(rows.latent, n * c + v * LANES)) for n in numbers]
                    columns = bind(zipped(*two)[half])
                    for lane, each in enumerate(sums):
                        word = words.pair(p * SUMS + lane)
                        each[0] = pair_dot(each[0], columns, word)
                for lane, each in enumerate(sums):
                    self.sums.put(at + lane * SUMS, each[0])

    def store(self, y: Tensor, position: Expr, head: Expr, c: int) -> None:
        """Write a head's sums over its mass, columns in order, as bf16."""
        inverse = hold(splat(f32(1.0) / self.mass[head], SUMS))
        with loop(c // LANES) as v:
            low, high = (
                bind(self.sums.at(self.base + _place(head, 2 * v + half, c), SUMS) * inverse)
                for half in range(2)
            )
            for half, value in enumerate(in_order(low, high)):
                put_bits(y, position + v * LANES + half * SUMS, narrow(value))
