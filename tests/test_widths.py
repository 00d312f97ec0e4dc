"""Configurations whose widths coincide go through every pass and compute what was traced.

`python -m bench.bars random_configs` traces, compiles and runs a thousand of them on every backend.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from bench.random_configs import EQUATIONS, draw
from dsc.errors import ConfigError
from dsc.frontends.family import ModelConfig, parse_config
from dsc.ir.program import Program
from dsc.ir.weights import random_source, sources
from tests.whole_pipeline import Setting, check
from tests.widths import APART, at

BACKENDS = ("tvm", "onnxruntime", "reference", "every")
SAMPLED = 24


def structured(index: int) -> tuple[str, ModelConfig] | None:
    """Configuration `index` of the bar with the structure of a stored trace, if it can have it."""
    drawn = draw(index).model_dump(exclude_none=True)
    name = "v3" if drawn["model_type"] == "deepseek_v3" else "v2"
    kept = {k: v for k, v in APART[name].items() if k not in drawn or not isinstance(v, int)}
    layers = {k: APART[name][k] for k in ("num_hidden_layers", "first_k_dense_replace")}
    query: dict[str, Any] = {"q_lora_rank": drawn.get("q_lora_rank", drawn["kv_lora_rank"])}
    plain: dict[str, Any] = {
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
    }
    try:
        return name, parse_config(drawn | plain | query | kept | layers | APART_ROUTER[name])
    except ConfigError:
        return None


APART_ROUTER: dict[str, dict[str, Any]] = {
    "v3": {"norm_topk_prob": True},
    "v2": {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
}


def valued(program: Program) -> Program:
    types = {s.key: s.type for expr in program.weights.values() for s in sources(expr)}
    return replace(program, source=random_source(types))


def test_coinciding_widths_keep_their_meaning_through_all_passes() -> None:
    found = (structured(index) for index in range(len(EQUATIONS)))
    sample = list(islice((each for each in found if each is not None), SAMPLED))
    assert {name for name, _ in sample} == {"v3", "v2"}
    for turn, (name, config) in enumerate(sample):
        check(valued(at(name, config)), Setting(backend=BACKENDS[turn % len(BACKENDS)]))


@pytest.mark.parametrize(("latent", "v"), [(16, 24), (48, 32)])
def test_the_rope_of_all_heads_may_be_as_wide_as_nope(latent: int, v: int) -> None:
    """heads x rope = nope: then the split of one is shaped like that of the other."""
    changes = {
        "num_attention_heads": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "kv_lora_rank": latent, "v_head_dim": v, "hidden_size": 32, "q_lora_rank": 24,
    }  # fmt: skip
    config = parse_config(APART["v3"] | SMALL | changes)
    check(valued(at("v3", config)), Setting(backend="tvm"))


SMALL = {
    "vocab_size": 17, "moe_intermediate_size": 6, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2,
}  # fmt: skip
