"""The einsums of absorbed MLA in bf16: a product a head, weights [h, n, k] or [h, k, n].

bshd,hdc->bshc sums over rows of the weight (mix form), bshc,hvc->bshv over its columns (dot form).
Bound: with few rows the weights' bytes over bandwidth, with many 2 rows heads k n flops over the
peak of pair products. A task is a head and a block of columns.
"""

from __future__ import annotations

from dsc.backends.tvm.bf16 import LANES, SUMS, Pairs, instructions, narrow, put_bits, unzipped
from dsc.backends.tvm.kernels.bf16_product import (
    BLOCK,
    Weights,
    dot_block,
    mix_sums,
    row_tiles,
    tile_height,
)
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    for_each,
    integer,
    lanes_for,
    loop,
    tirx,
)
from dsc.ir.dims import product
from dsc.ir.types import DType, TensorType

AHEAD = 16
"""Rows of a weight that are asked for before they are mixed."""
VECTORS = {1: 8, 2: 4, 3: 4}
"""Vectors of 32 columns of a mix tile by its number of rows; 2 where nothing is said."""


def launch(
    terms: tuple[str, ...], result: str, types: list[TensorType], machine: Machine
) -> Launch | None:
    """The launch of an einsum that is a product a head, or `None`."""
    if not machine.bf16 or len(terms) != 2 or any(t.dtype is not DType.bf16 for t in types):
        return None
    x, w = terms
    if len(x) < 3 or len(w) != 3 or x[-2] != w[0] or x[-1] not in w[1:]:
        return None
    mixes = w[1] == x[-1]
    column = w[2] if mixes else w[1]
    shape = types[1].shape
    if result != x[:-1] + column or column in x or not all(isinstance(d, int) for d in shape):
        return None
    heads, k, n = (int(str(shape[w.index(c)])) for c in (w[0], x[-1], column))
    if k % LANES or n % LANES:
        return None
    rows = product(types[0].shape[:-2])
    flops = rows * (2 * heads * k * n)
    return Launch(bf16_heads, (heads, k, n, mixes), (rows,), flops=flops)


def bf16_heads(heads: int, k: int, n: int, mixes: bool) -> PrimFunc:
    """Arguments: x [rows, h, k], w [h, k, n] if `mixes`, else [h, n, k], y [rows, h, n]; rows."""
    together = n if mixes else lanes_for(n, BLOCK)

    def body(x: Expr, weight: Expr, y: Expr, rows: Expr) -> None:
        source, pairs = Tensor(x, DType.bf16, (rows, heads, k)), Pairs.at(x, rows * (heads * k))
        w = Tensor(weight, DType.bf16, (heads, k, n))
        target = Tensor(y, DType.bf16, (rows, heads, n))

        def task(i: Expr) -> None:
            head = bind(tirx.truncmod(i, heads))
            column = bind(tirx.truncdiv(i, heads) * together)

            def dot(row: Expr, height: int) -> None:
                x_rows = [bind(source.offset(row + a, head)) for a in range(height)]
                at = bind((head * n + column) * k)
                made = dot_block(source, x_rows, Weights(w, at, integer(k), together, k))
                for a in range(height):
                    for j in range(0, together, SUMS):
                        value = narrow(made.load(integer(a * BLOCK + j), SUMS))
                        put_bits(target, target.offset(row + a, head, column + j), value)

            def mix(row: Expr, height: int) -> None:
                x_rows = [bind(source.offset(row + a, head)) for a in range(height)]
                vectors = lanes_for(n // LANES, VECTORS.get(height, 2))
                with loop(n // LANES // vectors) as part:
                    at = bind(head * (k * n) + part * (vectors * LANES))
                    sums = mix_sums(pairs, x_rows, w, lambda t: at + t * n, k, vectors, ahead=AHEAD)
                    for a, line in enumerate(sums):
                        for c in range(vectors):
                            start = part * (vectors * LANES) + c * LANES
                            halves = unzipped(line[2 * c][0], line[2 * c + 1][0])
                            for half, value in enumerate(halves):
                                place = target.offset(row + a, head, start + half * SUMS)
                                put_bits(target, place, narrow(value))

            row_tiles(rows, tile_height(), mix if mixes else dot)

        with instructions():
            for_each(heads * (n // together), rows * (k * together // 4), task)

    return build(body)
