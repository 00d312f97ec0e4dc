"""A checkpoint in FP8 becomes one in bf16, and one in bf16 a checkpoint in FP8.

To bf16, each weight in FP8 is its codes times the scales of their blocks, in fp32, rounded once
(`inference/fp8_cast_bf16.py` of deepseek-ai/DeepSeek-V3); everything else stays bit for bit what it
is. FP8 of other makers, scaled by row or tensor, is read too.

To FP8, what the published checkpoints have in FP8 becomes codes with a scale for 128 x 128: the
linears of attention, of dense MLPs and of all experts, in MTP layers of the DeepSeek-V3 family as
in others. Embeddings, heads, norms, the router's gate and bias, and what joins an MTP layer to the
model stay. Which tensors of another type those are, its stock class and its table of conversions
say; what of its linears stays is named in `modules_to_not_convert`. A scale is
the largest magnitude of its block over 448, so a checkpoint in FP8 that was so made comes back from
bf16 bit for bit; with `scale_fmt` "ue8m0" it is the next power of two, as since DeepSeek-V3.1.

Weights stream from mapped files into new ones; the folder takes its place once it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from dsc.errors import CheckpointError, ConfigError, FileError, UsageError
from dsc.files import check_makeable, check_room, size_of
from dsc.frontends.codes import SCALE_SUFFIXES
from dsc.frontends.conversions import conversions_of
from dsc.frontends.family import LINEARS, MEMBERS
from dsc.frontends.folder import CONFIG_FILE, COPIED
from dsc.frontends.huggingface import CheckpointModel, open_checkpoint
from dsc.frontends.stock import completed
from dsc.ir.safetensors import INDEX_FILE, inside
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import WeightExpr, apply, sources
from dsc.replacing import clear, replacing
from dsc.runtime.contents import Stored, nbytes
from dsc.runtime.emission import Progress
from dsc.runtime.shards import SHARD, cut, write_shards
from dsc.strict_json import JsonObject

Form: TypeAlias = Literal["bf16", "fp8"]
ScaleFormat: TypeAlias = Literal["f32", "ue8m0"]
BLOCK = (128, 128)
_ROUTER = re.compile(r"(.*\.)?(\w*_)?(gate|router)(\..*)?")
"""Linears that choose experts, or how much of one is taken."""


@dataclass(frozen=True)
class Conversion:
    """What was written: bytes by file, how many tensors, and how many of them were converted."""

    folder: Path
    files: Mapping[str, int]
    tensors: int
    converted: int
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    to: Form,
    *,
    scale_fmt: ScaleFormat = "f32",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint folder `source` to the folder `out` with its weights in another form.

    Args:
        source: a checkpoint folder.
        out: where the new one goes, whole or not at all.
        to: "bf16" for weights in FP8; "fp8" for plain weights.
        scale_fmt: scales of FP8: "f32", or "ue8m0" for powers of two.
        max_shard_size: bytes of tensors in a file at most: a number, or as "5GB", "500MB", "2GiB".
        force: replace a checkpoint at `out`.
        progress: called with (what, done, total), in bytes.

    Raises:
        DscError: one of its classes, with what is wrong, where, and what to do.
    """
    folder, target = Path(source), Path(out)
    for told, known in ((to, get_args(Form)), (scale_fmt, get_args(ScaleFormat))):
        if told not in known:
            raise UsageError(f"{told!r} is not known here", hint=f"give {' or '.join(known)}")
    limit = size_of(max_shard_size)
    _check_free(folder, target, force)
    opened = open_checkpoint(folder, DType.bf16)
    _check_form(opened, to)
    chosen, plain = _linears(opened) if to == "fp8" else (frozenset[str](), [])
    converted, opened = _plain(opened)
    stored = list(opened.weights.items())
    if to == "fp8":
        converted = [name for name, _ in stored if name in chosen]
        _check_linears([(name, opened.weights[name].type) for name in converted])
        stored = [
            part
            for name, expr in stored
            for part in (_in_blocks(name, expr, scale_fmt) if name in chosen else [(name, expr)])
        ]
    if not converted:
        raise CheckpointError(f"no weight to convert to {to}", str(folder), "use it as it is")
    shards = cut(stored, limit)
    copied = [inside(folder, n, str(folder)) for n in COPIED if os.path.lexists(folder / n)]
    sizes = [sum(nbytes(expr.type) for _, expr in shard) for shard in shards]
    beside = sum(path.stat().st_size for path in copied)
    clear(target)
    check_room(target, sum(sizes) + beside, "the weights", max(sizes))
    with replacing(target, partial(_check_free, folder, target, force)) as made:
        for path in copied:
            shutil.copyfile(path, made / path.name)
        (made / CONFIG_FILE).write_text(_config(opened.raw, to, scale_fmt, plain), "utf-8")
        try:
            write_shards(made, shards, opened.source, f"to {to}", progress)
        except CheckpointError as error:  # scales are ours to write, and a user's file has none
            weight = (error.where or "").removesuffix(SCALE_SUFFIXES[0])
            error.where = weight if weight in chosen else error.where
            raise
        files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    notes = (*opened.notes, *_left_out(folder, files))
    return Conversion(target, files, len(stored), len(converted), notes)


def _check_free(source: Path, out: Path, force: bool) -> None:
    """Raise unless `out` may be written: nothing is there, or a checkpoint that may be replaced."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError("the checkpoint would be replaced by what is made of it", str(out),
                         "give another place")  # fmt: skip
    check_makeable(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise FileError(
            f"{out} exists already", hint="give another place, or --force to replace it"
        )
    why = "it is no folder"
    if out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if not _is_ours(path.name))
        why = f"it holds {foreign[0]}, which no converted checkpoint has" if foreign else ""
    if why:
        told = f"{out} is not replaced, not even with --force: {why}"
        raise FileError(told, hint="give another place")


def _is_ours(name: str) -> bool:
    """Whether a converted checkpoint may have a file of this name."""
    return name in (CONFIG_FILE, INDEX_FILE, *COPIED) or bool(SHARD.fullmatch(name))


def _check_form(opened: CheckpointModel, to: Form) -> None:
    """Raise `ConfigError` for weights that are not in a form that is converted to this one."""
    told = opened.config.facts.quantization_config
    where = str(opened.folder / CONFIG_FILE)
    if told is not None and told.integers:
        raise ConfigError(
            f"weights in FP8 are converted, and these are integers (quant_method "
            f"{told.quant_method!r})", where,
            "give the checkpoint in FP8 or bf16 that this one was made from",
        )  # fmt: skip
    if told is not None and to == "fp8":
        raise ConfigError(
            f"the weights are in FP8 already (quant_method {told.quant_method!r})", where,
            "for other blocks or scales convert to bf16 first",
        )  # fmt: skip


def _plain(opened: CheckpointModel) -> tuple[list[str], CheckpointModel]:
    """Which weights are in 8-bit floats, and the checkpoint with all of its weights as numbers.

    Raises `CheckpointError` for scales that are missing, left over or of another shape.
    """
    kept = {
        key: kind for key, kind in opened.source.types.items()
        if not key.endswith(SCALE_SUFFIXES)
    }  # fmt: skip
    narrow = [key for key, t in kept.items() if t.dtype.is_float and t.dtype.itemsize == 1]
    wide = {key: TensorType(DType.bf16, kept[key].shape) for key in narrow}
    return narrow, opened.mapped(kept | wide)


def _linears(opened: CheckpointModel) -> tuple[frozenset[str], list[str]]:
    """The stored weights that become FP8, and the modules of other matrices, without embeddings.

    Raises `CheckpointError` where a checkpoint is not that of its stock class.
    """
    if opened.config.model_type in MEMBERS:
        return frozenset(filter(LINEARS.fullmatch, opened.source.types)), []
    from torch import nn

    from dsc.frontends.causal_lm import parameter_types

    step = opened.build()
    model: Any = step.stock()
    facts, parameters = completed(opened.config, step.config), parameter_types(step)
    found = opened.mapped(parameters, facts, conversions_of(model))
    head = model.get_output_embeddings()
    kinds = dict(model.named_modules())
    matrices = {
        path: kinds[path]
        for name, kind in parameters.items()
        if name.endswith(".weight") and kind.rank == 2
        and not isinstance(kinds[path := name.removesuffix(".weight")], nn.Embedding)
    }  # fmt: skip
    linears = {
        path for path, part in matrices.items()
        if isinstance(part, nn.Linear) and part is not head and not _ROUTER.fullmatch(path)
    }  # fmt: skip
    stacked = {n for n, t in parameters.items() if t.rank == 3 and t.shape[0] == facts.experts}
    chosen = stacked | {f"{path}.weight" for path in linears}
    stored = {leaf.key for name in chosen for leaf in sources(found.weights[name])}
    left = {
        path if kinds[path] is head else leaf.key.removesuffix(".weight")
        for path in matrices.keys() - linears
        for leaf in sources(found.weights[f"{path}.weight"])
    }
    return frozenset(key for key in stored if key.removesuffix(".weight") not in left), sorted(left)


def _check_linears(linears: Sequence[tuple[str, TensorType]]) -> None:
    """Raise `CheckpointError` unless all are matrices of numbers, or several."""
    odd = [f"{n} : {t}" for n, t in linears if not t.dtype.is_float or t.rank not in (2, 3)]
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        raise CheckpointError("a weight to quantise is no matrix of floats", odd[0] + more)


def _in_blocks(name: str, expr: WeightExpr, scale_fmt: ScaleFormat) -> Iterator[Stored]:
    """Codes and scales of a weight."""
    kind = DType.f8e8m0 if scale_fmt == "ue8m0" else DType.f32
    scales = apply("block_scales", expr, codes=DType.f8e4m3, block=BLOCK, dtype=kind)
    if kind is not DType.f32:
        scales = apply("cast", scales, dtype=DType.f32)
    yield name, apply("block_codes", expr, scales, codes=DType.f8e4m3, block=BLOCK)
    yield name + SCALE_SUFFIXES[0], scales


def _config(raw: JsonObject, to: Form, scale_fmt: ScaleFormat, plain: Sequence[str]) -> str:
    """`config.json` of the new form; all else stays as it is. `plain`: modules of other linears."""
    made = {key: value for key, value in raw.items() if key != "quantization_config"}
    if to == "bf16":
        made["dtype" if "dtype" in made else "torch_dtype"] = "bfloat16"
    else:
        told = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        exponents = {"scale_fmt": scale_fmt} if scale_fmt == "ue8m0" else {}
        rest = {"modules_to_not_convert": list(plain)} if plain else {}
        made["quantization_config"] = told | exponents | {"weight_block_size": list(BLOCK)} | rest
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _left_out(folder: Path, files: Mapping[str, int]) -> Sequence[str]:
    """A note on the files that were not copied; weights and their index have new names."""
    names = [path.name for path in folder.iterdir() if not path.name.endswith(".safetensors")]
    left = sorted(set(names) - {INDEX_FILE} - files.keys())
    more = f" and {len(left) - 8} more" if len(left) > 8 else ""
    return (f"not copied: {', '.join(left[:8])}{more}",) if left else ()
