"""What the verbs print with: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def stdout() -> Console:
    """Return a console for results."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def tables() -> Console:
    """Return a console for wide tables: as wide as the terminal, wider than 80 without one."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def stderr() -> Console:
    """Return a console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print one JSON document, and nothing else, on standard output."""
    print(json.dumps(data, indent=2, default=str))


def human_bytes(count: float) -> str:
    """Spell a number of bytes.

    >>> human_bytes(512), human_bytes(21_577_792)
    ('512 B', '21.6 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class StepReporter:
    """The `progress` argument of the API, drawn as one bar: called with what, done and total.

    `what` is a phase, or "phase: detail"; each phase has a bar and a clock of its own.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._phase, self._began = "", 0.0
        self._seconds: dict[str, float] = {}

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Show that step `what` has finished `done` of `total` parts (0: not known)."""
        phase = what.partition(": ")[0]
        if self._task is None or phase != self._phase:
            self._end()
            self._phase, self._began = phase, time.perf_counter()
            self._task = self._bars.add_task(what, total=None, count="")
        count = "" if total == 0 else _count(done, total, time.perf_counter() - self._began)
        self._bars.update(
            self._task, description=what, completed=done, total=total or None, count=count
        )

    def seconds(self) -> dict[str, float]:
        """The phases until now in their order, and how long each took."""
        self._end()
        return {phase: round(taken, 3) for phase, taken in self._seconds.items()}

    def _end(self) -> None:
        if self._task is not None:
            taken = time.perf_counter() - self._began
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + taken
            self._bars.remove_task(self._task)
            self._task = None


_MANY = 10**5
"""Parts that are more than these are bytes."""


def _count(done: int, total: int, seconds: float) -> str:
    """How much is done; of bytes how many a second, too.

    >>> _count(3, 27, 2), _count(1_200_000, 6_300_000_000, 2)
    ('3/27', '1.2 MB/6.3 GB, 600.0 kB/s')
    """
    if total <= _MANY:
        return f"{done}/{total}"
    rate = human_bytes(done / max(seconds, 1e-3))
    return f"{human_bytes(done)}/{human_bytes(total)}, {rate}/s"


@contextmanager
def progress_bar() -> Iterator[StepReporter]:
    """Draw progress on standard error while the block runs, and wipe it afterwards."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    texts = TextColumn("{task.description}"), TextColumn("{task.fields[count]}")
    columns = (texts[0], BarColumn(), texts[1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bars:
        yield StepReporter(bars)
