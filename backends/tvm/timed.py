"""The timed form of an entry: its list of steps with a clock before each, and copies of choices.

The library's `execute` walks whatever list it is given, so a profile needs no other code: the clock
writes where each step begins into a buffer, and the expert indices that a step reads are copied
aside before its memory is used again. Nothing runs in Python between the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from dsc.ir.dims import Dim, evaluate
from dsc.ir.graph import Graph, Node, Value
from dsc.runtime.plan import EntryPlan, Plan, live_bytes
from dsc.runtime.profiler import EntryRun, StepTime

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

CLOCK, COPY = 0, 1
"""The numbers of the two in every library (`dsc.backends.tvm.library`)."""
ZERO = 0
"""The slot that holds 0: an address is what is added to it."""
CHOICES = {"experts": 1, "grouped_linear": 2}
"""Operators over stacked experts, and the operand that tells which are read."""


@dataclass(frozen=True, slots=True)
class Tap:
    """The copy of one step's choices: where it goes, and whether it holds offsets or indices."""

    step: int
    start: int
    count: int
    offsets: bool


@dataclass
class TimedEntry:
    """An entry's timed list, and the buffers that it writes to; rebuilt when sizes change."""

    graph: Graph
    plan: EntryPlan
    words: Words
    sizes: Mapping[str, int] | None = None
    taps: list[Tap] = field(default_factory=list)

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Make the list, at `address`, one for a run at these sizes."""
        if sizes != self.sizes:
            self._build(sizes)

    def _build(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.taps = dict(sizes), []
        nodes = {node.outputs[0].name: node for node in self.graph.nodes}
        found = [_choice(nodes.get(launch.node)) for launch in self.plan.launches]
        counts = [0 if choice is None else evaluate(choice.numel, sizes) for choice in found]
        self.times = np.zeros(2 * (len(self.plan.launches) + 1), dtype=np.int64)
        self.copies = np.zeros(sum(counts), dtype=np.int64)
        clock, copies = int(self.times.ctypes.data), int(self.copies.ctypes.data)
        words: list[int] = []
        at, start = 1, 0
        for index, (launch, choice, count) in enumerate(
            zip(self.plan.launches, found, counts, strict=True)
        ):
            end = at + 1 + 2 * len(launch.arguments)
            words += (CLOCK, ZERO, clock + 16 * index)
            if choice is not None:
                source = at + 1 + 2 * choice.argument
                target = (ZERO, copies + 8 * start)
                words += (
                    COPY,
                    *map(int, self.words[source : source + 2]),
                    *target,
                    ZERO,
                    8 * count,
                )
                self.taps.append(Tap(index, start, count, choice.offsets))
            words += map(int, self.words[at:end])
            at, start = end, start + count
        words += (CLOCK, ZERO, clock + 16 * len(self.plan.launches))
        total = 2 * len(self.plan.launches) + 1 + len(self.taps)
        self.list = np.array([total, *words], dtype=np.int64)
        self.address = int(self.list.ctypes.data)

    def finished(self, lengths: Sequence[int] | None) -> EntryRun:
        """What the last run wrote, for the profiler."""
        times, copies, taps = self.times.copy(), self.copies.copy(), self.taps
        sizes = self.sizes or {}
        return EntryRun(
            self.graph,
            sizes,
            lengths,
            lambda: _step_times(self.plan, times, copies, taps),
            lambda: live_bytes(self.plan, sizes),
        )


def timed_entries(
    text: bytes | None, graphs: Mapping[str, Graph], steps: Words
) -> dict[str, TimedEntry]:
    """The timed form of every entry by the text of plan.json; none for an artifact without it."""
    if text is None:
        return {}
    plan = Plan.from_json(text)
    found, at = {}, 0
    for name, entry in plan.entries.items():
        size = 1 + sum(1 + 2 * len(launch.arguments) for launch in entry.launches)
        found[name] = TimedEntry(graphs[name], entry, steps[at : at + size])
        at += size
    return found


@dataclass(frozen=True, slots=True)
class _Choice:
    """The argument that tells a launch its experts: how many numbers, and whether offsets."""

    argument: int
    numel: Dim
    offsets: bool


def _choice(node: Node | None) -> _Choice | None:
    """What tells a node its experts."""
    if node is None:
        return None
    inner = next((n for n in _inside(node) if n.op in CHOICES), None)
    if inner is None:
        return None
    operand = CHOICES[inner.op]
    wanted = inner.inputs[operand]
    if node.body is not None:
        names = [v.name for v in node.body.inputs]
        if not isinstance(wanted, Value) or wanted.name not in names:
            return None
        operand = names.index(wanted.name)
    given = node.inputs[operand] if operand < len(node.inputs) else None
    if given is None:
        return None
    argument = sum(x is not None for x in node.inputs[:operand])
    return _Choice(argument, given.type.numel, inner.op == "grouped_linear")


def _inside(node: Node) -> Sequence[Node]:
    return node.body.nodes if node.body is not None else (node,)


def _step_times(
    plan: EntryPlan, times: Words, copies: Words, taps: Sequence[Tap]
) -> list[StepTime]:
    seconds = times[0::2] + 1e-9 * times[1::2]
    chosen = {tap.step: _distinct(copies[tap.start : tap.start + tap.count], tap) for tap in taps}
    return [
        StepTime(
            launch.node, launch.kernel, float(seconds[i]), float(seconds[i + 1] - seconds[i]),
            chosen.get(i),
        )
        for i, launch in enumerate(plan.launches)
    ]  # fmt: skip


def _distinct(copied: Words, tap: Tap) -> int:
    return int((np.diff(copied) > 0).sum()) if tap.offsets else len(np.unique(copied))
