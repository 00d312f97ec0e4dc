"""The mechanisms of the model family, each as its operator and as tracers take it apart.

Every function appends to a `GraphBuilder` and returns values; `apart` chooses the traced spelling.
Shapes are those of the operators (b batch, s new tokens, h heads, d width, e experts).
"""

from __future__ import annotations

from typing import Any

from dsc.ir.dims import Dim, product
from dsc.ir.graph import GraphBuilder, Operand, Value
from dsc.ir.types import DType

Builder = GraphBuilder


def number(b: Builder, value: float, dtype: DType = DType.f32) -> Value:
    """A scalar constant."""
    return b.call("full", shape=(), value=value, dtype=dtype)[0]


def rms_norm(b: Builder, x: Value, weight: Operand, eps: float, apart: str) -> Value:
    """`apart`: "", "rsqrt" or "sqrt"; 16-bit floats through fp32."""
    if not apart:
        return b.call("rms_norm", x, weight, eps=eps)[0]
    narrow = x.type.dtype is not DType.f32
    wide = b.call("cast", x, dtype=DType.f32)[0] if narrow else x
    if apart == "rsqrt":
        squared = b.call("square", wide)[0]
    else:
        squared = b.call("mul", wide, wide)[0]
    (mean,) = b.call("mean", squared, axes=(x.type.rank - 1,), keepdims=True)
    (inner,) = b.call("add", mean, number(b, eps))
    if apart == "rsqrt":
        (y,) = b.call("mul", wide, b.call("rsqrt", inner)[0])
    else:
        (y,) = b.call("div", wide, b.call("sqrt", inner)[0])
    y = b.call("cast", y, dtype=x.type.dtype)[0] if narrow else y
    return b.call("mul", weight, y)[0]


def layer_norm(
    b: Builder, x: Value, weight: Operand, bias: Operand | None, eps: float, apart: str
) -> Value:
    """`apart`: "" or "traced"; 16-bit floats through fp32, up to the end."""
    affine = [weight] if bias is None else [weight, bias]
    if not apart:
        return b.call("layer_norm", x, *affine, eps=eps)[0]
    narrow = x.type.dtype is not DType.f32
    wide = b.call("cast", x, dtype=DType.f32)[0] if narrow else x
    (mean,) = b.call("mean", wide, axes=(x.type.rank - 1,), keepdims=True)
    (centred,) = b.call("sub", wide, mean)
    (squared,) = b.call("square", centred)
    (variance,) = b.call("mean", squared, axes=(x.type.rank - 1,), keepdims=True)
    (inner,) = b.call("add", variance, number(b, eps))
    (y,) = b.call("mul", centred, b.call("rsqrt", inner)[0])
    for op, each in zip(("mul", "add"), affine, strict=False):
        (y,) = b.call(op, y, b.call("cast", each, dtype=DType.f32)[0] if narrow else each)
    return b.call("cast", y, dtype=x.type.dtype)[0] if narrow else y


def swiglu(b: Builder, gate: Value, up: Value, apart: str) -> Value:
    """`apart`: "", "silu" or "sigmoid"."""
    match apart:
        case "silu":
            return b.call("mul", b.call("silu", gate)[0], up)[0]
        case "sigmoid":
            turned = b.call("mul", gate, b.call("sigmoid", gate)[0])[0]
            return b.call("mul", up, turned)[0]
    return b.call("swiglu", gate, up)[0]


def rope(
    b: Builder, x: Value, positions: Value, inv_freq: Operand, layout: str, scale: float, apart: str
) -> Value:
    """x [b,s,r] or [b,s,h,r], or wider: then its first columns turn; `apart` is "" or "traced"."""
    width, last, rank = x.type.shape[-1], 2 * inv_freq.type.shape[0], x.type.rank
    assert isinstance(last, int)
    assert isinstance(width, int)
    dims = last if last != width else 0
    if not apart:
        return b.call("rope", x, positions, inv_freq, layout=layout, scale=scale, dims=dims)[0]
    if dims:
        turned, rest = b.call("split", x, sizes=(last, width - last), axis=rank - 1)
        turned = rope(b, turned, positions, inv_freq, layout, scale, apart)
        return b.call("concat", turned, rest, axis=rank - 1)[0]
    batch, new = positions.type.shape
    (at,) = b.call("reshape", positions, shape=(batch, new, *[1] * (rank - 2)))
    (angle,) = b.call("mul", b.call("cast", at, dtype=DType.f32)[0], inv_freq)
    cos, sin = b.call("cos", angle)[0], b.call("sin", angle)[0]
    if scale != 1.0:
        cos = b.call("mul", cos, number(b, scale))[0]
        sin = b.call("mul", sin, number(b, scale))[0]
    narrow = x.type.dtype is not DType.f32
    wide = b.call("cast", x, dtype=DType.f32)[0] if narrow else x
    if layout == "half":
        first, second = b.call("split", wide, sizes=(last // 2, last // 2), axis=rank - 1)
    else:
        (first,) = b.call("slice", wide, axis=rank - 1, start=0, end=last - 1, step=2)
        (second,) = b.call("slice", wide, axis=rank - 1, start=1, end=last, step=2)
    (even,) = b.call("sub", b.call("mul", first, cos)[0], b.call("mul", second, sin)[0])
    (odd,) = b.call("add", b.call("mul", second, cos)[0], b.call("mul", first, sin)[0])
    if layout == "interleaved":
        shape = (*even.type.shape, 1)
        pair = [b.call("reshape", part, shape=shape)[0] for part in (even, odd)]
        (joined,) = b.call("concat", *pair, axis=rank)
        (y,) = b.call("reshape", joined, shape=x.type.shape)
    else:
        (y,) = b.call("concat", even, odd, axis=rank - 1)
    return b.call("cast", y, dtype=x.type.dtype)[0] if narrow else y


def append(b: Builder, past: Value, new: Value, lengths: Value, apart: str) -> Value:
    """Rows [b,s,d] behind a cache [b,p,d]; `apart`: "", "concat" (full caches) or "scatter"."""
    if not apart:
        return b.call("append", past, new, lengths)[0]
    if apart == "concat":
        return b.call("concat", past, new, axis=1)[0]
    batch, rows, width = new.type.shape
    (first,) = b.call("reshape", lengths, shape=(batch, 1))
    (index,) = b.call("add", first, b.call("arange", start=0, end=rows, dtype=DType.i64)[0])
    (index,) = b.call("reshape", index, shape=(batch, rows, 1))
    (index,) = b.call("expand", index, shape=(batch, rows, width))
    (room,) = b.call("full", shape=new.type.shape, value=0.0, dtype=new.type.dtype)
    (grown,) = b.call("concat", past, room, axis=1)
    return b.call("scatter", grown, index, new, axis=1)[0]


def causal_mask(b: Builder, new: Dim, total: Dim, batch: Dim, lengths: Value | None) -> Value:
    """bool[b,1,s,t]: query i sees row j when j <= lengths + i; without lengths, j <= t - s + i."""
    (columns,) = b.call("arange", start=0, end=total, dtype=DType.i64)
    if lengths is None:
        (rows,) = b.call("arange", start=total - new, end=total, dtype=DType.i64)
        (rows,) = b.call("reshape", rows, shape=(new, 1))
        (mask,) = b.call("le", columns, rows)
        return b.call("expand", mask, shape=(batch, 1, new, total))[0]
    (first,) = b.call("reshape", lengths, shape=(batch, 1))
    (rows,) = b.call("add", first, b.call("arange", start=0, end=new, dtype=DType.i64)[0])
    (rows,) = b.call("reshape", rows, shape=(batch, new, 1))
    (mask,) = b.call("le", columns, rows)
    return b.call("reshape", mask, shape=(batch, 1, new, total))[0]


def attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    lengths: Value | None,
    scale: float,
    apart: str,
    uniform: bool = False,
) -> Value:
    """q [b,s,h,d], k [b,t,h,d], v [b,t,h,e]; `apart`: "", "sdpa" or "softmax".

    With `uniform` the mask is written as full caches allow: by t - s.
    """
    if not apart:
        causal = lengths is not None
        return b.call("attention", q, k, v, lengths, scale=scale, causal=causal)[0]
    batch, new = q.type.shape[:2]
    mask = None
    if lengths is not None:
        mask = causal_mask(b, new, k.type.shape[1], batch, None if uniform else lengths)
    heads = [b.call("permute", x, dims=(0, 2, 1, 3))[0] for x in (q, k, v)]
    if apart == "sdpa":
        (y,) = b.call("sdpa", *heads, mask, scale=scale)
    else:
        (kt,) = b.call("permute", heads[1], dims=(0, 1, 3, 2))
        (scores,) = b.call("matmul", heads[0], kt)
        (scores,) = b.call("mul", scores, number(b, scale, scores.type.dtype))
        if mask is not None:
            hidden = number(b, float("-inf"), scores.type.dtype)
            scores = b.call("where", mask, scores, hidden)[0]
            scores = scores if scores.type.dtype is DType.f32 else _wide(b, scores)
        (shares,) = b.call("softmax", scores, axis=-1)
        shares = b.call("cast", shares, dtype=v.type.dtype)[0]
        (y,) = b.call("matmul", shares, heads[2])
    return b.call("permute", y, dims=(0, 2, 1, 3))[0]


def _wide(b: Builder, x: Value) -> Value:
    return b.call("cast", x, dtype=DType.f32)[0]


def mla(
    b: Builder,
    q_nope: Value,
    q_rope: Value,
    latent: Value,
    rope: Value,
    kv_b: Operand,
    lengths: Value,
    scale: float,
    apart: str,
    uniform: bool = False,
) -> Value:
    """mla_attention; `apart` ("sdpa", "softmax") rebuilds keys and values from the latent."""
    if not apart:
        operands = (q_nope, q_rope, latent, rope, kv_b, lengths)
        return b.call("mla_attention", *operands, scale=scale)[0]
    batch, _, heads, nope = q_nope.type.shape
    total, width, rows = latent.type.shape[1], q_rope.type.shape[3], kv_b.type.shape[0]
    each = rows // heads
    (both,) = b.call("linear", latent, kv_b)
    (both,) = b.call("reshape", both, shape=(batch, total, heads, each))
    k_nope, v = b.call("split", both, sizes=(nope, each - nope), axis=3)
    (shared,) = b.call("reshape", rope, shape=(batch, total, 1, width))
    (k_rope,) = b.call("expand", shared, shape=(batch, total, heads, width))
    (q,) = b.call("concat", q_nope, q_rope, axis=3)
    (k,) = b.call("concat", k_nope, k_rope, axis=3)
    return attention(b, q, k, v, lengths, scale, apart, uniform)


def route(
    b: Builder, x: Value, gate: Operand, bias: Operand | None, attrs: dict[str, Any], apart: str
) -> tuple[Value, Value]:
    """Experts i64[n,k] and their weights f32[n,k] of tokens [n,d]; `apart` is "" or "traced"."""
    if not apart:
        idx, w = b.call("route", x, gate, bias, **attrs)
        return idx, w
    tokens, experts = x.type.shape[0], gate.type.shape[0]
    groups, keep, k = attrs["groups"], attrs["keep"], attrs["top_k"]
    wide = x if x.type.dtype is DType.f32 else _wide(b, x)
    matrix = gate if gate.type.dtype is DType.f32 else b.call("cast", gate, dtype=DType.f32)[0]
    (logits,) = b.call("linear", wide, matrix)
    if attrs["score"] == "sigmoid":
        (scores,) = b.call("sigmoid", logits)
    else:
        (scores,) = b.call("softmax", logits, axis=-1)
    (chosen,) = (scores,) if bias is None else b.call("add", scores, bias)
    if groups > 1:
        (parts,) = b.call("reshape", chosen, shape=(tokens, groups, experts // groups))
        if attrs["group_score"] == "top2":
            best, _ = b.call("topk", parts, k=2)
            (strength,) = b.call("sum", best, axes=(-1,), keepdims=False)
        else:
            (strength,) = b.call("amax", parts, axes=(-1,), keepdims=False)
        _, kept = b.call("topk", strength, k=keep)
        (none,) = b.call("full", shape=(tokens, groups), value=0.0, dtype=DType.f32)
        (shown,) = b.call("scatter", none, kept, number(b, 1.0), axis=1)
        (shown,) = b.call("cast", shown, dtype=DType.boolean)
        (shown,) = b.call("reshape", shown, shape=(tokens, groups, 1))
        (masked,) = b.call("where", shown, parts, number(b, attrs["fill"]))
        (chosen,) = b.call("reshape", masked, shape=(tokens, experts))
    _, idx = b.call("topk", chosen, k=k)
    (w,) = b.call("gather", scores, idx, axis=1)
    if attrs["normalise"]:
        (total,) = b.call("sum", w, axes=(-1,), keepdims=True)
        (total,) = b.call("add", total, number(b, 1e-20))
        (w,) = b.call("div", w, total)
    if attrs["scale"] != 1.0:
        (w,) = b.call("mul", w, number(b, attrs["scale"]))
    return idx, w


def experts(
    b: Builder, x: Value, idx: Value, w: Value, gate_up: Operand, down: Operand, apart: str
) -> Value:
    """Gated experts of tokens [n,d]; `apart`: "", "dense" or "grouped"."""
    if not apart:
        return b.call("experts", x, idx, w, gate_up, down, act="silu")[0]
    tokens, width = x.type.shape
    count, inner, k = gate_up.type.shape[0], down.type.shape[2], idx.type.shape[1]
    (up,) = b.call("permute", gate_up, dims=(0, 2, 1))
    (out,) = b.call("permute", down, dims=(0, 2, 1))
    share = w if w.type.dtype is x.type.dtype else b.call("cast", w, dtype=x.type.dtype)[0]
    if apart == "dense":
        (none,) = b.call("full", shape=(tokens, count), value=0.0, dtype=x.type.dtype)
        (mask,) = b.call("scatter", none, idx, share, axis=1)
        (all_rows,) = b.call("expand", x, shape=(count, tokens, width))
        hidden = _gated(b, b.call("matmul", all_rows, up)[0], inner)
        (y,) = b.call("matmul", hidden, out)
        (mask,) = b.call("permute", mask, dims=(1, 0))
        (mask,) = b.call("reshape", mask, shape=(count, tokens, 1))
        return b.call("sum", b.call("mul", y, mask)[0], axes=(0,), keepdims=False)[0]
    rows = product((k, tokens))
    (flat,) = b.call("reshape", idx, shape=(rows,))
    by_expert, order = b.call("sort", flat, axis=0)
    assert isinstance(k, int)
    (token,) = b.call("div", order, number(b, k, DType.i64))
    (sorted_rows,) = b.call("take", x, token, axis=0)
    (ends,) = b.call("cumsum", b.call("histc", by_expert, bins=count)[0], axis=0)
    hidden = _gated(b, b.call("grouped_mm", sorted_rows, up, ends)[0], inner)
    (y,) = b.call("grouped_mm", hidden, out, ends)
    (shares,) = b.call("take", b.call("reshape", share, shape=(rows,))[0], order, axis=0)
    (y,) = b.call("mul", y, b.call("reshape", shares, shape=(rows, 1))[0])
    (nothing,) = b.call("full", shape=(rows,), value=0, dtype=DType.i64)
    (places,) = b.call("arange", start=0, end=rows, dtype=DType.i64)
    (inverse,) = b.call("index_put", nothing, order, places)
    (y,) = b.call("take", y, inverse, axis=0)
    (y,) = b.call("reshape", y, shape=(tokens, k, width))
    return b.call("sum", y, axes=(1,), keepdims=False)[0]


def _gated(b: Builder, both: Value, inner: Dim) -> Value:
    gate, up = b.call("split", both, sizes=(inner, inner), axis=-1)
    return b.call("mul", b.call("silu", gate)[0], up)[0]


def select_rows(b: Builder, x: Value, index: Value, apart: str) -> Value:
    """Rows [b,l,d] of x [b,s,d]; `apart` is "" or "gather"."""
    if not apart:
        return b.call("select_rows", x, index)[0]
    batch, count = index.type.shape
    width = x.type.shape[-1]
    (wide,) = b.call("reshape", index, shape=(batch, count, 1))
    (wide,) = b.call("expand", wide, shape=(batch, count, width))
    return b.call("gather", x, wide, axis=1)[0]
