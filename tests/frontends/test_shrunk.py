"""A twin is small, and everything that makes its type what it is is still there."""

from __future__ import annotations

from typing import Any

import pytest

from dsc.frontends.shrunk import VOCABULARY, WIDEST, WINDOW, role_of, shrunk

LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False,
    "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": [128001, 128009],
    "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5,
                        "original_max_position_embeddings": 8192},
}  # fmt: skip


def test_a_llama_keeps_its_form() -> None:
    small = shrunk(LLAMA)
    assert small["num_hidden_layers"] == 2
    assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"] <= 128
    assert 1 < small["num_key_value_heads"] < small["num_attention_heads"]
    assert small["vocab_size"] == VOCABULARY
    assert max(small["eos_token_id"]) < VOCABULARY > small["bos_token_id"]
    named = ("hidden_act", "rms_norm_eps", "attention_bias", "rope_parameters")
    assert {k: small[k] for k in (*named, "max_position_embeddings")} == {
        k: LLAMA[k] for k in (*named, "max_position_embeddings")
    }


def test_heads_that_are_not_as_wide_as_the_model_are_not() -> None:
    small = shrunk(LLAMA | {"hidden_size": 2560, "head_dim": 128})
    assert small["hidden_size"] != small["num_attention_heads"] * small["head_dim"]


@pytest.mark.parametrize("shared", [1, 32])
def test_one_head_for_all_and_a_head_for_each_stay_so(shared: int) -> None:
    small = shrunk(LLAMA | {"num_key_value_heads": shared})
    assert small["num_key_value_heads"] == (1 if shared == 1 else small["num_attention_heads"])


def test_two_layers_of_each_kind_stay_in_their_order() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    dense = {"layer_types": types * 4, "first_k_dense_replace": 3, "num_hidden_layers": 24}
    small = shrunk(LLAMA | dense | {"mlp_only_layers": [4]})
    sliding, full = types[0], types[-1]
    assert small["layer_types"] == [*[sliding] * 4, full, sliding, full]
    assert small["num_hidden_layers"] == 7
    assert small["first_k_dense_replace"] == 2, "of three dense layers two were kept"
    assert small["mlp_only_layers"] == [3], "the dense ones 0 and 1, 3, and then 4 were kept"


def test_layers_that_repeat_are_cut_behind_their_period() -> None:
    small = shrunk(LLAMA | {"decoder_sparse_step": 3})
    assert small["decoder_sparse_step"] == small["num_hidden_layers"] == 3


def test_what_the_last_layers_share_is_still_shared() -> None:
    types = ["full_attention", "sliding_attention"] * 6
    small = shrunk(
        LLAMA | {"num_hidden_layers": 12, "layer_types": types, "num_kv_shared_layers": 4}
    )
    assert small["num_kv_shared_layers"] == 4
    assert small["num_hidden_layers"] == 8


def test_experts_stay_several_and_their_choice_what_it_was() -> None:
    experts = {
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "n_shared_experts": 1, "moe_intermediate_size": 2048,
    }  # fmt: skip
    small = shrunk(LLAMA | experts)
    assert (small["n_group"], small["topk_group"]) == (2, 1)
    assert small["num_experts_per_tok"] <= small["n_routed_experts"] // small["n_group"]
    assert small["n_shared_experts"] == 1
    all_chosen = shrunk(LLAMA | experts | {"num_experts_per_tok": 256})
    assert all_chosen["num_experts_per_tok"] == all_chosen["n_routed_experts"]


def test_latent_attention_keeps_its_sums_and_its_widths_apart() -> None:
    latent = {
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "qk_head_dim": 192, "v_head_dim": 128,
    }  # fmt: skip
    small = shrunk(LLAMA | latent)
    assert small["qk_head_dim"] == small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
    assert small["kv_lora_rank"] != small["q_lora_rank"]


def test_a_part_of_a_head_that_is_rotated_is_still_a_whole_number_of_pairs() -> None:
    small = shrunk(LLAMA | {"head_dim": 80, "hidden_size": 2560, "partial_rotary_factor": 0.25})
    assert int(small["head_dim"] * 0.25) % 2 == 0


def test_windows_are_shorter_than_what_is_tried_even_of_a_small_model() -> None:
    tiny = LLAMA | {
        "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "num_hidden_layers": 3, "sliding_window": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert shrunk(tiny) == tiny | {"sliding_window": WINDOW}


def test_sections_and_lists_shrink_too() -> None:
    small = shrunk(LLAMA | {"ffn_config": {"ffn_hidden_size": 9216}, "sizes": [16384] * 32})
    assert small["ffn_config"]["ffn_hidden_size"] <= WIDEST * 2
    assert small["sizes"] == [small["sizes"][0]] * 2
    assert small["sizes"][0] <= WIDEST * 2


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("num_experts_per_tok", "chosen"),
        ("moe_shared_expert_intermediate_size", "width"),
        ("n_shared_experts", "shared"),
        ("vocab_size_per_layer_input", "vocabulary"),
        ("max_position_embeddings", ""),
        ("sliding_window_pattern", "kept"),
        ("decoder_start_token_id", "id"),
    ],
)
def test_the_role_of_a_number_is_in_its_key(key: str, role: str) -> None:
    assert role_of(key) == role
