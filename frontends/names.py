"""From the tensors a checkpoint stores to the parameters a model declares.

Many names are equal on both sides. What is not becomes weight expressions, so that nothing is read
before an artifact is packed:

* transformers' own table says which stored tensors are renamed, stacked, joined or cut to what a
  class declares (`conversions.py`): experts are published one by one, and declared as stacks.
* Quantised weights are codes beside scales, in the same shard or another (`codes.py`). The table
  is about weights, whatever they are stored in.
* Tied parameters are another one: with tied embeddings `lm_head.weight` is the embedding.
* The tensors of a model that is part of a larger one lie under a prefix.
* An element type may differ from the one to compute in.

The layers behind the last decoder layer predict further tokens (MTP). They are recognised, and
reported as unused, as are the other parts of a larger model and what the class itself leaves out;
every other tensor that no parameter takes is an error, because a tensor that is silently dropped is
a model that silently differs. One cause is told once: tensors that differ in layer and expert alone
are one line, and what is only named otherwise is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsc.errors import CheckpointError
from dsc.frontends.checked import Holds
from dsc.frontends.codes import SCALE_SUFFIXES, CodesReader, Unfit
from dsc.frontends.conversion_steps import Making, Untranslated, Wanted, made_by, wanted_by
from dsc.frontends.conversions import AS_DECLARED, Conversions, Converter, natural
from dsc.frontends.facts import Facts
from dsc.frontends.folder import CONFIG_FILE
from dsc.frontends.quantisation import HINT, QuantizationConfig, packed
from dsc.frontends.towers import Tower, language_model
from dsc.ir.op import TypeMismatch
from dsc.ir.program import Program
from dsc.ir.types import TensorType
from dsc.ir.weights import (
    DictSource,
    LayeredSource,
    Source,
    WeightExpr,
    WeightSource,
    apply,
    sources,
)

if TYPE_CHECKING:
    from torch import nn

EMBEDDING = "model.embed_tokens.weight"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_JOINING = re.compile(r"(?:.*\.)?layers\.(\d+)\.eh_proj\.")
_RECOMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
_BLOCK = 1024
"""Rows that are compared at a time."""
_ACTIVATIONS = re.compile(r".*(\.|_)(input|output|activation|[qkv]|kv)_(scale(_inv)?|zero_point)")
"""Scales of what flows through a layer or lies in a cache: both stay as they are computed."""


@dataclass(frozen=True)
class WeightMap:
    """Every parameter's expression, and the stored tensors that none of them reads.

    `checks`: what must hold of values when they are read (`checked.py`). `left_out`: what the class
    itself leaves unused; `others`: other parts of a larger model.
    """

    weights: Mapping[str, WeightExpr]
    mtp: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    checks: Mapping[str, Holds | None] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass
class _Faults:
    """What does not fit, gathered so that one error tells all of it: causes before effects."""

    where: str
    misfit: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)

    def raise_any(self) -> None:
        named = "" if self.misfit else _named_otherwise(self.missing, self.unexpected)
        told = [named] if named else [
            f"{kind} ({len(lines)}):\n" + _listed(lines)
            for kind, lines in (
                ("tensors that do not fit", self.misfit),
                ("missing tensors", self.missing),
                ("unexpected tensors", self.unexpected),
            )
            if lines
        ]  # fmt: skip
        if told:
            hint = "config.json and the weights must belong to the same model"
            raise CheckpointError("\n".join(told), self.where, hint)


def map_weights(
    parameters: Mapping[str, TensorType],
    source: WeightSource,
    facts: Facts,
    where: str = "checkpoint",
    conversions: Conversions = AS_DECLARED,
    wrapper: str = "",
) -> WeightMap:
    """Give each declared parameter its expression over the stored tensors.

    Args:
        parameters: name and type of every parameter and persistent buffer of the model.
        source: the stored tensors.
        facts: which layers are MTP, how codes are stored.
        where: the checkpoint, for messages.
        conversions: the table of the model's class; by default names are as they are declared.
        wrapper: the type of the larger model whose language model this is, if it is part of one.

    Raises:
        CheckpointError: tensors are missing, of another shape, or left over. All of them are
            named, with expected and found types.
    """
    mapper = _Mapper(parameters, source, facts.quantization_config, conversions, where, wrapper)
    _check_depth(layers_of(parameters), layers_of(r.name for r in mapper.renamed.values()), where)
    weights = {name: mapper.parameter(name) for name in parameters}
    used = {leaf.key for expr in weights.values() if expr for leaf in sources(expr)}
    left = [key for key in source.types if key not in used]
    others = [key for key in left if mapper.tower.is_beside(mapper.weight_of[key])]
    left = [key for key in left if key not in set(others)]
    plain = {key: mapper.plain_of(key) for key in left}
    mtp = _mtp(plain, facts.num_hidden_layers)
    sorted_out: dict[str, list[str]] = {"ignored": [], "class": [], "unexpected": []}
    for key in (key for key in left if key not in mtp):
        name = mapper.renamed_of(key)
        tied = name in conversions.tied or name in conversions.tied.values()
        scales = facts.quantization_config is not None and _ACTIVATIONS.fullmatch(key)
        if scales or _RECOMPUTED.fullmatch(key) or (tied and name in parameters):
            sorted_out["ignored"].append(key)
            if tied:
                _check_tied(key, weights.get(name), source, where)
        elif key not in mapper.claimed:
            spare = conversions.is_left_out(name) and not _is_behind(name, facts.num_hidden_layers)
            sorted_out["class" if spare else "unexpected"].append(key)
    mapper.faults.unexpected += [
        (key, f" : {source.types[key]}") for key in sorted(sorted_out["unexpected"], key=natural)
    ]
    mapper.faults.raise_any()
    complete = {name: expr for name, expr in weights.items() if expr is not None}
    return WeightMap(
        complete, tuple(key for key in left if key in mtp), tuple(sorted_out["ignored"]),
        mapper.codes.checks, tuple(sorted_out["class"]), tuple(others),
    )  # fmt: skip


def _check_tied(key: str, taken: WeightExpr | None, source: WeightSource, where: str) -> None:
    """Refuse a stored tensor that is tied to another one, and has other values than that.

    transformers then takes both (`modeling_utils.py`, `tie_weights`), whatever is configured.
    """
    found = list(sources(taken)) if taken is not None and source.has_values else []
    one = found[0] if len(found) == 1 else None
    if one is None or not (one.type.dtype.is_float and source.types[key].dtype.is_float):
        return
    same = one.type.rank and one.type.shape == source.types[key].shape
    rows = one.type.shape[0] if same else 0
    assert isinstance(rows, int)  # nothing that is stored has a symbol for a size
    for start in range(0, rows, _BLOCK):
        block = slice(start, min(start + _BLOCK, rows))
        mine, theirs = (source.array(name, block).astype(np.float32) for name in (key, one.key))
        if not np.array_equal(mine, theirs, equal_nan=True):
            raise CheckpointError(
                f"{key} is tied to {one.key} by the configuration, yet both are stored, and"
                f" differ from row {start + int((mine != theirs).nonzero()[0][0])} on", where,
                f"set tie_word_embeddings to false in {CONFIG_FILE}, or take {key} out",
            )  # fmt: skip


def with_weights(
    traced: Program, weights: Mapping[str, WeightExpr], source: WeightSource
) -> Program:
    """A traced program over weights; constants that the trace found stay its own."""
    found = {name: weights.get(name, expr) for name, expr in traced.weights.items()}
    return replace(traced, weights=found, source=LayeredSource((traced.source, source)))


def with_state(traced: Program, module: nn.Module) -> Program:
    """A traced program over the tensors that a module has in memory."""
    source = DictSource({name: tensor.detach() for name, tensor in module.state_dict().items()})
    return with_weights(traced, {k: Source(k, t) for k, t in source.types.items()}, source)


def check_layout(source: WeightSource, facts: Facts, where: str) -> None:
    """Refuse in one sentence what would make every tensor missing and every other unexpected.

    Raises:
        CheckpointError: the weights are packed in a form that is not read, or the configuration
            counts an MTP layer as a decoder layer.
    """
    keys = list(source.types)
    told = facts.quantization_config
    form = packed(keys, told.quant_method if told else None)
    if form:
        raise CheckpointError(f"{form} holds a weight in a quantised form not read", where, HINT)
    layers, file = facts.num_hidden_layers, str(Path(where) / CONFIG_FILE)
    if layers is None:
        return
    for layer, key in sorted(_joining(keys).items()):
        if layer < layers:
            raise CheckpointError(
                f"layer {layer} predicts further tokens (MTP: it has {key}weight), yet "
                f"num_hidden_layers is {layers}", file, f"set num_hidden_layers to {layer}",
            )  # fmt: skip


def _check_depth(declared: set[int], stored: set[int], where: str) -> None:
    """Refuse in one sentence a configuration of more layers than there are weights for."""
    if declared and stored and max(stored) < max(declared):
        raise CheckpointError(
            f"num_hidden_layers is {max(declared) + 1}, and the weights end with layer "
            f"{max(stored)}", str(Path(where) / CONFIG_FILE),
            f"set num_hidden_layers to {max(stored) + 1}, or get the weights that are missing",
        )  # fmt: skip


@dataclass
class _Job:
    """Stored weights that become parameters together: by source of the converter, if there is one.

    `targets`: parameters by the converter's targets. `made`: what was made of them, once it was.
    """

    converter: Converter | None
    targets: Mapping[str, str]
    members: dict[str, list[str]] = field(default_factory=dict)
    made: Mapping[str, WeightExpr] | None = None


class _Mapper:
    """One mapping in progress: `parameter` gives an expression, or notes why there is none."""

    def __init__(
        self,
        parameters: Mapping[str, TensorType],
        source: WeightSource,
        quantization: QuantizationConfig | None,
        table: Conversions,
        where: str,
        wrapper: str,
    ) -> None:
        self.parameters, self.source, self.table = parameters, source, table
        self.faults = _Faults(where)
        self.codes = CodesReader(source, quantization)
        self.weight_of = {key: self.codes.weight_of(key) for key in source.types}
        weights = dict.fromkeys(self.weight_of.values())
        self.tower: Tower = language_model(weights, parameters, table, where, wrapper)
        plain = {self.tower.plain(name): name for name in weights}
        self.renamed = table.renamed(plain, parameters)
        self.claimed: set[str] = set()  # what parameters asked for: faults of it are noted
        self.jobs: dict[str, _Job] = {}
        for name, found in self.renamed.items():
            if found.name in parameters:
                self._add(plain[name], found.name, found.converter, found.source)

    def plain_of(self, key: str) -> str:
        """The name that a stored tensor's weight has in a checkpoint of the model alone."""
        return self.tower.plain(self.weight_of[key])

    def renamed_of(self, key: str) -> str:
        """The name of the parameter that a stored tensor would be of."""
        return self.renamed[self.plain_of(key)].name

    def _add(self, weight: str, name: str, place: int | None, source: str) -> None:
        converter = None if place is None else self.table.converters[place]
        job = self.jobs.get(name)
        if job is None:
            job = self.jobs[name] = _Job(converter, _targets(name, converter))
            for target in job.targets.values():
                self.jobs.setdefault(target, job)
        if job.converter is converter and (converter is not None or not job.members):
            job.members.setdefault(source, []).append(weight)

    def parameter(self, name: str) -> WeightExpr | None:
        """The expression of one declared parameter, or of the one that it is tied to."""
        tied = self.table.tied.get(name)
        ties = [name] if tied is None else [tied, name]
        ties += [n for n, other in self.table.tied.items() if other == (tied or name)]
        found = next((other for other in ties if other in self.jobs), None)
        if found is None:
            self.faults.missing.append((ties[0], f" : {self.parameters[name]}"))
            return None
        job = self.jobs[found]
        if job.made is None:
            job.made = self._made(job)
        return job.made.get(found)

    def _made(self, job: _Job) -> Mapping[str, WeightExpr]:
        """The expressions of a job's parameters; none where anything is at fault."""
        if job.converter is None:
            ((name,), (weight,)) = job.targets.values(), job.members[""]
            expr = self._tensor(weight, self.parameters[name])
            return {} if expr is None else {name: expr}
        declared = {t: self.parameters[n].shape for t, n in job.targets.items()}
        first = self.parameters[next(iter(job.targets.values()))]
        making = Making(job.converter.sources, job.converter.targets, declared)
        steps = job.converter.steps
        wanted = wanted_by(steps, making, sum(map(len, job.members.values())))
        given: dict[str, list[WeightExpr]] = {}
        whole = True
        for source, each in wanted.items():
            members = self._complete(job, source, each, first)
            parts = [self._part(member, each, first) for member in members]
            given[source] = [part for part in parts if part is not None]
            whole = whole and len(given[source]) == (each.count or len(members) or -1)
        if not whole:
            return {}
        one = next(iter(job.members.values()))[0]
        try:
            made = made_by(steps, given, making)
        except Untranslated as step:
            raise CheckpointError(
                f"transformers makes {', '.join(job.targets.values())} of it by {step}, which dsc "
                "does not know", one, "save the checkpoint anew by transformers' save_pretrained",
            ) from None  # fmt: skip
        except TypeMismatch as problem:
            self._misfit(one, f": {problem}")
            return {}
        for target, name in job.targets.items():
            if made[target][0].type != self.parameters[name]:
                self._misfit(one, f": makes {name} {made[target][0].type}, "
                             f"expected {self.parameters[name]}")  # fmt: skip
                return {}
        return {name: made[target][0] for target, name in job.targets.items()}

    def _complete(
        self, job: _Job, source: str, wanted: Wanted, declared: TensorType
    ) -> Sequence[str]:
        """The members of a source, those left out that it has not; what is missing is noted."""
        members = job.members.get(source, [])
        assert job.converter is not None
        if wanted.count is None and members:
            return members
        place = _place([member for each in job.members.values() for member in each])
        count = wanted.count or 1
        there = {_number(member, place): member for member in members}
        for number in range(count):
            if number not in there:
                name = _name_of(number, source, job, place) or next(iter(job.targets.values()))
                kind = TensorType(declared.dtype, wanted.shape or declared.shape)
                self.faults.missing.append((name, f" : {kind}"))
                self.claimed |= self.codes.names(name)
        return [there[number] for number in sorted(there) if number < count]

    def _part(self, member: str, wanted: Wanted, declared: TensorType) -> WeightExpr | None:
        shape = wanted.shape
        if shape is None:
            if member not in self.source.types:
                self._misfit(member, ": its shape cannot be told")
                return None
            shape = self.source.types[member].shape
        return self._tensor(member, TensorType(declared.dtype, shape))

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
        if key not in self.source.types:
            self.faults.missing.append((key, f" : {declared}"))
            return None
        found = self.source.types[key]
        if found.shape != declared.shape:
            self._misfit(key, f": expected {declared}, found {found}")
            return None
        scale = next((key + s for s in SCALE_SUFFIXES if key + s in self.source.types), None)
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


def _targets(name: str, converter: Converter | None) -> dict[str, str]:
    """The parameters that a converter makes, by its targets; `name` is the first."""
    if converter is None:
        return {"": name}
    first, *others = converter.targets
    front, _, back = name.partition(first)
    return {first: name} | {target: front + target + back for target in others}


def _place(members: Sequence[str]) -> int:
    """Which part of a list's dotted names numbers it: the last in which they differ, or that is."""
    parted = [member.split(".") for member in members]
    longest = max(parted, key=len, default=[])
    places = [place for place, part in enumerate(longest) if part.isdecimal()]
    differ = [p for p in places if len({tuple(parts[p : p + 1]) for parts in parted}) > 1]
    return (differ or places or [0])[-1]


def _number(member: str, place: int) -> int:
    part = "".join(member.split(".")[place : place + 1])
    return int(part[:9]) if part.isdecimal() else 0


def _name_of(number: int, source: str, job: _Job, place: int) -> str:
    """The name that a missing member would have, after the names of the others; "" of none."""
    for other, members in ((source, job.members.get(source, ())), *job.members.items()):
        end, own = (each.rpartition("*")[2].replace("\\", "") for each in (other, source))
        for member in members:
            named = member if other == source else member.replace(end, own)
            if other == source or named != member:
                parts = named.split(".")
                parts[place] = str(number) if parts[place].isdecimal() else parts[place]
                return ".".join(parts)
    return ""


def _mtp(plain: Mapping[str, str], layers: int | None) -> set[str]:
    """Of stored tensors, by their weights' names, those of MTP layers.

    An MTP layer lies behind the decoder layers and has the `eh_proj` that joins hidden state and
    embedding, whether or not the config announces it: tools drop `num_nextn_predict_layers` more
    often than tensors. A plain layer there is no MTP layer: it means that the config has fewer
    layers than the weights.
    """
    if layers is None:
        return set()
    joining = {layer for layer in _joining(plain.values()) if layer >= layers}
    found = {key: _LAYER.fullmatch(name) for key, name in plain.items()}
    return {key for key, layer in found.items() if layer and int(layer[1]) in joining}


def _is_behind(name: str, layers: int | None) -> bool:
    """Whether a tensor is of a layer behind the last: some classes leave out one by its number."""
    found = _LAYER.fullmatch(name)
    return layers is not None and found is not None and int(found[1]) >= layers


def layers_of(names: Iterable[str]) -> set[int]:
    """The layers that tensors of layers are of."""
    return {int(found[1]) for found in map(_LAYER.fullmatch, names) if found}


def _joining(names: Iterable[str]) -> dict[int, str]:
    """Layers that join hidden state and embedding, by a weight stored in whatever form."""
    return {int(found[1]): found[0] for found in map(_JOINING.match, names) if found}


def _named_otherwise(
    missing: Sequence[tuple[str, str]], unexpected: Sequence[tuple[str, str]]
) -> str:
    """What is wrong where all that is missing is there, but for a part of its name."""
    lost, there = dict(missing), dict(unexpected)
    if not lost or len(lost) != len(there):
        return ""
    first, kind = next(iter(there.items()))
    for name in [name for name, expected in lost.items() if expected == kind][:64]:
        wrong, right = _difference(first, name)
        meant = {f".{n}.".replace(f".{right}.", f".{wrong}.", 1)[1:-1]: n for n in lost}
        if all(there.get(found) == lost[n] for found, n in meant.items()):
            more = f" (as are {len(lost) - 1} more)" if len(lost) > 1 else ""
            return f"{name}{kind} is missing, and {first} is there in its place{more}"
    return ""


def _difference(one: str, other: str) -> tuple[str, str]:
    """The dotted parts in which two names differ; with a part beside them where one has none."""
    a, b = one.split("."), other.split(".")
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    ends = (i for i in range(shorter - start) if a[-1 - i] != b[-1 - i])
    end = next(ends, shorter - start)
    if start + end == shorter:
        start, end = (start - 1, end) if start else (0, end - 1)
    return ".".join(a[start : len(a) - end]), ".".join(b[start : len(b) - end])


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
