"""Matrix products: one strided, batched GEMM and one grouped GEMM over expert segments.

`gemm` serves linear, matmul and every two-operand einsum that folds to (batch, m, n, k): the caller
passes one stride per role and operand, so no operand is ever transposed or copied for it.

A comment `#: place` marks what a slot may say instead (`dsc.backends.triton.slots`). Names are the
same in both kernels: row m of `x` is live[m], column n of the product, which is row n of the
weight, fits[n], `w_at` is where the weight's columns begin, and `matrix` which of its matrices.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def gemm(
    a,
    b,
    bias,
    limit,
    c,
    M,
    N,
    K,
    a_batch,
    a_m,
    a_k,
    b_batch,
    b_n,
    b_k,
    c_batch,
    c_m,
    c_n,
    new_rows,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """c[z, m, n] = sum_k a[z, m, k] * b[z, n, k] (+ bias[n]); grid (m tiles * n tiles, batch z).

    Tiles are visited in groups of GROUP_M row tiles, so that a group shares its columns of `b` in
    cache; 0 visits them row tiles first. WIDEN multiplies in fp32 whatever the operands are (the
    router's scores). HAS_LIMIT ends at row `limit[z] + new_rows`: those behind it, of a latent
    cache that has no token there yet, are neither read nor written.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    if GROUP_M == 0:
        tile_m = tile % tiles_m
        tile_n = tile // tiles_m
    else:
        across = GROUP_M * tl.cdiv(N, BLOCK_N)
        first = tile // across * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        tile_m = first + (tile % across) % height
        tile_n = (tile % across) // height
    rows = M
    if HAS_LIMIT:
        rows = tl.minimum(tl.load(limit + matrix) + new_rows, M)
        if tile_m * BLOCK_M >= rows:
            return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = m < rows
    fits = n < N
    #: columns
    x_at = a + matrix * a_batch + m[:, None].to(tl.int64) * a_m  #: at
    w_at = b + matrix * b_batch + n[None, :].to(tl.int64) * b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    #: start
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_at + k[None, :] * a_k, mask=live[:, None] & (k[None, :] < K), other=0.0)  #: x
        #: rows
        w = tl.load(w_at + k[:, None] * b_k, mask=fits[None, :] & (k[:, None] < K), other=0.0)  #: w
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")  #: sum
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=fits, other=0.0).to(tl.float32)[None, :]
    #: tile
    out = c + matrix * c_batch + m[:, None].to(tl.int64) * c_m + n[None, :] * c_n
    tl.store(out, acc, mask=live[:, None] & fits[None, :])


@triton.jit
def grouped_gemm(
    a,
    order,
    b,
    offsets,
    c,
    N,
    K,
    a_m,
    c_m,
    c_n,
    slots,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c[r] = a[r] @ b[g].T for rows offsets[g] <= r < offsets[g+1]; grid (row tiles, n tiles).

    No host knows how many tiles an expert has, so the grid is an upper bound and a program finds
    its own: tile counts per expert, their prefix sum, and the expert whose span holds this tile.
    Programs past the last tile leave. With GATHER row r of the product reads a[order[r] // slots]:
    the permuted copy of the tokens is never made. b is [EXPERTS, N, K], dense.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS_PADDED)
    low = tl.load(offsets + e, mask=e < EXPERTS, other=0).to(tl.int32)
    high = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0).to(tl.int32)
    tiles = (high - low + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    if tile >= tl.sum(tiles, axis=0):
        return
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    mine = e == expert
    before = tl.sum(tl.where(mine, ends - tiles, 0), axis=0)
    begin = tl.sum(tl.where(mine, low, 0), axis=0)
    end = tl.sum(tl.where(mine, high, 0), axis=0)
    m = begin + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = tl.program_id(1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = m < end
    fits = n < N
    #: columns
    matrix = expert.to(tl.int64)
    row = m.to(tl.int64)
    if GATHER:
        row = tl.load(order + m, mask=live, other=0).to(tl.int64) // slots
    x_at = a + row[:, None] * a_m
    w_at = b + matrix * N * K + n[None, :].to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_at + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        w = tl.load(w_at + k[:, None], mask=fits[None, :] & (k[:, None] < K), other=0.0)  #: w
        acc = tl.dot(x, w, acc, input_precision="ieee")  #: sum
    #: tile
    out = c + m[:, None].to(tl.int64) * c_m + n[None, :] * c_n
    tl.store(out, acc, mask=live[:, None] & fits[None, :])
