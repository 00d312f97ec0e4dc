"""Small checkpoints of releases: their `config.json` as published but for widths and counts.

What the releases say is in `tests/data/released-configs.json`. A folder has the names, formats and
leftovers that a release has: FP8 codes with `weight_scale_inv` where it says so, experts one by
one, the layers that predict further tokens, Python files that must not be imported.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.parity import randomise
from bench.quantised_folders import LAYOUTS, stored
from dsc.ir.arrays import array_of, tensor_of

DATA = Path(__file__).parent / "data" / "released-configs.json"
RELEASES: dict[str, dict[str, Any]] = json.loads(DATA.read_text())
VOCABULARY = 384
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 160, "intermediate_size": 144,
    "moe_intermediate_size": 136, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 132, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "qk_head_dim": 20, "n_routed_experts": 16, "num_attention_heads": 4,
}  # fmt: skip
"""Widths past a block of 128, and two layers: a dense one, and one of experts."""
LEFT_OUT = (
    "architectures", "auto_map", "model_type", "quantization_config", "torch_dtype", "dtype",
    "transformers_version",
)  # fmt: skip
"""Keys that transformers reads itself and gives to no class."""


@dataclass(frozen=True)
class Release:
    """A release in small: what its files say, and the stock model of the numbers they hold."""

    name: str
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, Tensor]
    stock: nn.Module

    @property
    def further(self) -> int:
        """Layers that predict further tokens."""
        return int(self.config.get("num_nextn_predict_layers", 0))

    @property
    def ends(self) -> list[int]:
        """The ids that end a text."""
        said = self.generation["eos_token_id"]
        return said if isinstance(said, list) else [said]

    def write(self, folder: Path) -> Path:
        """The checkpoint folder."""
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "generation_config.json").write_text(json.dumps(self.generation))
        save_file(self.tensors, folder / "model.safetensors")
        settings = RELEASES[self.name].get("tokenizer_config")
        if settings is not None:
            write_ranks(folder, settings)
        named = json.dumps([self.config.get("auto_map"), (settings or {}).get("auto_map")])
        for module in set(re.findall(r"\w+(?=\.\w+\")", named)):
            (folder / f"{module}.py").write_text("raise SystemExit('imported')\n")
        return folder


@cache
def release(name: str) -> Release:
    """A release, its weights drawn from a seed."""
    told = RELEASES[name]
    config, generation = shrunk(told["config"]), shrunk(told["generation_config"])
    stock = stock_of(config)
    quantised = "quantization_config" in config
    drawn = {
        key: value if key.endswith("e_score_correction_bias") else _bf16(value)
        for key, value in published(stock.state_dict()).items()
        if key != "lm_head.weight" or not config["tie_word_embeddings"]
    }
    made, numbers = stored(drawn, LAYOUTS["fp8-block"], 0) if quantised else (drawn, drawn)
    _fill(stock, numbers)
    whole = made | _further(made, config)
    tensors = {k: tensor_of(np.ascontiguousarray(t)).clone() for k, t in whole.items()}
    return Release(name, config, generation, tensors, stock)


def shrunk(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, with small widths, counts and ids."""
    made = {k: SMALL[k] if k in SMALL and v is not None else v for k, v in told.items()}
    heads = told.get("num_attention_heads")
    if heads is not None:
        made["num_key_value_heads"] = 4 if told["num_key_value_heads"] == heads else 2
    if "v_head_dim" in told:
        made["v_head_dim"] = told["v_head_dim"] // 16
    if "head_dim" in told:
        made["head_dim"] = SMALL["qk_rope_head_dim"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = told.get(key)
        if ids is not None:
            small = [each % VOCABULARY for each in np.atleast_1d(ids).tolist()]
            made[key] = small if isinstance(ids, list) else small[0]
    return made


def stock_of(config: Mapping[str, Any]) -> nn.Module:
    """The class of transformers that the release names, of its keys as transformers takes them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config["model_type"]
    kind = CONFIG_MAPPING["deepseek_v3" if model_type == "kimi_k2" else model_type]
    built = kind(**{k: v for k, v in config.items() if k not in LEFT_OUT})
    built._experts_implementation = "eager"  # which takes any widths
    stock: nn.Module = randomise(MODEL_FOR_CAUSAL_LM_MAPPING[kind](built).float().eval())
    return stock


def published(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A model's tensors under the names of a release, whose experts are one by one."""
    made: dict[str, Any] = {}
    for name, tensor in state.items():
        head, is_experts, last = name.partition(".mlp.experts.")
        if not is_experts:
            made[name] = array_of(tensor)
            continue
        for number, each in enumerate(tensor):
            parts = dict(zip(("gate_proj", "up_proj"), each.chunk(2), strict=True))
            for part, weight in (parts if last == "gate_up_proj" else {last: each}).items():
                made[f"{head}.mlp.experts.{number}.{part}.weight"] = array_of(weight)
    return made


def _bf16(value: Any) -> Any:
    return value.astype(ml_dtypes.bfloat16)


def _fill(stock: nn.Module, numbers: Mapping[str, Any]) -> None:
    """Give a model the numbers that a checkpoint holds."""
    state = stock.state_dict()
    for name, value in published(state).items():
        value[...] = numbers.get(name, numbers["model.embed_tokens.weight"]).astype(np.float32)


def _further(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers that predict further tokens: one more of the last kind, and what is before it."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    made: dict[str, Any] = {}
    for number in range(layers, layers + config.get("num_nextn_predict_layers", 0)):
        last, own = f"model.layers.{layers - 1}.", f"model.layers.{number}."
        made |= {own + k.removeprefix(last): v for k, v in tensors.items() if k.startswith(last)}
        ones = np.ones(hidden, ml_dtypes.bfloat16)
        made |= {own + n: ones for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        made[own + "eh_proj.weight"] = np.ones((hidden, 2 * hidden), ml_dtypes.bfloat16)
        made[own + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        made[own + "shared_head.head.weight"] = tensors["lm_head.weight"]
    return made


def write_ranks(folder: Path, settings: Mapping[str, Any]) -> None:
    """A tokenizer of bytes, in the two files that Moonlight and Kimi-K2 publish."""
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(ranks) + "\n")
    names = [settings[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")]
    decoder = {str(256 + i): {"content": n, "special": True} for i, n in enumerate(names)}
    told = {**settings, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
