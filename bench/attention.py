"""Attention over odd shapes on every backend, against a plain formula in fp64: `make bars`.

    python -m bench.attention

Windows, chunks, capped scores, sinks and pages; one new row and several; groups of 1 to 4 key
heads, widths of 8 to 128; fp32 and bf16; code for this CPU and for any x86-64.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsc.ir.types import DType
from tests.backends.attention_cases import (
    EVERYTHING,
    TOLERANCE,
    Case,
    error,
    formula,
    loaded,
    of_types,
)

Figures = dict[str, Any]


def measure() -> Figures:
    """The largest error of each backend as a share of its bound, and how many cases there were."""
    typed = of_types(EVERYTHING, DType.f32, DType.bf16)
    unique = list({case.id: case for case in typed}.values())
    runs = {
        "tvm": ("tvm", "cpu", unique),
        "tvm, any x86-64": ("tvm", "cpu:x86-64", unique),
        "onnxruntime": ("onnxruntime", "cpu", [c for c in unique if not c.page]),
    }
    found = {name: _worst(*run) for name, run in runs.items()}
    return {"ok": max(found.values()) <= 1, "cases": len(unique), "worst": found}


def _worst(backend: str, target: str, cases: list[Case]) -> float:
    """The largest error of a backend, as a share of the bound."""
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(backend, cases, Path(folder) / "out", target)
        shares = [_share(case, model) for case in cases]
    return max(shares)


def _share(case: Case, model: Any) -> float:
    given = case.inputs()
    made: torch.Tensor = model.run(case.id, {k: x.clone() for k, x in given.items()})["y"]
    return error(made, formula(given, **case.attributes())) / TOLERANCE[case.dtype]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
