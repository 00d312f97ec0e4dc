"""The model of a card against what cards did: steps of two shortened models in bf16.

    python -m bench.cards

Times of kernels are those of docs/decisions/triton-on-a-gpu.md: one sequence, `--max-context 8192
--max-batch 4`. Launches have become fewer since they were read: of those that are gone the model's
seconds of a launch are added.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bench.gpu.prepare import MODELS, configured
from bench.plans import plan_of
from dsc.backends.triton.devices import CARDS, LAUNCH_SECONDS
from dsc.backends.triton.modelled import modelled_step
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.models import v3
from dsc.runtime.plan import Plan

SHORTENED = ("moonlight-6l", "671b-3l")
"""Those of `bench.gpu` that were measured."""
POINTS = {"decode at 512": (1, 1, 512), "decode at 8000": (1, 1, 8000), "prefill": (1, 512, 0)}
"""Batch, new tokens, context."""
MEASURED: Mapping[tuple[str, str], tuple[float, float]] = {
    ("moonlight-6l", "decode at 512"): (0.693e-3, 0.833e-3),
    ("moonlight-6l", "decode at 8000"): (0.715e-3, 0.866e-3),
    ("moonlight-6l", "prefill"): (2.96e-3, 3.61e-3),
    ("671b-3l", "decode at 512"): (1.413e-3, 1.948e-3),
    ("671b-3l", "decode at 8000"): (1.459e-3, 2.001e-3),
    ("671b-3l", "prefill"): (15.39e-3, 19.8e-3),
}
"""Seconds of kernels on an H200 and on an H100."""
LAUNCHES: Mapping[tuple[str, str], int] = {
    ("moonlight-6l", "decode"): 116, ("moonlight-6l", "prefill"): 124,
    ("671b-3l", "decode"): 62, ("671b-3l", "prefill"): 64,
}  # fmt: skip
"""Launches of these steps in the plans of the commits that were measured, 8f123b9 and a419f80."""
FACTORS = {"decode": (0.9, 1.1), "prefill": (1.0, 1.5)}
"""How many times as long as the model says kernels took, at least and at most."""


@cache
def shortened(name: str) -> tuple[Program, Plan]:
    """One of the models and its plan, of a configuration that is written for it."""
    known, changes, _ = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = configured(known, changes, Path(folder))
        return plan_of(v3.__file__, "triton", config=str(file), weights="none", dtype=DType.bf16)


def ratios(name: str) -> dict[str, float]:
    """Measured over modelled seconds, by card and step, each of as many launches."""
    program, plan = shortened(name)
    found = {}
    for step, point in POINTS.items():
        for card, seconds in zip(("H200", "H100"), MEASURED[name, step], strict=True):
            modelled = modelled_step(program, plan, {}, CARDS[card], *point)
            gone = LAUNCHES[name, step.split()[0]] - modelled.launches
            expected = modelled.seconds + gone * LAUNCH_SECONDS
            found[f"{card} {name} {step}"] = round(seconds / expected, 3)
    return found


def measure() -> dict[str, Any]:
    """All ratios; within `FACTORS`."""
    found = {step: ratio for name in SHORTENED for step, ratio in ratios(name).items()}
    return {"ok": all(is_near(step, ratio) for step, ratio in found.items()), **found}


def is_near(step: str, ratio: float) -> bool:
    """Whether a step's ratio is within the factors of its kind."""
    least, most = FACTORS["decode" if "decode" in step else "prefill"]
    return least <= ratio <= most


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
