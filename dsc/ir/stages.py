"""Stages of a program, and which operators are legal at each.

A pass states the stage it needs and the stage it ensures; the pass manager checks both, the second
on the result.
"""

from __future__ import annotations

from enum import IntEnum

from dsc.ir.op import OpDef
from dsc.ir.ops import FAMILIES


class Stage(IntEnum):
    """How far a program has come."""

    TRACED = 0
    CANONICAL = 1
    OPTIMIZED = 2
    LOWERED = 3
    PLANNED = 4


def _family(name: str) -> frozenset[str]:
    return frozenset(v.name for v in vars(FAMILIES[name]).values() if isinstance(v, OpDef))


_GROUPED_MOE = frozenset({"dispatch", "grouped_linear", "combine"})
_MODEL = (
    _family("pointwise") | _family("shape") | _family("core") | _family("nn") | _family("cache")
    | _family("paged") | _family("moe")
)  # fmt: skip
_COMM = _family("comm")

LEGAL: dict[Stage, frozenset[str]] = {
    Stage.TRACED: _MODEL | _family("traced") | _family("quant"),
    Stage.CANONICAL: _MODEL - _GROUPED_MOE - _family("paged") - {"cache_write", "fused"},
    Stage.OPTIMIZED: (_MODEL | _COMM) - {"fused"},
    Stage.LOWERED: _MODEL | _COMM,
    Stage.PLANNED: _MODEL | _COMM,
}
