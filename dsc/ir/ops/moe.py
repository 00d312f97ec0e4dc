"""Mixture-of-experts operators: the router, the experts as one, and the grouped form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

from dsc.ir.calls import Call
from dsc.ir.dims import Dim
from dsc.ir.extents import Extent
from dsc.ir.graph import Attrs, Node
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op
from dsc.ir.ops.quant import activation_type, product_of
from dsc.ir.placement import EXPERTS, PARTIAL, Choice, Part, PlacedCall, Placing
from dsc.ir.sized import Sized
from dsc.ir.traits import DISTINCT, FROM_FIRST, Form, Role, Traits, Within, nothing
from dsc.ir.types import DType, TensorType

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _infer_route(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, weight = types[0], types[1]
    experts, groups = weight.shape[0], attrs["groups"]
    if attrs["score"] not in ("sigmoid", "softmax"):
        raise TypeMismatch(f"score {attrs['score']!r}; sigmoid or softmax")
    if attrs["group_score"] not in ("top2", "max"):
        raise TypeMismatch(f"group_score {attrs['group_score']!r}; top2 or max")
    if not isinstance(experts, int):
        raise TypeMismatch(f"a router over {experts} experts; their number must be known")
    if groups < 1 or experts % groups or not 1 <= attrs["keep"] <= groups:
        raise TypeMismatch(f"{experts} experts in {groups} groups, {attrs['keep']} kept")
    if attrs["keep"] < groups and attrs["group_score"] == "top2" and experts // groups < 2:
        raise TypeMismatch(f"the two best of {experts // groups} experts a group")
    if not 1 <= attrs["top_k"] <= attrs["keep"] * (experts // groups):
        raise TypeMismatch(
            f"the top {attrs['top_k']} of {experts} experts, {attrs['keep']} of {groups} groups"
        )
    if attrs["shared"] < 0:
        raise TypeMismatch(f"{attrs['shared']} shared experts")
    shape = (*x.shape[:-1], attrs["top_k"] + attrs["shared"])
    return TensorType(DType.i64, shape), TensorType(DType.f32, shape)


def routing_scores(x: Any, weight: Any, score: str, logit_bias: Any = None) -> Any:
    """Scores f32[*n, e] of every expert."""
    logits = torch.nn.functional.linear(x.float(), weight.float(), logit_bias)
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


def with_shared(idx: Any, w: Any, experts: int, shared: int) -> Any:
    """Choices [*n, k] and their weights, and after them the shared experts, each with weight 1."""
    always = torch.arange(experts, experts + shared).expand(*idx.shape[:-1], shared)
    return torch.cat([idx, always], -1), torch.nn.functional.pad(w, (0, shared), value=1.0)


def _route(
    x: Any,
    weight: Any,
    bias: Any = None,
    logit_bias: Any = None,
    *,
    score: str,
    groups: int,
    keep: int,
    group_score: str,
    fill: float,
    top_k: int,
    normalise: bool,
    scale: float,
    shared: int,
) -> Any:
    scores = routing_scores(x, weight, score, logit_bias)
    biased = scores if bias is None else scores + bias
    if keep < groups:
        grouped = biased.unflatten(-1, (groups, -1))
        best = grouped.topk(2, -1)[0].sum(-1) if group_score == "top2" else grouped.amax(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(-1, best.topk(keep, -1)[1], True)
        biased = grouped.masked_fill(~kept[..., None], fill).flatten(-2)
    idx = biased.topk(top_k, -1)[1]
    w = scores.gather(-1, idx)
    if normalise:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    return with_shared(idx, w * scale, weight.shape[0], shared)


def activate(x: Any, act: str) -> Any:
    """The activation called `act`."""
    if act == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return getattr(torch.nn.functional, act)(x)


def gated(
    gate: Any, up: Any, act: str, limit: float = inf, alpha: float = 1.0, shift: float = 0.0
) -> Any:
    """act(alpha gate) / alpha * (up + shift); with a limit, gate and up are cut to it first."""
    if limit < inf:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    opened = activate(gate, act) if alpha == 1.0 else activate(gate * alpha, act) / alpha
    return opened * (up + shift if shift else up)


def is_plain(attrs: Mapping[str, Any]) -> bool:
    """Whether experts are act(gate) * up, gate before up, with neither limits nor factors."""
    plain = attrs["limit"] == inf and attrs["alpha"] == 1.0 and attrs["shift"] == 0.0
    return bool(plain and not attrs["pairs"])


def plain_experts(node: Node) -> Node:
    """Experts without biases and with a plain gate; any other node as it is.

    What is left away becomes pointwise operators before kernels are made: the products, which are
    all that reads stored weights, are those of the plain form.
    """
    if node.op != "experts":
        return node
    attrs = Attrs({**node.attrs, "limit": inf, "alpha": 1.0, "shift": 0.0})
    return replace(node, inputs=node.inputs[:5], attrs=attrs)


def _infer_experts(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, gate_up, down = types[0], types[3], types[4]
    if attrs["act"] not in ACTIVATIONS:
        raise TypeMismatch(f"act {attrs['act']!r}; one of {', '.join(ACTIVATIONS)}")
    if not (attrs["limit"] > 0 and 0 < attrs["alpha"] < inf):
        raise TypeMismatch(f"limit {attrs['limit']} and alpha {attrs['alpha']}; above 0")
    if gate_up.shape[1] != down.shape[2] * 2:
        raise TypeMismatch(f"gate_up {gate_up} holds gate and up rows for down {down}")
    if attrs["activations"]:
        activation_type(x, attrs["activations"])
    return (x,)


def _experts(
    x: Any,
    idx: Any,
    w: Any,
    gate_up: Any,
    down: Any,
    gate_up_bias: Any = None,
    down_bias: Any = None,
    *,
    act: str,
    limit: float,
    alpha: float,
    shift: float,
    pairs: bool,
    activations: str,
) -> Any:
    tokens = x.reshape(-1, x.shape[-1])
    idx, w = idx.reshape(-1, idx.shape[-1]), w.reshape(-1, w.shape[-1])
    out = torch.zeros(tokens.shape, dtype=torch.float32)
    for expert in idx.unique().tolist():
        token, slot = torch.where(idx == expert)
        both = product_of(tokens[token], gate_up[expert], activations=activations)
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        gate, up = (both[..., 0::2], both[..., 1::2]) if pairs else both.chunk(2, -1)
        hidden = gated(gate, up, act, limit, alpha, shift)
        y = product_of(hidden, down[expert], activations=activations)
        if down_bias is not None:
            y = y + down_bias[expert]
        out.index_add_(0, token, y.float() * w[token, slot, None])
    return out.to(x.dtype).reshape(x.shape)


def _infer_dispatch(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, idx = types
    if attrs["experts"] < 1:
        raise TypeMismatch(f"{attrs['experts']} experts")
    rows = idx.numel
    return (
        x.with_shape((rows, x.shape[1])),
        TensorType(DType.i64, (attrs["experts"] + 1,)),
        TensorType(DType.i64, (rows,)),
    )


def _dispatch(x: Any, idx: Any, experts: int) -> Any:
    flat = idx.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return x[order // idx.shape[1]], offsets, order


def _infer_grouped(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, weight = types[:2]
    if attrs["activations"]:
        activation_type(x, attrs["activations"])
    return (x.with_shape((x.shape[0], weight.shape[1])),)


def _grouped_linear(x: Any, weight: Any, offsets: Any, activations: str = "") -> Any:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for group, (start, end) in enumerate(pairwise(bounds)):
        out[start:end] = product_of(x[start:end], weight[group], activations=activations)
    return out


def _infer_combine(types: Types, attrs: Mapping[str, Any]) -> Result:
    y, order, w = types
    if y.shape[0] != w.numel or order.shape[0] != w.numel:
        raise TypeMismatch(f"{y} rows for {w} weights")
    return (y.with_shape((w.shape[0], y.shape[1])),)


def _combine(y: Any, order: Any, w: Any) -> Any:
    slots = torch.zeros(y.shape, dtype=torch.float32)
    slots[order] = y.float()
    return (slots.reshape(*w.shape, y.shape[1]) * w[..., None]).sum(1).to(y.dtype)


def _demand_route(call: Sized) -> None:
    """Groups part the experts, and those that are kept have as many as are taken."""
    groups, keep = call.attrs["groups"], call.attrs["keep"]
    needed = -(-call.attrs["top_k"] // keep)
    if call.attrs["group_score"] == "top2" and keep < groups:
        needed = max(needed, 2)
    call.system.divisible(call.dims["e"], groups, needed * groups)


def _demand_rows(call: Sized) -> None:
    """A row for each choice of each token."""
    call.system.equate(call.dims["r"], call.dims["m"] * call.dims["k"])


def _place_experts(call: PlacedCall) -> Placing | str:
    """Some of the experts on each rank, or a part of the inner rows of every one: summands."""
    if not call.weights.issuperset(("gate_up", "down")):
        return "the weights of its experts are computed"
    tokens = ("x", "idx", "w")
    number, inner = call["gate_up"].shape[0], call["down"].shape[2]
    biases = [name for name in ("gate_up_bias", "down_bias") if name in call.operands]
    if not call.weights.issuperset(biases):
        return "the biases of its experts are computed"
    if call.wish == EXPERTS:
        if not isinstance(number, int) or not call.divides(number):
            return f"{number} experts do not part into {call.ranks} ranks"
        parts = {name: Part(0) for name in ("gate_up", "down", *biases)}
        choice = Choice("idx", "w", number)
        return Placing((PARTIAL,), parts, whole=tokens, choice=choice, kind="experts")
    if not call.divides(inner):
        return f"experts of {inner} rows on {call.ranks} ranks stay whole"
    if "down_bias" in biases:
        return "a part of every expert would add the bias of down on each rank"
    pieces = 1 if call.attrs["pairs"] else 2
    parts = {name: Part(1, pieces=pieces) for name in ("gate_up", *biases)} | {"down": Part(2)}
    return Placing((PARTIAL,), parts, whole=tokens, kind="experts")


def _chosen_gate_up(call: Call) -> Dim:
    """Elements of gate and up of the chosen experts, each choice apart."""
    return call["idx"].numel * call.dim("g") * call.dim("d")


def _chosen_down(call: Call) -> Dim:
    return call["idx"].numel * call.dim("d") * call.dim("i")


route = op(
    "route(x: F[*n, d], weight: W[e, d], bias: f32[e]?, logit_bias: f32[e]?; score: str,"
    ' groups: int = 1, keep: int = 1, group_score: str = "top2", fill: float = -inf, top_k: int,'
    " normalise: bool, scale: float = 1.0, shared: int = 0)"
    " -> (i64[*n, top_k+shared], f32[*n, top_k+shared])",
    Traits(
        Role.DISPATCH,
        results=("idx", "w"),
        flops=lambda c: 2 * c["x"].numel * c.dim("e"),
        demand=_demand_route,
    ),
    reference=_route,
    doc="Choose top_k experts a token among the kept groups by biased scores; weights come from"
    " the unbiased ones, normalised, then scaled (DeepSeek-V3, eq. 12-16; noaux_tc). A bias of the"
    " logits is part of both. Softmax over the chosen logits alone is softmax over all, normalised."
    " Experts e .. e+shared-1 follow, with weight 1: every token has them.",
    example='f32[5,8], f32[12,8], f32[12] {score="sigmoid", groups=4, keep=2, top_k=3,'
    " normalise=true, scale=2.5}",
    infer=_infer_route,
    gives={0: Within("0", "e+shared-1")},
)
experts = op(
    "experts(x: F[*n, d], idx: i64[*n, k], w: f32[*n, k], gate_up: F[e, g, d], down: F[e, d, i],"
    ' gate_up_bias: F[e, g]?, down_bias: F[e, d]?; act: str = "silu", limit: float = inf,'
    ' alpha: float = 1.0, shift: float = 0.0, pairs: bool = false, activations: str = "")'
    " -> F[*n, d]",
    Traits(
        Role.EXPERTS,
        flops=lambda c: 2 * (_chosen_gate_up(c) + _chosen_down(c)),
        reads={"gate_up": _chosen_gate_up, "down": _chosen_down},
        stored=("gate_up", "down"),
        demand=lambda c: c.system.equate(c.dims["g"], Extent.number(2) * c.dims["i"]),
        place=_place_experts,
        grants=EXPERTS,
    ),
    reference=_experts,
    doc="sum_k w_k * down_k(act(gate_k x) * up_k x) over each token's experts; gate_up holds the"
    " i gate rows, then the i up rows of each expert. Both products may have a bias; act(gate) * up"
    " is then act(alpha gate) / alpha * (up + shift), where gate is at most limit and up within it"
    " on both sides (gpt-oss). With pairs each gate row is followed by its up row. Accumulates in"
    " fp32. Activations, which are those of linear, are the rows of both products.",
    example="f32[5,8], i64[5,2]=3, f32[5,2], f32[4,6,8], f32[4,8,3]",
    infer=_infer_experts,
    within={"idx": Within("0", "e-1", "the number of an expert")},
)
dispatch = op(
    "dispatch(x: T[m, d], idx: i64[m, k]; experts: extent) -> (T[r, d], i64[experts+1], i64[r])",
    Traits(
        Role.DISPATCH,
        Form.LOWERED,
        flops=nothing,
        results=("rows", "offsets", "order"),
        demand=_demand_rows,
    ),
    reference=_dispatch,
    doc="Sort (token, slot) pairs by expert, stably: rows of x in that order, the prefix sum of"
    " the counts, and order[p] = token*k + slot of sorted row p.",
    example="f32[5,3], i64[5,2]=3 {experts=4}",
    infer=_infer_dispatch,
    within={"idx": Within("0", "experts-1", "the number of an expert")},
    gives={
        1: Within("0", "m*k", order=FROM_FIRST),
        2: Within("0", "m*k-1", order=DISTINCT),
    },
)
grouped_linear = op(
    "grouped_linear(x: T[m, k], weight: T[e, n, k], offsets: i64[e+1];"
    ' activations: str = "") -> T[m, n]',
    Traits(
        Role.PRODUCT,
        Form.LOWERED,
        flops=lambda c: 2 * c["x"].numel * c.dim("n"),
        reads={"weight": lambda c: c["x"].numel * c.dim("n")},
        stored=("weight",),
    ),
    reference=_grouped_linear,
    doc="Rows offsets[g] .. offsets[g+1]-1 times weight[g]^T. Activations are those of linear.",
    example="f32[0,3], f32[4,2,3], i64[5]=0",
    infer=_infer_grouped,
    within={"offsets": Within("0", "m", "the first row of a group", FROM_FIRST)},
)
combine = op(
    "combine(y: F[r, d], order: i64[r], w: f32[m, k]) -> F[m, d]",
    Traits(Role.EXPERTS, Form.LOWERED, flops=lambda c: 2 * c["y"].numel, demand=_demand_rows),
    reference=_combine,
    doc="Undo dispatch: each token's weighted sum of its slots, in fp32.",
    example="f32[10,3], i64[10], f32[5,2]",
    infer=_infer_combine,
    within={"order": Within("0", "r-1", "the slot of a sorted row", DISTINCT)},
)
