"""Absorbed multi-head latent attention: every head reads one latent row a token.

After W_UK is folded into the query, all heads share keys (latent | rope) and values (latent): the
heads are the rows of one GEMM per token of the cache, and 576 numbers a token are read once for a
tile of heads. A decode step has few (sequence, head tile) pairs, so the cache is cut into spans
(flash-decoding), the fewer the more sequences there are. Whoever reads the result merges them by
their log-sum-exp (`dsc.backends.triton.prologue`), else `latent_combine` does. The place `values`
may say how rows become numbers (`dsc.backends.triton.coded_cache`), `pages` where they lie,
`queries` that those of rope are turned as they are read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def latent_attention(
    q,
    q_rope,
    latent,
    rope,
    lengths,
    partial,
    lse,
    out,
    S,
    T,
    scale,
    q_row,
    q_head,
    qr_row,
    qr_head,
    l_batch,
    l_row,
    r_batch,
    r_row,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[b, s, h, :C] over one span of the cache; grid (B * S, head tiles, spans).

    Query s of row b sees cache rows j <= lengths[b] + s. From APART spans on (0: never) the
    normalised result of a span goes to partial f32[spans, B*S, H, C], unless it is empty, and its
    log-sum-exp to lse f32[spans, B*S, H].
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(2)
    spans = tl.num_programs(2)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    live = h[:, None] < H
    q_at = q + row * q_row + h[:, None] * q_head + c[None, :]
    queries = tl.load(q_at, mask=live & (c[None, :] < C), other=0.0)
    qr_at = q_rope + row * qr_row + h[:, None] * qr_head + r[None, :]
    rope_queries = tl.load(qr_at, mask=live & (r[None, :] < R), other=0.0)  #: queries
    seen = tl.load(lengths + b).to(tl.int32) + (row - b * S).to(tl.int32) + 1
    seen = tl.minimum(seen, T)
    span = tl.cdiv(tl.cdiv(seen, spans), BLOCK_T) * BLOCK_T
    begin = split * span
    stop = tl.minimum(begin + span, seen)
    top = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32)
    for start in range(begin, stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        fresh = t[:, None] < stop
        rows = t[:, None].to(tl.int64)
        #: pages
        l_at = latent + b * l_batch + rows * l_row + c[None, :]
        values = tl.load(l_at, mask=fresh & (c[None, :] < C), other=0.0)  #: values
        r_at = rope + b * r_batch + rows * r_row + r[None, :]
        ropes = tl.load(r_at, mask=fresh & (r[None, :] < R), other=0.0)
        scores = tl.dot(queries, tl.trans(values), input_precision="ieee")
        scores = tl.dot(rope_queries, tl.trans(ropes), scores, input_precision="ieee")
        scores = tl.where(t[None, :] < stop, scores * scale, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - peak[:, None])
        decay = tl.exp(top - peak)
        total = total * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
        top = peak
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    keep = live & (c[None, :] < C)
    count = spans + tl.zeros_like(h)
    if APART != 1:
        whole = keep & (count < APART)[:, None] if APART > 1 else keep
        tl.store(out + (row * H + h[:, None]) * C + c[None, :], acc, mask=whole)
    if APART > 0:
        at = (split * tl.num_programs(0) + row) * H + h
        kept = keep & ((total > 0.0) & (count >= APART))[:, None]
        level = tl.where(total == 0.0, float("-inf"), top + tl.log(total))
        tl.store(partial + at[:, None] * C + c[None, :], acc, mask=kept)
        tl.store(lse + at, level, mask=(h < H) & (count >= APART))


@triton.jit
def latent_combine(
    partial,
    lse,
    out,
    spans,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Merge the results of up to SPANS spans by their log-sum-exp; grid (rows, tiles of C).

    A row is one (batch, query, head). All its spans are read at once; an empty one wrote nothing
    but its log-sum-exp. Span 0 always holds a visible token (a query sees at least itself), so the
    maximum is finite.
    """
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPANS)
    part = split.to(tl.int64) * tl.num_programs(0) + row
    level = tl.load(lse + part, mask=split < spans, other=float("-inf"))
    weight = tl.exp(level - tl.max(level, axis=0))
    keep = (weight > 0.0)[:, None] & (c[None, :] < C)
    parts = tl.load(partial + part[:, None] * C + c[None, :], mask=keep, other=0.0)
    acc = tl.sum(weight[:, None] * parts, axis=0) / tl.sum(weight, axis=0)
    tl.store(out + row.to(tl.int64) * C + c, acc, mask=c < C)
