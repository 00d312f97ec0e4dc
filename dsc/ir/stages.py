"""Stages of a program, and which operators are legal at each.

A pass states the stage it needs and the stage it ensures; the pass manager checks both, the second
on the result.
"""

from __future__ import annotations

from enum import IntEnum

from dsc.ir.op import registry
from dsc.ir.traits import Form


class Stage(IntEnum):
    """How far a program has come."""

    TRACED = 0
    CANONICAL = 1
    OPTIMIZED = 2
    LOWERED = 3
    PLANNED = 4


_MADE_OF: dict[Stage, frozenset[Form]] = {
    Stage.TRACED: frozenset({Form.MODEL, Form.TRACED, Form.LOWERED, Form.REGION}),
    Stage.CANONICAL: frozenset({Form.MODEL}),
    Stage.OPTIMIZED: frozenset({Form.MODEL, Form.LOWERED, Form.COLLECTIVE}),
    Stage.LOWERED: frozenset({Form.MODEL, Form.LOWERED, Form.COLLECTIVE, Form.REGION}),
    Stage.PLANNED: frozenset({Form.MODEL, Form.LOWERED, Form.COLLECTIVE, Form.REGION}),
}
"""The forms of operators that may stand at each stage."""


def is_legal(op: str, stage: Stage) -> bool:
    """Whether an operator is declared and may stand in a program at a stage."""
    found = registry().get(op)
    return found is not None and found.traits.form in _MADE_OF[stage]
