"""Rows of caches as numbers and in order, once for all who read them."""

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

    The places `values` and `pages` say what numbers are, and where rows lie.
    """
    b = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(tl.load(lengths + b) + new_rows, T)
    start = tl.program_id(0) * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    if start >= stop:
        return
    fresh = t[:, None] < stop
    rows = t[:, None].to(tl.int64)
    made_at = out + (b * T + rows) * C + c[None, :]
    made = fresh & (c[None, :] < C)
    #: pages
    l_at = latent + b * l_batch + rows * l_row + c[None, :]
    values = tl.load(l_at, mask=fresh & (c[None, :] < C), other=0)  #: values
    tl.store(made_at, values, mask=made)
