"""Kernels that move whole rows: embedding, select_rows and append."""

from __future__ import annotations

from dsc.backends.tvm.launch import Launch, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    f32,
    for_each,
    lanes_for,
    loop,
    splat,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType


def _copy(source: Tensor, at: Expr, target: Tensor, to: Expr, width: Expr, lanes: int) -> None:
    """Copy `width` elements between flat positions, in vectors that divide a row."""
    step = lanes_for(width, lanes) if isinstance(width, int) else lanes
    with loop(width // step) as i:
        target.put(to + i * step, source.at(at + i * step, step))


def lower_embedding(node: Node, machine: Machine) -> Launch:
    """The launch of `embedding`."""
    ids, table = operand(node, 0).type, operand(node, 1).type
    width = static_dim(table.shape[1], "a table row")
    return Launch(embedding, (table.dtype, width, machine.lanes), (rows_of(ids, 0),))


def embedding(dtype: DType, width: int, lanes: int) -> PrimFunc:
    """Arguments: ids [rows], weight [v, width], y [rows, width]; rows."""

    def body(ids: Expr, weight: Expr, y: Expr, rows: Expr) -> None:
        index = Tensor(ids, DType.i64, (rows,))
        table, target = Tensor(weight, dtype, (1, width)), Tensor(y, dtype, (rows, width))
        for_each(
            rows,
            width,
            lambda r: _copy(table, bind(index.load(r) * width), target, r * width, width, lanes),
        )

    return build(body)


def lower_select_rows(node: Node, machine: Machine) -> Launch:
    """The launch of `select_rows`."""
    x, index = operand(node, 0).type, operand(node, 1).type
    width = static_dim(x.shape[2], "a row")
    sizes = (*index.shape, x.shape[1])
    return Launch(select_rows, (x.dtype, width, machine.lanes), sizes)


def select_rows(dtype: DType, width: int, lanes: int) -> PrimFunc:
    """Arguments: x [b, s, width], index [b, l], y [b, l, width]; b, l, s."""

    def body(x: Expr, index: Expr, y: Expr, b: Expr, wanted: Expr, s: Expr) -> None:
        source = Tensor(x, dtype, (b, s, width))
        chosen = Tensor(index, DType.i64, (b, wanted))
        target = Tensor(y, dtype, (b, wanted, width))
        with loop(b) as batch, loop(wanted) as i:
            row = bind(source.offset(batch, chosen.load(batch, i)))
            _copy(source, row, target, target.offset(batch, i), width, lanes)

    return build(body)


def lower_append(node: Node, machine: Machine) -> Launch:
    """The launch of `append`: copies the past, so it is for programs without in-place caches."""
    past, new = operand(node, 0).type, operand(node, 1).type
    width = static_dim(past.shape[2], "a cache row")
    sizes = (*new.shape[:2], past.shape[1])
    return Launch(append, (past.dtype, width, machine.lanes), sizes)


def append(dtype: DType, width: int, lanes: int) -> PrimFunc:
    """Arguments: past [b, p, width], new [b, s, width], lengths [b], y [b, p+s, width]; b, s, p."""

    def body(past: Expr, new: Expr, lengths: Expr, y: Expr, b: Expr, s: Expr, p: Expr) -> None:
        old, fresh = Tensor(past, dtype, (b, p, width)), Tensor(new, dtype, (b, s, width))
        target, used = Tensor(y, dtype, (b, p + s, width)), Tensor(lengths, DType.i64, (b,))
        step = lanes_for(width, lanes)

        with loop(b) as batch:
            _copy(old, old.offset(batch), target, target.offset(batch), p * width, step)
            with loop(s * (width // step)) as i:
                target.put(target.offset(batch, p) + i * step, splat(f32(0.0), step))
            with loop(s) as t:
                place = target.offset(batch, used.load(batch) + t)
                _copy(fresh, fresh.offset(batch, t), target, place, width, lanes)

    return build(body)
