"""KV caches: functional ones, a grown copy a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc.backends.onnxruntime.graph import GraphWriter
from dsc.ir.graph import Node


def _append(g: GraphWriter, node: Node, past: str, new: str, lengths: str) -> str:
    """past [b, p, d] and s rows of zeros, with new [b, s, d] written at lengths [b].

    TensorScatter may work on its operand's memory, so the concatenation is the only copy; where
    all sequences have length p this costs what a plain concatenation of past and new would.
    """
    new_type = node.operands[1].type
    grown = g.op("Concat", past, g.zeros(new_type.shape, new_type.dtype), axis=1)
    return g.op("TensorScatter", grown, new, lengths, axis=1)


EMITTERS: dict[str, Callable[..., Any]] = {"append": _append}
