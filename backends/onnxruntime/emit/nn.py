"""Embedding, norm and rotary embedding: one ONNX operator each, after some arranging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.emit.coded import Matrix, is_coded, looked_up
from dsc.backends.onnxruntime.graph import GraphWriter, static
from dsc.ir.dims import product
from dsc.ir.graph import Node, Weight
from dsc.ir.types import DType


def _embedding(g: GraphWriter, node: Node, ids: str, table: str) -> str:
    """Rows of a table in numbers, or in codes."""
    given, stored = node.operands
    if is_coded(stored):
        assert isinstance(stored, Weight)
        return looked_up(g, ids, given.type.shape, Matrix(stored))
    return g.op("Gather", table, ids, axis=0)


def _rms_norm(g: GraphWriter, node: Node, x: str, weight: str) -> str:
    """The result has the type of the weight: x in fp32 where that is."""
    own, gain = (operand.type.dtype for operand in node.operands)
    eps = float(node.attrs["eps"])
    y = g.op("RMSNormalization", g.cast(x, own, gain), weight, axis=-1, epsilon=eps)
    return g.cast(y, gain, own)


def _layer_norm(g: GraphWriter, node: Node, x: str, weight: str, bias: str | None = None) -> str:
    """All in fp32, rounded once."""
    own, gain = (operand.type.dtype for operand in node.operands[:2])
    affine = [g.cast(each, gain, DType.f32) for each in (weight, bias) if each is not None]
    wide, eps = g.cast(x, own, DType.f32), float(node.attrs["eps"])
    y = g.op("LayerNormalization", wide, *affine, axis=-1, epsilon=eps)
    return g.cast(y, DType.f32, own)


def _rope(g: GraphWriter, node: Node, x: str, positions: str, inv_freq: str) -> str:
    """x [b, s, r] or [b, s, h, r] through RotaryEmbedding, which knows pairs and halves.

    `deinterleave` takes pairs and gives halves: columns are gathered as halves beforehand, and
    columns that do not turn are cut off before and put back behind.
    """
    shape = node.operands[0].type.shape
    lead, width = shape[:-1], shape[-1]
    heads = shape[2] if len(shape) == 4 else 1
    turned, rest = node.attrs["dims"] or width, ""
    if node.attrs["layout"] == "deinterleave":
        if turned != width:
            x, rest = g.ops("Split", 2, x, g.shape((turned, width - turned)), axis=-1)
            shape = (*lead, turned)
        halves = np.arange(static(turned)).reshape(-1, 2).T.reshape(-1)
        x = g.op("Gather", x, g.constant(halves), axis=-1)
    x = g.reshape(x, shape, (*shape[:2], product(shape[2:])))
    cos, sin = _angles(g, node, positions, inv_freq)
    how = {"interleaved": int(node.attrs["layout"] == "interleaved"), "num_heads": heads}
    if turned != shape[-1]:
        how["rotary_embedding_dim"] = turned
    y = g.op("RotaryEmbedding", x, cos, sin, **how)
    y = g.reshape(y, (*shape[:2], product(shape[2:])), shape)
    return g.op("Concat", y, rest, axis=-1) if rest else y


def _angles(g: GraphWriter, node: Node, positions: str, inv_freq: str) -> tuple[str, str]:
    """cos and sin [b, s, r/2] of position times frequency, times the attribute `scale`."""
    steps = g.cast(g.op("Unsqueeze", positions, g.i64(2)), DType.i64, DType.f32)
    angle = g.op("Mul", steps, inv_freq)
    cos, sin = g.op("Cos", angle), g.op("Sin", angle)
    scale = node.attrs["scale"]
    if scale == 1.0:
        return cos, sin
    return g.op("Mul", cos, g.scalar(scale)), g.op("Mul", sin, g.scalar(scale))


EMITTERS: dict[str, Callable[..., Any]] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
}
