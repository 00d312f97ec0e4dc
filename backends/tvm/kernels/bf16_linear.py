"""linear in bf16: one kernel for all shapes whose k is a multiple of 32.

Bound: bytes of w / bandwidth for few rows, 2 rows m k / peak of pair products for many. Threads
share out blocks of columns: narrow ones for few rows, so that small matrices occupy all threads;
wide ones for many, so that x is read seldom (see `grain`). Within a block the weights stay in the
second-level cache while tiles of rows pass by.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx

from dsc.backends.tvm.bf16 import LANES, columns_of_tasks, instructions
from dsc.backends.tvm.kernels.bf16_panels import Rows, multiply, pack, panel_bytes
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights, store_row
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    Local,
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


def launch(rows: Dim, m: int, k: int, has_bias: bool, machine: Machine) -> Launch:
    """The launch of y[rows, m] = x[rows, k] weight[m, k]^T (+ bias)."""
    scratch = panel_bytes(rows, k) if machine.tiles else 0
    static = (has_bias, machine.tiles)
    return Launch(bf16_linear, static, (rows, m, k), scratch=scratch, flops=rows * (2 * m * k))


def bf16_linear(has_bias: bool, tiles: bool) -> PrimFunc:
    """Arguments: x [rows, k], weight [m, k], bias [m] if there is one, y; rows, m, k.

    With `tiles` scratch memory for the panels of x stands before the sizes.
    """
    names = ["x", "weight", *["bias"] * has_bias, "y", *["scratch"] * tiles, "rows", "m", "k"]

    def body(*arguments: Expr) -> None:
        given = dict(zip(names, arguments, strict=True))
        _linear(given, None)

    return build(body, names)


def bf16_linear_cut() -> PrimFunc:
    """Arguments: x, weight, y, scratch; rows, m, k, the columns of a task: what `tuning` times."""
    names = ["x", "weight", "y", "scratch", "rows", "m", "k", "columns"]

    def body(*arguments: Expr) -> None:
        given = dict(zip(names, arguments, strict=True))
        _linear(given, given["columns"])

    return build(body, names)


def _linear(given: Mapping[str, Expr], columns: Expr | None) -> None:
    """The kernel's body; with given columns a task, always on all threads."""
    rows, m, k = given["rows"], given["m"], given["k"]
    x, w = Tensor(given["x"], DType.bf16, (rows, k)), Tensor(given["weight"], DType.bf16, (m, k))
    y = Tensor(given["y"], DType.bf16, (rows, m))
    bias = Tensor(given["bias"], DType.bf16, (m,)) if "bias" in given else None
    panels = given.get("scratch", integer(0))
    source = Rows(x, given["x"], lambda i: i * k, integer(0), rows, k, panels)
    width = grain(rows) if columns is None else columns

    def task(g: Expr) -> None:
        first = bind(g * width)
        block = Weights(w, first * k, k, bind(tirx.min(width, m - first)), k)

        def finish(tile: Local, r: Expr, row: Expr) -> None:
            def value(j: Expr, lanes: int) -> Expr:
                got = tile.load(j + r * BLOCK, lanes)
                return got if bias is None else got + bias.at(first + j, lanes)

            store_row(y, bind(row * m + first), block.columns, value)

        multiply(source, integer(1), lambda n: block, finish)

    with instructions():
        pack(source)
        tasks = bind(tirx.truncdiv(m + width - 1, width))
        work = tirx.truncdiv(rows * k * width, integer(4))
        for_each(tasks, work if columns is None else PARALLEL_WORK, task)
