"""A process that tunes on the fake driver: binaries are stand-ins that begin with their kernel.

    python -m tests.backends.tuned_artifact FOLDER PLAN

PLAN is JSON: `run`, the verb to be run on the artifact in FOLDER, and by kernel what is `spilled`
or `refused` by a compiler that stands in for Triton's; `kill` ends the process when the artifact's
new folder is whole but for its name. With `compile` the artifact is made first, for `batch`
sequences, else 2. `triton` is the version that is said to be here. `again` has pairs
of a card's name and of options: the model is compiled for each, and plans and notes are printed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dsc
from dsc import hardware, replacing
from dsc.backends.triton import backend, tuner, tuning
from dsc.backends.triton.launch import Kernel
from dsc.cli import main
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

CONTEXT, CHUNK = 64, 16


def model(batch: int) -> Program:
    """A layer in bf16: fp32 products have no other tiles."""
    limits = Limits(max_batch=batch, max_context=CONTEXT, prefill_chunk=CHUNK)
    sizes = Sizes(layers=1, dense=0, dtype=DType.bf16)
    return canonical_lm(sizes, max(4, batch), CONTEXT).limited(limits)


class StandIn:
    """Compiles nothing; says of some kernels that they spill, or do not compile."""

    def __init__(self, planted: Mapping[str, Any]) -> None:
        self.spilled: list[str] = planted.get("spilled", [])
        self.refused: list[str] = planted.get("refused", [])

    def each(
        self, kernels: Mapping[str, Kernel], target: Target, *rest: object
    ) -> tuple[dict[str, bytes], dict[str, Any], dict[str, str]]:
        """See `compile.compile_each`."""
        records = {
            key: {
                "file": f"{key}.cubin", "symbol": kernel.function, "warps": kernel.warps,
                "shared": 0, "global_scratch": 0, "profile_scratch": 0, "stages": kernel.stages,
                "parameters": sum(kind != "constexpr" for kind in kernel.signature.values()),
                "spill_bytes": 8 * (key in self.spilled), "registers": 32, "matrix": {},
            }
            for key, kernel in kernels.items()
            if key not in self.refused
        }  # fmt: skip
        binaries = {f"{key}.cubin": f"\x7fELF{key} ".encode() for key in records}
        return binaries, records, dict.fromkeys(kernels.keys() - records.keys(), "no\nreason")

    def all(self, *given: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
        """See `compile.compile_kernels`."""
        return self.each(*given)[:2]


def compiled(options: Mapping[str, Any], batch: int = 2) -> dsc.CompiledModel:
    """The model for a card that may be at hand."""
    return dsc.compile(
        model(batch), backend="triton", target="cuda:sm_90", max_batch=batch, max_context=CONTEXT,
        prefill_chunk=CHUNK, backend_options=options,
    )  # fmt: skip


def _killed(folder: Path, out: Path) -> None:
    os._exit(9)


def run() -> None:
    """Compile the artifact where there is none, and run the verbs."""
    folder, planted = Path(sys.argv[1]), json.loads(sys.argv[2])
    made = StandIn(planted)
    has_triton = not planted.get("no_triton")
    with (
        patch.object(backend, "compile_kernels", made.all),
        patch.object(tuner, "compile_each", made.each),
        patch.object(tuner, "has_triton", lambda: has_triton),
        patch.object(tuner, "triton_version", lambda: planted.get("triton", version("triton"))),
        patch.object(tuning, "REPEATS", 3),
        patch.object(replacing, "_put", _killed if planted.get("kill") else replacing._put),
    ):
        _run(folder, planted)


def _run(folder: Path, planted: Mapping[str, Any]) -> None:
    out = folder / "out"
    if planted.get("compile"):
        compiled({}, planted.get("batch", 2)).save(out)
    told = []
    for card, options in planted.get("again", ()):
        os.environ["FAKE_CUDA_NAME"] = card
        hardware.gpus.cache_clear()
        found = compiled(options)
        assert found._emission is not None
        assert found._emission.plan is not None
        told.append([found._emission.plan.to_json().decode(), list(found.report["notes"])])
    if told:
        print(json.dumps(told))
    if planted.get("run"):
        main([*planted["run"], str(out)])


if __name__ == "__main__":
    run()
