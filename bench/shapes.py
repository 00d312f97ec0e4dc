"""Checkpoints of random weights in a preset's layer shapes, with as many layers as asked.

`moonlight-6l` is Moonlight-16B-A3B with 6 layers and a vocabulary of 32000: 3.2 B parameters, of
which a token reads 564 M. Tensors are written one after another, so memory holds one at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PRESETS = Path(__file__).resolve().parent.parent / "models" / "configs"
VOCABULARY = 32000
CONTEXT = 32768
"""Positions of the written configuration: weights mean nothing, so any context can be measured."""
PLAIN: dict[str, dict[str, Any]] = {
    "qwen2-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151936, "max_position_embeddings": 32768,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_dropout": 0.0,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
        "use_sliding_window": False, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    },
}  # fmt: skip
"""Decoders with keys and values in their caches, by name, with all of their layers."""
STD = 0.02
SHARD = 4 << 30


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter: bf16, but for the router's bias; `std` 0 stands for ones."""

    name: str
    shape: tuple[int, ...]
    std: float = STD
    dtype: str = "BF16"

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * (2 if self.dtype == "BF16" else 4)


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of `PRESET-Nl`, or of a plain decoder. Exits with the names there are."""
    if name in PLAIN:
        return dict(PLAIN[name])
    presets = sorted(path.stem for path in PRESETS.glob("*.json"))
    found = re.fullmatch(r"(.+?)-(\d+)l", name)
    if found is None or found[1] not in presets or int(found[2]) < 1:
        plain = ", ".join(PLAIN)
        sys.exit(f"no shape {name!r}: {plain}, or PRESET-Nl, PRESET of {', '.join(presets)}")
    config: dict[str, Any] = json.loads((PRESETS / f"{found[1]}.json").read_text())
    config.pop("quantization_config", None)
    config |= {
        "num_hidden_layers": int(found[2]),
        "first_k_dense_replace": min(config["first_k_dense_replace"], int(found[2])),
        "vocab_size": min(VOCABULARY, config["vocab_size"]),
        "max_position_embeddings": max(CONTEXT, config["max_position_embeddings"]),
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    return config


def tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """All parameters of a checkpoint, under the names that the hub uses."""
    hidden = config["hidden_size"]
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield Tensor(f"{layer}.input_layernorm.weight", (hidden,), 0)
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), 0)
        yield from _attention(config, f"{layer}.self_attn")
        if index < config.get("first_k_dense_replace", index + 1):
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _experts(config, f"{layer}.mlp")
    yield Tensor("model.norm.weight", (hidden,), 0)
    if not config.get("tie_word_embeddings"):
        yield Tensor("lm_head.weight", (config["vocab_size"], hidden))


def _plain_attention(config: Mapping[str, Any], path: str) -> Iterator[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    rows = {"q": heads, "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    for part, count in rows.items():
        yield Tensor(f"{path}.{part}_proj.weight", (count * width, hidden))
        if config["model_type"] == "qwen2":
            yield Tensor(f"{path}.{part}_proj.bias", (count * width,))
    yield Tensor(f"{path}.o_proj.weight", (hidden, heads * width))


def _attention(config: Mapping[str, Any], path: str) -> Iterator[Tensor]:
    if "kv_lora_rank" not in config:
        yield from _plain_attention(config, path)
        return
    hidden, heads, rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if config.get("q_lora_rank"):
        low = config["q_lora_rank"]
        yield Tensor(f"{path}.q_a_proj.weight", (low, hidden))
        yield Tensor(f"{path}.q_a_layernorm.weight", (low,), 0)
        yield Tensor(f"{path}.q_b_proj.weight", (heads * (nope + rope), low))
    else:
        yield Tensor(f"{path}.q_proj.weight", (heads * (nope + rope), hidden))
    yield Tensor(f"{path}.kv_a_proj_with_mqa.weight", (rank + rope, hidden))
    yield Tensor(f"{path}.kv_a_layernorm.weight", (rank,), 0)
    yield Tensor(f"{path}.kv_b_proj.weight", (heads * (nope + value), rank))
    yield Tensor(f"{path}.o_proj.weight", (hidden, heads * value))


def _mlp(path: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(f"{path}.gate_proj.weight", (inner, hidden))
    yield Tensor(f"{path}.up_proj.weight", (inner, hidden))
    yield Tensor(f"{path}.down_proj.weight", (hidden, inner))


def _experts(config: Mapping[str, Any], path: str) -> Iterator[Tensor]:
    hidden, count, inner = (
        config[k] for k in ("hidden_size", "n_routed_experts", "moe_intermediate_size")
    )
    yield Tensor(f"{path}.gate.weight", (count, hidden))
    if config.get("topk_method", "noaux_tc") == "noaux_tc":
        yield Tensor(f"{path}.gate.e_score_correction_bias", (count,), STD, "F32")
    for expert in range(count):
        yield from _mlp(f"{path}.experts.{expert}", hidden, inner)
    if config.get("n_shared_experts"):
        yield from _mlp(f"{path}.shared_experts", hidden, inner * config["n_shared_experts"])


def write_checkpoint(config: Mapping[str, Any], folder: Path) -> None:
    """Write a folder as the hub lays it out; whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    random = np.random.default_rng(0)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors(config))):
        name = f"model-{number:05}.safetensors"
        with (partial / name).open("wb") as file:
            _write_shard(file, shard, random)
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {}, "weight_map": places}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    partial.rename(folder)


def _shards(found: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in found:
        if shard and sum(t.bytes for t in shard) + tensor.bytes > SHARD:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(file: BinaryIO, shard: list[Tensor], random: np.random.Generator) -> None:
    """Write a safetensors file: length of the header, header, bytes of the tensors."""
    header, at = {}, 0
    for tensor in shard:
        places = [at, at := at + tensor.bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": places,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        file.write(_values(tensor, random).tobytes())


def _values(tensor: Tensor, random: np.random.Generator) -> np.ndarray[Any, np.dtype[Any]]:
    """Values of a tensor, as bits of bf16 or as fp32."""
    if tensor.std == 0:
        values = np.ones(tensor.shape, np.float32)
    else:
        values = random.standard_normal(tensor.shape, np.float32) * np.float32(tensor.std)
    if tensor.dtype == "F32":
        return values
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
