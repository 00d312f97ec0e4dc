"""Where the values of a graph lie: the result of memory planning, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """A value's storage: `region` is arena, input, output or weight.

    In the arena it starts `offset` bytes in. Elsewhere `key` is the name of the input, output or
    weight whose storage it is.
    """

    region: str
    key: str = ""
    offset: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The place of every value of a graph, and the bytes of the arena they need.

    Sizes are taken at the upper bounds of the symbols' ranges. `lower_bound` is the peak of live
    bytes: no plan can be smaller. `waits` says for which nodes of other lanes (`dsc.ir.lanes`) a
    node waits, both by position.
    """

    places: Mapping[str, Place]
    size: int
    lower_bound: int
    waits: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
