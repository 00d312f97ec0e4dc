"""Operators that move or make elements. They take every element type as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import helper

from dsc.backends.onnxruntime.emit.pointwise import one
from dsc.backends.onnxruntime.graph import ONNX_TYPE, GraphWriter
from dsc.ir.graph import Node
from dsc.ir.types import DType


def _reshape(g: GraphWriter, node: Node, x: str) -> str:
    return g.reshape(x, node.operands[0].type.shape, node.attrs["shape"])


def _permute(g: GraphWriter, node: Node, x: str) -> str:
    rank = len(node.operands[0].type.shape)
    return g.transpose(x, *(d % rank for d in node.attrs["dims"]))


def _expand(g: GraphWriter, node: Node, x: str) -> str:
    return g.op("Expand", x, g.shape(node.attrs["shape"]))


def _slice(g: GraphWriter, node: Node, x: str) -> str:
    start, end = g.dim(node.attrs["start"]), g.dim(node.attrs["end"])
    step = node.attrs["step"]
    return g.op("Slice", x, start, end, g.i64(node.attrs["axis"]), g.i64(step))


def _stack(g: GraphWriter, node: Node, *xs: str) -> str:
    return g.op("Concat", *(g.op("Unsqueeze", x, g.i64(0)) for x in xs), axis=0)


def _split(g: GraphWriter, node: Node, x: str) -> tuple[str, ...]:
    sizes = node.attrs["sizes"]
    axis = node.attrs["axis"]
    return g.ops("Split", len(sizes), x, g.shape(sizes), axis=axis)


def _gather(g: GraphWriter, node: Node, x: str, index: str) -> str:
    """GatherElements wants x no larger than the index on the other axes; torch.gather does not."""
    axis = node.attrs["axis"] % len(node.operands[0].type.shape)
    for other, (have, want) in enumerate(
        zip(node.operands[0].type.shape, node.operands[1].type.shape, strict=True)
    ):
        if other != axis and have != want:
            x = g.op("Slice", x, g.i64(0), g.dim(want), g.i64(other))
    return g.op("GatherElements", x, index, axis=axis)


def _select_rows(g: GraphWriter, node: Node, x: str, index: str) -> str:
    """x [b, s, d] at index [b, l]: GatherND with one batch axis copies whole rows."""
    return g.op("GatherND", x, g.op("Unsqueeze", index, g.i64(2)), batch_dims=1)


def _full(g: GraphWriter, node: Node) -> str:
    dtype: DType = node.attrs["dtype"]
    value = node.attrs["value"]
    if not node.attrs["shape"]:
        return g.scalar(value, dtype)
    held = float(value) if dtype.is_float else int(value)
    tensor = helper.make_tensor("value", ONNX_TYPE[dtype], [1], [held])
    return g.op("ConstantOfShape", g.shape(node.attrs["shape"]), value=tensor)


def _arange(g: GraphWriter, node: Node) -> str:
    bounds = (g.number(node.attrs["start"]), g.number(node.attrs["end"]), g.number(1))
    return g.cast(g.op("Range", *bounds), DType.i64, node.attrs["dtype"])


def _scatter(g: GraphWriter, node: Node, x: str, index: str, values: str) -> str:
    if node.operands[2].type.shape != node.operands[1].type.shape:
        values = g.op("Expand", values, g.shape(node.operands[1].type.shape))
    return g.op("ScatterElements", x, index, values, axis=node.attrs["axis"])


def _slice_scatter(g: GraphWriter, node: Node, x: str, part: str) -> str:
    axis = node.attrs["axis"]
    head = g.op("Slice", x, g.i64(0), g.dim(node.attrs["start"]), g.i64(axis))
    end = g.dim(node.operands[0].type.shape[axis])
    tail = g.op("Slice", x, g.dim(node.attrs["end"]), end, g.i64(axis))
    return g.op("Concat", head, part, tail, axis=axis)


EMITTERS: dict[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "concat": one("Concat", "axis"),
    "stack": _stack,
    "split": _split,
    "gather": _gather,
    "take": one("Gather", "axis"),
    "select_rows": _select_rows,
    "full": _full,
    "arange": _arange,
    "scatter": _scatter,
    "slice_scatter": _slice_scatter,
}
