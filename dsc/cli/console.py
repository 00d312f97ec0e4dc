"""What the verbs print with: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
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
    """The `progress` argument of the API, drawn as one bar: called with what, done and total."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Show that step `what` has finished `done` of `total` parts (0: not known)."""
        if self._task is None:
            self._task = self._bars.add_task(what)
        self._bars.update(self._task, description=what, completed=done, total=total or None)


@contextmanager
def progress_bar() -> Iterator[StepReporter]:
    """Draw progress on standard error while the block runs, and wipe it afterwards."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr(), transient=True) as bars:
        yield StepReporter(bars)
