"""A real trace at other widths: two stored ones in which every extent differs, with others put in.

`tests/data/apart/v3.dsc` and `v2.dsc` are traces of stock models whose configuration
(`APART`) makes each number that a width has a part in unlike every other number. So a number in the
text says which product of widths it is, and `at` writes down the trace of another configuration of
the same structure in no time, where tracing takes seconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.parity import YARN
from dsc.frontends.config import ModelConfig, parse_config
from dsc.ir.parser import parse_program
from dsc.ir.program import Program

TRACED = Path(__file__).resolve().parent / "data" / "apart"
LEAST = 50
"""Smaller numbers are no widths: axes, and numbers that belong to the equations."""
OPEN = 2**31 - 1
_WIDTHS: dict[str, Any] = {
    "vocab_size": 1009, "hidden_size": 901, "intermediate_size": 107, "moe_intermediate_size": 101,
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 53,
    "q_lora_rank": 59, "kv_lora_rank": 62, "qk_nope_head_dim": 68, "qk_rope_head_dim": 142,
    "v_head_dim": 75, "n_routed_experts": 61 * 67, "n_group": 61, "topk_group": 57,
    "num_experts_per_tok": 97, "n_shared_experts": 54, "max_position_embeddings": 4096,
    "rope_parameters": YARN,
}  # fmt: skip
APART = {
    "v3": _WIDTHS | {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5},
    "v2": _WIDTHS
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
}


def extents(config: ModelConfig) -> list[int]:
    """Every number that a width of `config` has a part in, in a fixed order."""
    heads, nope, rope = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
    )
    v, latent, query = config.v_head_dim, config.kv_lora_rank, config.q_lora_rank or 1
    experts, groups, inner = (
        config.n_routed_experts,
        config.n_group,
        config.moe_intermediate_size,
    )
    shared = config.n_shared_experts * inner
    return [
        config.vocab_size, config.hidden_size, inner, 2 * inner, shared, heads, query, latent,
        nope, rope, rope - 1, rope // 2, v, nope + rope, nope + v, latent + rope,
        heads * (nope + rope), heads * (nope + v), heads * v, experts, groups,
        experts // groups, config.topk_group, config.num_experts_per_tok,
    ]  # fmt: skip


def at(name: str, config: ModelConfig) -> Program:
    """The stored trace `name` with the widths of `config`, over weights without values."""
    apart = parse_config(APART[name])
    old, new = extents(apart), extents(config)
    assert len(set(old)) == len(old)
    numbers = dict(zip(old, new, strict=True))
    text = (TRACED / f"{name}.dsc").read_text()
    text, scaled = re.subn(r"(?<=scale=)[\d.]+", repr(config.softmax_scale), text)
    assert scaled == 1

    def put(found: re.Match[str]) -> str:
        value, whole = int(found[1]), found[2] or ""
        return found[0] if value < LEAST or value >= OPEN else f"{numbers[value]}{whole}"

    return parse_program(re.sub(r"(?<![\w.])(\d+)(\.0)?(?![\w.])", put, text))
