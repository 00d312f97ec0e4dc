"""linear: y[i, j] = sum_k x[i, k] w[j, k] (+ bias[j]).

Schedule: threads share out groups of columns; within a group the rows of w stay in the cache while
row tiles of x pass by. One row (decode) reads w once and is bound by memory bandwidth.
"""

from __future__ import annotations

from dsc.backends.tvm.kernels import bf16_linear
from dsc.backends.tvm.kernels.dots import product_rows
from dsc.backends.tvm.launch import Launch, fp32_only, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import PARALLEL_WORK, Expr, PrimFunc, Tensor, build, for_each, integer
from dsc.ir.graph import Node
from dsc.ir.types import DType

GROUP = 16
"""Columns that a thread takes at a time."""


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `linear`: rows are all leading axes of x."""
    x, weight = operand(node, 0).type, operand(node, 1).type
    m, k = (static_dim(d, "a weight's axis") for d in weight.shape)
    rows = rows_of(x)
    fp32_only(node)
    has_bias = len(node.operands) > 2
    if bf16_linear.fits(machine, k, *(o.type for o in node.operands)):
        return bf16_linear.launch(rows, m, k, has_bias, machine)
    return Launch(linear, (x.dtype, m, k, has_bias, machine), (rows,), flops=rows * (2 * m * k))


def linear(dtype: DType, m: int, k: int, has_bias: bool, machine: Machine) -> PrimFunc:
    """Arguments: x [rows, k], weight [m, k], bias [m] when there is one, y [rows, m]; rows."""

    def emit(x_at: Expr, w_at: Expr, bias_at: Expr | None, y_at: Expr, rows: Expr) -> None:
        x, w = Tensor(x_at, dtype, (rows, k)), Tensor(w_at, dtype, (m, k))
        y = Tensor(y_at, dtype, (rows, m))
        bias = None if bias_at is None else Tensor(bias_at, dtype, (m,))

        def columns(first: Expr, count: int) -> None:
            def store(i: Expr, j: Expr, value: Expr) -> None:
                column = first + j
                y.store(value if bias is None else value + bias.load(column), i, column)

            product_rows(
                x, lambda i: i * k, rows, w, lambda j: (first + j) * k, count, k, machine, store
            )

        heavy = m * k >= PARALLEL_WORK
        if m >= GROUP:
            work = PARALLEL_WORK if heavy else rows * (GROUP * k)
            for_each(m // GROUP, work, lambda g: columns(g * GROUP, GROUP))
        if m % GROUP:
            columns(integer(m - m % GROUP), m % GROUP)

    def with_bias(x: Expr, weight: Expr, bias: Expr, y: Expr, rows: Expr) -> None:
        emit(x, weight, bias, y, rows)

    def plain(x: Expr, weight: Expr, y: Expr, rows: Expr) -> None:
        emit(x, weight, None, y, rows)

    return build(with_bias if has_bias else plain)
