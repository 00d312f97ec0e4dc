"""transformers' conversion table of a model as data: names in checkpoints, and steps from them.

Published checkpoints and the stock classes differ in names and in what is stored together. For each
class transformers keeps an ordered list: renamings, all of which are applied to a name, then at
most one converter a tensor, which makes some declared tensors out of some stored ones. Here the
list is read into frozen data with a JSON form, so that it can be kept with a trace: to map names
with it, neither torch nor transformers is needed, and no tensor is read (`conversion_steps.py`).

Source: `core_model_loading.py` of transformers 5.23, whose meaning is kept to the letter, that a
name is changed where its text is first found included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsc.frontends.conversion_steps import Step, step_from_json, step_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Renaming:
    """Where `pattern` is found in a name, a target takes its place.

    Args:
        pattern: alternatives in groups g0, g1, ...; the one that matches is that of a source.
        targets: what takes the place; a backslash and a digit is a group of the alternative.
        scope: the prefix of the names that it is for, `None` for all.
        base: the prefix of the model without its head, which may stand before the scope.
        shift: what is added to a number that is taken over.
        paired: each alternative has a target of its own, and none counts before the first did.
    """

    pattern: str
    targets: tuple[str, ...]
    scope: str | None = None
    base: str = ""
    shift: int = 0
    paired: bool = False

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        """The pattern, compiled once."""
        return re.compile(self.pattern)

    def _parted(self, name: str) -> tuple[str, str] | None:
        """The scope at the front of a name, and what follows it."""
        if self.scope is None:
            return "", name
        scope = f"{self.scope}." if self.scope else ""
        for front in (f"{self.base}.{scope}" if self.base else scope, scope):
            if name.startswith(front):
                return front, name.removeprefix(front)
        return None

    def match(self, name: str) -> tuple[int, str] | None:
        """Which alternative is found in a name, and the name that it gives."""
        parted = self._parted(name)
        found = self.compiled.search(parted[1]) if parted else None
        if parted is None or found is None:
            return None
        group = next(g for g, text in found.groupdict().items() if text is not None)
        which, start = int(group[1:]), self.compiled.groupindex[group]

        def taken(reference: re.Match[str]) -> str:
            text = found.group(start + int(reference[1]))
            return str(int(text[:9]) + self.shift) if self.shift else text or ""

        target = re.sub(r"\\(\d)", taken, self.targets[which if self.paired else 0])
        return which, parted[0] + parted[1].replace(found[0], target, 1)


@dataclass(frozen=True)
class Converter(Renaming):
    """A renaming to the first target of what `steps` make of tensors found by `sources`."""

    sources: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Renamed:
    """What a name becomes: the parameter, or the first that a converter makes of it."""

    name: str
    converter: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Conversions:
    """A model's table.

    Args:
        renamings, converters: in order.
        base: the prefix of the model without its head, which a checkpoint may have or lack.
        tied: parameters that are others.
        left_out: patterns of names that the class leaves in its checkpoints unused.
    """

    renamings: tuple[Renaming, ...] = ()
    converters: tuple[Converter, ...] = ()
    base: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def renamed(self, names: Iterable[str], declared: Mapping[str, Any]) -> dict[str, Renamed]:
        """What each name becomes, whether or not it is `declared`; in the order of the names."""
        begun: set[int] = set()
        made: dict[str, Renamed] = {}
        for name in sorted(names, key=natural):
            found = self._renamed(name, declared, begun)
            if found.name not in declared and name in declared:
                found = Renamed(self._based(name, declared))
            made[name] = found
        return made

    def _renamed(self, name: str, declared: Mapping[str, Any], begun: set[int]) -> Renamed:
        for place, renaming in enumerate(self.renamings):
            found = renaming.match(name)
            if found is None:
                continue
            if renaming.paired:
                if found[0] == 0:
                    begun.add(place)
                if place not in begun:
                    continue
            name = found[1]
        for place, converter in enumerate(self.converters):
            found = converter.match(name)
            if found is not None:
                made = self._based(found[1], declared)
                return Renamed(made, place, converter.sources[found[0]])
        return Renamed(self._based(name, declared))

    def _based(self, name: str, declared: Mapping[str, Any]) -> str:
        """The name with or without the prefix of the base model, as it is declared."""
        if not self.base:
            return name
        bare = name.removeprefix(f"{self.base}.")
        if bare != name and bare in declared:
            return bare
        based = f"{self.base}.{name}"
        return based if based in declared else name

    def is_left_out(self, name: str) -> bool:
        """Whether the class itself leaves such a tensor unused."""
        return any(re.search(pattern, name) for pattern in self.left_out)

    def to_json(self) -> dict[str, Any]:
        """What is kept with a trace."""
        return asdict(self) | {
            "converters": [
                {**asdict(each), "steps": [step.to_json() for step in each.steps]}
                for each in self.converters
            ]
        }

    @staticmethod
    def from_json(kept: Mapping[str, Any]) -> Conversions:
        """The table that was kept. Raises `KeyError`, `TypeError` for anything else."""
        renamings = tuple(Renaming(**_tuples(each)) for each in kept["renamings"])
        converters = tuple(
            Converter(**_tuples(each) | {"steps": tuple(map(step_from_json, each["steps"]))})
            for each in kept["converters"]
        )
        tied, left_out = dict(kept["tied"]), tuple(kept["left_out"])
        return Conversions(renamings, converters, kept["base"], tied, left_out)


AS_DECLARED = Conversions()
"""The table of a checkpoint that stores what is declared, under its names."""


def natural(name: str) -> list[tuple[Any, ...]]:
    """Orders layer 10 behind layer 9, as transformers orders names."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :].lstrip("0")
        number = (len(digits), digits) if text != part else (-1, "")
        parts.append((1, text, *number) if text else (0, *number))
    return parts


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def conversions_of(model: nn.Module) -> Conversions:
    """The table of a stock model, which may lie on `meta`.

    A step that has no translation stays in it by name, and is an error where it is used.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    stock: Any = model
    table = get_model_conversion_mapping(stock)
    renamings = [_renaming(each) for each in table if not isinstance(each, WeightConverter)]
    converters = [
        Converter(
            **vars(_renaming(each)),
            sources=tuple(each.source_patterns),
            steps=tuple(step_of(operation, stock.config) for operation in each.operations),
        )
        for each in table
        if isinstance(each, WeightConverter)
    ]
    left_out = getattr(stock, "_keys_to_ignore_on_load_unexpected", None) or ()
    tied = dict(getattr(stock, "all_tied_weights_keys", None) or {})
    base = stock.base_model_prefix
    return Conversions(tuple(renamings), tuple(converters), base, tied, tuple(sorted(left_out)))


def _renaming(transform: Any) -> Renaming:
    return Renaming(
        transform.compiled_sources.pattern,
        tuple(transform.target_patterns),
        transform.scope_prefix,
        transform.base_model_prefix or "",
        getattr(transform, "offset", 0),
        type(transform).__name__ == "GroupWeightRename",
    )
