"""Rows of caches in codes as numbers, once for all who read them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def widen_rows(
    latent,
    lengths,
    out,
    T,
    new_rows,
    l_batch,
    l_row,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[b, t] = the numbers of row t, for t < lengths[b] + new_rows; grid (row tiles, B).

    The place `values` says what numbers are.
    """
    b = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(tl.load(lengths + b) + new_rows, T)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    if tl.program_id(0) * BLOCK_T >= stop:
        return
    fresh = t[:, None] < stop
    rows = t[:, None].to(tl.int64)
    l_at = latent + b * l_batch + rows * l_row + c[None, :]
    values = tl.load(l_at, mask=fresh & (c[None, :] < C), other=0)  #: values
    tl.store(out + (b * T + rows) * C + c[None, :], values, mask=fresh & (c[None, :] < C))
