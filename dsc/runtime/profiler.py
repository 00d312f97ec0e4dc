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
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dsc.errors import UsageError
from dsc.files import write_text
from dsc.ir.interpreter import bind_shapes
from dsc.ir.ranks import current

if TYPE_CHECKING:
    from dsc.ir.graph import Graph
    from dsc.runtime.probes import Machine

_active: list[Profiler] = []
Spans: TypeAlias = dict[int, float]
"""Seconds by the number of the run of an entry."""
THREADS = {"entry": "steps", "segment": "between ranks", "collective": "between ranks"}
OPERATORS = "operators"
"""Rows of a trace by category of events; all others are operators."""


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time, in seconds of a monotonic clock. Bytes and flops are 0 where unknown.

    `live` is what the intermediates take during a step, in bytes; `stored` are those of `bytes`
    that weights and caches are, `coded` those of `flops` that are products of 8-bit codes.
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
    stored: int = 0
    coded: int = 0


@dataclass(slots=True)
class Row:
    """The events of one group, summed: `seconds` with what ran inside them, `self_seconds` without.

    Bytes and flops are those of the steps. `runs` holds the seconds of each run of an entry in
    which the group ran, `self_runs` without what ran inside; outside of entries each event is a run
    of its own. One slow run moves a mean, and a sum, but no median.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    self_seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    stored: int = 0
    runs: Spans = field(default_factory=dict)
    self_runs: Spans = field(default_factory=dict)
    coded: int = 0

    @property
    def median(self) -> float:
        """Seconds of a run, in the middle."""
        return statistics.median(self.runs.values()) if self.runs else 0.0

    @property
    def self_median(self) -> float:
        """The same without what ran inside."""
        return statistics.median(self.self_runs.values()) if self.self_runs else 0.0

    @property
    def least(self) -> float:
        """Seconds of the fastest run."""
        return min(self.runs.values(), default=0.0)

    @property
    def p95(self) -> float:
        """The seconds that 95% of the runs kept within."""
        ordered = sorted(self.runs.values())
        return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


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


class Spent(Protocol):
    """What a step moves and computes; `stored` are the bytes of weights and caches."""

    @property
    def bytes(self) -> int:
        """All bytes."""
        ...

    @property
    def stored(self) -> int:
        """Bytes of weights and caches."""
        ...

    @property
    def flops(self) -> int:
        """Operations."""
        ...


@dataclass(frozen=True, slots=True)
class EntryRun:
    """One run of a graph: sizes of its symbols, tokens in the cache, and when its steps ran.

    `lengths` are the tokens of each sequence before the run, where the graph has them. `live` gives
    the bytes of intermediates during each step, where they are planned; `costs` what each step
    moved and computed, where the backend's plan says so, else it is what its node does.
    """

    graph: Graph
    sizes: Mapping[str, int]
    lengths: Sequence[int] | None
    steps: Callable[[], Sequence[StepTime]]
    live: Callable[[], Sequence[int]] | None = None
    costs: Callable[[], Sequence[Spent]] | None = None


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
        from dsc.runtime.costs import step_events

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

        `sort_by`: seconds (or total) and self, both by the median of runs; calls, bytes, flops or
        name. `group_by`: operator, kernel, module (every module path, with what lies inside it) or
        layer. What a run of an entry takes outside of its steps has a row. Raises `UsageError`.
        """
        from dsc.runtime.stats import grouped

        return grouped(self.events, sort_by, row_limit, group_by)

    def print_stats(
        self,
        sort_by: str = "seconds",
        row_limit: int = 0,
        group_by: str = "operator",
        machine: Machine | None = None,
        shares: bool = True,
    ) -> None:
        """Print the table of `rows`, with shares of what this machine's memory and cores can do.

        Those are measured once a process, in about two seconds, unless `machine` gives them;
        without `shares` they are left out, as where the code ran on another device.
        """
        from rich.console import Console

        from dsc.runtime.stats import table

        found = Console(highlight=False)
        wide = found if found.is_terminal else Console(highlight=False, width=160)
        wide.print(table(self.events, sort_by, row_limit, group_by, machine, shares))

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write the events in the Trace Event format that Perfetto and chrome://tracing read.

        Live bytes of intermediates become a counter beside the steps. Times begin with the first
        event; the process is this rank's, its threads are steps, operators and collectives.
        """
        events = _trace(self.events, current().rank)
        write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _trace(events: Sequence[Event], rank: int = 0) -> list[dict[str, Any]]:
    """Names of the process and its threads, a span for each event, and a counter."""
    start = min((e.start for e in events), default=0.0)
    threads = list(dict.fromkeys(_thread(e) for e in sorted(events, key=lambda e: e.start)))
    named: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": _process(rank)}}
    ]
    for tid, name in enumerate(threads):
        of = {"ph": "M", "pid": rank, "tid": tid}
        named.append({"name": "thread_name", **of, "args": {"name": name}})
        named.append({"name": "thread_sort_index", **of, "args": {"sort_index": tid}})
    spans = [
        {
            "name": e.name, "cat": e.category, "ph": "X", "pid": rank,
            "tid": threads.index(_thread(e)),
            "ts": (e.start - start) * 1e6, "dur": e.seconds * 1e6,
            "args": {"bytes": e.bytes, "flops": e.flops, "loc": e.loc, "kernel": e.kernel},
        }
        for e in events
    ]  # fmt: skip
    counters = [
        {
            "name": "live bytes", "ph": "C", "pid": rank, "tid": 0,
            "ts": (e.start - start) * 1e6, "args": {"arena": e.live},
        }
        for e in events
        if e.live is not None
    ]  # fmt: skip
    return named + spans + counters


def _thread(event: Event) -> str:
    return THREADS.get(event.category, OPERATORS)


def _process(rank: int) -> str:
    return f"dsc, rank {rank}" if current().size > 1 else "dsc"


def active() -> Profiler | None:
    """The profiler that collects now, or `None`."""
    return _active[-1] if _active else None


@contextmanager
def span(
    name: str,
    category: str,
    cost: Callable[[], tuple[int, int, int]] | None = None,
) -> Iterator[None]:
    """Time a block for the active profiler; free when there is none.

    `cost` gives its bytes, its flops, and the bytes of weights and caches, when somebody looks.
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
            read, computed, stored = cost() if cost is not None else (0, 0, 0)
            return (Event(name, category, began, seconds, read, computed, stored=stored),)

        profiler.later(made)


def entry_span(graph: Graph, inputs: Mapping[str, Any]) -> Any:
    """`span` over a run of an entry on tensors by name, with what the entry costs at their sizes.

    A context manager.
    """
    if active() is None:
        return span(graph.name, "entry")
    from dsc.runtime.costs import entry_cost

    shapes, lengths = [inputs[v.name].shape for v in graph.inputs], lengths_of(inputs)

    def cost() -> tuple[int, int, int]:
        return entry_cost(graph, bind_shapes(graph, shapes), lengths)

    return span(graph.name, "entry", cost)


def lengths_of(inputs: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each sequence in the cache, where an entry takes them."""
    lengths = inputs.get("lengths")
    return None if lengths is None else [int(n) for n in lengths]


def check_choice(what: str, given: str, known: Iterable[str]) -> None:
    """Raise `UsageError` unless `given` is one of `known`."""
    if given not in known:
        raise UsageError(f"{what} {given!r}", hint=f"one of {', '.join(known)}")
