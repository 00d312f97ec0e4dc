"""Blocked dot products: the inner loop of every projection.

out[i, j] = sum_k x[i, k] * w[j, k], both contiguous in k. A tile of rows x columns keeps one vector
accumulator for each of its dot products, so that a loaded vector of x serves all columns and one of
w all rows; the lanes are summed once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import Expr, Local, Tensor, bind, lanes_for, loop, tiles, total

Position = Callable[[Expr], Expr]
"""The flat position at which row i of a tensor starts."""


def dots(
    x: Tensor, x_rows: Sequence[Expr], w: Tensor, w_rows: Sequence[Expr], depth: int, lanes: int
) -> list[list[Expr]]:
    """The dot products of rows of x with rows of w, given by their start positions."""
    width = lanes_for(depth, lanes)
    sums = [[Local(1, width=width) for _ in w_rows] for _ in x_rows]
    for line in sums:
        for acc in line:
            acc[0] = acc.zero
    with loop(depth // width) as step:
        xs = [bind(x.at(row + step * width, width)) for row in x_rows]
        ws = [bind(w.at(row + step * width, width)) for row in w_rows]
        for line, a in zip(sums, xs, strict=True):
            for acc, b in zip(line, ws, strict=True):
                acc[0] = acc[0] + a * b
    return [[total(acc[0]) for acc in line] for line in sums]


def product_rows(
    x: Tensor,
    x_row: Position,
    rows: Expr,
    w: Tensor,
    w_row: Position,
    columns: int,
    depth: int,
    machine: Machine,
    store: Callable[[Expr, Expr, Expr], None],
) -> None:
    """`store(i, j, value)` for every row i and column j of x w^T."""

    def row_tile(i: Expr, height: int) -> None:
        x_rows = [bind(x_row(i + a)) for a in range(height)]

        def column_tile(j: Expr, width: int) -> None:
            w_rows = [bind(w_row(j + b)) for b in range(width)]
            values = dots(x, x_rows, w, w_rows, depth, machine.lanes)
            for a, line in enumerate(values):
                for b, value in enumerate(line):
                    store(i + a, j + b, value)

        tiles(columns, machine.columns, column_tile)

    tiles(rows, machine.rows, row_tile)
