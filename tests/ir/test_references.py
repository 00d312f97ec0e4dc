"""References against independent formulations, and the regression tests that carry numbers.

The numbers are those of the list of bugs that other projects shipped (routing, rotary layouts,
latent attention); each test computes the same thing another way.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from dsc.ir.op import registry

OPS = registry()


def call(name: str, *operands: Any, **attrs: Any) -> Any:
    return OPS[name].reference(*operands, **OPS[name].with_defaults(attrs))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- routing --------------------------------------------------------------------------------------


def route_by_loop(
    x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor | None, *, score: str, groups: int,
    keep: int, group_score: str, top_k: int, normalise: bool, scale: float,
) -> list[dict[int, float]]:  # fmt: skip
    """One token after another, in Python numbers: expert -> weight."""
    chosen = []
    for token in x:
        logits = [float(torch.dot(row, token)) for row in gate]
        if score == "sigmoid":
            s = [1 / (1 + math.exp(-v)) for v in logits]
        else:
            total = sum(math.exp(v - max(logits)) for v in logits)
            s = [math.exp(v - max(logits)) / total for v in logits]
        biased = [a + (0.0 if bias is None else float(bias[e])) for e, a in enumerate(s)]
        size = len(s) // groups
        best = []
        for g in range(groups):
            inside = sorted(biased[g * size : (g + 1) * size], reverse=True)
            best.append(inside[0] + inside[1] if group_score == "top2" else inside[0])
        kept = sorted(range(groups), key=lambda g: -best[g])[:keep]
        allowed = [e for e in range(len(s)) if e // size in kept]
        picks = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        total = sum(s[e] for e in picks) + 1e-20 if normalise else 1.0
        chosen.append({e: s[e] / total * scale for e in picks})
    return chosen


ROUTERS = [
    {"score": "sigmoid", "groups": 4, "keep": 2, "group_score": "top2", "top_k": 3,
     "normalise": True, "scale": 2.5},
    {"score": "softmax", "groups": 1, "keep": 1, "group_score": "max", "top_k": 6,
     "normalise": False, "scale": 1.0},
    {"score": "softmax", "groups": 4, "keep": 3, "group_score": "max", "top_k": 2,
     "normalise": False, "scale": 16.0},
    {"score": "sigmoid", "groups": 1, "keep": 1, "group_score": "top2", "top_k": 4,
     "normalise": True, "scale": 2.827},
]  # fmt: skip


@pytest.mark.parametrize("config", ROUTERS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_route_agrees_with_a_loop(config: dict[str, Any], with_bias: bool) -> None:
    x, gate = randn(20, 8), randn(12, 8)
    bias = randn(12) * 0.3 if with_bias else None
    idx, w = call("route", x, gate, bias, fill=float("-inf"), **config)
    for token, wanted in enumerate(route_by_loop(x, gate, bias, **config)):
        made = dict(zip(idx[token].tolist(), w[token].tolist(), strict=True))
        assert made.keys() == wanted.keys()
        for expert, weight in wanted.items():
            assert made[expert] == pytest.approx(weight, rel=1e-5)


def test_01_weights_from_unbiased_scores() -> None:
    gate = torch.eye(4)
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    idx, w = call("route", x, gate, bias, score="sigmoid", top_k=2, normalise=False)
    weights = dict(zip(idx[0].tolist(), w[0].tolist(), strict=True))
    assert set(weights) == {0, 3}, "the bias selects expert 3"
    assert weights[3] == pytest.approx(float(torch.tensor(-1.0).sigmoid()))
    assert weights[0] == pytest.approx(float(torch.tensor(2.0).sigmoid()))


def test_02_negative_bias_with_masked_groups() -> None:
    """With all biased scores negative, a masked expert at 0.0 would win over every kept one."""
    gate, x = torch.eye(8), torch.zeros(1, 8)
    x[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    bias = torch.full((8,), -5.0)
    config: dict[str, Any] = {"score": "sigmoid", "groups": 4, "keep": 2, "top_k": 3,
                              "normalise": True}  # fmt: skip
    idx, w = call("route", x, gate, bias, fill=float("-inf"), **config)
    assert set(idx[0].tolist()) == {0, 1, 2}
    assert float(w.sum()) == pytest.approx(1.0)
    old, _ = call("route", x, gate, bias, fill=0.0, **config)
    assert set(old[0].tolist()) <= {4, 5, 6, 7}, "what older code did"


def test_03_scale_after_normalising() -> None:
    x, gate = randn(5, 8), randn(12, 8)
    _, w = call("route", x, gate, None, score="sigmoid", top_k=4, normalise=True, scale=2.5)
    close(w.sum(-1), torch.full((5,), 2.5))


def test_scores_that_all_underflow_give_zeros_not_nan() -> None:
    x, gate = torch.full((1, 2), -200.0), torch.ones(4, 2)
    _, w = call("route", x, gate, None, score="sigmoid", top_k=2, normalise=True)
    assert w.tolist() == [[0.0, 0.0]]


def test_shared_experts_follow_the_chosen_with_weight_1() -> None:
    x, gate = torch.randn(4, 8), torch.randn(6, 8)
    config = {"score": "sigmoid", "top_k": 2, "normalise": True, "scale": 2.5}
    idx, w = call("route", x, gate, None, **config)
    more, ones = call("route", x, gate, None, **config, shared=2)
    assert torch.equal(more, torch.cat([idx, torch.tensor([[6, 7]] * 4)], 1))
    assert torch.equal(ones, torch.cat([w, torch.ones(4, 2)], 1))


def test_a_bf16_router_scores_in_fp32() -> None:
    x, gate = randn(7, 8).bfloat16(), randn(12, 8).bfloat16()
    narrow = call("route", x, gate, None, score="softmax", top_k=3, normalise=False)
    wide = call("route", x.float(), gate.float(), None, score="softmax", top_k=3, normalise=False)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


# --- experts --------------------------------------------------------------------------------------


def experts_case(tokens: int, experts: int, k: int, all_on: int | None = None) -> tuple[Any, ...]:
    d, i = 8, 5
    x = randn(tokens, d)
    idx = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:k]
                       for t in range(tokens)]) if tokens else torch.zeros(0, k).long()  # fmt: skip
    if all_on is not None:
        idx = torch.full((tokens, k), all_on)
    return x, idx, randn(tokens, k).abs(), randn(experts, 2 * i, d), randn(experts, d, i)


def experts_by_loop(x: Any, idx: Any, w: Any, gate_up: Any, down: Any) -> torch.Tensor:
    out = torch.zeros_like(x)
    inner = down.shape[2]
    for t in range(len(x)):
        for slot, e in enumerate(idx[t].tolist()):
            gate, up = gate_up[e, :inner] @ x[t], gate_up[e, inner:] @ x[t]
            out[t] += w[t, slot] * (down[e] @ (gate * torch.sigmoid(gate) * up))
    return out


def grouped(x: Any, idx: Any, w: Any, gate_up: Any, down: Any) -> torch.Tensor:
    """The experts in the grouped form."""
    rows, offsets, order = call("dispatch", x, idx, experts=gate_up.shape[0])
    both = call("grouped_linear", rows, gate_up, offsets)
    gate, up = both.split(down.shape[2], -1)
    y = call("grouped_linear", call("swiglu", gate, up), down, offsets)
    made: torch.Tensor = call("combine", y, order, w)
    return made


@pytest.mark.parametrize(("tokens", "experts", "k"), [(9, 6, 2), (1, 4, 4), (3, 12, 1), (0, 4, 2)])
def test_experts_agree_with_a_loop_and_the_grouped_form(tokens: int, experts: int, k: int) -> None:
    case = experts_case(tokens, experts, k)
    close(call("experts", *case), experts_by_loop(*case))
    close(grouped(*case), experts_by_loop(*case))


def test_14_zero_token_and_one_expert() -> None:
    """Experts without tokens, and every token (twice) on the last expert."""
    case = experts_case(5, 4, 2, all_on=3)
    close(call("experts", *case), experts_by_loop(*case))
    close(grouped(*case), experts_by_loop(*case))
    _, offsets, order = call("dispatch", case[0], case[1], experts=4)
    assert offsets.tolist() == [0, 0, 0, 0, 10]
    assert order.tolist() == list(range(10)), "a stable sort"


def test_dispatch_keeps_the_order_of_tokens_within_an_expert() -> None:
    idx = torch.tensor([[1, 0], [0, 2], [1, 0]])
    rows, offsets, order = call("dispatch", torch.arange(3.0)[:, None], idx, experts=4)
    assert offsets.tolist() == [0, 3, 5, 6, 6]
    assert order.tolist() == [1, 2, 5, 0, 4, 3]
    assert rows[:, 0].tolist() == [0, 1, 2, 0, 2, 1]


def test_17_sum_over_expert_shards_equals_single() -> None:
    x, idx, w, gate_up, down = experts_case(7, 6, 3)
    total = torch.zeros_like(x)
    for lo in (0, 3):
        mine = (idx >= lo) & (idx < lo + 3)
        part = call("experts", x, torch.where(mine, idx - lo, 0), w * mine, gate_up[lo : lo + 3],
                    down[lo : lo + 3])  # fmt: skip
        total += part
    close(total, call("experts", x, idx, w, gate_up, down))


def test_experts_activations_and_leading_axes() -> None:
    x, idx, w, gate_up, down = experts_case(6, 4, 2)
    for act in ("silu", "gelu", "gelu_tanh", "relu"):
        flat = call("experts", x, idx, w, gate_up, down, act=act)
        shaped = call("experts", x.reshape(2, 3, 8), idx.reshape(2, 3, 2), w.reshape(2, 3, 2),
                      gate_up, down, act=act)  # fmt: skip
        close(flat.reshape(2, 3, 8), shaped)
    gate, up = (gate_up[0] @ x[0]).chunk(2)
    alone = call("experts", x[:1], torch.zeros(1, 1).long(), torch.ones(1, 1), gate_up, down,
                 act="gelu")  # fmt: skip
    close(alone[0], down[0] @ (functional.gelu(gate) * up))


def test_experts_with_biases_and_limits_are_those_of_gpt_oss() -> None:
    """The gate of GptOssExperts, over rows that were parted, in transformers' own words."""
    x, _, _, gate_up, down = experts_case(6, 4, 2)
    x, i = 4 * x, down.shape[2]
    idx, w = torch.full((6, 1), 2), torch.full((6, 1), 0.5)
    biases = torch.randn(4, 2 * i), torch.randn(4, 8)
    found = call("experts", x, idx, w, gate_up, down, *biases, limit=1.5, alpha=1.702, shift=1.0)
    gate, up = (x @ gate_up[2].T + biases[0][2]).chunk(2, -1)
    gate, up = gate.clamp(min=None, max=1.5), up.clamp(min=-1.5, max=1.5)
    glu = gate * torch.sigmoid(gate * 1.702)
    close(found, 0.5 * (((up + 1) * glu) @ down[2].T + biases[1][2]))


def test_route_by_biased_logits_is_softmax_over_the_chosen() -> None:
    """GptOssTopKRouter: the top k of x W^T + b, and softmax over them alone."""
    x, gate, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    idx, w = call("route", x, gate, None, bias, score="softmax", top_k=2, normalise=True)
    value, chosen = torch.topk(functional.linear(x, gate, bias), 2)
    assert bool((idx == chosen).all())
    close(w, value.softmax(-1))


def test_a_norm_by_a_wide_weight_rounds_once() -> None:
    """Gemma's and OLMo 2's order, where the weight is fp32; by one in bf16 it is Llama's."""
    x, weight = torch.randn(4, 16).bfloat16(), torch.randn(16)
    normed = functional.rms_norm(x.float(), (16,), eps=1e-6)
    late = call("rms_norm", x, weight, eps=1e-6)
    assert torch.equal(late, (normed * weight).bfloat16())
    early = call("rms_norm", x, weight.bfloat16(), eps=1e-6)
    assert torch.equal(early, normed.bfloat16() * weight.bfloat16())


# --- rotary embedding -----------------------------------------------------------------------------


def rotated_complex(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> Any:
    """The official formulation: interleaved pairs as complex numbers times e^(i angle)."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    turn = torch.polar(torch.ones(()).double(), positions[..., None].double() * inv_freq.double())
    if x.dim() == 4:
        turn = turn[:, :, None]
    return pairs * turn


@pytest.mark.parametrize("heads", [(), (3,)])
def test_05_rope_layouts(heads: tuple[int, ...]) -> None:
    x = randn(2, 5, *heads, 8)
    positions = torch.randint(0, 5000, (2, 5), generator=torch.Generator().manual_seed(1))
    inv_freq = 10000.0 ** (-torch.arange(0, 8, 2).float() / 8)
    z = rotated_complex(x, positions, inv_freq)
    apart = torch.view_as_real(z).float()
    official = call("rope", x, positions, inv_freq, layout="interleaved")
    close(official, apart.flatten(-2), 2e-3)
    halves = call("rope", x, positions, inv_freq, layout="deinterleave")
    close(halves, torch.cat([apart[..., 0], apart[..., 1]], -1), 2e-3)
    swapped = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    close(call("rope", swapped, positions, inv_freq, layout="half"), halves, 1e-6)
    close(call("rope", x, positions, inv_freq, layout="interleaved", scale=1.25), official * 1.25)
    wider = torch.cat([x, randn(2, 5, *heads, 6, seed=3)], -1)
    partly = call("rope", wider, positions, inv_freq, layout="interleaved", dims=8)
    close(partly[..., :8], apart.flatten(-2), 2e-3)
    assert torch.equal(partly[..., 8:], wider[..., 8:])


def test_05_scores_do_not_depend_on_the_layout() -> None:
    q, k = randn(1, 4, 2, 8), randn(1, 4, 8, seed=1)
    positions, inv_freq = torch.arange(4)[None] + 90, torch.rand(4)
    scores = [
        torch.einsum("bshr,btr->bhst", *(call("rope", x, positions, inv_freq, layout=layout)
                                         for x in (q, k)))
        for layout in ("interleaved", "deinterleave")
    ]  # fmt: skip
    close(scores[0], scores[1])


def test_rope_at_position_zero_is_the_identity() -> None:
    x, zero = randn(1, 2, 6), torch.zeros(1, 2).long()
    assert torch.equal(call("rope", x, zero, torch.rand(3), layout="interleaved"), x)


# --- attention ------------------------------------------------------------------------------------


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch's attention, which has heads before rows."""
    first = [x.transpose(1, 2) for x in (q, k, v)]
    made = functional.scaled_dot_product_attention(first[0], first[1], first[2], **options)
    return made.transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_agrees_with_torch(causal: bool, groups: int) -> None:
    q, k, v = randn(2, 5, 4, 6), randn(2, 5, groups, 6, seed=1), randn(2, 5, groups, 7, seed=2)
    made = call("attention", q, k, v, scale=0.4, causal=causal)
    wanted = by_torch(q, k, v, is_causal=causal, scale=0.4, enable_gqa=True)
    close(made, wanted)


def test_attention_with_lengths_masks_as_stated() -> None:
    q, k, v = randn(2, 3, 2, 4), randn(2, 7, 2, 4, seed=1), randn(2, 7, 2, 5, seed=2)
    lengths = torch.tensor([4, 1])
    mask = torch.zeros(2, 1, 3, 7, dtype=torch.bool)
    for b, n in enumerate(lengths.tolist()):
        for i in range(3):
            mask[b, 0, i, : n + i + 1] = True
    wanted = by_torch(q, k, v, attn_mask=mask, scale=0.5)
    close(call("attention", q, k, v, lengths, scale=0.5, causal=True), wanted)


def test_causal_attention_without_lengths_aligns_the_ends() -> None:
    q, k, v = randn(1, 2, 1, 4), randn(1, 5, 1, 4, seed=1), randn(1, 5, 1, 3, seed=2)
    made = call("attention", q, k, v, scale=1.0, causal=True)
    by_lengths = call("attention", q, k, v, torch.tensor([3]), scale=1.0, causal=True)
    assert torch.equal(made, by_lengths)


def mla_case(nope: int, value: int, seed: int = 0) -> dict[str, Any]:
    h, c, r, b, s, t = 3, 10, 4, 2, 3, 8
    return {
        "q_nope": randn(b, s, h, nope, seed=seed), "q_rope": randn(b, s, h, r, seed=seed + 1),
        "latent": randn(b, t, c, seed=seed + 2), "rope": randn(b, t, r, seed=seed + 3),
        "kv_b": randn(h * (nope + value), c, seed=seed + 4), "lengths": torch.tensor([5, 2]),
    }  # fmt: skip


def mla(case: dict[str, Any], **changes: Any) -> torch.Tensor:
    made: torch.Tensor = call("mla_attention", *{**case, **changes}.values(), scale=0.3)
    return made


@pytest.mark.parametrize(("nope", "value"), [(5, 5), (4, 7), (6, 2)])
def test_06_per_head_nope_v_split(nope: int, value: int) -> None:
    """kv_b per head is [k_nope | v], in that order; v may be wider or narrower (test 13 too)."""
    case = mla_case(nope, value)
    kv = (case["latent"] @ case["kv_b"].T).reshape(2, 8, 3, nope + value)
    k_nope, v = kv.split([nope, value], -1)
    k = torch.cat([k_nope, case["rope"][:, :, None].expand(-1, -1, 3, -1)], -1)
    q = torch.cat([case["q_nope"], case["q_rope"]], -1)
    wanted = call("attention", q, k, v, case["lengths"], scale=0.3, causal=True)
    close(mla(case), wanted)
    wrong = kv[..., value:] if nope == value else None
    assert wrong is None or not torch.allclose(mla(case), wrong.mean())


@pytest.mark.parametrize(("nope", "value"), [(5, 5), (4, 7)])
def test_07_absorbed_equals_expanded(nope: int, value: int) -> None:
    case = mla_case(nope, value)
    per_head = case["kv_b"].reshape(3, nope + value, -1)
    w_uk, w_uv = per_head[:, :nope], per_head[:, nope:]
    q_latent = torch.einsum("bshn,hnc->bshc", case["q_nope"], w_uk)
    o = call("latent_attention", q_latent, case["q_rope"], case["latent"], case["rope"],
             case["lengths"], scale=0.3)  # fmt: skip
    close(torch.einsum("bshc,hvc->bshv", o, w_uv), mla(case))


def test_latent_attention_is_attention_over_one_shared_key() -> None:
    case = mla_case(5, 5)
    q_latent = randn(2, 3, 3, 10)
    q = torch.cat([q_latent, case["q_rope"]], -1)
    k = torch.cat([case["latent"], case["rope"]], -1)[:, :, None]
    wanted = call("attention", q, k, case["latent"][:, :, None], case["lengths"], scale=0.3,
                  causal=True)  # fmt: skip
    made = call("latent_attention", q_latent, case["q_rope"], case["latent"], case["rope"],
                case["lengths"], scale=0.3)  # fmt: skip
    close(made, wanted)


def test_what_lies_beyond_the_lengths_is_not_seen() -> None:
    case = mla_case(5, 5)
    spoiled = {k: v.clone() for k, v in case.items()}
    for name in ("latent", "rope"):
        for b, n in enumerate(case["lengths"].tolist()):
            spoiled[name][b, n + 3 :] = 1e4
    assert torch.equal(mla(case), mla(spoiled))


@pytest.mark.parametrize("chunks", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)])
def test_08_chunked_prefill_equals_full(chunks: tuple[int, ...]) -> None:
    """Appending and attending chunk by chunk, functional or in place, is one full prefill."""
    h, nope, value, c, r, n = 2, 4, 5, 6, 4, 6
    q_nope, q_rope = randn(2, n, h, nope), randn(2, n, h, r)
    latent, rope, kv_b = randn(2, n, c), randn(2, n, r, seed=9), randn(h * (nope + value), c)
    zero = torch.zeros(2).long()
    full = call("mla_attention", q_nope, q_rope, latent, rope, kv_b, zero, scale=0.4)
    past = [latent[:, :0], rope[:, :0]]
    cache = [torch.full((2, n + 3, w), 1e4) for w in (c, r)]
    outputs: list[torch.Tensor] = []
    in_place: list[torch.Tensor] = []
    at = 0
    for size in chunks:
        part = slice(at, at + size)
        lengths = zero + at
        new = (latent[:, part], rope[:, part])
        past = [call("append", p, x, lengths) for p, x in zip(past, new, strict=True)]
        cache = [call("cache_write", p, x, lengths) for p, x in zip(cache, new, strict=True)]
        for form, into in ((past, outputs), (cache, in_place)):
            into.append(call("mla_attention", q_nope[:, part], q_rope[:, part], *form, kv_b,
                             lengths, scale=0.4))  # fmt: skip
        at += size
    assert torch.equal(past[0], latent)
    close(torch.cat(outputs, 1), full)
    close(torch.cat(in_place, 1), full)


def test_ragged_appends_equal_each_sequence_alone() -> None:
    past, new = randn(3, 4, 2), randn(3, 2, 2, seed=1)
    lengths = torch.tensor([0, 4, 2])
    together = call("append", past, new, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = call("append", past[b : b + 1, :n], new[b : b + 1], lengths[b : b + 1])
        assert torch.equal(together[b, : n + 2], alone[0])


# --- norms and the rest ---------------------------------------------------------------------------


def test_rms_norm_rounds_once_before_the_weight() -> None:
    x, w = randn(3, 8), randn(8, seed=1)
    close(call("rms_norm", x, w, eps=1e-6), functional.rms_norm(x, (8,), w, 1e-6))
    half = x.bfloat16()
    wide = half.double() / (half.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(call("rms_norm", half, w.bfloat16(), eps=1e-6),
                       wide.float().bfloat16() * w.bfloat16())  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layer_norm_is_in_fp32_and_rounds_once(dtype: torch.dtype) -> None:
    x, w, b = (randn(*s, seed=i).to(dtype) for i, s in enumerate([(3, 8), (8,), (8,)]))
    for bias in (None, b):
        wide = None if bias is None else bias.double()
        wanted = functional.layer_norm(x.double(), (8,), w.double(), wide)
        found = call("layer_norm", x, w, bias, eps=1e-5)
        assert found.dtype is dtype
        close(found.float(), wanted.to(dtype).float(), 1e-2 if dtype is torch.bfloat16 else 1e-6)
    far = torch.full((1, 8), 4096.0) + torch.arange(8)
    close(call("layer_norm", far, torch.ones(8), eps=1e-5),
          functional.layer_norm(far.double(), (8,)).float())  # fmt: skip


def test_swiglu_softmax_and_activations_compute_in_fp32() -> None:
    x, y = randn(4, 9).bfloat16(), randn(4, 9, seed=2).bfloat16()
    g = x.double()
    close(call("swiglu", x, y), (g / (1 + (-g).exp()) * y.double()).bfloat16(), 1e-2)
    close(call("softmax", x, axis=0), torch.softmax(g, 0).bfloat16(), 1e-2)
    assert call("softmax", g, axis=0).dtype == torch.float64
    for name in ("silu", "gelu", "sigmoid", "tanh", "exp", "erf"):
        wide = call(name, x.float())
        assert torch.equal(call(name, x), wide.bfloat16())
    total = call("sum", torch.ones(4096).bfloat16(), axes=(0,), keepdims=False)
    assert float(total) == 4096
    assert float(call("cumsum", torch.ones(4096).bfloat16(), axis=0)[-1]) == 4096


def test_integer_division_rounds_down_and_remainder_follows() -> None:
    a, b = torch.tensor([-7, 7, -6]), torch.tensor([2, -2, 3])
    assert call("div", a, b).tolist() == [-4, -4, -2]
    assert call("remainder", a, b).tolist() == [1, -1, 0]


def test_lookups_agree_with_indexing() -> None:
    x, index = randn(3, 4, 5), torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(call("take", x, index, axis=1), x[:, index])
    rows = torch.tensor([[3, 0], [1, 1], [2, 2]])
    assert torch.equal(call("select_rows", x, rows), torch.stack([x[b, rows[b]] for b in range(3)]))


def test_grouped_mm_leaves_rows_past_the_last_end_zero() -> None:
    x, w = randn(5, 3), randn(2, 3, 4)
    made = call("grouped_mm", x, w, torch.tensor([2, 4]))
    close(made, torch.cat([x[:2] @ w[0], x[2:4] @ w[1], torch.zeros(1, 4)]))
