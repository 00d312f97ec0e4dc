"""Which quantised weights are read, and what to say of the others.

Each tool writes a `quantization_config` of its own; `readable` gives those that are read one
spelling, and refuses any other by what it is. FP8 (e4m3) is read whoever wrote it, since all store
`weight` beside scales that multiply: one a block (DeepSeek, compressed-tensors, modelopt), one a
row (compressed-tensors, fbgemm, modelopt) or one a tensor. Integers of 4 and 8 bits are read as
compressed-tensors, GPTQ (both forms), AWQ (gemm), AutoRound and blockwise int8 store them: see
`codes.py`.

Which modules are quantised is told by the tensors that they store, so lists of those that are not
(`ignore`, `modules_to_not_convert`), names or patterns, are not asked. Scales of
activations and caches are not used: products run in the element type that is compiled for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsc.errors import ConfigError
from dsc.frontends.schema import Schema, sentence
from dsc.strict_json import AGAIN

OTHERS = {
    "mxfp4": "4-bit float weights in groups of 32 (MXFP4)",
    "bitsandbytes": "bitsandbytes weights",
    "torchao": "torchao weights",
    "quark": "Quark weights",
    "bitnet": "ternary weights (BitNet)",
}
"""What else checkpoints announce, in words."""
PACKED = {
    ".qweight": ("gptq", "awq"), ".weight_packed": ("compressed-tensors",), ".absmax": (),
    "_blocks": (), "weight_scale_2": (), "_weight_qdata": (),
}  # fmt: skip
"""How names of tensors end that hold weights in packed forms, and whose of them are read."""
HINT = (
    "give the checkpoint that this one was made from, or dequantise it and save it in bf16; read "
    "are FP8 (e4m3), and integers of compressed-tensors, GPTQ, AWQ and AutoRound"
)
MODELOPT = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": [128, 128]}
"""modelopt's algorithms in FP8, and their blocks."""
AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2", "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}  # fmt: skip
"""AutoRound's packing formats, and whose layouts they are."""
FORMATS = (
    "dense", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized",
    "mixed-precision",
)  # fmt: skip
"""Forms of compressed-tensors that hold such weights, where one is named."""
STRATEGIES = ("tensor", "channel", "group", "block")
BITS = (4, 8)
"""Of integers."""

Block = Annotated[list[Annotated[int, Field(gt=0, le=1 << 16)]], Field(min_length=2, max_length=2)]


class IntegerWeights(Schema):
    """Weights in integers: a scale, and unless symmetric a zero point, for each group of columns.

    Or for each block, row (channel) or tensor. A size of groups is held against each weight's.
    `ordered`: columns are in groups by an index (`g_idx`), not in order.
    """

    bits: Literal[4, 8]
    strategy: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None
    block_structure: Block | None = None
    symmetric: bool = True
    ordered: bool = False

    @model_validator(mode="after")
    def _check(self) -> IntegerWeights:
        if self.strategy == "group" and self.group_size is None:
            raise ValueError("group_size is missing")
        if self.strategy == "block" and self.block_structure is None:
            raise ValueError("the sizes of blocks are missing")
        return self


class QuantizationConfig(Schema):
    """Weights in FP8 or in integers by any of the methods that are read.

    A weight `W` of `[N, K]` in FP8 is stored as e4m3 beside its scales: one for each block, in a
    tensor of `[ceil(N / n), ceil(K / k)]`, one a row, or one in all. `weight_block_size` says the
    blocks, `integers` how integers may be stored. GPTQ's first form stores zero points one lower
    than they are (`stored_zero`).
    """

    quant_method: Literal[
        "fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "blockwise_int8", "gptq", "awq"
    ]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: Block | None = Field([128, 128])
    scale_fmt: Literal["ue8m0", "float32"] | None = None
    integers: list[IntegerWeights] = Field([])
    stored_zero: Literal[0, 1] = 0
    activations: Literal["", "integers"] = ""

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of FP8 that share a scale; `None` where it is by row or tensor."""
        if self.weight_block_size is None:
            return None
        rows, columns = self.weight_block_size
        return rows, columns


def quantisation(section: Any, where: str) -> QuantizationConfig | None:
    """How a `quantization_config` says that weights are stored; `None` where there is none.

    Raises:
        ConfigError: in a form that is not read, or what is said is damaged; says which.
    """
    told = readable(section, where)
    if told is None:
        return None
    try:
        return QuantizationConfig.model_validate(told)
    except ValidationError as exc:
        raise ConfigError(sentence(exc, "quantization_config"), where, AGAIN) from None


def readable(found: Any, where: str) -> Any:
    """A `quantization_config` in the spelling of `QuantizationConfig`; what is no object as it is.

    Raises:
        ConfigError: its weights are in a form that is not read; says which.
    """
    if not isinstance(found, Mapping):
        return found
    method = found.get("quant_method", "modelopt" if "quant_algo" in found else None)
    match method:
        case "fp8":
            return {k: v for k, v in found.items() if v is not None or k == "weight_block_size"}
        case "compressed-tensors":
            return _compressed_tensors(found, where)
        case "gptq":
            return _gptq(found, where)
        case "awq":
            return _awq(found, where)
        case "auto-round":
            return _auto_round(found, where)
        case "blockwise_int8":
            block = found.get("weight_block_size")
            told = {"bits": 8, "strategy": "block", "block_structure": block}
            return _weights_alone(method, [told])
        case "fbgemm_fp8":
            return _weights_alone(method)
        case "modelopt":
            algorithm = found.get("quant_algo")
            if not isinstance(algorithm, str) or algorithm not in MODELOPT:
                raise refused("modelopt weights", f"quant_algo {algorithm!r}", where)
            return {"quant_method": method, "weight_block_size": MODELOPT[algorithm]}
    kind = OTHERS.get(method) if isinstance(method, str) else None
    raise refused(kind or "these quantised weights", _named(found), where)


def packed(keys: Iterable[str], method: str | None) -> str:
    """The first of `keys` that holds a weight in a form that is not read; empty if none does."""
    unread = tuple(end for end, methods in PACKED.items() if method not in methods)
    return next((key for key in keys if key.endswith(unread)), "")


def refused(kind: str, found: str, where: str) -> ConfigError:
    """The error for weights in another form."""
    return ConfigError(f"quantization_config: {kind} are not read (found {found})", where, HINT)


def _named(found: Mapping[str, Any]) -> str:
    return f"quant_method {found.get('quant_method')!r}"


def _weights_alone(method: str, integers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"quant_method": method, "weight_block_size": None, "integers": integers or []}


def _compressed_tensors(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Each group stores FP8, of which the blocks of one are those of all, or integers."""
    groups = found.get("config_groups")
    given = list(groups.values()) if isinstance(groups, Mapping) else []
    told = [each for each in given if isinstance(each, Mapping)]
    weights = [w for each in told if isinstance(w := each.get("weights"), Mapping)]
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
    made = _weights_alone("compressed-tensors")
    for each in weights:
        bits, kind, strategy = each.get("num_bits"), each.get("type", "int"), _strategy(each)
        if kind == "int" and bits in BITS and strategy in STRATEGIES:
            made["integers"].append(_integers(each, bits, strategy))
            continue
        if (bits, kind) != (8, "float"):
            raise refused(f"{bits}-bit {kind} weights", f"format {found.get('format')!r}", where)
        if strategy not in ("tensor", "channel", "block"):
            raise refused("FP8 weights so scaled", f"strategy {strategy!r}", where)
        if strategy == "block":
            made["weight_block_size"] = each.get("block_structure")
    for each in (found, *told):
        if each.get("format") is not None and each["format"] not in FORMATS:
            raise refused("weights of that form", f"format {each['format']!r}", where)
    if any(_in_integers(each.get("input_activations")) for each in told):
        made["activations"] = "integers"
    return made


def _strategy(weights: Mapping[str, Any]) -> Any:
    """How weights share scales; where it is not said, as the size of groups says."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "group"
    return "channel" if strategy == "group" and size == -1 else strategy


def _integers(weights: Mapping[str, Any], bits: int, strategy: str) -> dict[str, Any]:
    told = {"bits": bits, "strategy": strategy, "symmetric": weights.get("symmetric", True)}
    if strategy == "group":
        told["group_size"] = weights.get("group_size")
        told["ordered"] = weights.get("actorder") in ("group", True)
    if strategy == "block":
        told["block_structure"] = weights.get("block_structure")
    return told


def _auto_round(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The layout of GPTQ, of which only one form stores zero points one lower, or of AWQ."""
    form = found.get("packing_format")
    if (
        not isinstance(form, str)
        or form not in AUTO_ROUND
        or found.get("data_type", "int") != "int"
    ):
        told = f"packing_format {form!r}, data_type {found.get('data_type')!r}"
        raise refused("AutoRound weights so packed", told, where)
    modules = found.get("extra_config")
    for name, told in modules.items() if isinstance(modules, Mapping) else ():
        bits = told.get("bits", 16) if isinstance(told, Mapping) else None
        if bits not in (16, 32):
            told = f"extra_config {name!r}, bits {bits!r}"
            raise refused("AutoRound weights that differ by module", told, where)
    if AUTO_ROUND[form] == "awq":
        return _awq(found, where)
    return _gptq({**found, "checkpoint_format": AUTO_ROUND[form]}, where)


def _in_groups(bits: int, size: Any) -> dict[str, Any]:
    told = {"strategy": "group", "group_size": size}
    return _integers(told, bits, _strategy(told))


def _in_integers(activations: Any) -> bool:
    return isinstance(activations, Mapping) and activations.get("type", "int") == "int"


def _gptq(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    bits = found.get("bits")
    if bits not in BITS:
        raise refused("GPTQ weights of such codes", f"bits {bits!r}, {_named(found)}", where)
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise refused("GPTQ weights so packed", f"checkpoint_format {form!r}", where)
    rules = found.get("dynamic")
    for rule, told in rules.items() if isinstance(rules, Mapping) else ():
        if told and not str(rule).startswith("-:"):
            raise refused("GPTQ weights that differ by module", f"dynamic {rule!r}", where)
    told = _in_groups(bits, found.get("group_size"))
    told["symmetric"] = found.get("sym") is True
    told["ordered"] = found.get("desc_act") is True
    return _weights_alone("gptq", [told]) | {"stored_zero": 1 if form == "gptq" else 0}


def _awq(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    bits = found.get("bits", found.get("w_bit"))
    if bits != 4:
        raise refused("AWQ weights of such codes", f"bits {bits!r}, {_named(found)}", where)
    version = found.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise refused("AWQ weights so packed", f"version {version!r}", where)
    told = _in_groups(4, found.get("group_size", found.get("q_group_size")))
    return _weights_alone("awq", [told | {"symmetric": False}])
