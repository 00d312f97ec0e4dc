"""What a pass is: a frozen dataclass whose fields are its options.

A pass takes a `Program` and returns a `Program`; the same object when it changed nothing. The
stages it needs and ensures are data, checked by the manager at both ends; its tolerance decides
whether the interpreter's results before and after agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dsc.ir.program import Program
from dsc.ir.stages import Stage

EXACT = 0.0
"""The tolerance of a pass that keeps every bit."""


@dataclass
class PassReport:
    """What a pass did, for report.json: counts of what fired and facts worth keeping.

    `fired` counts rewrites by rule; `missed` holds near-misses as `(rule, where, reason)`.
    """

    fired: dict[str, int] = field(default_factory=dict)
    missed: list[tuple[str, str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def fire(self, rule: str, times: int = 1) -> None:
        """Count a rewrite."""
        self.fired[rule] = self.fired.get(rule, 0) + times

    def miss(self, rule: str, where: str, reason: str) -> None:
        """Note why a rule that nearly matched did not fire."""
        self.missed.append((rule, where, reason))

    def as_dict(self) -> Mapping[str, Any]:
        """The report as JSON values."""
        return {"fired": self.fired, "missed": self.missed, "facts": self.facts}


@dataclass(frozen=True)
class Pass:
    """The base of all passes. Subclasses are frozen dataclasses and define `run`.

    `tolerance` is the largest allowed |difference| relative to max(1, |value|max) of any output in
    fp32; `EXACT` compares bit for bit.
    """

    needs: ClassVar[frozenset[Stage]] = frozenset(Stage)
    ensures: ClassVar[Stage | None] = None
    tolerance: ClassVar[float] = EXACT

    @property
    def name(self) -> str:
        """The pass's name: the stem of its file."""
        return type(self).__module__.rpartition(".")[2]

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite the program. Note in `report` what fired and what nearly did."""
        raise NotImplementedError(f"{type(self).__name__} does not define run")
