"""Kernels that work row by row: norms, softmax, reductions, rope, gathers and cache writes.

A row is the innermost, contiguous dim; all outer dims are folded into one row index and one stride.
Programs take BLOCK_ROWS rows each: few on a GPU, many in the interpreter, where a program is dear.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x,
    weight,
    y,
    rows,
    x_row,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Write (x * rsqrt(mean(x^2) + eps)).to(T) * weight over rows of D; statistics in fp32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    keep = (row[:, None] < rows) & (d[None, :] < D)
    at = x + row[:, None].to(tl.int64) * x_row + d[None, :]
    v = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    normed = (v * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + row[:, None].to(tl.int64) * D + d[None, :], normed * gain[None, :], mask=keep)


@triton.jit
def softmax(
    x,
    y,
    rows,
    D,
    x_row,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Softmax over rows of any length D in two passes: running maximum and sum, then the values."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = x + row[:, None].to(tl.int64) * x_row
    top = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(top, tl.max(v, axis=1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(v - safe[:, None]), axis=1)
        top = peak
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=0.0).to(tl.float32)
        p = tl.exp(v - top[:, None]) / total[:, None]
        tl.store(y + row[:, None].to(tl.int64) * D + d[None, :], p, mask=keep)


@triton.jit
def reduce_rows(
    x,
    y,
    rows,
    D,
    x_row,
    KIND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """KIND "sum" | "mean" | "amax" | "amin" over rows of length D, in fp32 (int64 for integers)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = x + row[:, None].to(tl.int64) * x_row
    WIDE: tl.constexpr = tl.float32 if x.dtype.element_ty.is_floating() else tl.int64
    if KIND == "amax":
        acc = tl.load(at, mask=row[:, None] < rows, other=0).to(WIDE)
    elif KIND == "amin":
        acc = tl.load(at, mask=row[:, None] < rows, other=0).to(WIDE)
    else:
        acc = tl.zeros((BLOCK_ROWS, 1), dtype=WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=0).to(WIDE)
        if KIND == "amax":
            acc = tl.maximum(acc, tl.max(tl.where(keep, v, acc), axis=1)[:, None])
        elif KIND == "amin":
            acc = tl.minimum(acc, tl.min(tl.where(keep, v, acc), axis=1)[:, None])
        else:
            acc += tl.sum(v, axis=1)[:, None]
    if KIND == "mean":
        acc = acc / D
    tl.store(y + row[:, None], acc, mask=row[:, None] < rows)


@triton.jit
def rope(
    x,
    positions,
    inv_freq,
    y,
    rows,
    heads,
    x_row,
    scale,
    R: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Rotate pairs of x by positions * inv_freq; a row is one (batch, token, head) of R numbers.

    LAYOUT "interleaved": pairs (2i, 2i+1) in and out. "deinterleave": pairs (2i, 2i+1) in, halves
    out. "half": pairs (i, i + R/2) in and out. cos and sin are multiplied by `scale` (YaRN).
    """
    HALF: tl.constexpr = R // 2
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.arange(0, BLOCK_HALF)
    keep = (row[:, None] < rows) & (i[None, :] < HALF)
    token = row // heads
    position = tl.load(positions + token, mask=row < rows, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(inv_freq + i, mask=i < HALF, other=0.0)[None, :]
    cos = tl.cos(angle) * scale
    sin = tl.sin(angle) * scale
    first = i
    second = i + HALF
    if LAYOUT != "half":
        first = 2 * i
        second = 2 * i + 1
    at = x + row[:, None].to(tl.int64) * x_row
    a = tl.load(at + first[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(at + second[None, :], mask=keep, other=0.0).to(tl.float32)
    if LAYOUT == "deinterleave":
        first = i
        second = i + HALF
    to = y + row[:, None].to(tl.int64) * R
    tl.store(to + first[None, :], a * cos - b * sin, mask=keep)
    tl.store(to + second[None, :], b * cos + a * sin, mask=keep)


@triton.jit
def take_rows(
    table,
    index,
    y,
    rows,
    D,
    table_row,
    per_batch,
    batch_rows,
    LIMIT,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """y[p] = table[base(p) + index[p]]; grid (row tiles, column tiles).

    base(p) = (p // per_batch) * batch_rows: embedding and take have one table (batch_rows = 0),
    select_rows has one a batch. A launch refuses no index: one outside of LIMIT rows gives zeros,
    and whoever runs the entry looks at those that it computed (`dsc.runtime.admission`).
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)
    inside = (at >= 0) & (at < LIMIT)
    at += (row // per_batch).to(tl.int64) * batch_rows
    keep = (row[:, None] < rows) & (d[None, :] < D)
    v = tl.load(table + at[:, None] * table_row + d[None, :], keep & inside[:, None], other=0)
    tl.store(y + row[:, None].to(tl.int64) * D + d[None, :], v, mask=keep)


@triton.jit
def cache_write(
    new,
    lengths,
    cache,
    rows,
    S,
    capacity,
    D,
    new_row,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """cache[b, lengths[b] + s] = new[b, s]; a row is one (b, s); none passes the capacity."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = (row // S).to(tl.int64)
    slot = tl.load(lengths + b, mask=row < rows, other=0).to(tl.int64) + row % S
    keep = ((row < rows) & (slot < capacity))[:, None] & (d[None, :] < D)
    v = tl.load(new + row[:, None].to(tl.int64) * new_row + d[None, :], mask=keep, other=0)
    tl.store(cache + (b * capacity + slot)[:, None] * D + d[None, :], v, mask=keep)


@triton.jit
def append(
    past,
    new,
    lengths,
    y,
    rows,
    P,
    S,
    D,
    new_row,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """y[b, j] = new[b, j - lengths[b]] if that is one of S rows, else past[b, j] (0 from P on)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = P + S
    b = (row // total).to(tl.int64)
    j = row % total
    s = j - tl.load(lengths + b, mask=row < rows, other=0).to(tl.int32)
    live = (row < rows)[:, None] & (d[None, :] < D)
    fresh = (s >= 0) & (s < S)
    old = live & ((j < P) & ((s < 0) | (s >= S)))[:, None]
    fresh_at = new + (b * S + s)[:, None] * new_row + d[None, :]
    p = tl.load(past + (b * P + j)[:, None] * D + d[None, :], mask=old, other=0)
    n = tl.load(fresh_at, mask=live & fresh[:, None], other=0)
    at = y + row[:, None].to(tl.int64) * D + d[None, :]
    tl.store(at, tl.where(fresh[:, None], n, p), mask=live)


@triton.jit
def cumsum(
    x,
    y,
    rows,
    D,
    x_row,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Running sum along rows of any length D, carried from step to step."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = x + row[:, None].to(tl.int64) * x_row
    WIDE: tl.constexpr = tl.float32 if x.dtype.element_ty.is_floating() else tl.int64
    carry = tl.zeros((BLOCK_ROWS, 1), dtype=WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=0).to(WIDE)
        tl.store(y + row[:, None].to(tl.int64) * D + d[None, :], tl.cumsum(v, axis=1) + carry, keep)
        carry += tl.sum(v, axis=1)[:, None]


@triton.jit
def argmax_rows(
    x,
    y,
    rows,
    D,
    x_row,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Index of the first largest element of rows of any length D."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = x + row[:, None].to(tl.int64) * x_row
    best = tl.load(at, mask=row[:, None] < rows, other=0).to(tl.float32)
    index = tl.zeros((BLOCK_ROWS, 1), dtype=tl.int64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=float("-inf")).to(tl.float32)
        top = tl.max(v, axis=1)[:, None]
        found = start + tl.argmax(v, axis=1)[:, None].to(tl.int64)
        index = tl.where(top > best, found, index)
        best = tl.maximum(best, top)
    tl.store(y + row[:, None], index, mask=row[:, None] < rows)


@triton.jit
def topk_rows(
    x,
    values,
    index,
    rows,
    x_row,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The K largest of rows of D, largest first, by repeated argmax."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    live = (row < rows)[:, None]
    v = tl.load(x + row[:, None].to(tl.int64) * x_row + d, mask=live & (d < D), other=0.0)
    v = tl.where(d < D, v.to(tl.float32), float("-inf"))
    ids = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.int32)
    picked = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    for slot in range(K):
        at = tl.argmax(v, axis=1)[:, None]
        ids = tl.where(k == slot, at, ids)
        picked = tl.where(k == slot, tl.max(v, axis=1)[:, None], picked)
        v = tl.where(d == at, float("-inf"), v)
    keep = live & (k < K)
    tl.store(index + row[:, None] * K + k, ids.to(tl.int64), mask=keep)
    tl.store(values + row[:, None] * K + k, picked, mask=keep)


@triton.jit
def lookup(
    x,
    index,
    y,
    n,
    extent,
    wanted,
    inner,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[o, j, i] = x[o, index, i], x dense [outer, extent, inner], y dense [outer, wanted, inner].

    SHARED: the index is i64[wanted], one for all (take); else i64[outer, wanted, inner] (gather).
    Indices as in `take_rows`.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    i = at % inner
    j = at // inner
    entry = at
    if SHARED:
        entry = j % wanted
    chosen = tl.load(index + entry, mask=keep, other=0)
    inside = keep & (chosen >= 0) & (chosen < extent)
    v = tl.load(x + ((j // wanted) * extent + chosen) * inner + i, mask=inside, other=0)
    tl.store(y + at, v, mask=keep)
