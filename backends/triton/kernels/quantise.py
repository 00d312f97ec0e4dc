"""Rows as codes, with a scale for some columns of each: what products of codes by codes take.

Products of many rows read rows that are codes already: each tile of columns would make them again.
Of few rows the products make them as they load (`dsc.backends.triton.coded_rows`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def quantise_rows(
    a,
    c,
    scales,
    M,
    K,
    a_m,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c[m, k] = a[m, k] / scales[m, k // BLOCK_K] as the nearest codes; grid (row tiles, groups).

    The place `codes` says what they are. A scale makes the largest magnitude of its columns the
    largest code; that of zeros is 1.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    k = group * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = (m < M)[:, None] & (k < K)[None, :]
    row = m.to(tl.int64)
    x = tl.load(a + row[:, None] * a_m + k[None, :], mask=keep, other=0.0)
    codes, row_scale = x, tl.max(x, axis=1)  #: codes
    tl.store(c + row[:, None] * K + k[None, :], codes, mask=keep)
    tl.store(scales + row * groups + group, row_scale, mask=m < M)
