"""Results that a long bench keeps as it goes, so that one which is cut off goes on where it ended.

Lines of JSON under bench/out, each with the commit at which it was measured.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"


@cache
def commit() -> str:
    """The commit that is checked out."""
    line = ["git", "rev-parse", "HEAD"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def earlier(path: Path) -> list[dict[str, Any]]:
    """What was measured at this commit and kept in a file."""
    if not path.is_file():
        return []
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [found for found in lines if found.pop("commit") == commit()]


def keep(path: Path, found: Mapping[str, Any]) -> None:
    """Add a result to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps({"commit": commit(), **found}) + "\n")


def measured(
    path: Path,
    named: Sequence[str],
    cases: Sequence[tuple[Any, ...]],
    ways: Sequence[Any],
    measure: Callable[..., Iterable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Results of all cases in all ways: those of this commit are read, others kept as they come.

    A result says under `named` of which case it is, and then in which way. `measure` is called with
    what tells a case and the ways that are left of it.
    """

    def of(case: tuple[Any, ...], way: Any) -> tuple[Any, ...]:
        return (*case, *way) if isinstance(way, tuple) else (*case, way)

    known = {tuple(each[name] for name in named): each for each in earlier(path)}
    for case in cases:
        left = [way for way in ways if of(case, way) not in known]
        for each in measure(*case, left) if left else ():
            known[tuple(each[name] for name in named)] = each
            keep(path, each)
    return [known[of(case, way)] for case in cases for way in ways]


def failed(problem: Exception) -> str:
    """What went wrong, as a result says it."""
    return f"{type(problem).__name__}: {str(problem)[:300]}"


def tell(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the results that do not hold, and how many there are."""
    bad = [each for each in found if not each["ok"]]
    for each in bad:
        print(json.dumps(each))
    print(f"{len(found)} results, {len(bad)} bad")
