"""How far a model's positions reach: by its own rope scaling, or by one that a user chooses.

A configuration says how many positions a model has (`max_position_embeddings`). A scaling that was
made from fewer (`original_max_position_embeddings` times `factor`) may reach further than that:
Qwen's checkpoints say 32,768 and, with YaRN by 4, serve 131,072 (their model cards). The option
`--rope-scaling yarn:4` writes such a section into a configuration that has none, as one would by
hand.

Chosen may be what a factor alone describes: yarn (Peng et al. 2023, arXiv:2309.00071), linear (Chen
et al. 2023, arXiv:2306.15595) and llama3 (Llama 3.1's, with its published bounds of wavelengths).
longrope needs factors that were searched for one model, and dynamic scaling depends on the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsc.errors import ConfigError, UsageError

CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "yarn": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""The scalings that may be chosen, and what each needs beside factor and original positions."""
SECTIONS = ("rope_parameters", "rope_scaling")
"""Both spellings of a configuration's rope section."""
MAX_FACTOR = 1024.0
MAX_POSITIONS = 1 << 40


@dataclass(frozen=True)
class RopeScaling:
    """A scaling by name, and by how much it multiplies the positions."""

    kind: str
    factor: float

    @staticmethod
    def parse(text: str) -> RopeScaling:
        """`yarn:4` as a scaling. Raises `UsageError`.

        >>> RopeScaling.parse("yarn:4")
        RopeScaling(kind='yarn', factor=4.0)
        """
        kind, _, number = text.partition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        hint = f"name one of {', '.join(CHOSEN)} and a factor above 1, as yarn:4"
        if kind not in CHOSEN:
            raise UsageError(f"no rope scaling that a factor describes is {text!r}", hint=hint)
        if not 1 < factor <= MAX_FACTOR:
            raise UsageError(f"{text!r} scales by no factor of 1 to {MAX_FACTOR:g}", hint=hint)
        return RopeScaling(kind, factor)

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def applied(
        self, values: Mapping[str, Any], positions: int | None, name: str, where: str
    ) -> dict[str, Any]:
        """A configuration with this scaling; `positions` are its own, under the key `name`.

        Raises:
            ConfigError: the configuration scales positions already, or has none to scale.
        """
        if own := own_scaling(values):
            raise ConfigError(
                f"the model scales its positions itself ({own})", where, "leave out --rope-scaling"
            )
        if positions is None or positions > MAX_POSITIONS:
            raise ConfigError("the model has no positions to scale", where)
        for spelled in SECTIONS:
            if not isinstance(values.get(spelled), Mapping | None):
                found = f"{values[spelled]!r:.60}"
                raise ConfigError(f"{spelled} must be an object, found {found}", where)
        section = {k: v for s in SECTIONS for k, v in (values.get(s) or {}).items()}
        for key in ("rope_theta", "partial_rotary_factor"):
            if values.get(key) is not None:
                section.setdefault(key, values[key])
        section |= {"rope_type": self.kind, "factor": self.factor, **CHOSEN[self.kind]}
        section["original_max_position_embeddings"] = positions
        rest = {k: v for k, v in values.items() if k not in SECTIONS}
        return {**rest, "rope_parameters": section, name: int(positions * self.factor)}


NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor",
    "partial_rotary_factor",
)  # fmt: skip
"""Keys of rope sections that say a number."""
TYPES = ("rope_type", "type")


def rope_sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rope sections of a configuration by their keys, wherever they stand.

    One for all layers, or within it one for each kind of layer, with what it says of all.

    >>> [key for key, _ in rope_sections({"rope_parameters": {"full": {}, "sliding": {}}})]
    ['rope_parameters.full', 'rope_parameters.sliding']
    """
    for name, section in values.items():
        if not isinstance(section, Mapping):
            continue
        kinds = {key: value for key, value in section.items() if isinstance(value, Mapping)}
        if "rope" not in name:
            yield from ((f"{name}.{key}", found) for key, found in rope_sections(section))
        elif not kinds:
            yield name, section
        for key, own in kinds.items() if "rope" in name else ():
            of_all = {k: v for k, v in section.items() if k not in kinds}
            yield f"{name}.{key}", {**of_all, **own}


def wrong_value(name: str, section: Mapping[str, Any]) -> str:
    """What of a rope section is no value of its key, in words; "" where nothing is.

    >>> wrong_value("rope_scaling", {"rope_type": "yarn", "factor": "4"})
    "rope_scaling.factor must be a number, found '4'"
    """
    part = name.rpartition(".")[2]
    if "." in name and part in (*NUMBERS, *TYPES):
        return f"{name} must be a {'text' if part in TYPES else 'number'}, found a section"
    for key, value in section.items():
        if key in TYPES and value is not None and not isinstance(value, str):
            return f"{name}.{key} must be a text, found {value!r:.60}"
        if key in NUMBERS and value is not None and type(value) not in (int, float):
            return f"{name}.{key} must be a number, found {value!r:.60}"
    return ""


def rope_type(section: Mapping[str, Any]) -> str:
    """The type that a rope section names, in either spelling; "" where it names none."""
    kind = section.get("rope_type", section.get("type"))
    return kind if isinstance(kind, str) else ""


def own_scaling(values: Mapping[str, Any]) -> str:
    """The type of a configuration's own rope section; "" where it changes no angles.

    Sections of their own for each kind of layer count as one, called after them.
    """
    sections = dict(rope_sections(values))
    if kinds := [key.rpartition(".")[2] for key in sections if "." in key]:
        return f"one for each of {', '.join(kinds)}"
    scaled = (rope_type(section) for section in sections.values())
    return next((kind for kind in scaled if kind not in ("", "default")), "")


def reach(values: Mapping[str, Any]) -> int:
    """The positions that a configuration's own scaling reaches; 0 where it does not say."""
    found = [0]
    for _, section in rope_sections(values):
        original, factor = (
            section.get(key, values.get(key))
            for key in ("original_max_position_embeddings", "factor")
        )
        are_numbers = type(original) is int and type(factor) in (int, float)
        if rope_type(section) not in CHOSEN or not are_numbers:
            continue
        if 0 < original <= MAX_POSITIONS and 0 < factor <= MAX_POSITIONS:
            found.append(int(original * factor))
    return max(found)
