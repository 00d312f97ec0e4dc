"""Traits: what an operator's declaration says beside its types and its meaning.

Whoever wants to know of a node whether it is a view, what it costs, which rows of a table it reads
or in which lane it runs asks the declaration; no table of operator names stands anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dsc.ir.arrays import Array
from dsc.ir.calls import Call
from dsc.ir.dims import Dim
from dsc.ir.placement import Place, pointwise
from dsc.ir.sized import Demand, broadcasting


class Role(StrEnum):
    """What an operator does, as far as passes and kernels treat operators alike."""

    VIEW = "view"
    """The same elements, or some of them, under another shape: strides change, nothing moves."""
    POINTWISE = "pointwise"
    """Each element of the result from those of the operands at its place; operands broadcast."""
    REDUCTION = "reduction"
    """One number of many along an axis, which may then be applied to each of them, as norms do."""
    ROTATION = "rotation"
    """Pairs of elements turned by an angle a token."""
    PRODUCT = "product"
    """Sums of products over an axis that operands share."""
    ATTENTION = "attention"
    EXPERTS = "experts"
    """Weighted sums over the rows of each token's experts."""
    DISPATCH = "dispatch"
    """Chooses experts and puts their rows in order."""
    LOOKUP = "lookup"
    """Rows or elements of a table, by index."""
    WRITE = "write"
    """Places rows in a tensor: in place, or in a copy of it."""
    JOIN = "join"
    """Operands side by side."""
    CONSTANT = "constant"
    """Made of attributes alone."""
    COLLECTIVE = "collective"
    """Speaks with other ranks."""
    REGION = "region"
    """Runs a body as one kernel."""
    OTHER = "other"
    """None of these: a kernel of its own."""


class Form(StrEnum):
    """Who makes an operator, and so at which stages it may stand (`dsc.ir.stages`)."""

    MODEL = "model"
    """What a model is written in: legal everywhere."""
    TRACED = "traced"
    """What tracers leave and the raise passes remove."""
    LOWERED = "lowered"
    """What only passes after the canonical stage make, or a function that names it."""
    REGION = "region"
    COLLECTIVE = "collective"
    WEIGHT = "weight"
    """What stands in weight expressions alone."""


COMPUTE, COPY, COLLECTIVE = LANES = ("compute", "copy", "collective")
"""Queues of steps that run at the same time, each in order (`dsc.ir.lanes`)."""


Count = Callable[[Call], Dim]
"""A number of elements or operations of one use, as a dim over the graph's symbols."""


def each_result(call: Call) -> Dim:
    """One operation for each element of the first result."""
    return call.results[0].numel if call.results else 0


def nothing(call: Call) -> Dim:
    """No operation, no element."""
    return 0


ASCENDING, FROM_FIRST, DISTINCT = "ascending", "from first", "distinct"
"""Orders of an index's values: none smaller than the one before it; besides, the least one first;
each at most once."""


@dataclass(frozen=True, slots=True)
class Within:
    """The values that an index may have: `low` <= x <= `high`, dims over the signature's names.

    `extent` is the size of the axis that `axis` names (0 where there is none). `order` is one of
    the above or empty. `what` says to a user what each value is.
    """

    low: str
    high: str
    what: str = "an index"
    order: str = ""

    @property
    def ascending(self) -> bool:
        """Whether no element is smaller than the one before it."""
        return self.order in (ASCENDING, FROM_FIRST)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a declaration says beside types and meaning.

    `role` and `form` as above. `commutative`: the first two operands may change places. `flops`
    counts floating-point operations, a multiply and an add as two. `arrays` is the reference on
    NumPy arrays, of what only moves elements: weights are packed without torch. `reads` counts the
    elements that are read of operands of which not all are: rows of a table, the chosen experts; 0
    of what is only written. `writes` names the operands that hold new rows of an update in place,
    `masked` those whose rows past each sequence's `lengths`, where these are given, are never seen.
    `stored` names those that may be in a stored format (`dsc.ir.formats`): the reference
    gets them unpacked, in the element type of the operands that share their letter, else in fp32.
    `into` says of new rows among which they are placed: they are stored as those are, and so is the
    first result.
    `updates` names the operand without whose elements the first one is returned as it is;
    `of_nothing` is what results hold where another operand has no elements, `None` where that has
    no value. `results` names results for readers. `lane` is where the operator runs. `samples`: the
    integers that an operand gets where the operator is tried out, if not any that it may have
    (`OpDef.within`). `demand` states what a call demands of the extents around it, where its
    signature does not (`dsc.ir.sized`). `place` says how ranks share it (`dsc.ir.placement`);
    without it each computes all. A pointwise operator has both by its role. `wants` names the
    operands of which it pays that a rank makes its part alone; `grants` is the wish for a part of
    its result that it grants, though its operands are whole.
    """

    role: Role
    form: Form = Form.MODEL
    commutative: bool = False
    flops: Count = each_result
    arrays: Callable[..., Array] | None = None
    reads: Mapping[str, Count] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    into: Mapping[str, str] = field(default_factory=dict)
    updates: str = ""
    of_nothing: float | None = None
    results: tuple[str, ...] = ()
    lane: str = COMPUTE
    samples: Mapping[str, Within] = field(default_factory=dict)
    demand: Demand | None = None
    place: Place | None = None
    wants: tuple[str, ...] = ()
    grants: str = ""

    def __post_init__(self) -> None:
        if self.role is Role.POINTWISE:
            object.__setattr__(self, "demand", self.demand or broadcasting)
            object.__setattr__(self, "place", self.place or pointwise)

    @property
    def stacked(self) -> frozenset[str]:
        """Operands that hold the weights of many experts, of which only the chosen are read."""
        sums = self.role in (Role.PRODUCT, Role.EXPERTS)
        return frozenset(self.reads) if sums else frozenset()
