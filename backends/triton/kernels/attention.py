"""Attention over materialised keys and values: one flash kernel for prefill and for GQA.

The scores are a sum of two products, q_nope . k_nope + q_rope . k_rope, because the expanded form
of multi-head latent attention has one rope key for all heads: it is read as it lies in the cache,
never copied into every head. Plain attention passes R = 0. The place `pages` may say where rows of
keys and values, or of rope keys, lie (`dsc.backends.triton.lower.cached`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


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
    scale,
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
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[b, s, h] = softmax(scale * scores) @ v; grid (query tiles, batch * heads).

    Query i of row b sees keys j <= lengths[b] + i (HAS_LENGTHS), j <= i + T - S (CAUSAL), or all.
    Of these it sees the last WINDOW, and those of its CHUNK, where they are not 0. Scores are
    capped to SOFTCAP; a sink is a logit of each head that is seen first and adds nothing.
    GROUP query heads share one key head. out is dense [B, S, heads, E]. Softmax is online, in fp32.
    """
    z = tl.program_id(1)
    b = (z // heads).to(tl.int64)
    h = z % heads
    g = h // GROUP
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    live = m[:, None] < S
    q_at = q + b * q_batch + m[:, None].to(tl.int64) * q_row + h * q_head
    queries = tl.load(q_at + d[None, :], mask=live & (d[None, :] < D), other=0.0)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        qr_at = q_rope + b * qr_batch + m[:, None].to(tl.int64) * qr_row + h * qr_head
        rope_queries = tl.load(qr_at + r[None, :], mask=live & (r[None, :] < R), other=0.0)
    seen = T + tl.zeros((BLOCK_M,), dtype=tl.int32)
    if HAS_LENGTHS:
        seen = tl.load(lengths + b).to(tl.int32) + m + 1
    elif CAUSAL:
        seen = m + 1 + T - S
    stop = tl.minimum(tl.max(tl.where(m < S, seen, 0), axis=0), T)
    first = tl.zeros((BLOCK_M,), dtype=tl.int32)
    if WINDOW > 0:
        first = tl.maximum(first, seen - WINDOW)
    if CHUNK > 0:
        first = tl.maximum(first, (seen - 1) // CHUNK * CHUNK)
    begin = tl.min(tl.where(m < S, first, T), axis=0) // BLOCK_T * BLOCK_T
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_SINKS:
        top = tl.zeros((BLOCK_M,), dtype=tl.float32) + tl.load(sinks + h).to(tl.float32)
        total += 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for start in range(begin, stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        key_rows = t.to(tl.int64)
        rope_rows = key_rows
        keys_held = t < stop
        ropes_held = keys_held
        #: pages
        k_at = k + b * k_batch + key_rows[None, :] * k_row + g * k_head
        keys = tl.load(k_at + d[:, None], mask=keys_held[None, :] & (d[:, None] < D), other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee")
        if R > 0:
            kr_at = k_rope + b * kr_batch + rope_rows[None, :] * kr_row
            fresh = ropes_held[None, :] & (r[:, None] < R)
            ropes = tl.load(kr_at + r[:, None], mask=fresh, other=0.0)
            scores = tl.dot(rope_queries, ropes, scores, input_precision="ieee")
        scores = scores * scale
        if SOFTCAP > 0:
            scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 / SOFTCAP * scores) - 1.0)
        visible = (t[None, :] < seen[:, None]) & (t[None, :] >= first[:, None])
        scores = tl.where(visible & (t[None, :] < T), scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        p = tl.exp(scores - safe[:, None])
        decay = tl.exp(top - safe)
        total = total * decay + tl.sum(p, axis=1)
        v_at = v + b * v_batch + key_rows[:, None] * v_row + g * v_head
        values = tl.load(v_at + e[None, :], mask=keys_held[:, None] & (e[None, :] < E), other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
        top = peak
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    rows = m < S
    #: tile
    o_at = out + ((b * S + m[:, None]) * heads + h) * E + e[None, :]
    tl.store(o_at, acc, mask=rows[:, None] & (e[None, :] < E))
