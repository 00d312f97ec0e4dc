"""Llama 4 attends more sharply in long texts, by a length that transformers counts for the batch.

Layers without rotations multiply the query of token n by 1 + a log(1 + floor((n + 1) / s)), s being
`floor_scale` (Nakanishi 2025, arXiv:2501.19399; `modeling_llama4.py`). transformers counts n from
the longest sequence, whatever the others hold. Texts of fewer than s tokens have a factor of 1: so
much is compiled, and a context beyond it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsc.errors import UnsupportedArchitecture
from dsc.frontends.longrope import SHORT, shelled

if TYPE_CHECKING:
    from torch import nn

TUNED, SCALE = "attn_temperature_tuning", "floor_scale"


def has_temperature(values: Mapping[str, Any]) -> bool:
    """Whether a configuration, or a part of it, may say that queries go by the text's length."""
    parts = (value for value in values.values() if isinstance(value, Mapping))
    named = str(values.get("model_type", "")).startswith("llama4") or TUNED in values
    return named or any(map(has_temperature, parts))


def for_plain_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all keys of its class, where `SHORT` tokens have a factor of 1."""
    return {**values, SCALE: 2 * SHORT} if SCALE in values else dict(values)


def fix_temperature(root: nn.Module, context: int | None) -> None:
    """Give `root` queries of texts up to `context`; the modules that it was made of stay.

    Raises `UnsupportedArchitecture` where the factor of such texts is not 1.
    """
    parts: list[tuple[str, Any]] = list(root.named_modules())
    for path, part in parts:
        if context is None or not getattr(part, TUNED, False) or getattr(part, "use_rope", True):
            continue
        if context >= part.floor_scale:
            raise UnsupportedArchitecture(
                f"a max_context of {context}: from {part.floor_scale} tokens on ({SCALE}) queries"
                " go by the length of the longest sequence of a batch",
                where=path,
                hint=f"compile it with a max_context of at most {part.floor_scale - 1}",
            )
        plain = copy.copy(part)
        setattr(plain, TUNED, False)
        shelled(root, path, plain)
