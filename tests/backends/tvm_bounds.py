"""What a kernel may be wrong by: fp64 results with a bound for every element.

With fp32 sums of n terms in any order the error of a dot product is at most
gamma(n) = n u / (1 - n u), u = 2^-24, times the sum of |a b| (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1). Products of bf16 are exact in fp32, and our bf16
kernels sum in 16 lanes at least: n is the length of a lane's chain, k / 16, the 4 steps that sum
the lanes, and one addition for each range of 1024. Where products go by AMX a sum is one chain of
k terms. The result is rounded once: r = 2^-24 in fp32, 2^-8 in bf16, relative. A term that is lost
is 1 / k of the sum of |a b|, far above gamma(k / 16), and above gamma(k) at the tests' k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsc.backends.tvm.machine import machine_for
from dsc.ir.ops.moe import activate
from dsc.ir.paging import gathered
from dsc.targets import parse_target

U = 2.0**-24
Bounded = tuple[Tensor, Tensor]
"""The exact result and the bound."""
Rule = Callable[[Mapping[str, Any], list[Tensor], float], Bounded]


def roundoff(dtype: torch.dtype) -> float:
    """The relative error of rounding to an element type."""
    return float(torch.finfo(dtype).eps) / 2


def gamma(terms: float) -> float:
    """The relative error of a sum of so many terms."""
    return terms * U / (1 - terms * U)


def chain(k: int, r: float) -> float:
    """gamma of a dot product of depth k whose operands have roundoff r."""
    if r < 1e-6 or machine_for(parse_target("cpu")).tiles:
        return gamma(k + 1)
    return gamma(-(-k // 16) + 8 + k // 1024)


def _products(
    given: list[Tensor], r: float, k: int, dot: Callable[[Tensor, Tensor], Tensor]
) -> Bounded:
    a, b, *bias = given
    exact, total = dot(a, b), dot(a.abs(), b.abs())
    if bias:
        exact, total = exact + bias[0], total + bias[0].abs()
    error = chain(k, r) * total
    return exact, error + r * (exact.abs() + error)


def _linear(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    return _products(given, r, given[1].shape[-1], lambda x, w: x @ w.T)


def _grouped(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    x, w, offsets = given
    ends = [int(n) for n in offsets]

    def dot(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x[a:b] @ m.T for a, b, m in zip(ends, ends[1:], w, strict=False)])

    return _products([x, w], r, w.shape[-1], dot)


def _einsum(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    terms, result = attrs["eq"].split("->")
    (shared,) = set(terms.replace(",", "")) - set(result)
    k = given[0].shape[terms.split(",")[0].index(shared)]
    return _products(given, r, k, lambda a, b: torch.einsum(attrs["eq"], a, b))


def _matmul(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    return _products(given, r, given[0].shape[-1], torch.matmul)


def _rms_norm(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    """The normalised row is rounded, then its product with the weight."""
    x, weight = given
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + attrs["eps"]) * weight
    return exact, exact.abs() * (2 * r + gamma(x.shape[-1] + 8) + r * r)


SLOPE = 1.13
"""The largest slope of gelu in both forms, silu and relu."""


def _experts(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    """Products, an activation of slope SLOPE and a few u, a rounded hidden value, and the sums."""
    x, idx, w, gate_up, down = given
    rows, (top_k, hidden) = x.reshape(-1, x.shape[-1]), (idx.shape[-1], down.shape[-1])
    act = partial(activate, act=attrs["act"])
    exact = torch.zeros_like(rows)
    error, size = torch.zeros_like(rows), torch.zeros_like(rows)
    for place, (choice, share) in enumerate(zip(idx.reshape(-1), w.reshape(-1), strict=True)):
        row, expert = rows[place // top_k], int(choice)
        gate, up = (gate_up[expert] @ row).split(hidden)
        gate_off, up_off = ((gate_up[expert].abs() @ row.abs()) * chain(x.shape[-1], r)).split(
            hidden
        )
        gate_off = SLOPE * gate_off + 8 * U * act(gate).abs()
        h = act(gate) * up
        h_off = gate_off * (up.abs() + up_off) + act(gate).abs() * up_off + 2 * U * h.abs()
        h_off = h_off + r * (h.abs() + h_off)
        weights, share = down[expert].abs(), abs(float(share))
        here = weights @ h.abs()
        error[place // top_k] += share * (weights @ h_off + chain(hidden, r) * here)
        size[place // top_k] += share * here
        exact[place // top_k] += float(w.reshape(-1)[place]) * (down[expert] @ h)
    error = error + gamma(top_k + 2) * size
    error = error + r * (exact.abs() + error)
    return exact.reshape(x.shape), error.reshape(x.shape)


def _mla_attention(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    """As `_latent_attention`, over keys and values that are made from the latents and rounded."""
    q, q_rope, latent, rope, kv_b, lengths, *table = given
    latent, rope = (_in_order(x, table) for x in (latent, rope))
    heads, nope = q.shape[2:]
    up = kv_b.reshape(heads, -1, kv_b.shape[-1])
    made = torch.einsum("btc,hmc->bthm", latent, up)
    off = torch.einsum("btc,hmc->bthm", latent.abs(), up.abs()) * chain(latent.shape[-1], r)
    off = off + r * (made.abs() + off)
    sizes = [nope, made.shape[-1] - nope]
    (keys, values), (keys_off, values_off) = made.split(sizes, -1), off.split(sizes, -1)
    shared = rope[:, :, None].expand(-1, -1, heads, -1)
    keys, queries = torch.cat([keys, shared], -1), torch.cat([q, q_rope], -1)
    keys_off = torch.cat([keys_off, torch.zeros_like(shared)], -1)
    score_off = torch.einsum("bshd,bthd->bhst", queries.abs(), keys_off) * attrs["scale"]
    return _attend(attrs["scale"], queries, keys, values, values_off, score_off, lengths, r)


def _latent_attention(attrs: Mapping[str, Any], given: list[Tensor], r: float) -> Bounded:
    """Scores, weights e^s (4 u, and r where they meet bf16 values) and sums, each with its part.

    An error of at most d in all scores changes a weight by e^2d; the sum of weights is rounded too.
    """
    q, q_rope, latent, rope, lengths, *table = given
    latent, rope = (_in_order(x, table) for x in (latent, rope))
    keys, queries = torch.cat([latent, rope], -1), torch.cat([q, q_rope], -1)
    none, heads = torch.zeros(()).double(), q.shape[2]
    keys, values = (x[:, :, None].expand(-1, -1, heads, -1) for x in (keys, latent))
    return _attend(attrs["scale"], queries, keys, values, none, none, lengths, r)


def _in_order(cache: Tensor, table: list[Tensor]) -> Tensor:
    """The rows of each sequence, those of pages one after another."""
    return gathered(cache, table[0].long()) if table else cache


def _attend(
    scale: float, queries: Tensor, keys: Tensor, values: Tensor, values_off: Tensor,
    score_off: Tensor, lengths: Tensor, r: float,
) -> Bounded:  # fmt: skip
    """Causal attention, where keys and values are themselves wrong by a little."""
    context, q = keys.shape[1], queries
    scores = torch.einsum("bshd,bthd->bhst", queries, keys) * scale
    sizes = torch.einsum("bshd,bthd->bhst", queries.abs(), keys.abs()) * scale
    ends = lengths.long()[:, None] + torch.arange(q.shape[1]) + 1
    seen = torch.arange(context) < ends.clamp(max=context)[:, None, :, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    # The scaled score and its distance to the maximum are rounded once more each.
    wrong = sizes * (chain(keys.shape[-1], r) + 4 * U) + score_off
    wrong = wrong.masked_fill(~seen, 0).amax(-1)
    share = torch.expm1(2 * wrong) + 2 * (r + gamma(context + 16))
    exact = torch.einsum("bhst,bthc->bshc", weights, values)
    total = torch.einsum("bhst,bthc->bshc", weights, values.abs() + values_off)
    error = total * share.transpose(1, 2)[..., None]
    error = error + torch.einsum("bhst,bthc->bshc", weights, values_off.expand_as(values))
    return exact, error + r * (exact.abs() + error)


RULES: dict[str, Rule] = {
    "linear": _linear,
    "grouped_linear": _grouped,
    "einsum": _einsum,
    "matmul": _matmul,
    "rms_norm": _rms_norm,
    "latent_attention": _latent_attention,
    "mla_attention": _mla_attention,
    "experts": _experts,
}
"""Bounds by operator."""


def excess(op: str, attrs: Mapping[str, Any], given: list[Tensor], got: Tensor) -> float:
    """The largest error as a share of its bound."""
    r = roundoff(got.dtype)
    exact, bound = RULES[op](attrs, [x.double() for x in given], r)
    return float(((got.double() - exact).abs() / bound.clamp(min=1e-300)).max())
