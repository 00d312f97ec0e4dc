"""States of stock decoders are found by running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsc.errors import UnsupportedArchitecture
from dsc.frontends.states import discover, signature_of
from dsc.frontends.stock import clean, stock_model
from tests.decoders import CONFIGS, PLAIN, cleaned, decoder, ids

FOUND = {
    "llama": {("key", 16, 2), ("value", 16, 2)},
    "mixtral": {("key", 16, 2), ("value", 16, 2)},
    "gpt2": {("key", 32, 4), ("value", 32, 4)},
    "falcon": {("key", 8, 1), ("value", 8, 1)},
    "mistral": {("key", 16, 2), ("value", 16, 2)},
    "deepseek_v3": {("latent", 16, 1), ("rope", 8, 1)},
    "glm4_moe_lite": {("latent", 12, 1), ("rope", 4, 1)},
}
"""Name, width of a row and heads of what every layer keeps."""


@pytest.mark.parametrize("name", FOUND)
def test_what_a_decoder_keeps_is_found(name: str) -> None:
    states = discover(stock_model(cleaned(name)))
    assert {(s.name, s.shape[-1], s.heads) for s in states} == FOUND[name]
    assert {s.shape[:-1] for s in states} == {("B", "P")}
    assert [s.layer for s in states] == [0, 0, 1, 1, 2, 2]


def test_a_signature_of_some_layers_counts_them_from_0() -> None:
    kept = signature_of(stock_model(cleaned("gemma3_text"))).only((0, 2))
    assert kept.input_names()[4:] == ("past.0.key", "past.0.value", "past.1.key", "past.1.value")


def test_layers_may_share_what_one_of_them_keeps() -> None:
    raw = PLAIN | {
        "model_type": "gemma3n_text", "num_hidden_layers": 5, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 5, "sliding_window": 5,
        "intermediate_size": [48] * 5,
    }  # fmt: skip
    assert {s.layer for s in discover(stock_model(clean(raw)))} == {0, 1, 2}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}, "it is an encoder"),
        ({"model_type": "minimax", "num_hidden_layers": 2}, "states of convolutions"),
    ],
)
def test_what_is_no_decoder_with_rows_is_refused(raw: dict[str, object], why: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=why):
        discover(stock_model(clean(PLAIN | raw)))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_found_is_what_stock_caches(name: str) -> None:
    """Layer by layer: heads and widths of keys and values after a step of the stock model."""
    model: Any = decoder(name)
    with torch.no_grad():
        cache = model(input_ids=ids(1, 4), use_cache=True).past_key_values
    kept = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    states = discover(stock_model(cleaned(name)))
    assert [(s.heads, s.shape[-1]) for s in states] == [
        (x.shape[1], x.shape[1] * x.shape[3]) for x in kept
    ]
