"""KV caches: functional ones, a grown copy a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc.backends.onnxruntime.graph import GraphWriter, Shape
from dsc.ir.graph import Node
from dsc.ir.types import DType

TENSOR_SCATTER = 24
"""The first opset that has it."""


def _append(g: GraphWriter, node: Node, past: str, new: str, lengths: str) -> str:
    """past [b, p, d] and s rows of zeros, with new [b, s, d] written at lengths [b].

    From opset 24 on by TensorScatter, which may work on its operand's memory; before by ScatterND.
    """
    given = node.operands[1].type
    dtype = DType.f32 if past in g.pool.wide else given.dtype
    new = g.cast(new, given.dtype, dtype)
    grown = g.op("Concat", past, g.zeros(given.shape, dtype), axis=1)
    if g.pool.opset >= TENSOR_SCATTER:
        result = g.op("TensorScatter", grown, new, lengths, axis=1)
    else:
        result = g.op("ScatterND", grown, _places(g, given.shape, lengths), new)
    if dtype is not given.dtype:
        g.pool.wide.add(result)
    return result


def _places(g: GraphWriter, shape: Shape, lengths: str) -> str:
    """For each new row of each sequence the sequence and where the row goes: int64 [b, s, 2]."""
    sequences, rows = shape[:2]
    at = g.op("Add", g.op("Unsqueeze", lengths, g.i64(1)), g.arange(rows))
    own = g.op("Expand", g.op("Unsqueeze", g.arange(sequences), g.i64(1)), g.shape(shape[:2]))
    pair = (g.op("Unsqueeze", x, g.i64(2)) for x in (own, at))
    return g.op("Concat", *pair, axis=2)


EMITTERS: dict[str, Callable[..., Any]] = {"append": _append}
