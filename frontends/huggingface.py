"""A checkpoint folder becomes a module to trace and weights to read later.

The folder is data. `config.json` goes through our own schema, the weights are opened as
safetensors only, and the module is the stock transformers class of the family, built from the
checked configuration on the `meta` device. No Python file of the folder is imported, no pickle is
opened, `trust_remote_code` is never set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.errors import CheckpointError, ConfigError
from dsc.frontends.checked import CheckedSource
from dsc.frontends.config import CONFIG_FILE, DTYPES, ModelConfig, parse_config, read_bounded
from dsc.frontends.names import EMBEDDING, WeightMap, check_layout, map_weights
from dsc.ir.safetensors import SafetensorsSource, open_safetensors
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import WeightExpr, WeightSource, evaluate
from dsc.strict_json import JsonObject, parse_object

if TYPE_CHECKING:
    from torch import nn

    from dsc.frontends.causal_lm import CausalLMStep

MODELOPT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class CheckpointModel:
    """A checkpoint, opened and checked; no weight has been read.

    `raw` is `config.json` as it stands. Once parameters are `mapped`, `weights` gives each its
    expression over `source`, and `notes` tells, one sentence each, what the folder holds that is
    not used.
    """

    folder: Path
    raw: JsonObject
    config: ModelConfig
    dtype: DType
    source: WeightSource
    weights: Mapping[str, WeightExpr] = field(default_factory=dict)
    unused_mtp: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def mapped(self, parameters: Mapping[str, TensorType]) -> CheckpointModel:
        """The same checkpoint with its weights for these parameters, names and types.

        Raises `CheckpointError`: the weights are not those of the parameters.
        """
        found = map_weights(parameters, self.source, self.config, str(self.folder))
        told = self.config.quantization_config
        notes = _notes(self.folder, self.raw, found, told.activations if told else "")
        source = CheckedSource(self.source, found.checks) if found.checks else self.source
        return replace(
            self, source=source, weights=found.weights, unused_mtp=found.mtp, notes=notes
        )

    def build(self) -> CausalLMStep:
        """The module to trace: parameters on `meta`, computed buffers real."""
        from dsc.frontends.causal_lm import CausalLMStep

        return CausalLMStep(stock_causal_lm(self.config, self.dtype))

    def load(self) -> CausalLMStep:
        """The same module with its weights, copied to memory: the oracle for small checkpoints."""
        step = self.build()
        state = {name: evaluate(expr, self.source).clone() for name, expr in self.weights.items()}
        step.load_state_dict(state, strict=True, assign=True)
        return step

    def stock(self) -> nn.Module:
        """The stock class itself with its weights, to be run as transformers runs it.

        Its experts are those of the plain loop: torch's grouped GEMMs refuse odd widths.
        """
        model: Any = stock_causal_lm(self.config, self.dtype)
        model.load_state_dict(self.load().state_dict(), strict=True, assign=True)
        model.config._experts_implementation = "eager"
        stock: nn.Module = model
        return stock


def load_checkpoint(folder: Path | str, dtype: DType | None = None) -> CheckpointModel:
    """Open a checkpoint folder for the stock class: `open_checkpoint` and `mapped` in one."""
    from dsc.frontends.causal_lm import parameter_types

    opened = open_checkpoint(folder, dtype)
    return opened.mapped(parameter_types(opened.build()))


def open_checkpoint(folder: Path | str, dtype: DType | None = None) -> CheckpointModel:
    """Open a checkpoint folder, before it is known which parameters its weights are for.

    Args:
        folder: holds `config.json` and safetensors files in the official layout or in the one
            that transformers writes.
        dtype: element type to compute in; the checkpoint's own by default.

    Raises:
        ConfigError, UnsupportedArchitecture: `config.json` is damaged or describes no member of
            the family.
        CheckpointError: the weights are damaged, or their layout is not that configuration's.
    """
    folder = Path(folder)
    raw, config = read_config(folder)
    source = open_safetensors(folder)
    check_layout(source, config, str(folder))
    dtype = dtype or _stored_dtype(config, source, folder)
    return CheckpointModel(folder, raw, config, dtype, source)


def read_config(folder: Path) -> tuple[JsonObject, ModelConfig]:
    """A folder's `config.json`, as it stands and checked. Raises as `load_checkpoint` does."""
    file = folder / CONFIG_FILE
    raw = parse_object(read_bounded(file), str(file), ConfigError)
    return raw, parse_config(_with_quantization(raw, folder), str(file))


def stock_causal_lm(
    config: ModelConfig, dtype: DType = DType.f32, device: str = "meta"
) -> nn.Module:
    """The transformers class of `config`, with sdpa attention and grouped-GEMM experts.

    Parameters lie on `device`, untrained. Buffers that the class computes and no checkpoint
    stores (rope frequencies) are real even on `meta`: the trace records them as constants.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from dsc.frontends.causal_lm import cast_parameters

    classes = {
        "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
        "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    }
    config_class, model_class = classes[config.model_type]
    check_rotation(config, dtype)
    try:
        stock = config_class(**_transformers_fields(config))
    except (ValueError, KeyError, StrictDataclassError) as exc:
        raise ConfigError(f"transformers refuses this configuration: {exc}") from None
    with torch.device(device):
        model: nn.Module = cast_parameters(model_class(stock).eval(), dtype.torch)
    base: Any = model.model
    with torch.device("cpu"):
        base.rotary_emb = type(base.rotary_emb)(stock)
    if config.tie_word_embeddings:
        head: Any = model.lm_head
        head.weight = base.embed_tokens.weight
    return model


def check_rotation(config: ModelConfig, dtype: DType) -> None:
    """Refuse a V2 whose stock class fails at run time: in fp32 it views halves as complex numbers.

    Raises:
        ConfigError: a rotated part starts at an odd column.
    """
    odd = [n for n in ("kv_lora_rank", "qk_nope_head_dim") if getattr(config, n) % 2]
    if config.model_type == "deepseek_v2" and dtype is DType.f32 and odd:
        raise ConfigError(
            f"in fp32 transformers rotates a deepseek_v2 only with an even {' and '.join(odd)}",
            hint="compile with dtype bf16",
        )


def _transformers_fields(config: ModelConfig) -> dict[str, Any]:
    """Our checked fields in transformers' spelling. Weights are dequantised before it sees them."""
    ours = {"published_model_type", "model_type", "dtype", "quantization_config"}
    rope = config.rope_parameters.model_dump(exclude_none=True)
    if config.rope_parameters.rope_type == "default":
        rope = {name: rope[name] for name in ("rope_type", "rope_theta")}
    return config.model_dump(exclude=ours | {"rope_parameters"}) | {
        "rope_parameters": rope,
        "num_key_value_heads": config.num_attention_heads,
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }


def _with_quantization(raw: JsonObject, folder: Path) -> JsonObject:
    """`config.json` with what modelopt writes beside it, where it has no section of its own."""
    file = folder / MODELOPT_FILE
    if raw.get("quantization_config") is not None or not os.path.lexists(file):
        return raw
    found = parse_object(read_bounded(file), str(file), ConfigError).get("quantization")
    return raw | {"quantization_config": found}


def _stored_dtype(config: ModelConfig, source: SafetensorsSource, folder: Path) -> DType:
    """What config.json names, else what the embedding is stored in."""
    if config.dtype is not None:
        return DTYPES[config.dtype]
    if EMBEDDING not in source.types:
        raise CheckpointError(f"there is no {EMBEDDING}", str(folder))
    found = source.types[EMBEDDING].dtype
    if found not in DTYPES.values():
        raise CheckpointError(
            f"config.json names no dtype, and {EMBEDDING} is stored in {found}", str(folder),
            "say what to compute in: --dtype bf16",
        )  # fmt: skip
    return found


def _notes(
    folder: Path, raw: Mapping[str, Any], mapped: WeightMap, activations: str
) -> tuple[str, ...]:
    """What a user may wonder about: what was there and was left alone."""
    notes = []
    if activations:
        notes.append(
            f"the checkpoint was quantised for activations in {activations}; they stay as they are "
            "computed, or are 8-bit codes by groups of columns where the backend multiplies codes"
        )
    if mapped.mtp:
        layers = sorted({int(key.split(".")[2]) for key in mapped.mtp})
        announced = "" if raw.get("num_nextn_predict_layers") else (
            ", which num_nextn_predict_layers does not announce"
        )  # fmt: skip
        notes.append(
            f"layer {', '.join(map(str, layers))} predicts further tokens (MTP){announced}; its "
            f"{len(mapped.mtp)} tensors are not used"
        )
    if mapped.ignored:
        more = f" and {len(mapped.ignored) - 3} more" if len(mapped.ignored) > 3 else ""
        notes.append(
            "not used, since recomputed, tied, or scales of activations: "
            + ", ".join(mapped.ignored[:3]) + more
        )  # fmt: skip
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in raw:
        named = ", ".join(code) or "auto_map in config.json"
        notes.append(f"code of the checkpoint is never imported: {named}")
    return tuple(notes)
