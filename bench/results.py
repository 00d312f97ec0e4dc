"""Results that a long bench keeps as it goes, so that one which is cut off goes on where it ended.

Lines of JSON under bench/out, each with the commit at which it was measured.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
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


def tell(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the results that do not hold, and how many there are."""
    bad = [each for each in found if not each["ok"]]
    for each in bad:
        print(json.dumps(each))
    print(f"{len(found)} results, {len(bad)} bad")
