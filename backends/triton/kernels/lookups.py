"""Kernels that work row by row: gathers, grown caches, scans.

A row is the innermost, contiguous dim; all outer dims are folded into one row index and one stride.
Programs take BLOCK_ROWS rows each: few on a GPU, many in the interpreter, where a program is dear.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


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
def take_coded(
    b,
    index,
    c,
    rows,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c[p] = row index[p] of a table of N rows in codes; grid (row tiles, column tiles).

    The place `w` makes numbers f32[BLOCK_N, BLOCK_K] of rows n. An index outside gives zeros.
    """
    matrix = 0
    start = tl.program_id(1) * BLOCK_K
    p = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = start + tl.arange(0, BLOCK_K)
    n = tl.load(index + p, mask=p < rows, other=-1).to(tl.int64)
    fits = (n >= 0) & (n < N)
    coded = tl.load(b + matrix + n[:, None] * K + k[None, :], mask=fits[:, None], other=0)  #: w
    keep = (p[:, None] < rows) & (k[None, :] < K)
    tl.store(c + p[:, None].to(tl.int64) * K + k[None, :], coded, mask=keep)


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
def _order(x):
    """Integers in the order of numbers: NaN is the largest, and a zero has no sign."""
    if x.dtype.is_floating():
        wide = x.to(tl.float32) + 0.0
        bits = wide.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return tl.where(wide != wide, 0x7FFFFFFF, bits)
    else:
        return x.to(tl.int64)


@triton.jit
def _lowest(x):
    """What is below all that `_order` gives of floats, and the least integer."""
    return -2147483648 if x.dtype.is_floating() else -9223372036854775808


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
    best = _order(tl.load(at, mask=row[:, None] < rows, other=0))
    index = tl.zeros((BLOCK_ROWS, 1), dtype=tl.int64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = (row[:, None] < rows) & (d[None, :] < D)
        v = tl.load(at + d[None, :], mask=keep, other=0)
        v = tl.where(keep, _order(v), _lowest(v))
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
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The K largest of rows of D, largest first, by repeated argmax."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    live = (row < rows)[:, None]
    v = tl.load(x + row[:, None].to(tl.int64) * x_row + d, mask=live & (d < D), other=0)
    lowest = _lowest(v)
    order = tl.where(d < D, _order(v), lowest)
    for slot in range(K):
        at = tl.argmax(order, axis=1)[:, None]
        order = tl.where(d == at, lowest, order)
        place = row[:, None].to(tl.int64) * K + slot
        found = tl.sum(tl.where(d == at, v, 0), axis=1)[:, None]
        tl.store(index + place, at.to(tl.int64), mask=live)
        tl.store(values + place, found, mask=live)


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


@triton.jit
def arange(y, n, START: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = START + i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, START + i, mask=i < n)
