"""A checkpoint as a GGUF file for llama.cpp: `deepseek2` with absorbed MLA, `llama` or `qwen2`.

Needs numpy and the `gguf` package, and nothing of dsc: it runs in llama.cpp's environment. Tensors
are mapped from the checkpoint and written one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
"""Kept in fp32, as llama.cpp wants them."""
PLAIN = ("llama", "qwen2")
"""Architectures whose caches hold keys and values; llama.cpp calls them so too."""
BIASES = {f"self_attn.{p}_proj.bias": f"attn_{p}.bias" for p in "qkv"}
"""In fp32 too."""
TURNED = {
    "self_attn.q_proj.weight": "num_attention_heads",
    "self_attn.k_proj.weight": "num_key_value_heads",
}
"""What rotary embedding turns, pairs of which lie side by side in `llama`; and how many heads."""
MATRICES = {
    **{f"self_attn.{p}_proj.weight": f"attn_{p}.weight" for p in "qkv"},
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"mlp.{p}_proj.weight": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
    **{
        f"mlp.shared_experts.{p}_proj.weight": f"ffn_{p}_shexp.weight"
        for p in ("gate", "up", "down")
    },
}
FILES = {"none": 32, "int8": 7, "int4": 2}
"""llama.cpp's number of a file whose matrices are in bf16, Q8_0, Q4_0, by what we call it."""
KINDS = {"none": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""The types of its matrices."""
HEAD = "output.weight"


def convert(folder: Path, path: Path, quant: str = "none") -> None:
    """Write `path`, whole or not at all; the head of a file in Q4_0 is in Q8_0."""
    gguf: Any = import_module("gguf")
    quants: Any = import_module("gguf.quants")
    config = json.loads((folder / "config.json").read_text())
    if config.get("rope_scaling"):
        raise ValueError("scaled rotary embeddings are not converted")
    found = checkpoint(folder)
    unfinished = path.with_suffix(".partial")
    kind = config.get("model_type")
    plain = kind in PLAIN
    writer = gguf.GGUFWriter(str(unfinished), kind if plain else "deepseek2")
    told = plain_metadata(config) if plain else metadata(config)
    for name, value in (told | {"file_type": FILES[quant]}).items():
        getattr(writer, f"add_{name}")(value)
    if not plain:
        scoring = config.get("scoring_func", "sigmoid").upper()
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[scoring])
    parts = list(converted(config, found))
    kinds = {}
    for part in parts:
        if not part.matrix:
            size = 4 * int(np.prod(part.shape))
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size)
            continue
        name = "Q8_0" if quant == "int4" and part.name == HEAD else KINDS[quant]
        kind = kinds[part.name] = gguf.GGMLQuantizationType[name]
        per, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*part.shape[:-1], part.shape[-1] // per * size)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        values = part.make()
        if quant != "none" and part.matrix:
            values = quants.quantize(widened(values), kinds[part.name])
        writer.write_tensor_data(np.ascontiguousarray(values))
    writer.close()
    unfinished.rename(path)


@dataclass(frozen=True)
class Part:
    """A tensor of the file: a matrix, or fp32; `make` gives its values in bf16 or fp32."""

    name: str
    shape: tuple[int, ...]
    matrix: bool
    make: Callable[[], Array]


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every architecture has."""
    parameters = config.get("rope_parameters") or {}
    return {
        "name": "random weights",
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "rope_freq_base": float(config.get("rope_theta") or parameters["rope_theta"]),
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "tokenizer_model": "no_vocab",
    }


def plain_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of the writer's `add_` methods, where caches hold keys and values."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return _common(config) | {
        "head_count_kv": config["num_key_value_heads"],
        "key_length": width,
        "value_length": width,
        "rope_dimension_count": width,
    }


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of the writer's `add_` methods."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return _common(config) | {
        "head_count_kv": 1,  # the latent cache is one head that all share
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_group_count": config.get("n_group", 1),
        "expert_group_used_count": config.get("topk_group", 1),
        "leading_dense_block_count": config["first_k_dense_replace"],
        "q_lora_rank": config.get("q_lora_rank") or 0,  # 0: one matrix; absent: guessed by depth
        "kv_lora_rank": rank,
        "key_length": rank + rope,
        "value_length": rank,
        "key_length_mla": config["qk_nope_head_dim"] + rope,
        "value_length_mla": config["v_head_dim"],
        "rope_dimension_count": rope,
    }


def converted(config: Mapping[str, Any], found: Mapping[str, Mapped]) -> Iterator[Part]:
    """All tensors of the file."""
    yield _matrix("token_embd.weight", found["model.embed_tokens.weight"])
    yield _vector("output_norm.weight", found["model.norm.weight"])
    tied = found["model.embed_tokens.weight"]
    yield _matrix("output.weight", found.get("lm_head.weight", tied))
    plain = config.get("model_type") in PLAIN
    turned = TURNED if config.get("model_type") == "llama" else {}
    heads = config["num_attention_heads"]
    for index in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{index}.", f"blk.{index}."
        for source, target in (NORMS | BIASES).items():
            if layer + source in found:
                yield _vector(block + target, found[layer + source])
        for source, target in MATRICES.items():
            if layer + source in found:
                count = config[turned[source]] if source in turned else 0
                yield _matrix(block + target, found[layer + source], count)
        if plain:
            continue
        nope = config["qk_nope_head_dim"]
        yield from _by_head(block, found[f"{layer}self_attn.kv_b_proj.weight"], heads, nope)
        if index < config["first_k_dense_replace"]:
            continue
        for part in ("gate", "up", "down"):
            names = [f"{layer}mlp.experts.{e}.{part}" for e in range(config["n_routed_experts"])]
            each = [found[f"{name}_proj.weight"] for name in names]
            shape = (len(each), *each[0].shape)
            yield Part(f"{block}ffn_{part}_exps.weight", shape, True, partial(_stacked, each))


def _vector(name: str, source: Mapped) -> Part:
    return Part(name, source.shape, False, lambda: widened(source()))


def _matrix(name: str, source: Mapped, heads: int = 0) -> Part:
    """A matrix; of so many heads whose halves are turned, in the order of pairs side by side."""

    def paired() -> Array:
        rows, depth = source.shape
        return (
            source()
            .reshape(heads, 2, rows // heads // 2, depth)
            .swapaxes(1, 2)
            .reshape(rows, depth)
        )

    return Part(name, source.shape, True, paired if heads else source)


def _by_head(block: str, kv_b: Mapped, heads: int, nope: int) -> Iterator[Part]:
    """The latent's expansion, cut into what the query absorbs (transposed) and what values take."""
    rows, rank = kv_b.shape
    value = rows // heads - nope

    def keys() -> Array:
        return kv_b().reshape(heads, nope + value, rank)[:, :nope].swapaxes(1, 2)

    def values() -> Array:
        return kv_b().reshape(heads, nope + value, rank)[:, nope:]

    yield Part(block + "attn_k_b.weight", (heads, rank, nope), True, keys)
    yield Part(block + "attn_v_b.weight", (heads, value, rank), True, values)


def _stacked(each: list[Mapped]) -> Array:
    return np.stack([source() for source in each])


def widened(values: Array) -> Array:
    """Bits of bf16 as fp32; fp32 as it is."""
    if values.dtype == np.float32:
        return np.array(values)
    return (values.astype(np.uint32) << 16).view(np.float32)


def checkpoint(folder: Path) -> dict[str, Mapped]:
    """What gives each tensor of a folder of safetensors files, mapped; bf16 as uint16."""
    found: dict[str, Mapped] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, facts in header.items():
            if name != "__metadata__":
                found[name] = Mapped(path, 8 + length + facts["data_offsets"][0], facts)
    return found


class Mapped:
    """A tensor in a file, mapped when it is asked for."""

    def __init__(self, path: Path, start: int, facts: Mapping[str, Any]) -> None:
        self.path, self.start, self.shape = path, start, tuple(facts["shape"])
        self.dtype = {"BF16": np.uint16, "F32": np.float32}[facts["dtype"]]

    def __call__(self) -> Array:
        """Its values; bf16 as uint16."""
        return np.memmap(self.path, self.dtype, "r", self.start, self.shape)
