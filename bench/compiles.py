"""What a person waits for in a compile, and that what is kept between compiles can be trusted.

    python -m bench.compiles                          seconds of a first, second and other compile
    python -m bench.compiles --against ../another     the same of another checkout, in turns

A first compile finds an empty cache, a second one what the first left, the third asks for another
`--max-context`. Each is a process of its own; seconds are the process's wall time, beside the CPU
time of it and of the processes that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny-v3"
KINDS = ("first", "second", "other_context")
PROCESSES, KILLED = 50, 20
PROGRAM = """program "kept" {{stage=CANONICAL}}
symbols {{B=[1,9]}}
graph main(%x: f32[B,{n}], %w: f32[{n},{n}]) {{
  %y = linear %x, %w
  %z = silu %y
  return %z
}}
"""
WIDTHS = (8, 24, 40, 56)
COMPILE = """
import sys, dsc
from dsc.ir.parser import parse_program
dsc.compile(parse_program(open(sys.argv[1]).read()), backend="tvm").save(sys.argv[2])
"""
CHECK = """
import sys, torch, dsc
from dsc.ir.parser import parse_program
program = parse_program(open(sys.argv[1]).read())
shapes = {v.name: v.type.shape for v in program.entries["main"].inputs}
given = {n: torch.randn(*[3 if isinstance(d, str) or not isinstance(d, int) else d for d in s])
         for n, s in shapes.items()}
run = lambda backend: dsc.compile(program, backend=backend).run(given, "main")
(a,), (b,) = run("tvm").values(), run("reference").values()
torch.testing.assert_close(a, b)
"""


def seconds(root: Path, model: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of wall and CPU seconds of the three kinds of compile by the checkout at `root`."""
    return _medians([_turn(root, model) for _ in range(rounds)])


def paired(root: Path, other: Path, model: Path, rounds: int) -> dict[str, Any]:
    """The same for two checkouts in turns, and ratios of medians: `root` to `other`."""
    turns: dict[Path, list[dict[str, tuple[float, float]]]] = {root: [], other: []}
    for number in range(rounds):
        for each in (root, other)[:: 1 if number % 2 else -1]:
            turns[each].append(_turn(each, model))
    ours, theirs = _medians(turns[root]), _medians(turns[other])
    ratios = {k: round(ours[k]["wall_s"] / theirs[k]["wall_s"], 3) for k in KINDS}
    return {"ours": ours, "theirs": theirs, "ratio": ratios}


def _turn(root: Path, model: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each kind, over a cache of their own."""
    with tempfile.TemporaryDirectory(prefix="dsc-compiles-") as folder:
        line = ["compile", str(model), "--backend", "tvm", "-o", f"{folder}/out", "--force"]
        other = [*line, "--max-context", "333"]
        kinds = dict(zip(KINDS, (line, line, other), strict=True))
        return {k: _timed(root, words, Path(folder)) for k, words in kinds.items()}


def _timed(root: Path, words: Sequence[str], cache: Path) -> tuple[float, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dsc", *words],
        cwd=root, env=_environment(root, cache), capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _environment(root: Path, cache: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": str(root), "XDG_CACHE_HOME": str(cache)}


def _medians(turns: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            "wall_s": round(statistics.median(turn[kind][0] for turn in turns), 2),
            "cpu_s": round(statistics.median(turn[kind][1] for turn in turns), 2),
        }
        for kind in KINDS
    }


def shared_cache(seed: int = 0) -> dict[str, Any]:
    """50 compiles at once over one cache, 20 of them killed: what is kept is whole and right."""
    from dsc import kept

    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="dsc-shared-") as temporary:
        folder = Path(temporary)
        texts = [folder / f"{n}.dsc" for n in WIDTHS]
        for text, n in zip(texts, WIDTHS, strict=True):
            text.write_text(PROGRAM.format(n=n))
        environment = _environment(ROOT, folder / "cache")
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", COMPILE, str(texts[i % len(texts)]), str(folder / f"o{i}")],
                env=environment, stderr=subprocess.PIPE,
            )
            for i in range(PROCESSES)
        ]  # fmt: skip
        for _ in range(KILLED):
            time.sleep(draw.uniform(0, 1.5))
            if alive := [p for p in processes if p.poll() is None]:
                draw.choice(alive).kill()
        errors = [p.communicate()[1].decode() for p in processes]
        failed = [e for p, e in zip(processes, errors, strict=True) if p.returncode > 0]
        checks = [
            subprocess.run(
                [sys.executable, "-c", CHECK, str(text)],
                env=environment, capture_output=True, text=True, check=False,
            )
            for text in texts
        ]  # fmt: skip
        wrong = [check.stderr for check in checks if check.returncode]
        files = [p for p in (folder / "cache" / "dsc").rglob("*") if p.is_file()]
        entries = [p for p in files if not p.name.startswith(".")]
        half = [str(p) for p in entries if not kept.is_whole(p.read_bytes())]
    died = sum(p.returncode < 0 for p in processes)
    return {
        "ok": not (failed or wrong or half) and died == KILLED,
        "killed": died,
        "entries": len(entries),
        "half": half,
        "failed": [error[-500:] for error in (*failed, *wrong)[:3]],
    }


def main() -> None:
    """Print the seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.against is None:
        found: Any = seconds(ROOT, asked.model.resolve(), asked.rounds)
    else:
        found = paired(ROOT, asked.against.resolve(), asked.model.resolve(), asked.rounds)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
