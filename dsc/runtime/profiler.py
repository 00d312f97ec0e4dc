"""Where the time goes: a table by step and a Chrome trace, over every backend.

    with dsc.Profiler() as prof:
        session.decode(next_ids)
    prof.print_stats()
    prof.export_chrome_trace("trace.json")

Executables report to the profiler that is active: per step where the backend runs steps one by
one, per entry where its runtime runs a whole graph.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_active: list[Profiler] = []


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time, in seconds of a monotonic clock. Bytes and flops are 0 where unknown."""

    name: str
    category: str
    start: float
    seconds: float
    bytes: int = 0
    flops: int = 0
    loc: str = ""


@dataclass(slots=True)
class Row:
    """The events of one name, summed."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0


@dataclass
class Profiler:
    """Collects events between `with` and its end. Profilers nest; the innermost one collects."""

    events: list[Event] = field(default_factory=list)

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

    def rows(self, sort_by: str = "seconds", row_limit: int = 0) -> list[Row]:
        """Events summed by name, largest first. `sort_by`: seconds, calls, bytes, flops or name."""
        rows: dict[str, Row] = {}
        for event in self.events:
            row = rows.setdefault(event.name, Row(event.name))
            row.calls += 1
            row.seconds += event.seconds
            row.bytes += event.bytes
            row.flops += event.flops
        ordered = sorted(
            rows.values(), key=lambda r: getattr(r, sort_by), reverse=sort_by != "name"
        )
        return ordered[:row_limit] if row_limit else ordered

    def print_stats(self, sort_by: str = "seconds", row_limit: int = 0) -> None:
        """Print the table of `rows`."""
        from rich.console import Console
        from rich.table import Table

        table = Table("step", "calls", "ms", "share", "GB/s", "GFLOP/s")
        for column in table.columns[1:]:
            column.justify = "right"
        rows = self.rows(sort_by, row_limit)
        steps = [e for e in self.events if e.category == "step"] or self.events
        total = sum(e.seconds for e in steps) or 1.0
        for row in rows:
            rate = 1e9 * max(row.seconds, 1e-12)
            table.add_row(
                row.name, str(row.calls), f"{row.seconds * 1e3:.3f}", f"{row.seconds / total:.1%}",
                f"{row.bytes / rate:.2f}" if row.bytes else "-",
                f"{row.flops / rate:.2f}" if row.flops else "-",
            )  # fmt: skip
        Console().print(table)

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write the events in the Trace Event format that Perfetto and chrome://tracing read."""
        events: list[dict[str, Any]] = [
            {
                "name": e.name, "cat": e.category, "ph": "X", "pid": 0,
                "tid": 0 if e.category == "entry" else 1,
                "ts": e.start * 1e6, "dur": e.seconds * 1e6,
                "args": {"bytes": e.bytes, "flops": e.flops, "loc": e.loc},
            }
            for e in self.events
        ]  # fmt: skip
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def active() -> Profiler | None:
    """The profiler that collects now, or `None`."""
    return _active[-1] if _active else None


@contextmanager
def span(name: str, category: str, loc: str = "", bytes: int = 0, flops: int = 0) -> Iterator[None]:
    """Time a block for the active profiler; free when there is none."""
    profiler = active()
    if profiler is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        profiler.events.append(Event(name, category, start, seconds, bytes, flops, loc))
