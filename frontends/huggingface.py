"""A checkpoint folder becomes a module to trace and weights to read later.

The folder is data. `config.json` is cleaned (`stock.py`), the weights are opened as safetensors
only, and the module is the stock transformers class of its `model_type`, built from the cleaned
configuration on the `meta` device. No Python file of the folder is imported, no pickle is opened,
`trust_remote_code` is never set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.errors import CheckpointError
from dsc.frontends.checked import CheckedSource
from dsc.frontends.conversions import AS_DECLARED, Conversions, conversions_of
from dsc.frontends.facts import Facts
from dsc.frontends.family import ModelConfig
from dsc.frontends.folder import CONFIG_FILE, MODELOPT_FILE, read_object
from dsc.frontends.names import EMBEDDING, WeightMap, check_layout, layers_of, map_weights
from dsc.frontends.rope_scaling import RopeScaling
from dsc.frontends.schema import DTYPES
from dsc.frontends.stock import StockConfig, clean, completed, stock_model, take_plain_experts
from dsc.frontends.towers import parts_of
from dsc.ir.safetensors import SafetensorsSource, open_safetensors
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import MetaSource, WeightExpr, WeightSource, evaluate
from dsc.strict_json import JsonObject

if TYPE_CHECKING:
    from torch import nn

    from dsc.frontends.causal_lm import CausalLMStep


@dataclass(frozen=True)
class CheckpointModel:
    """A checkpoint, opened and checked; no weight has been read.

    `raw` is `config.json` as it stands. Once parameters are `mapped`, `weights` gives each its
    expression over `source`, and `notes` tells, one sentence each, what the folder holds that is
    not used.
    """

    folder: Path
    raw: JsonObject
    config: StockConfig
    dtype: DType
    source: WeightSource
    weights: Mapping[str, WeightExpr] = field(default_factory=dict)
    unused_mtp: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def mapped(
        self,
        parameters: Mapping[str, TensorType],
        facts: Facts | None = None,
        conversions: Conversions = AS_DECLARED,
    ) -> CheckpointModel:
        """The same checkpoint with its weights for these parameters, names and types.

        `facts` are all of the model's, where the file does not tell them all; `conversions` are
        those of the stock class, without which names are as they are declared. Raises
        `CheckpointError`: the weights are not those of the parameters.
        """
        known = self.config.facts.completed(facts) if facts else self.config.facts
        wrapper = self.config.wrapper
        found = map_weights(parameters, self.source, known, str(self.folder), conversions, wrapper)
        notes = _notes(self.folder, self.raw, found, known, wrapper)
        source = CheckedSource(self.source, found.checks) if found.checks else self.source
        return replace(
            self, source=source, weights=found.weights, unused_mtp=found.mtp, notes=notes
        )

    def build(self, context: int | None = None) -> CausalLMStep:
        """The module to trace, for so many tokens: parameters on `meta`, computed buffers real."""
        from dsc.frontends.causal_lm import CausalLMStep

        return CausalLMStep(stock_model(self.config, self.dtype), context=context)

    def load(self, context: int | None = None) -> CausalLMStep:
        """The same module with its weights, copied to memory: the oracle for small checkpoints."""
        step = self.build(context)
        state = {name: evaluate(expr, self.source).clone() for name, expr in self.weights.items()}
        step.load_state_dict(state, strict=True, assign=True)
        return step

    def stock(self, context: int | None = None) -> nn.Module:
        """The stock class itself with its weights, to be run as transformers runs it.

        Where it has two sets of angles, it keeps that for so many tokens (`longrope.py`).
        Its experts are those of the plain loop: torch's grouped GEMMs refuse odd widths.
        """
        step = self.load(context)
        take_plain_experts(step.config)
        return step.stock()


def load_checkpoint(
    folder: Path | str, dtype: DType | None = None, scaling: RopeScaling | None = None
) -> CheckpointModel:
    """Open a checkpoint folder for the stock class: `open_checkpoint` and `mapped` in one."""
    from dsc.frontends.causal_lm import parameter_types

    found = open_checkpoint(folder, dtype, scaling)
    step = found.build()
    facts = completed(found.config, step.config)
    return found.mapped(parameter_types(step), facts, conversions_of(step.stock()))


def open_checkpoint(
    folder: Path | str, dtype: DType | None = None, scaling: RopeScaling | None = None
) -> CheckpointModel:
    """Open a checkpoint folder, before it is known which parameters its weights are for.

    Args:
        folder: holds `config.json` and safetensors files in the official layout or in the one
            that transformers writes.
        dtype: element type to compute in; the checkpoint's own by default.
        scaling: a rope scaling to extend its context by.

    Raises:
        ConfigError, UnsupportedArchitecture: `config.json` is damaged or describes no decoder.
        CheckpointError: the weights are damaged, or their layout is not that configuration's.
    """
    folder = Path(folder)
    return opened(folder, *read_config(folder, scaling), dtype)


def opened(
    folder: Path, raw: JsonObject, config: StockConfig, dtype: DType | None = None
) -> CheckpointModel:
    """`open_checkpoint` of a folder whose configuration was read."""
    source = open_safetensors(folder)
    check_layout(source, config.facts, str(folder))
    return CheckpointModel(
        folder, raw, config, dtype or _stored_dtype(config, source, folder), source
    )


def bare(
    folder: Path, raw: JsonObject, config: StockConfig, dtype: DType | None = None
) -> CheckpointModel:
    """A folder's configuration without its weights, which need not be there.

    Raises `CheckpointError` where it names no element type and none is asked for.
    """
    found = dtype or (None if config.dtype is None else DTYPES[config.dtype])
    if found is None:
        raise CheckpointError(
            "config.json names no dtype", str(folder), "say what to compute in: --dtype bf16"
        )
    return CheckpointModel(folder, raw, config, found, MetaSource({}))


def read_config(folder: Path, scaling: RopeScaling | None = None) -> tuple[JsonObject, StockConfig]:
    """A folder's `config.json`, as it stands and cleaned. Raises as `load_checkpoint` does."""
    file = folder / CONFIG_FILE
    raw = read_object(file)
    return raw, clean(_with_quantization(raw, folder), str(file), scaling)


def stock_causal_lm(
    config: ModelConfig, dtype: DType = DType.f32, device: str = "meta"
) -> nn.Module:
    """The transformers class of a member of the DeepSeek-V3 family (see `stock_model`)."""
    return stock_model(clean(config.model_dump()), dtype, device)


def _with_quantization(raw: JsonObject, folder: Path) -> JsonObject:
    """`config.json` with what modelopt writes beside it, where it has no section of its own."""
    if raw.get("quantization_config") is not None:
        return raw
    found = read_object(folder / MODELOPT_FILE, missing_ok=True)
    return raw | {"quantization_config": found["quantization"]} if "quantization" in found else raw


def _stored_dtype(config: StockConfig, source: SafetensorsSource, folder: Path) -> DType:
    """What config.json names, else what the embedding is stored in, or else the largest matrix."""
    if config.dtype is not None:
        return DTYPES[config.dtype]
    sizes = {
        key: math.prod(map(int, t.shape))  # type: ignore[arg-type]
        for key, t in source.types.items()
        if t.rank == 2 and t.dtype.is_float
    }
    if not sizes:
        raise CheckpointError("there is no matrix of floats", str(folder))
    named = EMBEDDING if EMBEDDING in source.types else max(sizes, key=sizes.__getitem__)
    found = source.types[named].dtype
    if found not in DTYPES.values():
        raise CheckpointError(
            f"config.json names no dtype, and {named} is stored in {found}", str(folder),
            "say what to compute in: --dtype bf16",
        )  # fmt: skip
    return found


def _notes(
    folder: Path, raw: Mapping[str, Any], mapped: WeightMap, facts: Facts, wrapper: str
) -> tuple[str, ...]:
    """What a user may wonder about: what was there and was left alone."""
    notes = []
    told = facts.quantization_config
    if told is not None and told.activations:
        notes.append(
            f"the checkpoint was quantised for activations in {told.activations}; they stay as "
            "they are computed, or are 8-bit codes by groups of columns where the backend "
            "multiplies codes"
        )
    if mapped.mtp:
        layers = sorted(layers_of(mapped.mtp))
        announced = "" if raw.get("num_nextn_predict_layers") else (
            ", which num_nextn_predict_layers does not announce"
        )  # fmt: skip
        notes.append(
            f"layer {', '.join(map(str, layers))} predicts further tokens (MTP){announced}; its "
            f"{len(mapped.mtp)} tensors are not used"
        )
    if mapped.ignored:
        notes.append(
            f"not used, since recomputed, tied, or scales of activations: {_some(mapped.ignored)}"
        )
    if mapped.left_out:
        notes.append(f"not used, as transformers' own class does not: {_some(mapped.left_out)}")
    if mapped.others:
        notes.append(
            f"of the {wrapper} the language model alone is compiled; left out are "
            f"{len(mapped.others)} tensors of {_some(parts_of(mapped.others))}"
        )
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in raw:
        named = ", ".join(code) or "auto_map in config.json"
        notes.append(f"code of the checkpoint is never imported: {named}")
    return tuple(notes)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
