"""How speed is measured where the machine's own speed moves: beside probes, by medians.

A turn is a probe of the machine, some steps, and the probe again. Turns whose two probes disagree
by more than a tenth are dropped: something else ran. What remains is summed up by its median and
its quartiles, as a share of the limit that the probes around it give, or as a ratio of two engines
that took turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

DRIFT = 0.10
"""How far the probes around a turn may lie apart, as a share of the larger."""
PASSED = 1.02
"""A median share of a limit above this is no share: what read the limit is wrong."""

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, their quartiles, and how many there are."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        middle = statistics.median(values)
        if len(values) == 1:
            return Spread(middle, middle, middle, 1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high, len(values))


@dataclass(frozen=True, slots=True)
class Turn(Generic[P]):
    """Seconds of the steps of a turn, and the probes before and after."""

    before: P
    seconds: tuple[float, ...]
    after: P


def take_turns(
    probe: Callable[[], P], steps: Callable[[], Sequence[float]], rounds: int
) -> list[Turn[P]]:
    """Probe, run steps, probe again, so many times; a probe serves the turns on both its sides."""
    turns = []
    before = probe()
    for _ in range(rounds):
        seconds = tuple(steps())
        after = probe()
        turns.append(Turn(before, seconds, after))
        before = after
    return turns


def drift(before: float, after: float) -> float:
    """How far two probes lie apart, as a share of the larger.

    >>> drift(10.0, 9.0), drift(8.0, 10.0)
    (0.1, 0.2)
    """
    larger = max(before, after)
    return round(abs(before - after) / larger, 12) if larger else 0.0


def steady(
    turns: Sequence[Turn[P]], speed: Callable[[P], float], limit: float = DRIFT
) -> list[Turn[P]]:
    """The turns whose probes agree."""
    return [t for t in turns if drift(speed(t.before), speed(t.after)) <= limit]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as long they took as we did, turn by turn of the same round."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def faster(shares: Spread) -> str:
    """What has to be said where a median share is above what a limit allows, or nothing.

    >>> faster(Spread(1.0, 0.9, 1.1, 9)), faster(Spread(1.05, 1.0, 1.1, 9))
    ('', 'steps are faster than the probes say that they can be, 1.05 times')
    """
    if shares.median <= PASSED:
        return ""
    return f"steps are faster than the probes say that they can be, {shares.median:.2f} times"
