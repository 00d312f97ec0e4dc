"""A real trace at other widths: traced once where every extent differs, then others put in.

`apart` is a configuration that makes each number that a width has a part in unlike every other
number. So a number in the text of its trace says which product of widths it is, and `at` writes
down the trace of another configuration of the same structure in no time, where tracing takes
seconds. `Structure` is what decides all else in a trace: which layers there are, and their parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

from torch import nn

from bench import parity
from dsc.frontends.family import ModelConfig, parse_config
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.load import CONSTANT, load_program
from dsc.ir.limits import OPEN
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import DictSource, sources

LEAST = 50
"""Smaller numbers are no widths: axes, and numbers that belong to the equations."""
WIDTHS: dict[str, Any] = {
    "vocab_size": 1009, "hidden_size": 901, "intermediate_size": 107, "moe_intermediate_size": 101,
    "num_attention_heads": 53, "q_lora_rank": 59, "kv_lora_rank": 62, "qk_nope_head_dim": 68,
    "qk_rope_head_dim": 142, "v_head_dim": 75, "n_routed_experts": 61 * 67, "n_group": 61,
    "topk_group": 57, "num_experts_per_tok": 97, "n_shared_experts": 54,
    "max_position_embeddings": 4096,
}  # fmt: skip
OF_EXPERTS = (
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
)  # fmt: skip
SCALING = 77.25
"""A factor of routed experts that no other number of a trace equals."""


@dataclass(frozen=True, order=True)
class Structure:
    """What of a configuration is no width. `experts` says of each layer whether it has some."""

    model_type: str
    experts: tuple[bool, ...]
    q_lora: bool
    attention_bias: bool
    tie_word_embeddings: bool
    yarn: bool
    rope_interleave: bool
    norm_topk_prob: bool
    topk_method: str
    scaled: bool

    @staticmethod
    def of(config: ModelConfig) -> Structure:
        """That of `config`. A router that no layer has is not told from others."""
        experts = tuple(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        v3, routed = config.model_type == "deepseek_v3", any(experts)
        return Structure(
            config.model_type,
            experts,
            config.q_lora_rank is not None,
            config.attention_bias,
            config.tie_word_embeddings,
            config.rope_parameters.rope_type == "yarn",
            config.rope_interleave,
            config.norm_topk_prob if routed else v3,
            config.topk_method if routed or v3 else "greedy",
            routed and config.routed_scaling_factor != 1,
        )

    def impose(self, given: Mapping[str, Any]) -> ModelConfig:
        """The configuration of this structure and the widths, YaRN and factor that are `given`.

        Raises:
            ConfigError: it would not be legal.
        """
        rope = given.get("rope_parameters", parity.YARN)
        query = given.get("q_lora_rank", given["kv_lora_rank"])
        changes = {
            "model_type": self.model_type,
            "num_hidden_layers": len(self.experts),
            "first_k_dense_replace": self.experts.count(False),
            "q_lora_rank": query if self.q_lora else None,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_parameters": rope if self.yarn else parity.PLAIN,
            "rope_interleave": self.rope_interleave,
            "norm_topk_prob": self.norm_topk_prob,
            "topk_method": self.topk_method,
            "routed_scaling_factor": given["routed_scaling_factor"] if self.scaled else 1.0,
        }
        return parse_config({**given, **changes})

    def has(self, width: str) -> bool:
        """Whether a width means anything here."""
        if width == "q_lora_rank":
            return self.q_lora
        if width == "intermediate_size":
            return not all(self.experts)
        return any(self.experts) or width not in OF_EXPERTS

    def features(self) -> tuple[tuple[str, Any], ...]:
        """Its fields with their values."""
        return tuple((each.name, getattr(self, each.name)) for each in fields(self))

    def likeness(self, other: Structure) -> int:
        """How many features two structures share."""
        return len(set(self.features()) & set(other.features()))


def covering(known: Sequence[Structure], first: Sequence[Structure] = ()) -> list[Structure]:
    """`first`, and few of `known`, in which any two features meet that meet in one of `known`."""
    pairs = {each: set(combinations(each.features(), 2)) for each in sorted({*known, *first})}
    missing = set().union(*pairs.values()).difference(*(pairs[each] for each in first))
    found = list(first)
    while missing:
        found.append(max(pairs, key=lambda each: len(pairs[each] & missing)))
        missing -= pairs[found[-1]]
    return found


def apart(structure: Structure) -> ModelConfig:
    """The configuration of a structure in which every extent differs."""
    return structure.impose(WIDTHS | {"routed_scaling_factor": SCALING})


def valued(program: Program, stock: nn.Module) -> Program:
    """The program over the weights of a stock model, and the frequencies that it computed."""
    tensors = dict(stock.named_parameters(remove_duplicate=False)) | dict(stock.named_buffers())
    keys = {s.key for expr in program.weights.values() for s in sources(expr)}
    source = DictSource({k: tensors[k.removeprefix(CONSTANT)].detach() for k in keys})
    return replace(program, source=source)


def traced(config: ModelConfig, **limits: Any) -> Program:
    """The trace of the stock class on `meta`: without values."""
    return load_program(stock_causal_lm(config), **limits).program


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
        config.intermediate_size,
    ]  # fmt: skip


def at(text: str, unlike: ModelConfig, config: ModelConfig) -> Program:
    """The trace `text` of `unlike`, with the widths of `config`, over weights without values."""
    old, new = extents(unlike), extents(config)
    assert len(set(old)) == len(old)
    numbers = dict(zip(old, new, strict=True))
    layers = config.num_hidden_layers
    text, scaled = re.subn(r"(?<=scale=)[\d.]+", repr(config.softmax_scale), text)
    assert scaled == layers
    if Structure.of(config).scaled:
        factor = re.escape(repr(unlike.routed_scaling_factor))
        text = re.sub(rf"(?<=value=){factor}(?!\d)", repr(config.routed_scaling_factor), text)

    def put(found: re.Match[str]) -> str:
        value, whole = int(found[1]), found[2] or ""
        return found[0] if value < LEAST or value >= OPEN else f"{numbers[value]}{whole}"

    return parse_program(re.sub(r"(?<![\w.])(\d+)(\.0)?(?![\w.])", put, text))
