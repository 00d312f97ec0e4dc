"""Attention in its three forms, as MatMul, Softmax, MatMul; and caches, a grown copy a step.

ONNX has an Attention operator, but over a long context ONNX Runtime's CPU kernel takes several
times as long as these plain operators. Scores and softmax are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.emit.core import contract
from dsc.backends.onnxruntime.graph import GraphWriter, Shape, static
from dsc.ir.analyses import few_tokens
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.types import DType, TensorType

TENSOR_SCATTER = 24
"""The first opset that has it."""


def _mask(g: GraphWriter, lengths: str, new: Dim, total: Dim, heads: int = 1) -> str:
    """f32[b, 1, s, t]: 0 where cache row j <= lengths[b] + i, else -inf. One for all layers.

    With `heads` 2 that is where their axis lies: f32[b, s, 1, t].
    """
    last = g.op("Add", g.op("Unsqueeze", lengths, g.i64(1)), g.arange(new))
    last = g.op("Unsqueeze", last, g.i64(heads, 3))
    seen = g.op("LessOrEqual", g.arange(total), last)
    return g.op("Where", seen, g.scalar(0.0), g.scalar(-np.inf))


def _sight(g: GraphWriter, start: str, new: Dim, total: Dim, window: int, chunk: int) -> str:
    """bool[b, 1, s, t]: what query i, in row start[b] + i, sees with a window or chunks."""
    last = g.op("Add", g.op("Unsqueeze", start, g.i64(1)), g.arange(new))
    last, rows = g.op("Unsqueeze", last, g.i64(1, 3)), g.arange(total)
    seen = g.op("LessOrEqual", rows, last)
    if window:
        first = g.op("Sub", last, g.i64(window))
        seen = g.op("And", seen, g.op("Greater", rows, first))
    if chunk:
        own, each = (g.op("Div", x, g.i64(chunk)) for x in (last, rows))
        seen = g.op("And", seen, g.op("Equal", each, own))
    return seen


def _softmax(g: GraphWriter, scores: str, mask: str) -> str:
    return g.op("Softmax", g.op("Add", scores, mask) if mask else scores, axis=-1)


def _shapes(node: Node) -> list[Shape]:
    return [x.type.shape for x in node.operands]


def _scaled(g: GraphWriter, q: str, scale: float) -> str:
    """The query carries the scale: it has fewer elements than the scores."""
    return q if scale == 1.0 else g.op("Mul", q, g.scalar(scale))


def _latent_attention(
    g: GraphWriter, node: Node, q_latent: str, q_rope: str, latent: str, rope: str, lengths: str
) -> str:
    """Absorbed: every head attends over the same rows."""
    (_, s, _, _), _, (_, t, _), *_ = shapes = _shapes(node)
    mask, scale = _mask(g, lengths, s, t, 2), node.attrs["scale"]
    q, turned = (_scaled(g, x, scale) for x in (q_latent, q_rope))
    return _over_latents(g, q, turned, shapes, latent, rope, mask)


def _over_latents(
    g: GraphWriter, q: str, q_rope: str, shapes: list[Shape], latent: str, rope: str, mask: str
) -> str:
    """All heads of all new tokens are columns of one matrix beside the latent rows [b, t, c].

    Rows of the cache are read as they lie: were they the columns, ONNX Runtime would pack the whole
    cache anew in every step. Scores are turned behind that, [b, t, s*h], a head for a latent.
    """
    (b, s, h, c), (_, _, _, r), (_, t, _), *_ = shapes
    parts = ((q, c, latent), (q_rope, r, rope))
    content, turned = (
        g.op("MatMul", rows, g.swap_last(g.reshape(x, (b, s, h, w), (b, s * h, w)), 3))
        for x, w, rows in parts
    )
    scores = g.swap_last(g.op("Add", content, turned), 3)
    p = _softmax(g, g.reshape(scores, (b, s * h, t), (b, s, h, t)), mask)
    p = g.reshape(p, (b, s, h, t), (b, s * h, t))
    return g.reshape(g.op("MatMul", p, latent), (b, s * h, c), (b, s, h, c))


def _mla_attention(
    g: GraphWriter,
    node: Node,
    q_nope: str,
    q_rope: str,
    latent: str,
    rope: str,
    kv_b: str,
    lengths: str,
) -> str:
    """Absorbed for few new tokens, expanded for many; where S is open, the model chooses.

    So one model serves all steps, and ONNX Runtime repacks what is outside of the two arms once.
    Without the halves of kv_b it is expanded for all.
    """
    (b, s, h, n), rope_shape, (_, t, c), *_ = shapes = _shapes(node)
    v = node.outputs[0].type.shape[-1]
    mask, scale = _mask(g, lengths, s, t, 2), node.attrs["scale"]
    q_nope, q_rope = (_scaled(g, x, scale) for x in (q_nope, q_rope))
    found = g.pool.halves.get(node["kv_b"].name)
    most = 0 if found is None else few_tokens(*map(static, (n, v, c)))
    w_uk, w_uv = [g.cast(g.weight(x), x.type.dtype, DType.f32) for x in found or ()] or ["", ""]

    def absorbed(g: GraphWriter) -> str:
        q = contract(g, "bshn,hnc->bshc", (q_nope, w_uk), ((b, s, h, n), (h, n, c)), 1)
        wide: list[Shape] = [(b, s, h, c), rope_shape, shapes[2]]
        o = _over_latents(g, q, q_rope, wide, latent, rope, mask)
        return contract(g, "bshc,hvc->bshv", (o, w_uv), ((b, s, h, c), (h, v, c)), 1)

    def rebuilt(g: GraphWriter) -> str:
        by_row = g.reshape(mask, (b, s, 1, t), (b, 1, s, t))
        return _expanded(g, shapes, v, (q_nope, q_rope, latent, rope, kv_b), by_row)

    if found is None or isinstance(s, int):
        return absorbed(g) if isinstance(s, int) and s <= most else rebuilt(g)
    few, many = g.branch(), g.branch()
    is_few = g.op("LessOrEqual", g.number(s), g.constant(np.array(most, np.int64)))
    return g.choose(is_few, (few, absorbed(few)), (many, rebuilt(many)))


def _expanded(
    g: GraphWriter, shapes: list[Shape], v: Dim, operands: tuple[str, ...], mask: str
) -> str:
    """Keys and values of all heads are rebuilt as kv_b [h*(n+v), c] times latent^T.

    That product is already [b, h, n+v, t], keys in the order that the scores read; the values are
    transposed inside the second MatMul.
    """
    (b, s, h, n), (_, _, _, r), (_, t, _), _, (m, _), *_ = shapes
    q_nope, q_rope, latent, rope, kv_b = operands
    rebuilt = g.op("MatMul", kv_b, g.swap_last(latent, 3))
    rebuilt = g.reshape(rebuilt, (b, m, t), (b, h, n + v, t))
    keys, values = g.ops("Split", 2, rebuilt, g.shape((n, v)), axis=2)
    content = g.op("MatMul", g.transpose(q_nope, 0, 2, 1, 3), keys)
    q_turned = g.reshape(g.transpose(q_rope, 0, 2, 1, 3), (b, h, s, r), (b, h * s, r))
    turned = g.op("MatMul", q_turned, g.swap_last(rope, 3))
    turned = g.reshape(turned, (b, h * s, t), (b, h, s, t))
    p = _softmax(g, g.op("Add", content, turned), mask)
    return g.transpose(g.op("MatMul", p, g.swap_last(values, 4)), 0, 2, 1, 3)


def _attention(
    g: GraphWriter, node: Node, q: str, k: str, v: str, lengths: str = "", sinks: str = ""
) -> str:
    """Query heads of one group are rows over that group's keys: q becomes [b, g, h/g * s, d]."""
    (b, s, h, d), (_, t, groups, _), (_, _, _, e) = (x.type.shape for x in node.operands[:3])
    per_group = h // groups
    q = g.transpose(_scaled(g, q, node.attrs["scale"]), 0, 2, 1, 3)
    q = g.reshape(q, (b, h, s, d), (b, groups, per_group * s, d))
    scores = g.op("MatMul", q, g.transpose(k, 0, 2, 3, 1))
    scores = g.reshape(scores, (b, groups, per_group * s, t), (b, h, s, t))
    if node.attrs["softcap"]:
        cap = g.scalar(node.attrs["softcap"])
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, cap)), cap)
    start = lengths or (g.dim(t - s) if node.attrs["causal"] else "")
    p = _weights(g, node, scores, start, sinks)
    p = g.reshape(p, (b, h, s, t), (b, groups, per_group * s, t))
    y = g.op("MatMul", p, g.transpose(v, 0, 2, 1, 3))
    y = g.reshape(y, (b, groups, per_group * s, e), (b, h, s, e))
    return g.transpose(y, 0, 2, 1, 3)


def _weights(g: GraphWriter, node: Node, scores: str, start: str, sinks: str) -> str:
    """The softmax of scores [b, h, s, t], of rows up to the query's own where there is `start`.

    A query of a window may see nothing: its weights are 0.
    """
    (b, s, h, _), t = node.operands[0].type.shape, node["k"].type.shape[1]
    window, chunk = node.attrs["window"], node.attrs["chunk"]
    seen, mask = "", ""
    if window or chunk:
        seen = _sight(g, start, s, t, window, chunk)
        mask = g.op("Where", seen, g.scalar(0.0), g.scalar(float(np.finfo(np.float32).min)))
    elif start:
        mask = _mask(g, start, s, t)
    if not sinks:
        p = _softmax(g, scores, mask)
        return g.op("Where", seen, p, g.scalar(0.0)) if seen else p
    column = g.op("Expand", g.op("Unsqueeze", sinks, g.i64(0, 2, 3)), g.shape((b, h, s, 1)))
    scores = g.op("Add", scores, mask) if mask else scores
    p = g.op("Softmax", g.op("Concat", scores, column, axis=-1), axis=-1)
    return g.op("Slice", p, g.i64(0), g.shape((t,)), g.i64(3))


def _append(g: GraphWriter, node: Node, past: str, new: str, lengths: str) -> str:
    """past [b, p, d] and s rows of zeros, with new [b, s, d] written at lengths [b].

    By ScatterND: TensorScatter of ONNX Runtime warns of its copy, once a cache in every step.
    """
    given = node.operands[1].type
    dtype = DType.f32 if past in g.pool.wide else given.dtype
    grown = g.op("Concat", past, g.zeros(given.shape, dtype), axis=1)
    return _placed(g, given, grown, new, lengths, dtype, "ScatterND")


def _cache_write(g: GraphWriter, node: Node, cache: str, new: str, lengths: str) -> str:
    """cache [b, c, d] with new [b, s, d] at lengths [b].

    By TensorScatter from opset 24 on, before by ScatterND. ONNX Runtime copies nothing where what
    is bound to the result is the cache's own memory.
    """
    given = node.operands[1].type
    dtype = DType.f32 if cache in g.pool.wide else given.dtype
    op_type = "TensorScatter" if g.pool.form.opset >= TENSOR_SCATTER else "ScatterND"
    return _placed(g, given, cache, new, lengths, dtype, op_type)


def _placed(
    g: GraphWriter,
    given: TensorType,
    cache: str,
    new: str,
    lengths: str,
    dtype: DType,
    op_type: str,
) -> str:
    """A cache of this element type with new rows, of the type `given`, at lengths [b]."""
    new = g.cast(new, given.dtype, dtype)
    if op_type == "TensorScatter":
        result = g.op("TensorScatter", cache, new, lengths, axis=1)
    else:
        result = g.op("ScatterND", cache, _places(g, given.shape, lengths), new)
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


CACHES: dict[str, Callable[..., Any]] = {"append": _append, "cache_write": _cache_write}
EMITTERS: dict[str, Callable[..., Any]] = {
    **CACHES,
    "attention": _attention,
    "latent_attention": _latent_attention,
    "mla_attention": _mla_attention,
}
