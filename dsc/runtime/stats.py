"""The profiler's table: events by operator, kernel, module or layer, beside what is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dsc.runtime.profiler import Event, Row, check_choice

if TYPE_CHECKING:
    from rich.table import Table

    from dsc.runtime.probes import Machine

SORTS: dict[str, Callable[[Row], float]] = {
    "seconds": lambda r: r.seconds,
    "total": lambda r: r.seconds,
    "self": lambda r: r.self_seconds,
    "calls": lambda r: r.calls,
    "bytes": lambda r: r.bytes,
    "flops": lambda r: r.flops,
}
GROUPS = ("operator", "kernel", "module", "layer")
ROOT = "(model)"
"""The module path that all others lie in."""


def grouped(events: Sequence[Event], sort_by: str, row_limit: int, group_by: str) -> list[Row]:
    """Events summed by group. Raises `UsageError` for an unknown order or group."""
    check_choice("sort_by", sort_by, (*SORTS, "name"))
    check_choice("group_by", group_by, GROUPS)
    rows: dict[str, Row] = {}
    for event, alone, outer in nested(events):
        own, *around = _groups(event, group_by)
        row = rows.setdefault(own, Row(own))
        row.calls += 1
        row.self_seconds += alone
        inside_itself = group_by != "module" and any(_groups(o, group_by)[0] == own for o in outer)
        for name in (own, *around):
            each = rows.setdefault(name, Row(name))
            # A module's total is what its own and its parts' events took by themselves.
            each.seconds += alone if group_by == "module" else event.seconds * (not inside_itself)
            if event.category != "entry" or group_by == "operator":
                each.bytes += event.bytes
                each.flops += event.flops
    by_name = sorted(rows.values(), key=lambda r: r.name)
    if sort_by != "name":
        by_name.sort(key=SORTS[sort_by], reverse=True)
    return by_name[:row_limit] if row_limit else by_name


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
    from dsc.report import layer_of

    if event.category == "entry":
        return [event.name]
    match group_by:
        case "kernel":
            return [event.kernel or event.name]
        case "layer":
            return [layer_of(event.loc)]
        case "module":
            parts = event.loc.split(".") if event.loc else []
            paths = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            return [*paths, ROOT]
    return [event.name]


def table(
    events: Sequence[Event],
    sort_by: str,
    row_limit: int,
    group_by: str,
    machine: Machine | None,
) -> Table:
    """The table that `Profiler.print_stats` prints."""
    from rich.table import Table

    rows = grouped(events, sort_by, row_limit, group_by)
    if machine is None and any(row.bytes or row.flops for row in rows):
        from dsc.runtime.probes import machine as measured

        machine = measured()
    total = sum(alone for _, alone, _ in nested(events)) or 1.0
    times = ("self ms", "self %", "total ms", "total %", "calls", "us a call")
    rates = ("MB", "GFLOP", "GB/s", "of read", "GFLOP/s", "of matrix")
    found = Table(group_by, *times, *rates)
    for column in found.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in rows:
        found.add_row(*cells(row, total, machine))
    if machine is not None:
        found.caption = str(machine)
    return found


def cells(row: Row, total: float, machine: Machine | None) -> list[str]:
    """A row as text. Rates are over the time with what ran inside."""
    seconds = max(row.seconds, 1e-12)
    found = [row.name, f"{row.self_seconds * 1e3:.3f}", f"{row.self_seconds / total:.1%}"]
    found += [f"{row.seconds * 1e3:.3f}", f"{row.seconds / total:.1%}", str(row.calls)]
    found.append(f"{1e6 * row.seconds / row.calls:.1f}" if row.calls else "-")
    reading, computing = row.bytes / seconds, row.flops / seconds
    found.append(f"{row.bytes / 1e6:.2f}" if row.bytes else "-")
    found.append(f"{row.flops / 1e9:.3f}" if row.flops else "-")
    found.append(f"{reading / 1e9:.2f}" if row.bytes else "-")
    found.append(f"{reading / machine.bandwidth:.0%}" if row.bytes and machine else "-")
    found.append(f"{computing / 1e9:.2f}" if row.flops else "-")
    found.append(f"{computing / machine.matrix:.0%}" if row.flops and machine else "-")
    return found
