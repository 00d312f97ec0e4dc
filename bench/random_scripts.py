"""Random steps of an artifact's run.py, each in a process of its own; see `bench.random_calls`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.random_calls import FAR, ROOT, Array, Outcome, vocabulary

if TYPE_CHECKING:
    from dsc.ir.program import Program

SCRIPT = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import numpy as np, run
from bench.guarded import Guarded
model, guards = run.Model(sys.argv[1]), []
for name, held in (model.caches if hasattr(model, "caches") else {}).items():
    guards.append(Guarded(held.nbytes))
    model.caches[name] = guards[-1].array(held.shape, held.dtype)
    model.caches[name][...] = held
for given in json.loads(sys.argv[3]):
    arrays = [np.array(x["values"], x["dtype"]).reshape(x["shape"]) for x in given]
    try:
        logits = model.step(*arrays)
    except ValueError as refusal:
        sys.exit(f"ValueError: {refusal}")
if not all(g.intact for g in guards) or not np.isfinite(logits).all():
    sys.exit("damage")
"""
"""Makes the steps that its argument lists; the model's caches lie in guarded memory."""


def run_scripts(folder: Path, calls: int, seed: int) -> Outcome:
    """Each call in a process of its own: a first step of two tokens, then the call."""
    from dsc.runtime import artifact

    opened = artifact.read(folder, trust=True)
    outcome = Outcome()
    for number in range(calls):
        steps, fault = script_steps(opened.program, opened.manifest, seed, number)
        line = [sys.executable, "-c", SCRIPT, str(folder), str(ROOT), json.dumps(steps)]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        outcome.calls += 1
        error = done.stderr.strip().splitlines()
        told = done.returncode == 1 and len(error) == 1 and error[0].startswith("ValueError: ")
        outcome.worked += done.returncode == 0
        outcome.refused += told
        outcome.crashes += done.returncode < 0
        outcome.faults.update([fault] if told else [])
        if done.returncode != 0 if not fault else not told:
            said = error[-1] if error else ""
            outcome.bad.append(f"call {number} ({fault}): {done.returncode} {said}")
    return outcome


def script_steps(
    program: Program, manifest: Mapping[str, Any], seed: int, number: int
) -> tuple[list[Any], str]:
    """The steps of a process, each four arrays, and what is wrong with the last; empty: nothing."""
    rng = random.Random(f"{seed}/{number}")
    vocab, chunk = vocabulary(program), manifest["limits"]["prefill_chunk"]
    context = manifest["limits"]["max_context"]
    first = _step_arrays([[1, 2]], 0, [1])
    held = 2 if manifest["backend"] == "onnxruntime" else rng.randint(0, context - chunk)
    new = rng.randint(1, chunk)
    ids = [[rng.randrange(vocab) for _ in range(new)]]
    step = _step_arrays(ids, held, [rng.randrange(new)])
    fault = rng.choice(
        ("", "", "ids", "lengths", "at", "positions", "long", "batch", "type", "empty")
    )
    far = rng.choice((-1, *FAR))
    match fault:
        case "ids":
            step[0][0, rng.randrange(new)] = rng.choice((vocab, far))
        case "positions":
            step[1][0, rng.randrange(new)] = far
        case "lengths":
            step[2][0] = rng.choice((context - new + 1, far))
        case "at":
            step[3][0, 0] = rng.choice((new, far))
        case "long":
            step = _step_arrays([[0] * rng.randint(chunk + 1, 4 * context)], held, [0])
        case "batch":
            step = [np.concatenate([x, x]) for x in step]
        case "type":
            place = rng.randrange(4)
            step[place] = step[place].astype(rng.choice((np.int32, np.float64)))
        case "empty":
            place = rng.randrange(4)
            step[place] = step[place][:0]
    steps = [[_as_json(x) for x in arrays] for arrays in (first, step)]
    return steps, fault


def _step_arrays(ids: list[list[int]], held: int, at: list[int]) -> list[Array]:
    new = len(ids[0])
    positions = np.arange(held, held + new, dtype=np.int64)[None]
    return [np.array(ids), positions, np.array([held]), np.array([at])]


def _as_json(array: Array) -> dict[str, Any]:
    return {"shape": array.shape, "dtype": array.dtype.name, "values": array.reshape(-1).tolist()}
