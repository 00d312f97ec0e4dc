"""Small members of the family with random weights, and their stock transformers twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.config import ModelConfig, parse_config
from dsc.frontends.huggingface import stock_causal_lm

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def small(**changes: Any) -> ModelConfig:
    """A V3 of three layers (one dense) with every mechanism on; `changes` are config fields."""
    fields: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 64,
        "rope_parameters": YARN,
    }
    return parse_config(fields | changes)


def small_v2(**changes: Any) -> ModelConfig:
    """The same as a V2: softmax scores, no bias, no normalising, true complex rotation."""
    router = {"model_type": "deepseek_v2", "routed_scaling_factor": 1.0}
    return small(**(router | changes))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in place: norms about 1, matrices small, router biases of both signs."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        values = torch.randn(tensor.shape, generator=random)
        centre = 1.0 if "norm" in name else 0.0
        with torch.no_grad():
            tensor.copy_(centre + 0.15 * values)
    return module


def stock(config: ModelConfig, seed: int = 0, *, ragged: bool = False) -> CausalLMStep:
    """The stock transformers model of `config` with random fp32 weights."""
    model = randomise(stock_causal_lm(config, device="cpu"), seed)
    return CausalLMStep(model, ragged=ragged)


def empty_caches(config: ModelConfig, batch: int = 1, rows: int = 0) -> tuple[Tensor, ...]:
    """Caches of zeros, `[batch, rows, width]`, two a layer."""
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    return tuple(
        torch.zeros(batch, rows, width) for _ in range(config.num_hidden_layers) for width in widths
    )


def advance(
    model: nn.Module, ids: Tensor, past: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Feed `ids` [B,S] behind full caches: logits of all S tokens, and the grown caches."""
    batch, new = ids.shape
    start = past[0].shape[1]
    columns = torch.arange(new).expand(batch, new)
    lengths = torch.full((batch,), start)
    with torch.no_grad():
        logits, *present = model(ids, columns + start, lengths, columns, *past)
    return logits, tuple(present)
