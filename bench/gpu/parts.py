"""The parts of a run: what comes first, how long each may take, and how they are kept apart.

Order is that of importance, since what would begin after `DEADLINE_S` is left out: speeds that all
shares are of, whether results are right, what was promised of steps, what is compared, and other
tiles in what time is left. Budgets are at least twice what a part is thought to take on an H200: a
part that hangs costs no more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from bench.gpu import bars, checks, peers, steps, tiles
from bench.gpu.archive import ROOT, sources, unpacked
from dsc.files import write_text

DEADLINE_S, END_S = 420.0, 480.0
Figures: TypeAlias = dict[str, Any]
Told: TypeAlias = Callable[[str, Any], None]
"""Takes a figure's name and the figure, as soon as it is found."""


@dataclass(frozen=True, slots=True)
class Part:
    """`measure` is given the unpacked folder, what was found before, and whom to tell.

    `thought_s` are the seconds that it is thought to take, `budget_s` those that it may.
    """

    measure: Callable[[Path, Figures, Told], None]
    thought_s: float
    budget_s: float


def _model(name: str, seconds: float) -> Part:
    return Part(partial(steps.measure, name), seconds, 3 * seconds)


def _tiles(name: str) -> Part:
    thought = tiles.BUDGET_S + 20
    return Part(partial(tiles.measure, name), thought, 2 * thought)


PARTS: Mapping[str, Part] = {
    "speeds": Part(steps.speeds, 5, 30),
    "torch's speeds": Part(peers.speeds, 15, 60),
    "tokens": Part(checks.tokens, 25, 75),
    "operators": Part(checks.operators, 15, 60),
    "codes": Part(checks.codes, 15, 60),
    "671b-3l": _model("671b-3l", 25),
    "moonlight-6l": _model("moonlight-6l", 10),
    "671b-3l, 64 sequences": _model("671b-3l, 64 sequences", 20),
    "671b-3l fp8": _model("671b-3l fp8", 20),
    "671b-3l fp8, head too": _model("671b-3l fp8, head too", 20),
    "block": Part(peers.block, 50, 120),
    "memcheck": Part(partial(checks.sanitised, "memcheck"), 30, 60),
    "racecheck": Part(partial(checks.sanitised, "racecheck"), 30, 60),
    "attention": Part(peers.attention, 15, 45),
    "products": Part(peers.products, 15, 45),
    "flex": Part(peers.flex, 30, 60),
    **{f"tiles of {name}": _tiles(name) for name in tiles.ENTRIES},
}
"""By name, in order."""


def run(archive: Path, wanted: Sequence[str], out: Path) -> Figures:
    """All parts, or some and the speeds, each with its figures or with why there are none."""
    start, archive, out = time.perf_counter(), archive.resolve(), out.resolve()
    with tempfile.TemporaryDirectory(prefix="dsc-gpu-") as place:
        folder = unpacked(archive, Path(place) / "unpacked")
        found: Figures = {"about": json.loads((folder / "about.json").read_text())}
        if found["about"].get("sources") != sources():
            found["about"]["note"] = "this checkout is not the one that the archive was made by"
        write_text(out, json.dumps(found))
        for name, part in PARTS.items():
            if wanted and name not in (*wanted, "speeds"):
                continue
            began = time.perf_counter() - start
            if began > DEADLINE_S:
                found[name] = {"left out": "after the deadline"}
                continue
            found[name] = _apart(folder, name, min(part.budget_s, END_S - began), out)
            found[name]["part_s"] = round(time.perf_counter() - start - began, 1)
            found["bars"] = bars.judged(found)
            found["took_s"] = round(time.perf_counter() - start, 1)
            write_text(out, json.dumps(found, indent=1))
    return found


def _apart(folder: Path, name: str, limit: float, out: Path) -> Figures:
    """A part in a process of its own, which is ended with all that it started at its limit."""
    own = folder / "found.json"
    own.unlink(missing_ok=True)
    line = [sys.executable, "-m", "bench.gpu", "part", str(folder), name, "--out", str(out)]
    environment = {"CUDA_MODULE_LOADING": "LAZY", "OMP_NUM_THREADS": "8", **os.environ}
    log = folder / "told.txt"
    with log.open("w") as told:
        process = subprocess.Popen(
            line, stdout=told, stderr=told, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            ended(process)
    figures: Figures = json.loads(own.read_text()) if own.is_file() else {}
    if status is None:
        figures["left out"] = f"it was not done after {limit:.0f} s"
    elif status != 0:
        last = [x for x in log.read_text(errors="replace").splitlines() if x.strip()][-3:]
        figures["error"] = f"it ended with {status}: {' | '.join(last)[-600:]}"
    return figures


def ended(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def measured(folder: Path, name: str, out: Path) -> None:
    """A part in this process: what it finds is in found.json of the folder at all times."""
    before: Figures = json.loads(out.read_text()) if out.is_file() else {}
    figures: Figures = {}

    def tell(figure: str, value: Any) -> None:
        figures[figure] = value
        write_text(folder / "found.json", json.dumps(figures))

    try:
        PARTS[name].measure(folder, before, tell)
    except Exception as problem:
        tell("error", f"{type(problem).__name__}: {str(problem)[:600]}")
