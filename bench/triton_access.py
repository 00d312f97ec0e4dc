"""Every kernel of tiny-v3 with its accesses watched, by the plans that GPUs run.

    python -m bench.triton_access [CASE ...]

A prefill and decode steps of two sequences of different lengths, in the interpreter but with a
GPU's own tiles (`dsc.backends.triton.access`): no program may store where another stores or loads,
nothing may be read that was not written, nothing beside what a launch was given, and no result may
depend on the order of programs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dsc

ROOT = Path(__file__).resolve().parent.parent
TINY, STORED = ROOT / "models" / "tiny-v3", ROOT / "tests" / "data" / "tiny-v3-fp8"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16 sm_90": ("cuda:sm_90", {}),
    "fp8 sm_90": ("cuda:sm_90", {"quant": "fp8", "cache_format": "fp8"}),
    "int4 sm_80": ("cuda:sm_80", {"quant": "int4", "cache_format": "int8"}),
    "fp8 gfx942": ("hip:gfx942", {"quant": "fp8"}),
    "stored in fp8 sm_100": ("cuda:sm_100", {"model": STORED}),
    "pages gfx950": ("hip:gfx950", {"cache": "paged"}),
    "fp8 in pages sm_89": ("cuda:sm_89", {"model": STORED, "quant": "fp8", "cache": "paged",
                                          "cache_format": "fp8"}),
}  # fmt: skip
"""By name the target, and options of the compile; the model is tiny-v3 where none is named."""
PROMPTS, STEPS = (26, 3), 1
"""Tokens: a chunk of a prompt, the few that are left of it, and steps of one, an entry each."""
LIMITS: dict[str, Any] = {"max_batch": 2, "max_context": 64, "prefill_chunk": 25}


def faults_of(
    target: str,
    options: dict[str, Any],
    model: Any = TINY,
    vocab: int = 2048,
    prompts: Sequence[int] = PROMPTS,
) -> list[str]:
    """What is found in a prefill of two sequences and decode steps; `options` are of compile."""
    import numpy as np

    from dsc.backends.triton.access import TracedExecutable
    from dsc.runtime.session import Session

    asked = {"model": model, "backend_options": {"compile": False}, **LIMITS, **options}
    compiled = dsc.compile(backend="triton", target=target, **asked)
    ids = np.random.default_rng(0).integers(0, vocab, (len(prompts), max(prompts) + STEPS))
    with tempfile.TemporaryDirectory() as place:
        folder = compiled.save(Path(place) / "out")
        weights = folder / "weights" / "model.safetensors"
        plan = f"{target.partition(':')[2]}/plan.json"
        traced = TracedExecutable(folder / "triton", weights, compiled.program, plan)
        try:
            session = Session(traced, compiled.program, *LIMITS.values())
            session.prefill(ids[:, : max(prompts)], lengths=list(prompts))
            for step in range(STEPS):
                session.decode(ids[:, max(prompts) + step])
            return [str(fault) for fault in traced.faults]
        finally:
            traced.close()


def measure(names: list[str] | None = None) -> dict[str, Any]:
    """The faults of each case; none hold."""
    found: dict[str, Any] = {}
    for name in names or CASES:
        start = time.perf_counter()
        faults = faults_of(*CASES[name])
        found[name] = {"faults": faults, "seconds": round(time.perf_counter() - start, 1)}
    return {"ok": not any(each["faults"] for each in found.values()), **found}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:] or None), indent=1))
