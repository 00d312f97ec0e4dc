"""What is measured, cell by cell: turns between probes, and two engines taking turns.

A cell is a prompt, or decode steps at a context and a batch. In each round the machine is probed,
one engine runs, it is probed, the other runs, and it is probed again; who is first changes from
round to round. A round counts for the ratio when all three probes agree, and each half of it for
its engine's share of the limit when its two do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from bench import limit
from bench.engines import CHUNK
from bench.remote import EngineFailed, Remote
from dsc.runtime.limit import Work, limit_seconds, working_set
from dsc.runtime.protocol import Spread, Turn, drift, faster, ratios, steady

SETTLE = 0.3
"""Seconds after which threads of the engine that ran have stopped spinning."""
Speed = Mapping[str, float]
READINGS = ("bandwidth", "matrix", "coded")
"""What a probe reads: bytes a second, operations of products a second, and of products of codes."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table: a prompt of `context` tokens, or decode after `context`.

    `quant` is what weights are in.
    """

    phase: str
    context: int
    batch: int
    quant: str = "none"

    @property
    def name(self) -> str:
        """How the cell is called."""
        return f"{self.phase} {self.context}, batch {self.batch}"

    def work(self, config: Mapping[str, Any], grown: int) -> list[Work]:
        """What a step does at least, when the context has grown by so many tokens."""
        if self.phase == "prefill":
            return limit.prefill_work(config, self.batch, self.context, CHUNK, self.quant)
        return limit.step_work(config, self.batch, 1, self.context + grown, self.quant)

    def read_bytes(self, config: Mapping[str, Any]) -> int:
        """What a step reads, or the first chunk of a prompt."""
        if self.phase == "prefill":
            chunk = min(CHUNK, self.context)
            return working_set(limit.step_work(config, self.batch, chunk, 0, self.quant))
        return working_set(self.work(config, 0))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * (self.context if self.phase == "prefill" else 1)

    @property
    def bound(self) -> str:
        """Which reading of a probe tells whether the machine was steady."""
        return "matrix" if self.phase == "prefill" else "bandwidth"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: rounds, decode steps of a turn at most, and seconds of a turn."""

    rounds: int = 15
    tokens: int = 20
    seconds: float = 2.0


@dataclass
class Result:
    """What an engine did in a cell. `ratio`: how many times as long it took as we did.

    `passed` says that the limit was none where that is so.
    """

    cell: Cell
    engine: str
    seconds: Spread | None = None
    of_limit: Spread | None = None
    bandwidth: Spread | None = None
    ratio: Spread | None = None
    dropped: int = 0
    rounds: int = 0
    why: str = ""
    passed: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Median rate; 0 where nothing was measured."""
        return self.cell.tokens / self.seconds.median if self.seconds else 0.0


@dataclass
class Runner:
    """One engine within a cell: how it takes a turn."""

    remote: Remote
    cell: Cell
    effort: Effort
    grown: int = 0
    count: int = field(default=1)

    def start(self) -> None:
        """Fill the caches and warm up. Raises `EngineFailed`."""
        cell = self.cell
        if cell.phase == "prefill":
            self.remote.call("prefill", batch=cell.batch, tokens=cell.context)
            return
        room = self.effort.tokens * (self.effort.rounds + 1) + 4
        self.remote.call("start", batch=cell.batch, context=cell.context, room=room)
        taken = self.remote.call("steps", count=2)[-1]
        self.count = max(1, min(self.effort.tokens, int(self.effort.seconds / taken)))
        self.grown = 2

    def turn(self) -> list[float]:
        """Seconds of the steps of a turn."""
        if self.cell.phase == "prefill":
            return [self.remote.call("prefill", batch=self.cell.batch, tokens=self.cell.context)]
        self.grown += self.count
        found: list[float] = self.remote.call("steps", count=self.count)
        return found


def measure(
    runners: Sequence[Runner],
    probe: Callable[[], Speed],
    config: Mapping[str, Any],
    settle: float = SETTLE,
) -> list[Result]:
    """Run a cell on one engine, or on two in turns; either is first in every other round."""
    for runner in runners:
        runner.start()
    turns: list[list[Turn[Speed]]] = [[] for _ in runners]
    time.sleep(settle)
    before = probe()
    for number in range(runners[0].effort.rounds):
        order = list(zip(runners, turns, strict=True))
        for runner, mine in reversed(order) if number % 2 else order:
            seconds = tuple(runner.turn())
            time.sleep(settle)
            after = probe()
            mine.append(Turn(before, seconds, after))
            before = after
    results = [summary(r, t, config) for r, t in zip(runners, turns, strict=True)]
    if len(runners) == 2:
        results[1].ratio = paired(turns[0], turns[1], runners[0].cell.bound)
    return results


def paired(ours: Sequence[Turn[Speed]], theirs: Sequence[Turn[Speed]], bound: str) -> Spread | None:
    """The ratio over the rounds whose three probes agree."""
    kept = [
        (a, b)
        for a, b in zip(ours, theirs, strict=True)
        if max(drift(x[bound], y[bound]) for x, y in _pairs(a, b)) <= 0.10
    ]
    if not kept:
        return None
    medians = [[Spread.of(t.seconds).median for t in side] for side in zip(*kept, strict=True)]
    return Spread.of(ratios(*medians))


def _pairs(a: Turn[Speed], b: Turn[Speed]) -> Iterable[tuple[Speed, Speed]]:
    """The probes around two turns, each with each."""
    return combinations((a.before, a.after, b.before, b.after), 2)


def summary(runner: Runner, turns: Sequence[Turn[Speed]], config: Mapping[str, Any]) -> Result:
    """What the turns of an engine say."""
    cell = runner.cell
    kept = steady(turns, lambda speed: speed[cell.bound])
    result = Result(cell, runner.remote.engine, rounds=len(turns), dropped=len(turns) - len(kept))
    if not kept:
        result.why = "no round was steady: the machine's own speed moved by more than 10% each time"
        return result
    work = cell.work(config, runner.grown // 2)
    result.seconds = Spread.of([s for turn in kept for s in turn.seconds])
    result.of_limit = Spread.of([_share(turn, work) for turn in kept])
    result.passed = faster(result.of_limit)
    result.bandwidth = Spread.of([_mean(turn, "bandwidth") for turn in kept])
    return result


def _share(turn: Turn[Speed], work: Sequence[Work]) -> float:
    least = limit_seconds(work, *(_mean(turn, name) for name in READINGS))
    return least / Spread.of(turn.seconds).median


def _mean(turn: Turn[Speed], name: str) -> float:
    return (turn.before[name] + turn.after[name]) / 2


def run_cell(
    remotes: Sequence[Remote],
    cell: Cell,
    effort: Effort,
    probe: Callable[[], Speed],
    config: Mapping[str, Any],
) -> list[Result]:
    """Measure a cell; an engine that fails is reported with its reason."""
    try:
        return measure([Runner(r, cell, effort) for r in remotes], probe, config)
    except EngineFailed as problem:
        return [Result(cell, remotes[-1].engine, why=str(problem))]
