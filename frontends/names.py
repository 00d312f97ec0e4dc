"""From the tensors a checkpoint stores to the parameters a model declares.

Most names are equal on both sides. Four things are not, and each becomes a weight expression, so
that nothing is read before an artifact is packed:

* Published checkpoints store each expert on its own (`mlp.experts.7.gate_proj.weight`); models
  declare all experts of a layer as one tensor (`mlp.experts.gate_up_proj` of `[E, 2i, h]`, gate
  rows before up rows; `mlp.experts.down_proj` of `[E, h, i]`).
* FP8 checkpoints store `weight` as e4m3 beside `weight_scale_inv`, in the same shard or another.
  Despite its name the scale multiplies: `W = weight * weight_scale_inv`, block by block.
* With tied embeddings `lm_head.weight` is the embedding.
* An element type may differ from the one to compute in.

The layers behind the last decoder layer predict further tokens (MTP). They are recognised, and
reported as unused; every other tensor that no parameter takes is an error, because a tensor that
is silently dropped is a model that silently differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dsc.errors import CheckpointError
from dsc.frontends.config import ModelConfig
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr, WeightSource, apply, sources

SCALE_SUFFIX = "_scale_inv"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FP8 = {DType.f8e4m3}
_RECOMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class WeightMap:
    """Every parameter's expression, and the stored tensors that none of them reads."""

    weights: Mapping[str, WeightExpr]
    mtp: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass
class _Faults:
    """What does not fit, gathered so that one error tells all of it."""

    where: str
    missing: list[str] = field(default_factory=list)
    misfit: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def raise_any(self) -> None:
        told = [
            f"{kind} ({len(lines)}):\n" + _listed(lines)
            for kind, lines in (
                ("missing tensors", self.missing),
                ("tensors that do not fit", self.misfit),
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
        config: says which layers are MTP, whether embeddings are tied, how FP8 blocks are cut.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: tensors are missing, of another shape, or left over. All of them are
            named, with expected and found types.
    """
    mapper = _Mapper(source, config, _Faults(where))
    weights = {name: mapper.parameter(name, type_) for name, type_ in parameters.items()}
    used = {leaf.key for expr in weights.values() if expr for leaf in sources(expr)}
    left = [key for key in source.keys() if key not in used]
    mtp, left = _split_mtp(left, config)
    ignored = [
        key
        for key in left
        if _RECOMPUTED.fullmatch(key) or (config.tie_word_embeddings and key == HEAD)
    ]
    mapper.faults.unexpected += [
        f"{key} : {source.type(key)}"
        for key in sorted(left)
        if key not in ignored and not mapper.is_claimed(key)
    ]
    mapper.faults.raise_any()
    complete = {name: expr for name, expr in weights.items() if expr is not None}
    return WeightMap(complete, tuple(mtp), tuple(ignored))


class _Mapper:
    """One mapping in progress: `parameter` gives an expression, or notes why there is none."""

    def __init__(self, source: WeightSource, config: ModelConfig, faults: _Faults) -> None:
        self.source = source
        self.config = config
        self.faults = faults
        self.stored = set(source.keys())
        self.claimed: set[str] = set()

    def is_claimed(self, key: str) -> bool:
        """Whether some parameter asked for `key`, so that a fault about it is already noted."""
        return key in self.claimed

    def parameter(self, name: str, declared: TensorType) -> WeightExpr | None:
        """The expression of one declared parameter."""
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        if name in self.stored or not self._holds_experts(name):
            return self._tensor(name, declared)
        return self._experts(name, declared)

    @staticmethod
    def _holds_experts(name: str) -> bool:
        return name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))

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
            if len(whole) < len(parts):
                return None  # one faulty expert tells enough; a layer may announce thousands
            stacked.append(apply("concat", *whole, axis=0) if len(whole) > 1 else whole[0])
        return apply("stack", *stacked)

    def _tensor(self, key: str, declared: TensorType) -> WeightExpr | None:
        """A stored tensor, dequantised and cast to what is declared."""
        self.claimed |= {key, key + SCALE_SUFFIX}
        if key not in self.stored:
            self.faults.missing.append(f"{key} : {declared}")
            return None
        found = self.source.type(key)
        if found.shape != declared.shape:
            self.faults.misfit.append(f"{key}: expected {declared}, found {found}")
            return None
        if found.dtype in _FP8:
            return self._dequantised(key, found, declared)
        if key + SCALE_SUFFIX in self.stored:
            self.faults.misfit.append(f"{key}: {found} is not FP8, yet has {key}{SCALE_SUFFIX}")
            return None
        if found.dtype is declared.dtype:
            return Source(key, found)
        if not found.dtype.is_float:
            self.faults.misfit.append(f"{key}: expected {declared}, found {found}")
            return None
        return apply("cast", Source(key, found), dtype=declared.dtype)

    def _dequantised(self, key: str, found: TensorType, declared: TensorType) -> WeightExpr | None:
        """`weight * weight_scale_inv`, one scale a block; blocks at the edges may be partial."""
        quantization = self.config.quantization_config
        scale_key = key + SCALE_SUFFIX
        if quantization is None:
            self.faults.misfit.append(f"{key}: {found}, but config.json has no quantization_config")
            return None
        if found.rank != 2:
            self.faults.misfit.append(f"{key}: {found}, FP8 blocks are read of matrices only")
            return None
        if scale_key not in self.stored:
            self.faults.missing.append(f"{scale_key} (the scales of {key})")
            return None
        block = quantization.block
        scale = self.source.type(scale_key)
        expected = tuple(-(-n // size) for n, size in zip(found.shape, block, strict=True))
        if scale.shape != expected or not scale.dtype.is_float:
            wanted = TensorType(DType.f32, expected)
            self.faults.misfit.append(
                f"{scale_key}: expected {wanted} for {found} in blocks of {list(block)}, "
                f"found {scale}"
            )
            return None
        scales: WeightExpr = Source(scale_key, scale)
        if scale.dtype is not DType.f32:
            scales = apply("cast", scales, dtype=DType.f32)
        return apply(
            "dequantize_block", Source(key, found), scales, block=block, dtype=declared.dtype
        )


def _split_mtp(keys: Iterable[str], config: ModelConfig) -> tuple[list[str], list[str]]:
    """Tensors of MTP layers, and the rest.

    An MTP layer lies behind the decoder layers, as many as the config announces, and has the
    `eh_proj` that joins hidden state and embedding. A plain layer there is no MTP layer: it means
    that the config has fewer layers than the weights.
    """
    rest: list[str] = []
    layers: dict[int, list[str]] = {}
    first = config.num_hidden_layers
    for key in keys:
        found = _LAYER.fullmatch(key)
        layer = int(found[1]) if found else -1
        announced = first <= layer < first + config.num_nextn_predict_layers
        (layers.setdefault(layer, []) if announced else rest).append(key)
    mtp: list[str] = []
    for layer, members in layers.items():
        joined = f"model.layers.{layer}.eh_proj.weight" in members
        (mtp if joined else rest).extend(members)
    return mtp, rest


def _listed(lines: list[str], limit: int = 8) -> str:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in lines[:limit] + more)
