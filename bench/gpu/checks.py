"""Whether what runs on the card is right: tokens, operators over odd shapes, and the sanitizer."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.archive import ROOT, TINY_CHECKPOINT
from bench.gpu.device import driver_for, opened, poisoned, weight_bytes
from dsc.backends.triton.device import DeviceExecutable
from dsc.backends.triton.tuner import step_inputs
from dsc.backends.triton.tuning import Step
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.weights import LayeredSource
from dsc.runtime.packing import pack
from dsc.runtime.session import Session

TINY, CASES, CODED = "tiny", "operators", "codes"
"""Folders: of compiled forms of the tiny checkpoint with the tokens that they give; of cases of
operators, and of those over codes."""
EXPECTED, CONSTANTS = "tokens.json", "constants.safetensors"
"""In such a folder: the tokens, and what of the weights no checkpoint has."""
MARGIN = 10
"""Of the typical step's error of it, what the two best tokens must be apart by."""
EXACT = 2e-3
"""Of the largest number, what sums in fp32 may be off by on a card, whose units round products."""
TOOLS = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
CLEAN = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")
REFUSED = "Device not supported"
STEPS = ((1, 1, 100), (3, 1, 40), (1, 65, 0))
"""Batch, new tokens and context of what the sanitizer sees."""
Tell = Callable[[str, Any], None]
Figures = dict[str, Any]
Pair = tuple[int, int, float]
"""The two likeliest tokens by the reference, and how far the first one's logit is ahead."""


# --- tokens ---------------------------------------------------------------------------------------


def tokens(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """Greedy tokens of the tiny checkpoint in each of its forms, beside the reference's."""
    for place in sorted((folder / TINY).iterdir()):
        try:
            tell(place.name, _tokens(place))
        except Exception as problem:
            tell(place.name, {"error": f"{type(problem).__name__}: {str(problem)[:300]}"})


def _tokens(place: Path) -> Figures:
    known = json.loads((place / EXPECTED).read_text())
    prompt, expected = known["prompt"], known["tokens"]
    program = parse_program((place / "program.dsc").read_text())
    stored = open_safetensors(place / CONSTANTS), open_safetensors(TINY_CHECKPOINT)
    program = replace(program, source=LayeredSource(stored))
    driver = driver_for(place)
    with tempfile.TemporaryDirectory() as made:
        weights = Path(made) / "model.safetensors"
        pack(program, weights)
        binaries = place / "triton" / driver.arch
        executable = DeviceExecutable(binaries, weights, program, driver)
    session = Session(executable, program, 1)
    rows = [session.prefill(np.array([prompt]))]
    for first, *_ in expected[:-1]:
        rows.append(session.decode(np.array([first])))
    found = agreement(expected, [np.asarray(row, np.float32)[0] for row in rows])
    session = Session(executable, program, 1)
    session.prefill(np.array([prompt]))
    told = np.asarray(session.generate(len(expected)))[0].tolist()
    own = [int(row.argmax()) for row in (np.asarray(x, np.float32)[0] for x in rows)]
    far = next((n for n, (pair, token) in enumerate(zip(expected, own, strict=True))
                if pair[0] != token), len(own) - 1)  # fmt: skip
    found["chosen on the device as by the host"] = told[: far + 1] == own[: far + 1]
    executable.close()
    return found


def agreement(expected: Sequence[Pair], logits: Iterable[Any]) -> Figures:
    """How often the likeliest token is the reference's, where that is no near-tie.

    Where its margin between the two best is `MARGIN` times what the typical step's is off by. What
    is left out is counted, and half of them at most.
    """
    errors, off = [], []
    for (first, second, margin), row in zip(expected, logits, strict=True):
        errors.append(abs(float(row[first]) - float(row[second]) - margin))
        off.append(int(row.argmax()) != first)
    typical = statistics.median(errors)
    clear = [wrong for (*_, margin), wrong in zip(expected, off, strict=True)
             if margin > MARGIN * typical]  # fmt: skip
    ok = not any(clear) and 2 * len(clear) >= len(off) and bool(np.isfinite(errors).all())
    error = float(f"{typical:.3g}")
    return {"ok": ok, "same": off.count(False), "compared": len(clear), "error": error}


# --- operators ------------------------------------------------------------------------------------


def operators(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """Every kernel over odd and large shapes, beside the operators' references by torch."""
    from tests.backends.triton_cases import EMITTED, cases, large_cases

    place = folder / CASES
    program = parse_program((place / "program.dsc").read_text())
    every = {k: x for k, x in (cases(EMITTED) | large_cases()).items() if k in program.entries}
    executable = _poisoned(place, folder / "none", program)

    def check(name: str) -> None:
        given = {k: x.clone() for k, x in every[name].inputs.items()}
        every[name].check(executable.run(name, given))

    _all_of(every, check, tell)


def codes(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """Products, caches and tables in codes over odd shapes, beside the interpreter of the IR."""
    from tests.backends.triton_coded import program
    from tests.backends.triton_coded_cases import CASES as EVERY
    from tests.backends.triton_coded_cases import check

    place = folder / CODED
    kept = parse_program((place / "program.dsc").read_text()).entries
    made = program({k: x for k, x in EVERY.items() if k in kept})
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        pack(made, weights)
        executable = _poisoned(place, weights, made)
    _all_of(made.entries, lambda name: check(made, executable, name, EXACT), tell)


def _poisoned(place: Path, weights: Path, program: Program) -> DeviceExecutable:
    driver = poisoned(driver_for(place))
    return DeviceExecutable(place / "triton" / driver.arch, weights, program, driver)


def _all_of(names: Collection[str], check: Callable[[str], None], tell: Tell) -> None:
    """Tell which cases are wrong, and how; of a part that ends midway, which ran last."""
    wrong: dict[str, str] = {}
    for name in names:
        tell("last", name)
        try:
            check(name)
        except Exception as problem:
            lines = str(problem).strip().splitlines()
            wrong[name] = f"{type(problem).__name__}: {' '.join(lines)[:200]}"
            tell("wrong", wrong)
    tell("cases", len(names))
    tell("ok", not wrong)


# --- the sanitizer --------------------------------------------------------------------------------


def sanitised(kind: str, folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """What a tool of compute-sanitizer finds in steps of models, the smallest first."""
    tool = shutil.which("compute-sanitizer") or next(
        (path for path in TOOLS if Path(path).exists()), None
    )
    if tool is None:
        tell("left out", "no compute-sanitizer on this machine")
        return
    models = {path.parent for path in folder.rglob("program.dsc")}
    models -= {folder / CASES, folder / CODED}
    for place in sorted(models, key=lambda path: (weight_bytes(path), path.name)):
        line = [tool, "--tool", kind, "--error-exitcode", "9"]
        line += [sys.executable, "-m", "bench.gpu.checks", str(place)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
        told = (done.stdout + done.stderr).splitlines()
        if any(REFUSED in x for x in told):
            tell("left out", f"the sanitizer does not take this device: {REFUSED}")
            return
        clean = done.returncode == 0 and any(mark in x for x in told for mark in CLEAN)
        last = [x for x in told if "SUMMARY" in x or "rror" in x][:3]
        tell(place.name, {"ok": clean, "status": done.returncode, "told": last})


def steps(place: Path) -> None:
    """Some steps of a model over weights that are made for it: what the sanitizer looks at."""
    with opened(place) as (executable, program):
        for batch, new, context in STEPS:
            limits = program.limits
            if batch > limits.max_batch or new > limits.prefill_chunk:
                continue
            step = Step.of(program, batch, new, context)
            executable.bind(step.entry, step_inputs(executable, program, step))()


if __name__ == "__main__":
    steps(Path(sys.argv[1]))
