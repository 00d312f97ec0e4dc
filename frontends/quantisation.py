"""Which quantised weights are read, and what to say of the others.

Each tool writes a `quantization_config` of its own. Weights in FP8 (e4m3) are read whoever wrote
them, since all of them store `weight` beside scales that multiply: one a block (DeepSeek,
compressed-tensors, modelopt), one a row (compressed-tensors, fbgemm, modelopt) or one a tensor.
`readable` gives those one spelling; anything else is refused by what it is. Scales of activations
and caches are not used: products run in the element type that is compiled for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dsc.errors import ConfigError

OTHERS = {
    "awq": "4-bit integer weights in groups (AWQ)",
    "gptq": "integer weights in groups (GPTQ)",
    "mxfp4": "4-bit float weights in groups of 32 (MXFP4)",
    "bitsandbytes": "bitsandbytes weights",
    "torchao": "torchao weights",
    "quark": "Quark weights",
    "auto-round": "integer weights in groups (AutoRound)",
    "bitnet": "ternary weights (BitNet)",
}
"""What else checkpoints announce, in words."""
PACKED = (
    "qweight", "weight_packed", ".absmax", "_blocks", "weight_scale_2", "_weight_qdata",
)  # fmt: skip
"""How names of tensors end that hold weights in such forms."""
HINT = (
    "only FP8 (e4m3) weights are read as they are: give the checkpoint that this one was made "
    "from, or dequantise it and save it in bf16"
)
MODELOPT = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": [128, 128]}
"""modelopt's algorithms in FP8, and their blocks."""


def readable(found: Any, where: str) -> Any:
    """A `quantization_config` in the spelling of `QuantizationConfig`; what is no object as it is.

    Raises:
        ConfigError: its weights are in a form that is not read; says which.
    """
    if not isinstance(found, Mapping):
        return found
    method = found.get("quant_method", "modelopt" if "quant_algo" in found else None)
    if method == "compressed-tensors":
        return _compressed_tensors(found, where)
    if method == "modelopt":
        algorithm = found.get("quant_algo")
        if not isinstance(algorithm, str) or algorithm not in MODELOPT:
            raise refused("modelopt weights", f"quant_algo {algorithm!r}", where)
        return {"quant_method": method, "weight_block_size": MODELOPT[algorithm]}
    if method == "fbgemm_fp8":
        return {"quant_method": method, "weight_block_size": None}
    if method != "fp8":
        kind = OTHERS.get(method) if isinstance(method, str) else None
        raise refused(kind or "these quantised weights", f"quant_method {method!r}", where)
    return {k: v for k, v in found.items() if v is not None or k == "weight_block_size"}


def packed(keys: Iterable[str]) -> str:
    """The first of `keys` that holds a weight in a form that is not read; empty if none does."""
    return next((key for key in keys if key.endswith(PACKED)), "")


def refused(kind: str, found: str, where: str) -> ConfigError:
    """The error for weights in another form."""
    return ConfigError(f"quantization_config: {kind} are not read (found {found})", where, HINT)


def _compressed_tensors(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All groups must store 8-bit floats; the blocks of one are those of all."""
    groups = found.get("config_groups")
    given = list(groups.values()) if isinstance(groups, Mapping) else []
    told = [each.get("weights") for each in given if isinstance(each, Mapping)]
    weights = [each for each in told if isinstance(each, Mapping)]
    if not weights or len(weights) < len(given):
        raise ConfigError(
            "quantization_config.config_groups does not say how weights are stored", where
        )
    sparse = found.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise refused("sparse weights", f"sparsity_config.format {sparse['format']!r}", where)
    transforms = found.get("transform_config")
    if isinstance(transforms, Mapping) and any(transforms.values()):
        raise refused("rotated weights", "transform_config", where)
    block = None
    for each in weights:
        bits, kind, strategy = (each.get(name) for name in ("num_bits", "type", "strategy"))
        if (bits, kind) != (8, "float"):
            raise refused(f"{bits}-bit {kind} weights", f"format {found.get('format')!r}", where)
        if strategy not in ("tensor", "channel", "block"):
            raise refused("FP8 weights so scaled", f"strategy {strategy!r}", where)
        block = each.get("block_structure") if strategy == "block" else block
    return {"quant_method": "compressed-tensors", "weight_block_size": block}
