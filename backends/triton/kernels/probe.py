"""How fast a card multiplies: the same tiles over and over, with nothing to wait for."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def multiply(
    a,
    out,
    turns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[program] = an element of `turns` products of a and its first rows; grid (programs,).

    a is [BLOCK_M, BLOCK_K] of ones, so that the element is turns * BLOCK_K, which tells that all of
    them were made.
    """
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x = tl.load(a + m[:, None] * BLOCK_K + k[None, :])
    w = tl.load(a + n[None, :] * BLOCK_K + k[:, None])
    if a.dtype.element_ty == tl.int8:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for _ in range(turns):
            acc = tl.dot(x, w, acc)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(turns):
            acc = tl.dot(x, w, acc)
    tl.store(out + tl.program_id(0), tl.max(tl.max(acc, axis=1), axis=0).to(tl.float32))
