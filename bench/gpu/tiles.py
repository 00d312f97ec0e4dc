"""The search space of `dsc tune` on the card: other tiles of a model's kernels, compiled before.

Weights are those that the model's steps are timed over. What is found is told, and kept by the
machine that it was found on; from the report somebody may take it into an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.device import Weights, driver_for
from dsc.backends.triton.tuner import Tuner
from dsc.hardware import Gpu
from dsc.ir.parser import parse_program
from dsc.targets import parse_target

ENTRIES: Mapping[str, tuple[str, ...]] = {
    "671b-3l": ("decode", "prefill"), "moonlight-6l": ("decode",), "671b-3l fp8": ("prefill",),
}  # fmt: skip
"""By model the entries whose tiles are tried, in order."""
BUDGET_S = 40.0
"""Seconds in which tiles are tried."""


def tuner_of(place: Path, target: str, entries: tuple[str, ...]) -> Tuner:
    """What tunes a model that was prepared for a target."""
    manifest = json.loads((place / "dsc.json").read_text())
    program = parse_program((place / "program.dsc").read_text())
    return Tuner(place, manifest, program, parse_target(target), entries, lambda *_: None)


def prepare(place: Path, target: str, entries: tuple[str, ...]) -> None:
    """Compile the other tiles of a model's entries into its folder."""
    for name, data in tuner_of(place, target, entries).prepare().files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def measure(name: str, folder: Path, found: Mapping[str, Any], tell: Any) -> None:
    """Which tiles are faster than the rules', and what steps take with all of those."""
    target = found["about"]["target"]
    tuner = tuner_of(folder / name, target, ENTRIES[name])
    driver = driver_for(folder / name)
    weights = Weights(driver, tuner.program)
    card = Gpu(found["speeds"]["card"], target, driver.memory()[1])
    for figure, value in tuner.tune(card, weights.places, BUDGET_S).report.items():
        tell(figure, value)
    weights.free()
    driver.close()
