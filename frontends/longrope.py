"""LongRoPE has two sets of angles, for short and for long texts: one of them is compiled.

transformers chooses anew in each step, by the longest text of the batch, and turns all of its
tokens so, although the keys that are cached were turned otherwise (Ding et al. 2024,
arXiv:2402.13753, section 3.3; `modeling_rope_utils.py`). What is compiled has one set: that of long
texts where its largest context is beyond the length that the model was first trained for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsc.frontends.rope_scaling import rope_sections, rope_type

if TYPE_CHECKING:
    from torch import nn

LONG = "longrope"
FIRST = "original_max_position_embeddings"
FIXED = "default"
SHORT = 4096
"""A context that is short for any model that `for_short_texts` gives."""


def has_longrope(values: Mapping[str, Any]) -> bool:
    """Whether a configuration has a rope section of two sets of angles."""
    return any(rope_type(section) == LONG for _, section in rope_sections(values))


def for_short_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with two sets of angles, for whose class `SHORT` tokens are a short text."""
    return _reaching(values, SHORT) if has_longrope(values) else dict(values)


def _reaching(values: Mapping[str, Any], least: int) -> dict[str, Any]:
    found = dict(values)
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = _reaching(value, least)
        elif key == FIRST and isinstance(value, int):
            found[key] = max(value, least)
    return found


def told_of(values: Mapping[str, Any], context: int) -> str:
    """What a user should know of the angles that were chosen, or ""."""
    for name, section in rope_sections(values):
        first = values.get(FIRST, section.get(FIRST))
        if rope_type(section) == LONG and isinstance(first, int) and context > first:
            return (
                f"{name} is longrope: with a max_context of {context} all texts are turned by the "
                f"angles for long ones; --max-context {first} takes those for short ones"
            )
    return ""


def fix_longrope(root: nn.Module, context: int | None) -> None:
    """Give `root` rotations of one set of angles; the modules that it was made of stay.

    Without a `context` it is the model's own.
    """
    parts: list[tuple[str, Any]] = list(root.named_modules())
    for path, part in parts:
        kinds = getattr(part, "rope_type", None)
        named: dict[Any, Any] = kinds if isinstance(kinds, dict) else {None: kinds}
        if LONG in named.values():
            shelled(root, path, _fixed(part, named, context))


def _fixed(part: Any, kinds: Mapping[str | None, str], context: int | None) -> Any:
    """A copy of a rotation with one set of angles, for each kind of layer that it knows."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fixed = copy.copy(part)
    fixed._buffers = dict(part._buffers)
    most = part.config.max_position_embeddings if context is None else context
    for layers, kind in kinds.items():
        if kind != LONG:
            continue
        section = part.config.rope_parameters
        section = section if layers is None else section[layers]
        first, prefix = section[FIRST], f"{layers}_" if layers else ""
        angles = fixed._buffers[f"{prefix}original_inv_freq"]
        if most > first:
            named = {} if layers is None else {"layer_type": layers}
            found, _ = ROPE_INIT_FUNCTIONS[LONG](part.config, "cpu", seq_len=first + 1, **named)
            angles = found.to(angles.device)
        fixed._buffers[f"{prefix}inv_freq"] = angles
    is_one = None in kinds
    fixed.rope_type = FIXED if is_one else {k: FIXED if v == LONG else v for k, v in kinds.items()}
    return fixed


def shelled(root: nn.Module, path: str, part: nn.Module) -> None:
    """Put a part in place, under copies of the modules that lead to it."""
    *above, last = path.split(".")
    parent = root
    for name in above:
        child = copy.copy(parent.get_submodule(name))
        child._modules = dict(child._modules)
        parent._modules[name] = child
        parent = child
    parent._modules[last] = part
