"""What a pass is: a frozen dataclass whose fields are its options.

A pass takes a `Program` and returns a `Program`; the same object when it changed nothing. The
stages it needs and ensures are data, checked by the manager at both ends; its tolerance decides
whether the interpreter's results before and after agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.options import check_values, text_of

EXACT = 0.0
"""The tolerance of a pass that keeps every bit."""


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule nearly fired: which condition failed, and the values to blame.

    `matched` of `wanted` parts of the rule's pattern fit; all of them where the shape fits and a
    condition on it fails.
    """

    rule: str
    where: str
    reason: str
    culprits: tuple[str, ...] = ()
    matched: int = 1
    wanted: int = 1


@dataclass
class PassReport:
    """What a pass did, for report.json: counts of what fired and facts worth keeping.

    `fired` counts rewrites by rule, `places` says where they were; `near` holds near-misses. With
    `explain`, patterns of which only a part matched are among them: slower, and for
    `dsc opt --explain` alone.
    """

    fired: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    near: list[NearMiss] = field(default_factory=list)
    explain: bool = False

    def fire(self, rule: str, times: int = 1, places: Sequence[str] = ()) -> None:
        """Count a rewrite, and say where it was."""
        self.fired[rule] = self.fired.get(rule, 0) + times
        self.places.setdefault(rule, []).extend(p for p in places if p)

    def miss(self, rule: str, where: str, reason: str, culprits: Sequence[str] = ()) -> None:
        """Note why a rule that nearly matched did not fire; `culprits` are names of values."""
        self.near.append(NearMiss(rule, where, reason, tuple(culprits)))

    @property
    def missed(self) -> list[tuple[str, str, str]]:
        """Rule, place and reason of each near-miss."""
        return [(each.rule, each.where, each.reason) for each in self.near]

    def as_dict(self) -> Mapping[str, Any]:
        """The report as JSON values."""
        found = {"fired": self.fired, "missed": self.missed, "facts": self.facts}
        return {**found, "places": {k: v for k, v in self.places.items() if v}}


@dataclass(frozen=True)
class Pass:
    """The base of all passes. Subclasses are frozen dataclasses and define `run`.

    `tolerance` is the largest allowed |difference| relative to max(1, |value|max) of any output in
    fp32; `EXACT` compares bit for bit.
    """

    needs: ClassVar[frozenset[Stage]] = frozenset(Stage)
    ensures: ClassVar[Stage | None] = None
    tolerance: ClassVar[float] = EXACT

    def __post_init__(self) -> None:
        """Check the options. Raises `UsageError`."""
        check_values(self)

    @property
    def name(self) -> str:
        """The pass's name: the stem of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def text(self) -> str:
        """The pass with its options, as `dsc opt -p` takes it."""
        return text_of(self)

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite the program. Note in `report` what fired and what nearly did."""
        raise NotImplementedError(f"{type(self).__name__} does not define run")

    def comparable(self, before: Program, after: Program) -> Program:
        """What of the result is compared with `before`: all, where it has the same entries."""
        return after
