"""The profiler's table: events by operator, kernel, module or layer, beside what is possible.

A row tells of one run of an entry by medians over runs, so that a slow one moves nothing. Only
weights and caches are held against the bandwidth, since other bytes may never leave the caches, and
products of codes against a peak of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dsc.ir.layers import layer_of
from dsc.runtime.profiler import Event, Row, check_choice

if TYPE_CHECKING:
    from rich.table import Table

    from dsc.runtime.probes import Machine

SORTS: dict[str, Callable[[Row], float]] = {
    "seconds": lambda r: r.median * len(r.runs),
    "total": lambda r: r.median * len(r.runs),
    "self": lambda r: r.self_median * len(r.self_runs),
    "calls": lambda r: r.calls,
    "bytes": lambda r: r.bytes,
    "flops": lambda r: r.flops,
}
GROUPS = ("operator", "kernel", "module", "layer")
ROOT = "(model)"
"""The module path that all others lie in."""
OUTSIDE = "(outside its steps)"
"""What follows an entry's name in the row of what its runs take besides their steps."""


def grouped(events: Sequence[Event], sort_by: str, row_limit: int, group_by: str) -> list[Row]:
    """Events summed by group. Raises `UsageError` for an unknown order or group.

    An entry's run is a row where nothing ran inside it; else its row holds what its steps leave.
    """
    check_choice("sort_by", sort_by, (*SORTS, "name"))
    check_choice("group_by", group_by, GROUPS)
    rows: dict[str, Row] = {}
    found = list(nested(events))
    whole = {id(e) for e, _, _ in found} - {id(o) for _, _, outer in found for o in outer}
    runs = {id(e): i for i, (e, _, outer) in enumerate(found) if not outer}
    for event, alone, outer in found:
        run = runs[id(outer[0] if outer else event)]
        if event.category == "entry" and id(event) not in whole:
            _add(rows, f"{event.name} {OUTSIDE}", run, alone, alone, own=True)
            continue
        own, *around = _groups(event, group_by)
        inside_itself = group_by != "module" and any(_groups(o, group_by)[0] == own for o in outer)
        for name in (own, *around):
            # A module's total is what its own and its parts' events took by themselves.
            total = alone if group_by == "module" else event.seconds * (not inside_itself)
            row = _add(rows, name, run, total, alone, own=name == own)
            if event.category != "entry" or group_by == "operator":
                row.bytes += event.bytes
                row.flops += event.flops
                row.stored += event.stored
                row.coded += event.coded
    by_name = sorted(rows.values(), key=lambda r: r.name)
    if sort_by != "name":
        by_name.sort(key=SORTS[sort_by], reverse=True)
    return by_name[:row_limit] if row_limit else by_name


def _add(rows: dict[str, Row], name: str, run: int, total: float, alone: float, own: bool) -> Row:
    """Add an event's seconds to a row, `own` where it is the row of the event itself."""
    row = rows.setdefault(name, Row(name))
    row.calls += own
    row.seconds += total
    row.runs[run] = row.runs.get(run, 0.0) + total
    row.self_seconds += alone * own
    row.self_runs[run] = row.self_runs.get(run, 0.0) + alone * own
    return row


def entry_rows(events: Sequence[Event]) -> list[Row]:
    """Each entry's runs as wholes, with what ran inside them."""
    rows: dict[str, Row] = {}
    for run, event in enumerate(e for e in events if e.category == "entry"):
        row = _add(rows, event.name, run, event.seconds, event.seconds, own=True)
        row.stored += event.stored
    return list(rows.values())


def working_set(events: Sequence[Event]) -> int:
    """Bytes of weights and caches that a run of an entry reads, at most."""
    return round(max((row.stored / row.calls for row in entry_rows(events)), default=0))


def nested(events: Sequence[Event]) -> Iterator[tuple[Event, float, list[Event]]]:
    """Each event, the seconds of it in which no other event ran inside, and the events around."""
    ordered = sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].seconds))
    alone = [e.seconds for e in events]
    outer: dict[int, list[int]] = {}
    stack: list[int] = []
    for i in ordered:
        event = events[i]
        while stack and not _holds(events[stack[-1]], event):
            stack.pop()
        outer[i] = list(stack)
        if stack:
            alone[stack[-1]] -= event.seconds
        stack.append(i)
    for i, event in enumerate(events):
        yield event, max(0.0, alone[i]), [events[j] for j in outer[i]]


def _holds(outer: Event, inner: Event) -> bool:
    slack = 1e-9 + 1e-6 * outer.seconds  # ends of spans are rounded
    end = outer.start + outer.seconds + slack
    return inner.start >= outer.start - slack and inner.start + inner.seconds <= end


def _groups(event: Event, group_by: str) -> list[str]:
    """The group of an event, and for modules those that it lies in."""
    if event.category == "entry":
        return [event.name]
    match group_by:
        case "kernel":
            return [event.kernel or event.name]
        case "layer":
            return [layer_of(event.loc)]
        case "module":
            is_line = ":" in event.loc  # of a function outside of modules, as `file.py:12`
            parts = [event.loc] if is_line else event.loc.split(".") if event.loc else []
            paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            return [*paths, ROOT]
    return [event.name]


def table(
    events: Sequence[Event],
    sort_by: str,
    row_limit: int,
    group_by: str,
    machine: Machine | None,
    shares: bool = True,
) -> Table:
    """The table that `Profiler.print_stats` prints: a run of an entry, row by row."""
    from rich.table import Table

    rows = grouped(events, sort_by, 0, group_by)
    if shares and machine is None and any(row.bytes or row.flops for row in rows):
        from dsc.runtime.probes import READ_BYTES
        from dsc.runtime.probes import machine as measured

        coded = any(event.coded for event in events)
        machine = measured(size=working_set(events) or READ_BYTES, coded=coded)
    total = sum(row.self_median for row in rows) or 1.0
    times = ("self ms", "self %", "median ms", "least", "p95", "calls")
    rates = ("MB", "GFLOP", "GB/s", "of read", "GFLOP/s", "of matrix")
    found = Table(group_by, *times, *rates)
    for column in found.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows[:row_limit] if row_limit else rows:
        found.add_row(*cells(row, total, machine))
    found.caption = "\n".join(_captions(events, rows, machine))
    found.caption_justify = "left"
    return found


def _captions(
    events: Sequence[Event], rows: Sequence[Row], machine: Machine | None
) -> Iterator[str]:
    """What was run, what the columns are, and what the shares are of."""
    for entry in entry_rows(events):
        yield (
            f"{entry.name}: {entry.calls} runs, median {entry.median * 1e3:.3f} ms,"
            f" least {entry.least * 1e3:.3f}, p95 {entry.p95 * 1e3:.3f}"
        )
    yield "a row tells of one run: the median over runs, the fastest, what 95% of them kept within"
    if any(OUTSIDE in row.name for row in rows):
        yield f"{OUTSIDE}: what a run takes to prepare its inputs and to start and leave the code"
    if machine is None:
        return
    yield str(machine)
    if any(_reading(row) > machine.bandwidth for row in rows):
        yield "of read: cached where weights and caches came faster, from the processor's caches"
    if any(_computed(row, machine) > 1.0 for row in rows):
        yield "of matrix: above 100% where a row computes faster than the product that was measured"


def _rate(row: Row, amount: int) -> float:
    """So much a second: a run's share of an amount, in a median run."""
    return amount / len(row.runs) / row.median if row.median else 0.0


def _computed(row: Row, machine: Machine) -> float:
    """The share of the matrix peak: products of codes of theirs, all others of the program's."""
    coded = row.coded / (machine.coded or machine.matrix)
    least = coded + (row.flops - row.coded) / machine.matrix
    return least / len(row.runs) / row.median if row.median else 0.0


def _reading(row: Row) -> float:
    """Bytes of weights and caches a second."""
    return _rate(row, row.stored)


def cells(row: Row, total: float, machine: Machine | None) -> list[str]:
    """A row as text. Rates are over the time with what ran inside.

    Only weights and caches count as read: other bytes may never leave the processor's caches.
    """
    runs = max(1, len(row.runs))
    found = [row.name, f"{row.self_median * 1e3:.3f}", f"{row.self_median / total:.1%}"]
    found += [f"{x * 1e3:.3f}" for x in (row.median, row.least, row.p95)]
    found.append(f"{row.calls / runs:g}" if row.calls else "-")
    found.append(f"{row.bytes / runs / 1e6:.2f}" if row.bytes else "-")
    found.append(f"{row.flops / runs / 1e9:.3f}" if row.flops else "-")
    found.append(f"{_rate(row, row.bytes) / 1e9:.2f}" if row.bytes else "-")
    share = _reading(row) / machine.bandwidth if machine else 0.0
    found.append("cached" if share > 1.0 else f"{share:.0%}" if share else "-")
    found.append(f"{_rate(row, row.flops) / 1e9:.2f}" if row.flops else "-")
    computed = _computed(row, machine) if machine else 0.0
    found.append(f"{computed:.0%}" if computed else "-")
    return found
