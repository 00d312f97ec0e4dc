"""models/v3.py computes what transformers' DeepseekV3ForCausalLM computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.parity import PLAIN, YARN
from dsc.errors import UnsupportedArchitecture, UsageError
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.signature import Extents
from dsc.models import v3
from dsc.models.configs import CONFIGS, config
from tests.family import advance, empty_caches, small, small_v2, stock

TOLERANCE = 1e-5
BEYOND = 48
"""Tokens to feed: three times the context that the small YaRN configuration was trained on."""

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "no_q_lora": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1},
    "wide_values": {"v_head_dim": 20},
    "narrow_values": {"v_head_dim": 4},
    "plain_rope": {"rope_parameters": PLAIN},
    "half_rope": {"rope_interleave": False},
    "yarn_without_mscale": {"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}},
    "yarn_equal_betas": {"rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}},
    "yarn_untruncated": {"rope_parameters": {**YARN, "truncate": False}},
    "unnormalised": {"norm_topk_prob": False},
    "all_dense": {"first_k_dense_replace": 3},
    "biased": {"attention_bias": True},
    "eps": {"rms_norm_eps": 1e-3},
}


def twin(cfg: ModelConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stock model and ours with the same random weights."""
    reference = stock(cfg)
    ours = v3.build(cfg)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(97, (batch, count), generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_stock_in_prefill_chunks_and_decode(variant: dict[str, Any]) -> None:
    """Whole, in chunks of 20, then token by token, past the original YaRN context."""
    cfg = small(**variant)
    reference, ours = twin(cfg)
    ids = tokens(2, BEYOND)
    expected, expected_caches = advance(reference, ids, empty_caches(cfg, 2))
    whole, caches = advance(ours, ids, empty_caches(cfg, 2))
    assert_close(whole, expected)
    for found, wanted in zip(caches, expected_caches, strict=True):
        assert_close(found, wanted)

    past, parts = empty_caches(cfg, 2), []
    for chunk in torch.split(ids, [20, 20, *[1] * (BEYOND - 40)], dim=1):
        logits, past = advance(ours, chunk, past)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), expected)


def test_12_q_lora_null() -> None:
    names = set(v3.build(small(q_lora_rank=None)).state_dict())
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("q_a_" in name or "q_b_" in name for name in names)


def test_13_value_width_differs_from_key_width() -> None:
    """The split of kv_b and the reshape before o_proj must both use the value width."""
    cfg = small(v_head_dim=20)
    reference, ours = twin(cfg)
    assert ours.get_parameter("model.layers.0.self_attn.kv_b_proj.weight").shape == (4 * 32, 16)
    expected, _ = advance(reference, tokens(1, 7), empty_caches(cfg))
    found, _ = advance(ours, tokens(1, 7), empty_caches(cfg))
    assert_close(found, expected)


def test_02_negative_bias_with_masked_groups() -> None:
    """Masked experts count as -inf: at 0 they would beat all kept ones, whose scores are below."""
    cfg = small()
    reference, ours = twin(cfg)
    for model in (reference, ours):
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer -= 2
    ids = tokens(2, 20)
    expected, _ = advance(reference, ids, empty_caches(cfg, 2))
    found, _ = advance(ours, ids, empty_caches(cfg, 2))
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["tiny", "16b", "671b", "moonlight"])
def test_frequencies_equal_stock_to_the_bit(name: str) -> None:
    cfg = config(name).model_copy(update={"num_hidden_layers": 1})
    expected = stock_causal_lm(cfg).get_buffer("model.rotary_emb.inv_freq")
    found = v3.inverse_frequencies(cfg.rope_parameters, cfg.qk_rope_head_dim)
    assert torch.equal(found, expected)


def test_yarn_matters_beyond_the_original_context() -> None:
    """Guards the equality above: without YaRN the same weights give other logits."""
    _, yarn = twin(small())
    plain = v3.build(small(rope_parameters=PLAIN))
    plain.load_state_dict(yarn.state_dict())
    ids = tokens(1, BEYOND)
    with_yarn, _ = advance(yarn, ids, empty_caches(small()))
    without, _ = advance(plain, ids, empty_caches(small()))
    assert (with_yarn - without).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("ragged_stock", [False, True], ids=["v3", "stock"])
def test_sequences_of_different_lengths_share_a_batch(ragged_stock: bool) -> None:
    """Each row of a padded batch equals the same sequence alone, in prefill and in decode."""
    cfg = small()
    reference, ours = twin(cfg)
    model = stock(cfg) if ragged_stock else ours
    cached, added = torch.tensor([5, 2, 0]), torch.tensor([4, 1, 3])
    ids = tokens(3, 10)
    past = [torch.full_like(cache, 9.0) for cache in empty_caches(cfg, 3, 5)]
    alone = []
    for row in range(3):
        end = int(cached[row] + added[row])
        if cached[row]:
            _, own = advance(reference, ids[row : row + 1, : cached[row]], empty_caches(cfg))
            for cache, part in zip(past, own, strict=True):
                cache[row, : cached[row]] = part[0]
        logits, _ = advance(reference, ids[row : row + 1, : end + 1], empty_caches(cfg))
        alone.append(logits[0])

    columns = torch.arange(4)
    positions = cached[:, None] + columns
    new = ids.gather(1, positions)
    last = (added - 1)[:, None]
    with torch.no_grad():
        logits, *past = model(new, positions, cached, last, *past)
        lengths = cached + added
        following = ids.gather(1, lengths[:, None])
        again, *_ = model(following, lengths[:, None], lengths, torch.zeros_like(last), *past)
    for row in range(3):
        assert_close(logits[row, 0], alone[row][-2])
        assert_close(again[row, 0], alone[row][-1])


def test_no_logits_but_those_asked_for() -> None:
    cfg = small()
    model = twin(cfg)[1]
    inputs = list(states_of(cfg).example_inputs(Extents(2, 5, 7, 3)))
    with torch.no_grad():
        few = model(*inputs)[0]
        inputs[3] = torch.arange(5).expand(2, 5)
        every = model(*inputs)[0]
    rows = states_of(cfg).example_inputs(Extents(2, 5, 7, 3))[3]
    assert few.shape == (2, 3, 97)
    for batch, column in ((0, 0), (1, 2)):
        assert_close(few[batch, column], every[batch, rows[batch, column]])


def test_one_export_serves_all_extents() -> None:
    """One non-strict trace with B, S, P, L symbolic, bit-equal to eager where dims are 0 or 1."""
    cfg = small(num_hidden_layers=2)
    model, signature = twin(cfg)[1], states_of(cfg)
    shapes = signature.dynamic_shapes()
    traced = torch.export.export(
        model, signature.example_inputs(), dynamic_shapes=shapes, strict=False
    ).module()
    for batch, new, past in ((1, 1, 9), (2, 1, 3), (1, 8, 0), (1, 1, 0), (3, 4, 2)):
        inputs = signature.example_inputs(Extents(batch, new, past, 1), seed=batch + new + past)
        with torch.no_grad():
            expected, found = model(*inputs), traced(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_buffers_are_real_on_meta() -> None:
    """A model without memory for weights still has rope frequencies, equal to stock's."""
    with torch.device("meta"):
        model = v3.build(small())
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    expected = stock(small()).get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(frequencies, expected)
    assert model.get_parameter("lm_head.weight").is_meta


def test_tied_embeddings_are_one_tensor() -> None:
    model = v3.build(small(tie_word_embeddings=True))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("name", "billions"), [("moonlight", 16.0), ("16b", 15.7), ("236b", 235.7), ("671b", 671.0)]
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = v3.build(config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_v2_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="deepseek_v2"):
        v3.build(small_v2())


def test_presets_by_name_or_path() -> None:
    assert set(CONFIGS) == {"tiny", "moonlight", "16b", "236b", "671b"}
    assert config("tiny").num_hidden_layers == 4
    assert config(str(CONFIGS["671b"])) == config("671b")
    with pytest.raises(UsageError, match="one of tiny, moonlight"):
        config("70b")
