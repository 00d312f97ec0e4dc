"""The experts in three steps: dispatch sorts rows, grouped_linear multiplies, combine adds.

A program in this form lets fusion work on each step; `experts` is the same in one kernel.
`grouped_linear` is a region of its own (`region_products`).
"""

from __future__ import annotations

from dsc.backends.tvm.kernels.sorting import sort_pairs
from dsc.backends.tvm.launch import Launch, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    for_each,
    lanes_for,
    loop,
    splat,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType


def lower_dispatch(node: Node, machine: Machine) -> Launch:
    """The launch of `dispatch`."""
    x, idx = operand(node, 0).type, operand(node, 1).type
    d, top_k = static_dim(x.shape[1], "a row"), static_dim(idx.shape[1], "top_k")
    static = (x.dtype, d, top_k, node.attrs["experts"], machine.lanes)
    return Launch(dispatch, static, (x.shape[0],))


def dispatch(dtype: DType, d: int, top_k: int, experts: int, lanes: int) -> PrimFunc:
    """Arguments: x [rows, d], idx [rows, k], sorted rows, offsets, order; rows."""
    step = lanes_for(d, lanes)

    def body(x: Expr, idx: Expr, y: Expr, offsets: Expr, order: Expr, rows: Expr) -> None:
        pairs = rows * top_k
        source, target = Tensor(x, dtype, (rows, d)), Tensor(y, dtype, (pairs, d))
        places = Tensor(order, DType.i64, (pairs,))
        starts = Tensor(offsets, DType.i64, (experts + 1,))
        sort_pairs(Tensor(idx, DType.i64, (pairs,)), pairs, experts, starts, places)

        def row(p: Expr) -> None:
            token = bind(places.load(p) // top_k)
            with loop(d // step) as i:
                target.store(source.load(token, i * step, lanes=step), p, i * step)

        for_each(pairs, d, row)

    return build(body)


def lower_combine(node: Node, machine: Machine) -> Launch:
    """The launch of `combine`; scratch holds the inverse of `order`."""
    y, w = operand(node, 0).type, operand(node, 2).type
    d, top_k = static_dim(y.shape[1], "a row"), static_dim(w.shape[1], "top_k")
    static = (y.dtype, d, top_k, machine.lanes)
    pairs = w.shape[0] * top_k
    return Launch(combine, static, (w.shape[0],), scratch=pairs * 8, flops=pairs * (2 * d))


def combine(dtype: DType, d: int, top_k: int, lanes: int) -> PrimFunc:
    """Arguments: y [rows*k, d], order [rows*k], w [rows, k], out [rows, d], scratch; rows."""
    step = lanes_for(d, lanes)

    def body(y: Expr, order: Expr, w: Expr, out: Expr, scratch: Expr, rows: Expr) -> None:
        pairs = rows * top_k
        source, target = Tensor(y, dtype, (pairs, d)), Tensor(out, dtype, (rows, d))
        places, weight = Tensor(order, DType.i64, (pairs,)), Tensor(w, DType.f32, (pairs,))
        sorted_row = Tensor(scratch, DType.i64, (pairs,))
        with loop(pairs) as p:
            sorted_row.store(p, places.load(p))

        def token(t: Expr) -> None:
            with loop(d // step) as i:
                acc = Local(1, width=step)
                acc[0] = acc.zero
                for k in range(top_k):
                    row = sorted_row.load(t * top_k + k)
                    vector = source.load(row, i * step, lanes=step)
                    acc[0] = acc[0] + vector * splat(weight.load(t * top_k + k), step)
                target.store(acc[0], t, i * step)

        for_each(rows, d * top_k, token)

    return build(body)
