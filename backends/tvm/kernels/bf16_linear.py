"""linear in bf16: one kernel for all shapes whose k is a multiple of 32.

Bound: bytes of w / bandwidth for few rows, 2 rows m k / peak of pair products for many. Threads
share out blocks of columns: narrow ones for few rows, so that small matrices occupy all threads;
wide ones for many, so that x is read seldom (see `grain`). Within a block the weights stay in the
second-level cache while tiles of six rows pass by.
"""

from __future__ import annotations

from tvm import tirx

from dsc.backends.tvm.bf16 import LANES, columns_of_tasks, instructions
from dsc.backends.tvm.kernels.bf16_product import (
    BLOCK,
    Weights,
    dot_block,
    row_tiles,
    store_row,
    tile_height,
)
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    for_each,
    integer,
    select,
)
from dsc.ir.dims import Dim
from dsc.ir.types import DType, TensorType

FEW = 16
"""Rows up to which a task takes few columns."""


def fits(machine: Machine, depth: int, *types: TensorType) -> bool:
    """Whether all operands are bf16, the machine multiplies it, and rows are whole vectors."""
    return machine.bf16 and depth % LANES == 0 and all(t.dtype is DType.bf16 for t in types)


def grain(rows: Expr, limit: int = BLOCK) -> Expr:
    """Columns that a task takes: by the number of rows, `limit` at most."""
    narrow, wide = (integer(min(n, limit)) for n in columns_of_tasks())
    return bind(select(rows <= integer(FEW), narrow, wide))


def launch(rows: Dim, m: int, k: int, has_bias: bool) -> Launch:
    """The launch of y[rows, m] = x[rows, k] weight[m, k]^T (+ bias)."""
    return Launch(bf16_linear, (has_bias,), (rows, m, k), flops=rows * (2 * m * k))


def bf16_linear(has_bias: bool) -> PrimFunc:
    """Arguments: x [rows, k], weight [m, k], bias [m] if there is one, y; rows, m, k."""

    def with_bias(x: Expr, weight: Expr, bias: Expr, y: Expr, rows: Expr, m: Expr, k: Expr) -> None:
        _linear(x, weight, bias, y, (rows, m, k))

    def plain(x: Expr, weight: Expr, y: Expr, rows: Expr, m: Expr, k: Expr) -> None:
        _linear(x, weight, None, y, (rows, m, k))

    return build(with_bias if has_bias else plain)


def bf16_linear_cut() -> PrimFunc:
    """Arguments: x, weight, y; rows, m, k, and the columns of a task: what `tuning` times."""

    def body(x: Expr, weight: Expr, y: Expr, rows: Expr, m: Expr, k: Expr, columns: Expr) -> None:
        _linear(x, weight, None, y, (rows, m, k), columns)

    return build(body)


def _linear(
    x_at: Expr, w_at: Expr, bias_at: Expr | None, y_at: Expr, extents: tuple[Expr, Expr, Expr],
    given: Expr | None = None,
) -> None:  # fmt: skip
    """The kernel's body; with `given` columns a task, always on all threads."""
    rows, m, k = extents
    x, w = Tensor(x_at, DType.bf16, (rows, k)), Tensor(w_at, DType.bf16, (m, k))
    y = Tensor(y_at, DType.bf16, (rows, m))
    bias = None if bias_at is None else Tensor(bias_at, DType.bf16, (m,))
    columns = grain(rows) if given is None else given

    def task(g: Expr) -> None:
        first = bind(g * columns)
        block = Weights(w, first * k, k, bind(tirx.min(columns, m - first)), k)

        def rows_of_x(i: Expr, height: int) -> None:
            tile = dot_block(x, [bind((i + r) * k) for r in range(height)], block)
            for r in range(height):

                def value(j: Expr, lanes: int, r: int = r) -> Expr:
                    got = tile.load(j + r * BLOCK, lanes)
                    return got if bias is None else got + bias.at(first + j, lanes)

                store_row(y, bind((i + r) * m + first), block.columns, value)

        row_tiles(rows, tile_height(), rows_of_x)

    with instructions():
        tasks = bind(tirx.truncdiv(m + columns - 1, columns))
        work = tirx.truncdiv(rows * k * columns, integer(4))
        for_each(tasks, work if given is None else PARALLEL_WORK, task)
