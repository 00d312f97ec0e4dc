"""From the tensors a checkpoint stores to the parameters a model declares.

Most names are equal on both sides. Four things are not, and each becomes a weight expression, so
that nothing is read before an artifact is packed:

* Published checkpoints store each expert on its own (`mlp.experts.7.gate_proj.weight`); models
  declare all experts of a layer as one tensor (`mlp.experts.gate_up_proj` of `[E, 2i, h]`, gate
  rows before up rows; `mlp.experts.down_proj` of `[E, h, i]`).
* Quantised weights are codes beside scales, in the same shard or another (`codes.py`).
* With tied embeddings `lm_head.weight` is the embedding.
* An element type may differ from the one to compute in.

The layers behind the last decoder layer predict further tokens (MTP). They are recognised, and
reported as unused; every other tensor that no parameter takes is an error, because a tensor that
is silently dropped is a model that silently differs. One cause is told once: tensors that differ in
layer and expert alone are one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsc.errors import CheckpointError
from dsc.frontends.checked import Holds
from dsc.frontends.codes import SCALE_SUFFIXES, CodesReader, Unfit
from dsc.frontends.config import CONFIG_FILE, ModelConfig
from dsc.frontends.quantisation import HINT, packed
from dsc.ir.types import TensorType
from dsc.ir.weights import Source, WeightExpr, WeightSource, apply, sources

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_JOINING = re.compile(r"model\.layers\.(\d+)\.eh_proj\.")
_RECOMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
_ACTIVATIONS = re.compile(r".*(\.|_)(input|output|activation|[qkv]|kv)_(scale(_inv)?|zero_point)")
"""Scales of what flows through a layer or lies in a cache: both stay as they are computed."""


@dataclass(frozen=True)
class WeightMap:
    """Every parameter's expression, and the stored tensors that none of them reads.

    `checks`: what must hold of values when they are read (`checked.py`).
    """

    weights: Mapping[str, WeightExpr]
    mtp: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    checks: Mapping[str, Holds | None] = field(default_factory=dict)


@dataclass
class _Faults:
    """What does not fit, gathered so that one error tells all of it: causes before effects."""

    where: str
    misfit: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)

    def raise_any(self) -> None:
        told = [
            f"{kind} ({len(lines)}):\n" + _listed(lines)
            for kind, lines in (
                ("tensors that do not fit", self.misfit),
                ("missing tensors", self.missing),
                ("unexpected tensors", self.unexpected),
            )
            if lines
        ]
        if told:
            hint = "config.json and the weights must belong to the same model"
            raise CheckpointError("\n".join(told), self.where, hint)


def map_weights(
    parameters: Mapping[str, TensorType],
    source: WeightSource,
    config: ModelConfig,
    where: str = "checkpoint",
) -> WeightMap:
    """Give each declared parameter its expression over the stored tensors.

    Args:
        parameters: name and type of every parameter and persistent buffer of the model.
        source: the stored tensors.
        config: says which layers are MTP, whether embeddings are tied, how codes are stored.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: tensors are missing, of another shape, or left over. All of them are
            named, with expected and found types.
    """
    mapper = _Mapper(source, config, _Faults(where))
    weights = {name: mapper.parameter(name, type_) for name, type_ in parameters.items()}
    used = {leaf.key for expr in weights.values() if expr for leaf in sources(expr)}
    left = [key for key in source.types if key not in used]
    mtp, left = _split_mtp(left, config)
    ignored = [key for key in left if _ignorable(key, config)]
    mapper.faults.unexpected += [
        (key, f" : {source.types[key]}")
        for key in sorted(set(left) - set(ignored), key=_natural)
        if key not in mapper.claimed
    ]
    mapper.faults.raise_any()
    complete = {name: expr for name, expr in weights.items() if expr is not None}
    return WeightMap(complete, tuple(mtp), tuple(ignored), mapper.codes.checks)


def check_layout(source: WeightSource, config: ModelConfig, where: str) -> None:
    """Refuse in one sentence what would make every tensor missing and every other unexpected.

    Raises:
        CheckpointError: the weights are packed in a form that is not read, all names have a
            prefix, or the configuration counts an MTP layer, or layers that are not there, as
            decoder layers.
    """
    keys = list(source.types)
    told = config.quantization_config
    form = packed(keys, told.quant_method if told else None)
    if form:
        raise CheckpointError(f"{form} holds a weight in a quantised form not read", where, HINT)
    under = next((k for k in keys if k.endswith("." + EMBEDDING)), None)
    if under is not None and EMBEDDING not in keys:
        raise CheckpointError(
            f"all tensors lie under {under.removesuffix(EMBEDDING)!r}: this is a part of a larger "
            "model", where, "save the language model on its own",
        )  # fmt: skip
    file = str(Path(where) / CONFIG_FILE)
    for layer in sorted(_joining(keys)):
        if layer < config.num_hidden_layers:
            raise CheckpointError(
                f"layer {layer} predicts further tokens (MTP: it has model.layers.{layer}.eh_proj."
                f"weight), yet num_hidden_layers is {config.num_hidden_layers}", file,
                f"set num_hidden_layers to {layer}",
            )  # fmt: skip
    stored = {int(found[1]) for found in map(_LAYER.fullmatch, keys) if found}
    if stored and max(stored) + 1 < config.num_hidden_layers:
        raise CheckpointError(
            f"num_hidden_layers is {config.num_hidden_layers}, and the weights end with layer "
            f"{max(stored)}", file,
            f"set num_hidden_layers to {max(stored) + 1}, or get the weights that are missing",
        )  # fmt: skip


class _Mapper:
    """One mapping in progress: `parameter` gives an expression, or notes why there is none."""

    def __init__(self, source: WeightSource, config: ModelConfig, faults: _Faults) -> None:
        self.source = source
        self.config = config
        self.faults = faults
        self.codes = CodesReader(source, config.quantization_config)
        self.stored = set(source.types)
        self.claimed: set[str] = set()  # what parameters asked for: faults of it are noted

    def parameter(self, name: str, declared: TensorType) -> WeightExpr | None:
        """The expression of one declared parameter."""
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        together = name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))
        if name in self.stored or not together:
            return self._tensor(name, declared)
        return self._experts(name, declared)

    def _experts(self, name: str, declared: TensorType) -> WeightExpr | None:
        """Stack per-expert tensors: `[E, 2i, h]` from gate and up, `[E, h, i]` from down."""
        prefix, _, part = name.rpartition(".")
        count, rows, columns = declared.shape
        assert isinstance(count, int)
        halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        each = TensorType(declared.dtype, (rows // len(halves), columns))
        stacked: list[WeightExpr] = []
        for expert in range(count):
            parts = [self._tensor(f"{prefix}.{expert}.{half}.weight", each) for half in halves]
            whole = [expr for expr in parts if expr is not None]
            if len(whole) == len(parts):
                stacked.append(apply("concat", *whole, axis=0) if len(whole) > 1 else whole[0])
        return apply("stack", *stacked) if len(stacked) == count else None

    def _tensor(self, key: str, declared: TensorType) -> WeightExpr | None:
        """A stored tensor, dequantised and cast to what is declared."""
        self.claimed |= self.codes.names(key)
        if self.codes.is_stored(key):
            try:
                return self.codes.weight(key, declared)
            except Unfit as fault:
                kind = self.faults.missing if fault.missing else self.faults.misfit
                kind.append((fault.key, fault.why))
                return None
        if key not in self.stored:
            self.faults.missing.append((key, f" : {declared}"))
            return None
        found = self.source.types[key]
        if found.shape != declared.shape:
            self._misfit(key, f": expected {declared}, found {found}")
            return None
        scale = next((key + s for s in SCALE_SUFFIXES if key + s in self.stored), None)
        if scale is not None:
            self._misfit(key, f": {found} is not FP8 (e4m3), yet has {scale}")
            return None
        if found.dtype is declared.dtype:
            return Source(key, found)
        if not found.dtype.is_float or found.dtype.itemsize == 1:
            self._misfit(key, f": expected {declared}, found {found}")
            return None
        return apply("cast", Source(key, found), dtype=declared.dtype)

    def _misfit(self, key: str, why: str) -> None:
        self.faults.misfit.append((key, why))


def _ignorable(key: str, config: ModelConfig) -> bool:
    """Whether a tensor that no parameter takes changes nothing."""
    if config.quantization_config is not None and _ACTIVATIONS.fullmatch(key):
        return True
    return bool(_RECOMPUTED.fullmatch(key)) or (config.tie_word_embeddings and key == HEAD)


def _split_mtp(keys: Iterable[str], config: ModelConfig) -> tuple[list[str], list[str]]:
    """Tensors of MTP layers, and the rest.

    An MTP layer lies behind the decoder layers and has the `eh_proj` that joins hidden state and
    embedding, whether or not the config announces it: tools drop `num_nextn_predict_layers` more
    often than tensors. A plain layer there is no MTP layer: it means that the config has fewer
    layers than the weights.
    """
    rest: list[str] = []
    layers: dict[int, list[str]] = {}
    for key in keys:
        found = _LAYER.fullmatch(key)
        layer = int(found[1]) if found else -1
        behind = layer >= config.num_hidden_layers
        (layers.setdefault(layer, []) if behind else rest).append(key)
    mtp: list[str] = []
    joining = _joining(key for members in layers.values() for key in members)
    for layer, members in layers.items():
        (mtp if layer in joining else rest).extend(members)
    return mtp, rest


def _joining(keys: Iterable[str]) -> set[int]:
    """Layers that join hidden state and embedding, by a weight stored in whatever form."""
    return {int(found[1]) for found in map(_JOINING.match, keys) if found}


def _listed(lines: list[tuple[str, str]], limit: int = 8) -> str:
    """A line for each tensor; those alike but for numbers in their names share one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for key, what in lines:
        kind = (re.sub(r"\d+", "#", key), re.sub(re.escape(key), "", what))
        alike.setdefault(kind, []).append(key + what)
    shown = [
        first + (f" (and {len(rest)} of other layers or experts)" if rest else "")
        for first, *rest in alike.values()
    ]
    more = [f"... and {len(shown) - limit} more kinds"] if len(shown) > limit else []
    return "\n".join(f"  {line}" for line in shown[:limit] + more)


def _natural(key: str) -> list[int | str]:
    """Orders layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
