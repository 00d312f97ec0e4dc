"""Attention over materialised keys and values: one flash kernel for prefill and for GQA.

The scores are a sum of two products, q_nope . k_nope + q_rope . k_rope, because the expanded form
of multi-head latent attention has one rope key for all heads: it is read as it lies in the cache,
never copied into every head. In plain attention R is 0, or what a width is above a power of two: 96
is 64 and 32, and so are values, whose columns behind BLOCK_E are BLOCK_F. The place `pages` may say
where rows of keys and values, or of rope keys, lie (`dsc.backends.triton.lower.cached`).

Tiles that all queries see whole are not masked: that is a comparison or two a tile, where a mask is
several instructions a score. Softmax is in powers of two and its scale part of the exponents, so
that a score costs a maximum, a multiplication with an addition, an exponential and a sum.
docs/decisions/triton-attention.md counts what targets make of this.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def _scores(
    queries,
    rope_queries,
    k_at,
    kr_at,
    key_rows,
    rope_rows,
    k_row,
    kr_row,
    left,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Queries times a tile of keys, of which `left` are there: f32[BLOCK_M, BLOCK_T].

    The longer product comes last: it is the one that softmax of another tile may run beside.
    """
    i = tl.arange(0, BLOCK_T)
    d = tl.arange(0, queries.shape[1])
    held = i < tl.where(key_rows < 0, 0, left)
    keys_at = k_at + key_rows * k_row + i[None, :] * k_row + d[:, None]
    keys = tl.load(keys_at, mask=held[None, :] & (d < D)[:, None], other=0.0)
    if R == 0:
        return tl.dot(queries, keys, input_precision="ieee")
    else:
        r = tl.arange(0, rope_queries.shape[1])
        held = i < tl.where(rope_rows < 0, 0, left)
        ropes_at = kr_at + rope_rows * kr_row + i[None, :] * kr_row + r[:, None]
        ropes = tl.load(ropes_at, mask=held[None, :] & (r < R)[:, None], other=0.0)
        scores = tl.dot(rope_queries, ropes, input_precision="ieee")
        return tl.dot(queries, keys, scores, input_precision="ieee")


@triton.jit
def flash_attention(
    q,
    q_rope,
    k,
    k_rope,
    v,
    lengths,
    sinks,
    out,
    S,
    T,
    heads,
    scale: tl.constexpr,
    q_batch,
    q_row,
    q_head,
    qr_batch,
    qr_row,
    qr_head,
    k_batch,
    k_row,
    k_head,
    kr_batch,
    kr_row,
    kr_head,
    v_batch,
    v_row,
    v_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out[b, s, h] = softmax(scale * scores) @ v; grid (query tiles, batch * heads).

    Query i of row b sees keys j <= lengths[b] + i (HAS_LENGTHS), j <= i + T - S (CAUSAL), or all.
    Of these it sees the last WINDOW, and those of its CHUNK, where they are not 0. Scores are
    capped to SOFTCAP; a sink is a logit of each head that is seen first and adds nothing.
    GROUP query heads share one key head. out is dense [B, S, heads, E]. Softmax is online, in fp32.
    Of a head the query tiles that see most run first. With AHEAD the scores of a tile of keys are
    multiplied before softmax goes over those of the tile before, so that both may run at once.
    """
    z = tl.program_id(1)
    b = (z // heads).to(tl.int64)
    h = z % heads
    g = h // GROUP
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    f = BLOCK_E + tl.arange(0, BLOCK_F) if BLOCK_F > 0 else e
    rows = m < S
    q_at = q + b * q_batch + h * q_head + m[:, None].to(tl.int64) * q_row + d[None, :]
    fits = rows[:, None] & (d < D)[None, :]
    queries = tl.load(q_at, mask=fits, other=0.0)
    rope_queries = queries
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        qr_at = q_rope + b * qr_batch + h * qr_head + m[:, None].to(tl.int64) * qr_row + r[None, :]
        fits = rows[:, None] & (r < R)[None, :]
        rope_queries = tl.load(qr_at, mask=fits, other=0.0)
    seen = T + tl.zeros((BLOCK_M,), dtype=tl.int32)
    fewest, most = T, T
    if HAS_LENGTHS or CAUSAL:
        past = tl.load(lengths + b).to(tl.int32) if HAS_LENGTHS else T - S
        seen = past + m + 1
        fewest = past + first + 1
        most = past + tl.minimum(first + BLOCK_M, S)
    unseen = tl.zeros((BLOCK_M,), dtype=tl.int32)
    least, late = 0, 0
    if WINDOW > 0:
        unseen = tl.maximum(unseen, seen - WINDOW)
        least = tl.maximum(least, fewest - WINDOW)
        late = tl.maximum(late, most - WINDOW)
    if CHUNK > 0:
        unseen = tl.maximum(unseen, (seen - 1) // CHUNK * CHUNK)
        least = tl.maximum(least, (fewest - 1) // CHUNK * CHUNK)
        late = tl.maximum(late, (most - 1) // CHUNK * CHUNK)
    seen = tl.minimum(seen, T)
    whole = tl.minimum(fewest, T)
    stop = tl.minimum(most, T)
    begin = least // BLOCK_T * BLOCK_T
    last = (stop - 1) // BLOCK_T * BLOCK_T
    k_at = k + b * k_batch + g * k_head
    kr_at = k_rope + b * kr_batch + g * kr_head if R > 0 else k_at
    v_at = v + b * v_batch + g * v_head
    FOLDED: tl.constexpr = SOFTCAP == 0 and scale > 0
    factor: tl.constexpr = 1.4426950408889634 * (scale if FOLDED else 1.0)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_SINKS:
        top = tl.zeros((BLOCK_M,), dtype=tl.float32)
        top += tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    if BLOCK_F > 0:
        rest = tl.zeros((BLOCK_M, BLOCK_F), dtype=tl.float32)
    if AHEAD:
        start = begin
        key_rows = tl.cast(start, tl.int64)
        rope_rows = key_rows
        #: pages
        scores = _scores(
            queries, rope_queries, k_at, kr_at, key_rows, rope_rows, k_row, kr_row, stop - start,
            D, R, BLOCK_T,
        )  # fmt: skip
        value_rows = key_rows
    for at in range(begin, stop, BLOCK_T):
        start = at
        if AHEAD:
            start = tl.minimum(at + BLOCK_T, last)
        key_rows = tl.cast(start, tl.int64)
        rope_rows = key_rows
        #: pages
        next_scores = _scores(
            queries, rope_queries, k_at, kr_at, key_rows, rope_rows, k_row, kr_row, stop - start,
            D, R, BLOCK_T,
        )  # fmt: skip
        if not AHEAD:
            scores, value_rows = next_scores, key_rows
        if not FOLDED:
            scores = scores * scale
        if SOFTCAP > 0:
            scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 / SOFTCAP * scores) - 1.0)
        t = at + i
        if (at < late) | (at + BLOCK_T > whole):
            visible = t[None, :] < seen[:, None]
            if WINDOW > 0 or CHUNK > 0:
                visible &= t[None, :] >= unseen[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1) * factor)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp2(scores * factor - safe[:, None])
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(p, axis=1)
        values_at = v_at + value_rows * v_row + i[:, None] * v_row
        held = i < tl.where(value_rows < 0, 0, stop - at)
        here = held[:, None] & (e < E)[None, :]
        values = tl.load(values_at + e[None, :], mask=here, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
        if BLOCK_F > 0:
            here = held[:, None] & (f < E)[None, :]
            values = tl.load(values_at + f[None, :], mask=here, other=0.0)
            rest = tl.dot(p.to(values.dtype), values, rest * decay[:, None], input_precision="ieee")
        top = peak
        if AHEAD:
            scores, value_rows = next_scores, key_rows
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    #: tile
    o_at = out + ((b * S + m[:, None]) * heads + h) * E
    tl.store(o_at + e[None, :], acc, mask=rows[:, None] & (e[None, :] < E))
    if BLOCK_F > 0:
        tl.store(o_at + f[None, :], rest / total[:, None], mask=rows[:, None] & (f[None, :] < E))
