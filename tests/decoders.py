"""Small configurations of decoders of many kinds, as somebody's `config.json` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.parity import BASE, randomise
from dsc.frontends.stock import StockConfig, clean, stock_model

PLAIN: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "qwen3": PLAIN,
    "mixtral": PLAIN | EXPERTS,
    "deepseek_v3": BASE | {"max_position_embeddings": 64},
    "gemma2": PLAIN | {"sliding_window": 5, "layer_types": SLIDING},
    "gemma3_text": PLAIN | {"sliding_window": 5, "layer_types": SLIDING},
    "gpt_oss": PLAIN | EXPERTS | {"sliding_window": 5, "layer_types": SLIDING},
    "mistral": PLAIN | {"sliding_window": 5},
    "glm4": PLAIN | {"partial_rotary_factor": 0.5},
    "gpt2": {
        "vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "glm4_moe_lite": PLAIN | LATENT | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 24, "routed_scaling_factor": 1.0,
        "norm_topk_prob": True, "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "falcon": PLAIN | {"multi_query": True, "new_decoder_architecture": False},
    "starcoder2": PLAIN,
}  # fmt: skip


def cleaned(name: str, **changes: Any) -> StockConfig:
    """A small decoder's configuration; `changes` are fields."""
    return clean({"model_type": name} | CONFIGS[name] | changes)


def decoder(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The stock model of it, with random fp32 weights."""
    return randomise(stock_model(cleaned(name, **changes), device="cpu"), seed)


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of a small vocabulary, [batch, length]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, length), generator=random)
