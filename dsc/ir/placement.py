"""How ranks share an operator: where values lie, and what the trait `place` is written over.

A value is whole (every rank has all of it), `Split` along an axis (rank r has part r), or `PARTIAL`
(the sum over ranks is the value). An operator's `place` takes a call whose operands lie somehow to
what a rank runs in its place and how the results lie, or to a reason in words why it cannot.
Operands are then made whole by collectives: every program comes out right, and `place` only saves
communication and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dsc.ir.calls import Call
from dsc.ir.dims import Dim


@dataclass(frozen=True, slots=True)
class Split:
    """Part r of an axis lies on rank r."""

    axis: int


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank has a summand."""


PARTIAL = Partial()
Placement: TypeAlias = Split | Partial | None
"""Where a value lies; `None` is whole."""

COLUMNS = "columns"
"""A wish: what reads the result needs only a part of its columns on each rank."""
EXPERTS, IN_EXPERTS = "experts", "in experts"
"""Wishes: each rank has some of the experts, or a part of every one."""
HEADS = 2
"""The axis of heads of whatever has them: [b, s, h, …]."""


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of a weight along an axis: of each of `pieces` that lie one after another."""

    axis: int
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """Operands that choose among `experts` and weigh the choice, of which a rank has its own."""

    index: str
    weight: str
    experts: int


@dataclass(frozen=True, slots=True)
class Placing:
    """What a rank runs: the same operator over other operands, and how its results lie.

    `parts`: weights of which it takes a part. `attrs`: attributes that change. `whole`: operands
    that are made whole first. `choice`: a choice of experts that becomes one among those of the
    rank. `kind` is what the report counts it as.
    """

    results: tuple[Placement, ...]
    parts: Mapping[str, Part] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    choice: Choice | None = None
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class PlacedCall(Call):
    """A use of an operator on a rank; `operands` are of the types that the rank has.

    `lies` has the operands that are not whole, `weights` those of which a rank can have a part.
    `wish` is one of the above, of an operator that `grants` it, or empty: some operand is not whole
    then.
    """

    lies: Mapping[str, Placement]
    weights: frozenset[str]
    ranks: int
    wish: str = ""

    def divides(self, extent: Dim) -> bool:
        """Whether an extent is known and parts into as many equal pieces as there are ranks."""
        return isinstance(extent, int) and extent % self.ranks == 0


Place = Callable[[PlacedCall], Placing | str]


def pointwise(call: PlacedCall) -> Placing | str:
    """Operands of one shape, all split along one axis; a whole number may be beside them."""
    tensors = {name: call.lies.get(name) for name, t in call.operands.items() if t.rank}
    if len({call[name].shape for name in tensors}) != 1:
        return "its operands are not of one shape"
    first, *others = set(tensors.values())
    if others or call.lies.keys() - tensors:
        return "its operands do not lie alike"
    if not isinstance(first, Split):
        return "it is not a sum of what it makes of summands"
    return Placing((first,) * len(call.results))


def additive(call: PlacedCall) -> Placing | str:
    """Pointwise, and of sums the sum: summands stay summands where all operands are."""
    alike = len({t.shape for t in call.operands.values()}) == 1
    if alike and all(call.lies.get(name) == PARTIAL for name in call.operands):
        return Placing((PARTIAL,) * len(call.results))
    return pointwise(call)


def linear_map(call: PlacedCall) -> Placing | str:
    """A linear map of the first operand: of a summand it makes a summand."""
    x, *rest = call.operands
    if call.lies.get(x) != PARTIAL:
        return f"it needs all of {x}"
    if any(name in call.lies for name in rest):
        return "only the first operand may be a sum over ranks"
    return Placing((PARTIAL,) * len(call.results))


def other_axes(call: PlacedCall) -> Placing | str:
    """A linear map along the axis that an attribute names, on a part of another one."""
    x, *rest = call.operands
    lies = call.lies.get(x)
    if not isinstance(lies, Split):
        return linear_map(call)
    if any(name in call.lies for name in rest):
        return f"only {x} may be in parts"
    if lies.axis == call.attrs["axis"] % call[x].rank:
        return "it works along the axis that is split"
    return Placing((lies,) * len(call.results))


def along_rows(call: PlacedCall) -> Placing | str:
    """Works along the last axis of the first operand, here on a part of another one."""
    x, *rest = call.operands
    lies = call.lies.get(x)
    if not isinstance(lies, Split) or any(name in call.lies for name in rest):
        return f"only {x} may be in parts, and not in summands"
    if lies.axis == call[x].rank - 1:
        return "it works along the axis that is split"
    return Placing((lies,) * len(call.results))


def over_heads(*heads: str, weight: str = "") -> Place:
    """Each rank its heads of the operands `heads`, and its rows of a weight that are by head."""

    def place(call: PlacedCall) -> Placing | str:
        if call.lies != dict.fromkeys(heads, Split(HEADS)):
            return f"all of {', '.join(heads)} must be split by heads, and nothing else"
        if weight and weight not in call.weights:
            return f"{weight} is computed, so no rank has its rows alone"
        parts = {weight: Part(0)} if weight else {}
        return Placing((Split(HEADS),), parts, kind="heads")

    return place
