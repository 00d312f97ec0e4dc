"""Where the time goes: a table by operator, kernel or module, and a Chrome trace, on every backend.

    with dsc.Profiler() as prof:
        session.decode(next_ids)
    prof.print_stats(sort_by="self", row_limit=20)
    prof.export_chrome_trace("trace.json")

Executables report to the profiler that is active: every step where the backend can time steps
(reference, tvm, and onnxruntime through its own profiler), whole entries elsewhere. What they hand
over is turned into events when somebody looks: a profiled step does as little as it can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError
from dsc.files import write_text

if TYPE_CHECKING:
    from dsc.ir.graph import Graph
    from dsc.runtime.probes import Machine

_active: list[Profiler] = []


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time, in seconds of a monotonic clock. Bytes and flops are 0 where unknown.

    `live` is what the intermediates take during a step, in bytes.
    """

    name: str
    category: str
    start: float
    seconds: float
    bytes: int = 0
    flops: int = 0
    loc: str = ""
    kernel: str = ""
    live: int | None = None


@dataclass(slots=True)
class Row:
    """The events of one group, summed: `seconds` with what ran inside them, `self_seconds` without.

    Bytes and flops are those of the steps.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    self_seconds: float = 0.0
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True, slots=True)
class StepTime:
    """When a node ran, by the name of its first result; `chosen`: distinct experts it read.

    `again` marks a further part of a node of which the first was reported with its whole cost.
    """

    node: str
    kernel: str
    start: float
    seconds: float
    chosen: int | None = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class EntryRun:
    """One run of a graph: sizes of its symbols, tokens in the cache, and when its steps ran.

    `lengths` are the tokens of each sequence before the run, where the graph has them. `live` gives
    the bytes of intermediates during each step, where they are planned.
    """

    graph: Graph
    sizes: Mapping[str, int]
    lengths: Sequence[int] | None
    steps: Callable[[], Sequence[StepTime]]
    live: Callable[[], Sequence[int]] | None = None


@dataclass(slots=True)
class _Open:
    """A span that has not ended: what was taken out of its time so far."""

    excluded: float = 0.0


class Profiler:
    """Collects events between `with` and its end. Profilers nest; the innermost one collects."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events = list(events)
        self._late: list[Callable[[], Iterable[Event]]] = []
        self._open: list[_Open] = []
        self._closing: list[Callable[[], None]] = []

    def __enter__(self) -> Profiler:
        _active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _active.remove(self)
        while self._closing:
            self._closing.pop(0)()

    @property
    def events(self) -> list[Event]:
        """All events so far, in the order in which they were reported."""
        while self._late:
            self._events.extend(self._late.pop(0)())
        return self._events

    def add(self, event: Event) -> None:
        """Report an event that is known now."""
        self._late.append(lambda: (event,))

    def ran(self, run: EntryRun) -> None:
        """Report the steps of a run; their costs are worked out when somebody looks."""
        self._late.append(lambda: step_events(run))

    def later(self, make: Callable[[], Iterable[Event]]) -> None:
        """Report events that are made when somebody looks."""
        self._late.append(make)

    def at_end(self, close: Callable[[], None]) -> None:
        """Call `close` once, when the `with` block ends."""
        self._closing.append(close)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of the block out of the spans that are open around it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            for each in self._open:
                each.excluded += time.perf_counter() - start

    def rows(
        self, sort_by: str = "seconds", row_limit: int = 0, group_by: str = "operator"
    ) -> list[Row]:
        """Events summed by group, largest first.

        `sort_by`: seconds (or total), self, calls, bytes, flops or name. `group_by`: operator,
        kernel, module (every module path, with what lies inside it) or layer. Raises `UsageError`.
        """
        from dsc.runtime.stats import grouped

        return grouped(self.events, sort_by, row_limit, group_by)

    def print_stats(
        self,
        sort_by: str = "seconds",
        row_limit: int = 0,
        group_by: str = "operator",
        machine: Machine | None = None,
    ) -> None:
        """Print the table of `rows`, with shares of what this machine's memory and cores can do.

        Those are measured once a process, in about two seconds, unless `machine` gives them.
        """
        from rich.console import Console

        from dsc.runtime.stats import table

        found = Console(highlight=False)
        wide = found if found.is_terminal else Console(highlight=False, width=160)
        wide.print(table(self.events, sort_by, row_limit, group_by, machine))

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write the events in the Trace Event format that Perfetto and chrome://tracing read.

        Live bytes of intermediates become a counter beside the steps.
        """
        text = json.dumps({"traceEvents": _trace(self.events), "displayTimeUnit": "ms"})
        write_text(path, text)


def _trace(events: Sequence[Event]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = [
        {
            "name": e.name, "cat": e.category, "ph": "X", "pid": 0,
            "tid": 0 if e.category == "entry" else 1,
            "ts": e.start * 1e6, "dur": e.seconds * 1e6,
            "args": {"bytes": e.bytes, "flops": e.flops, "loc": e.loc, "kernel": e.kernel},
        }
        for e in events
    ]  # fmt: skip
    counters = [
        {"name": "live bytes", "ph": "C", "pid": 0, "ts": e.start * 1e6, "args": {"arena": e.live}}
        for e in events
        if e.live is not None
    ]
    return spans + counters


def active() -> Profiler | None:
    """The profiler that collects now, or `None`."""
    return _active[-1] if _active else None


@contextmanager
def span(
    name: str,
    category: str,
    cost: Callable[[], tuple[int, int]] | None = None,
) -> Iterator[None]:
    """Time a block for the active profiler; free when there is none.

    `cost` gives its bytes and flops, when somebody looks.
    """
    profiler = active()
    if profiler is None:
        yield
        return
    mine = _Open()
    profiler._open.append(mine)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start - mine.excluded
        profiler._open.remove(mine)
        began = start + mine.excluded  # what was left out came first: a backend gets ready

        def made() -> tuple[Event]:
            moved = cost() if cost is not None else (0, 0)
            return (Event(name, category, began, seconds, *moved),)

        profiler.later(made)


def entry_span(graph: Graph, inputs: Mapping[str, Any]) -> Any:
    """`span` over a run of an entry on tensors by name, with what the entry costs at their sizes.

    A context manager.
    """
    if active() is None:
        return span(graph.name, "entry")
    from dsc.runtime.costs import entry_cost, lengths_of
    from dsc.runtime.plan import symbols_of

    shapes, lengths = {v.name: inputs[v.name].shape for v in graph.inputs}, lengths_of(inputs)

    def cost() -> tuple[int, int]:
        return entry_cost(graph, symbols_of(graph, shapes), lengths)

    return span(graph.name, "entry", cost)


def step_events(run: EntryRun) -> Iterable[Event]:
    """The events of a run's steps, with what each moved and computed."""
    from dsc.runtime import costs

    return costs.step_events(run)


def check_choice(what: str, given: str, known: Iterable[str]) -> None:
    """Raise `UsageError` unless `given` is one of `known`."""
    if given not in known:
        raise UsageError(f"{what} {given!r}", hint=f"one of {', '.join(known)}")
