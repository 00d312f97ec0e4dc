"""Neural-network operators: norms, rotary embedding, attention in its three forms, swiglu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.calls import Call
from dsc.ir.dims import Dim
from dsc.ir.extents import Extent
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op
from dsc.ir.ops.cache import IN_PAGES, ONE_PAGE
from dsc.ir.paging import BLOCK_TABLE, gathered
from dsc.ir.placement import HEADS, PlacedCall, Placing, Split, along_rows, over_heads
from dsc.ir.sized import Sized
from dsc.ir.traits import Role, Traits, Within, each_result, nothing
from dsc.ir.types import DType, TensorType

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]

ROPE_LAYOUTS = ("interleaved", "deinterleave", "half")


def _wide(x: Any) -> Any:
    """In fp32; fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype != wide.dtype:
        normed = normed.to(x.dtype)
    return (normed * weight).to(x.dtype)


def _layer_norm(x: Any, weight: Any, bias: Any = None, *, eps: float) -> Any:
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _infer_norm(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, weight = types[:2]
    if weight.dtype not in (x.dtype, DType.f32):
        raise TypeMismatch(f"{x} with the weight {weight}; it has the type of x, or f32")
    return (x,)


def _infer_rope(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, positions, inv_freq = types
    if attrs["layout"] not in ROPE_LAYOUTS:
        raise TypeMismatch(f"layout {attrs['layout']!r}; one of {', '.join(ROPE_LAYOUTS)}")
    width, turned = x.shape[-1], inv_freq.shape[0] * 2
    if x.rank not in (3, 4) or turned != (attrs["dims"] or width):
        raise TypeMismatch(f"{x} with {inv_freq} frequencies")
    if attrs["dims"] and not (isinstance(width, int) and attrs["dims"] <= width and width % 2 == 0):
        raise TypeMismatch(f"{turned} columns of {x}, whose width is even and no less")
    if x.shape[:2] != positions.shape:
        raise TypeMismatch(f"{x} at the positions {positions}")
    return (x,)


def _rope(x: Any, positions: Any, inv_freq: Any, layout: str, scale: float, dims: int) -> Any:
    if dims:
        turned = _rope(x[..., :dims], positions, inv_freq, layout, scale, 0)
        return torch.cat([turned, x[..., dims:]], -1)
    angle = positions[..., None].float() * inv_freq
    if x.dim() == 4:
        angle = angle[:, :, None]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    wide = x.float()
    half = x.shape[-1] // 2
    if layout == "half":
        a, b = wide[..., :half], wide[..., half:]
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
    rotated = (a * cos - b * sin, b * cos + a * sin)
    if layout == "interleaved":
        return torch.stack(rotated, -1).flatten(-2).to(x.dtype)
    return torch.cat(rotated, -1).to(x.dtype)


def visible(lengths: Any, new: int, total: int) -> Any:
    """bool[b, s, t]: query i of sequence b sees cache index j when j <= lengths[b] + i."""
    last = lengths[:, None] + torch.arange(new)
    return torch.arange(total)[None, None, :] <= last[..., None]


def _probabilities(scores: Any, mask: Any) -> Any:
    """Softmax over the last axis in fp32; `mask` is bool[b, s, t], scores are [b, h, s, t]."""
    return torch.softmax(_wide(scores).masked_fill(~mask[:, None], float("-inf")), -1)


def sees(last: Any, rows: Any, window: int, chunk: int) -> Any:
    """Whether row j is seen from row `last`: j <= last, of its window and of its chunk."""
    seen = rows <= last
    if window:
        seen = seen & (rows > last - window)
    if chunk:
        seen = seen & (rows // chunk == last // chunk)
    return seen


def _attention(
    q: Any, k: Any, v: Any, lengths: Any = None, sinks: Any = None, block_table: Any = None,
    *, scale: float, causal: bool, window: int, chunk: int, softcap: float,
) -> Any:  # fmt: skip
    if block_table is not None:
        k, v = gathered(k, block_table), gathered(v, block_table)
    heads, groups = q.shape[2], k.shape[2]
    k = k.repeat_interleave(heads // groups, 2)
    v = v.repeat_interleave(heads // groups, 2)
    scores = torch.einsum("bshd,bthd->bhst", _wide(q), _wide(k)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    b, s, t = q.shape[0], q.shape[1], k.shape[1]
    mask = torch.ones(b, s, t, dtype=torch.bool)
    if lengths is not None or causal:
        start = torch.full((b,), t - s) if lengths is None else lengths
        last = start[:, None, None] + torch.arange(s)[None, :, None]
        mask = sees(last, torch.arange(t), window, chunk)
    if sinks is not None:
        sink = _wide(sinks)[None, :, None, None].expand(b, heads, s, 1)
        scores = torch.cat([scores, sink], -1)
        mask = torch.cat([mask, torch.ones(b, s, 1, dtype=torch.bool)], -1)
    weights = _probabilities(scores, mask)[..., :t]
    if sinks is None and not bool(mask.any(-1).all()):
        weights = weights.masked_fill(~mask.any(-1)[:, None, :, None], 0.0)
    return torch.einsum("bhst,bthe->bshe", weights, _wide(v)).to(q.dtype)


def _infer_attention(types: Types, attrs: Mapping[str, Any]) -> Result:
    q, k, v = types[:3]
    heads, groups = q.shape[2], k.shape[2]
    if isinstance(heads, int) and isinstance(groups, int) and (groups == 0 or heads % groups):
        raise TypeMismatch(f"{heads} query heads over {groups} key heads")
    lengths, table = (types[i] if len(types) > i else None for i in (3, 5))
    if table is not None and lengths is None:
        raise TypeMismatch("a block table without lengths")
    window, chunk, softcap = (attrs[name] for name in ("window", "chunk", "softcap"))
    if window < 0 or chunk < 0 or softcap < 0:
        raise TypeMismatch("window, chunk and softcap are positive, or 0 for none")
    if (window or chunk) and lengths is None and not attrs["causal"]:
        raise TypeMismatch("a window or chunk of attention that is not causal")
    return (q.with_shape((*q.shape[:3], v.shape[3])),)


def _infer_mla(types: Types, attrs: Mapping[str, Any]) -> Result:
    q_nope, kv_b = types[0], types[4]
    heads, nope = q_nope.shape[2], q_nope.shape[3]
    width = kv_b.shape[0] // heads - nope
    empty = isinstance(width, int) and width <= 0
    if kv_b.shape[0] != heads * (nope + width) or empty:
        raise TypeMismatch(f"kv_b is {kv_b} for {heads} heads of {nope} nope dims and a value")
    return (q_nope.with_shape((*q_nope.shape[:3], width)),)


def split_kv_b(kv_b: Any, heads: int, nope: int) -> tuple[Any, Any]:
    """kv_b [h*(n+v), c] as (W_UK [h, n, c], W_UV [h, v, c]): per head, nope rows come first."""
    per_head = kv_b.reshape(heads, -1, kv_b.shape[-1])
    return per_head[:, :nope], per_head[:, nope:]


def _in_order(latent: Any, rope: Any, block_table: Any) -> tuple[Any, Any]:
    """The two parts of a latent cache with each sequence's rows in order."""
    if block_table is None:
        return latent, rope
    return gathered(latent, block_table), gathered(rope, block_table)


def _mla_attention(
    q_nope: Any, q_rope: Any, latent: Any, rope: Any, kv_b: Any, lengths: Any,
    block_table: Any = None, *, scale: float,
) -> Any:  # fmt: skip
    latent, rope = _in_order(latent, rope, block_table)
    w_uk, w_uv = split_kv_b(kv_b.float(), q_nope.shape[2], q_nope.shape[3])
    k_nope = torch.einsum("btc,hnc->bthn", latent.float(), w_uk)
    value = torch.einsum("btc,hvc->bthv", latent.float(), w_uv)
    scores = torch.einsum("bshn,bthn->bhst", q_nope.float(), k_nope)
    scores = scores + torch.einsum("bshr,btr->bhst", q_rope.float(), rope.float())
    mask = visible(lengths, q_nope.shape[1], latent.shape[1])
    p = _probabilities(scores * scale, mask)
    return torch.einsum("bhst,bthv->bshv", p, value).to(q_nope.dtype)


def _latent_attention(
    q_latent: Any, q_rope: Any, latent: Any, rope: Any, lengths: Any,
    block_table: Any = None, *, scale: float,
) -> Any:  # fmt: skip
    latent, rope = _in_order(latent, rope, block_table)
    scores = torch.einsum("bshc,btc->bhst", q_latent.float(), latent.float())
    scores = scores + torch.einsum("bshr,btr->bhst", q_rope.float(), rope.float())
    mask = visible(lengths, q_latent.shape[1], latent.shape[1])
    p = _probabilities(scores * scale, mask)
    return torch.einsum("bhst,btc->bshc", p, latent.float()).to(q_latent.dtype)


def _pairs(call: Call, rows: Dim) -> Dim:
    """Query rows of all heads times the rows that they see."""
    return call.dim("b") * call.dim("s") * call.dim("h") * rows


def _cached(call: Call) -> Dim:
    """Rows that a sequence has in a cache, at most."""
    return call.dim("m") * call.dim("p")


def _absorbed_flops(call: Call) -> Dim:
    return 2 * _pairs(call, _cached(call)) * (2 * call.dim("c") + call.dim("r"))


def _expanded_flops(call: Call) -> Dim:
    """Keys and values of all rows are rebuilt."""
    width, rows = (
        call["q_nope"].shape[-1] + call.dim("r") + call.results[0].shape[-1],
        _cached(call),
    )
    return 2 * call.dim("b") * rows * call["kv_b"].numel + 2 * _pairs(call, rows) * width


_CACHE_READS = {
    "latent": lambda call: call.dim("b") * _cached(call) * call.dim("c"),
    "rope": lambda call: call.dim("b") * _cached(call) * call.dim("r"),
}


def _in_sight(call: Call, queries: Dim) -> Dim:
    """Rows that so many queries in a row see, at most: of a window or chunk no others."""
    bounds = [n for n in (call.attrs["window"], call.attrs["chunk"]) if n]
    rows = _cached(call)
    if not bounds:
        return rows
    shown = min(bounds) + queries - 1
    return min(rows, shown) if isinstance(rows, int) and isinstance(shown, int) else shown


def _key_rows(call: Call) -> Dim:
    """Rows of keys that are read of all sequences."""
    return call.dim("b") * _in_sight(call, call.dim("s"))


_KEY_READS = {
    "k": lambda call: _key_rows(call) * call.dim("g") * call.dim("d"),
    "v": lambda call: _key_rows(call) * call.dim("g") * call.dim("e"),
}


def _demand_rope(call: Sized) -> None:
    x = call["x"]
    call.same(x, call.outs[0])
    call.same(x[:2], call["positions"])
    turned, width = Extent.number(2) * call.dims["r"], x[-1]
    if call.attrs.get("dims"):
        call.system.equate(call.extents["dims"], turned)
        call.system.at_most(call.extents["dims"], width)
        call.system.divisible(width, 2)
    else:
        call.system.equate(width, turned)


def _place_rope(call: PlacedCall) -> Placing | str:
    """Heads turn alike; a token in parts would need its part of the positions."""
    if call.lies.get("x") != Split(HEADS):
        return "only the heads of x may be split"
    return along_rows(call)


def _demand_attention(call: Sized) -> None:
    heads = (call.operands["q"].shape[2], call.operands["k"].shape[2])
    call.in_proportion(call.dims["h"], call.dims["g"], heads)


def _place_attention(call: PlacedCall) -> Placing | str:
    """Each rank its heads, and their sinks."""
    sinks = "sinks" in call.operands
    return over_heads("q", "k", "v", weight="sinks" if sinks else "")(call)


def _demand_kv_b(call: Sized) -> None:
    """Rows of kv_b: of every head those of the nope dims, and those of the value."""
    rows = call["kv_b"][0]
    heads, nope, value = call.dims["h"], call["q_nope"][-1], call.dims["v"]
    call.system.equate(rows, heads * nope + heads * value)


embedding = op(
    "embedding(ids: i64[*n], weight: T[v, d]) -> T[*n, d]",
    Traits(Role.LOOKUP, flops=nothing, reads={"weight": each_result}, stored=("weight",)),
    reference=lambda ids, weight: torch.nn.functional.embedding(ids, weight),
    doc="Rows of a table.",
    example="i64[2,3]=5, f32[6,4]",
    within={"ids": Within("0", "v-1", "an id of the vocabulary")},
)
rms_norm = op(
    "rms_norm(x: F[*n, d], weight: W[d]; eps: float) -> F[*n, d]",
    Traits(Role.REDUCTION, place=along_rows),
    reference=_rms_norm,
    doc="Root-mean-square norm over the last axis, statistics in fp32"
    " (Zhang & Sennrich 2019, eq. 4). A weight in the type of x multiplies what was rounded to it;"
    " one in fp32 multiplies first, and the product is rounded (Gemma, OLMo 2).",
    example="f32[2,3,8], f32[8] {eps=1e-06}",
    infer=_infer_norm,
)
layer_norm = op(
    "layer_norm(x: F[*n, d], weight: W[d], bias: W[d]?; eps: float) -> F[*n, d]",
    Traits(Role.REDUCTION, place=along_rows),
    reference=_layer_norm,
    doc="Layer norm over the last axis (Ba et al. 2016): less its mean, over its deviation, times"
    " the weight, plus the bias, all in fp32 and rounded once. Weight and bias have the type of x,"
    " or f32.",
    example="f32[2,3,8], f32[8], f32[8] {eps=1e-05}",
    infer=_infer_norm,
)
rope = op(
    "rope(x: F[...], positions: i64[b, s], inv_freq: f32[r]; layout: str, scale: float = 1.0,"
    " dims: extent = 0) -> F[...]",
    Traits(
        Role.ROTATION,
        samples={"positions": Within("0", "1")},
        demand=_demand_rope,
        place=_place_rope,
    ),
    reference=_rope,
    doc="Rotary position embedding (Su et al. 2021) of x [b,s,2r] or [b,s,h,2r]; layouts: "
    "interleaved (pairs 2i,2i+1), deinterleave (such pairs in, halves out), half (pairs i,i+r)."
    " With `dims` a row is wider: its first `dims` = 2r columns turn, and the others stay as they"
    " are (GPT-NeoX, Black et al. 2022).",
    example='f32[2,3,4,6], i64[2,3]=9, f32[3] {layout="deinterleave", scale=1.5}',
    infer=_infer_rope,
    within={"positions": Within("0", "16777216", "a position, which fp32 must hold exactly")},
)
swiglu = op(
    "swiglu(gate: F[*n], up: F[*n]) -> F[*n]",
    Traits(Role.POINTWISE, wants=("gate", "up")),
    reference=lambda gate, up: (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype),
    doc="silu(gate) * up (Shazeer 2020).",
    example="f32[2,3], f32[2,3]",
)
attention = op(
    "attention(q: F[b, s, h, d], k: F[n, p, g, d], v: F[n, p, g, e], lengths: i64[b]?,"
    " sinks: F[h]?, block_table: i64[b, m]?; scale: float, causal: bool, window: int = 0,"
    " chunk: int = 0, softcap: float = 0.0) -> F[b, s, h, e]",
    Traits(
        Role.ATTENTION,
        masked=("k", "v"),
        flops=lambda c: 2 * _pairs(c, _in_sight(c, 1)) * (c.dim("d") + c.dim("e")),
        reads=_KEY_READS,
        demand=_demand_attention,
        place=_place_attention,
        wants=("q", "k", "v"),
    ),
    reference=_attention,
    doc="softmax(q k^T * scale) v over grouped heads. With lengths, query i is row lengths[b] + i"
    " and sees keys j up to its own; causal without lengths, it is row i + t - s. Of these it sees"
    " the last `window` (Beltagy et al. 2020), and those of its own chunk j / `chunk`. Scores are"
    " capped to softcap * tanh(x / softcap) before the mask (Gemma 2, section 2). A sink is one"
    " more logit a head that takes its share of the softmax and adds nothing (Xiao et al. 2024)."
    " The cache is as `cache_write` has it. A query that sees no key gives zeros.",
    example="f32[2,3,4,5], f32[2,7,2,5], f32[2,7,2,6], i64[2]=4 {scale=0.5, causal=true}",
    infer=_infer_attention,
    within={
        "lengths": Within("0", "m*p", "a number of keys that the first query sees"),
        BLOCK_TABLE: IN_PAGES[BLOCK_TABLE],
    },
    without=ONE_PAGE,
)
mla_attention = op(
    "mla_attention(q_nope: F[b, s, h, d], q_rope: F[b, s, h, r], latent: F[n, p, c],"
    " rope: F[n, p, r], kv_b: F[w, c], lengths: i64[b], block_table: i64[b, m]?; scale: float)"
    " -> F[b, s, h, v]",
    Traits(
        Role.ATTENTION,
        results=("attention",),
        masked=("latent", "rope"),
        stored=("latent", "kv_b"),
        flops=_expanded_flops,
        reads=_CACHE_READS,
        demand=_demand_kv_b,
        place=over_heads("q_nope", "q_rope", weight="kv_b"),
        wants=("q_nope", "q_rope"),
    ),
    reference=_mla_attention,
    doc="Multi-head latent attention, expanded: keys and values are rebuilt from the latent by"
    " kv_b, per head [nope | v] (DeepSeek-V2, eq. 9-19). The cache is as `cache_write` has it.",
    example="f32[2,3,4,5], f32[2,3,4,2], f32[2,7,6], f32[2,7,2], f32[32,6], i64[2]=4 {scale=0.5}",
    infer=_infer_mla,
    within=IN_PAGES,
    without=ONE_PAGE,
)
latent_attention = op(
    "latent_attention(q_latent: F[b, s, h, c], q_rope: F[b, s, h, r], latent: F[n, p, c],"
    " rope: F[n, p, r], lengths: i64[b], block_table: i64[b, m]?; scale: float) -> F[b, s, h, c]",
    Traits(
        Role.ATTENTION,
        results=("attention",),
        masked=("latent", "rope"),
        stored=("latent",),
        flops=_absorbed_flops,
        reads=_CACHE_READS,
        place=over_heads("q_latent", "q_rope"),
        wants=("q_latent", "q_rope"),
    ),
    reference=_latent_attention,
    doc="Multi-head latent attention, absorbed: W_UK is in the query, W_UV in what follows, so"
    " every head attends over the same latent rows (DeepSeek-V2, section 2.1.2). The cache is as"
    " `cache_write` has it.",
    example="f32[2,3,4,6], f32[2,3,4,2], f32[2,7,6], f32[2,7,2], i64[2]=4 {scale=0.5}",
    within=IN_PAGES,
    without=ONE_PAGE,
)
