"""Llama 4's queries in long texts: texts of fewer than `floor_scale` tokens are compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.parity import randomise
from dsc.errors import UnsupportedArchitecture
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.longrope import SHORT
from dsc.frontends.self_check import twin
from dsc.frontends.stock import clean, stock_model
from dsc.frontends.temperature import SCALE, has_temperature
from tests.decoders import PLAIN, ids

CONFIG: dict[str, Any] = PLAIN | {
    "model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 16,
    "no_rope_layers": [0, 1], "num_hidden_layers": 2, "floor_scale": 16, "attn_scale": 0.5,
}  # fmt: skip


def test_sequences_of_one_batch_have_queries_of_their_own() -> None:
    """A short one beside one of 16 tokens, from which on transformers' factor is another."""
    model: Any = randomise(stock_model(clean(CONFIG), device="cpu"))
    step = CausalLMStep(model, context=15)
    tokens, columns = ids(1, 5), torch.arange(5)[None]
    past = [torch.zeros(s.sizes(1, 0)) for s in step.signature.states]
    with torch.no_grad():
        alone = model(input_ids=tokens, use_cache=False).logits
        found, *_ = step(tokens, columns, torch.zeros(1, dtype=torch.int64), columns, *past)
        held = [torch.zeros(s.sizes(1, 16)) for s in step.signature.states]
        beside, *_ = step(tokens, columns, torch.zeros(1, dtype=torch.int64), columns, *held)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].self_attn.attn_temperature_tuning, "the model stays as it was"
    with pytest.raises(UnsupportedArchitecture, match="16 tokens on") as refused:
        CausalLMStep(model, context=16)
    assert "at most 15" in str(refused.value)


def test_a_twin_has_plain_texts() -> None:
    assert twin(clean(CONFIG)).values[SCALE] > SHORT
    assert has_temperature({"model_type": "llama4", "text_config": {}})
    assert not has_temperature({"model_type": "llama"})
