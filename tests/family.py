"""Small members of the family with random weights, and their stock transformers twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.parity import BASE, randomise
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.facts import Facts
from dsc.frontends.family import ModelConfig, parse_config
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.stock import clean


def small(**changes: Any) -> ModelConfig:
    """A V3 of three layers (one dense) with every mechanism on; `changes` are config fields."""
    return parse_config(BASE | {"max_position_embeddings": 64} | changes)


def facts(**changes: Any) -> Facts:
    """What is known of such a V3 from its configuration."""
    return clean(BASE | changes).facts


def small_v2(**changes: Any) -> ModelConfig:
    """The same as a V2: softmax scores, no bias, no normalising, true complex rotation."""
    router = {"model_type": "deepseek_v2", "routed_scaling_factor": 1.0}
    return small(**(router | changes))


def stock(config: ModelConfig, seed: int = 0) -> CausalLMStep:
    """The stock transformers model of `config` with random fp32 weights."""
    return CausalLMStep(randomise(stock_causal_lm(config, device="cpu"), seed))


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
