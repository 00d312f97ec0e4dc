"""Every TVM kernel against its operator's reference, at a decode step's and at ragged sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions, Executable
from dsc.ir.interpreter import run_graph
from tests.backends.tvm_cases import POINTS, Case, cases, program

pytest.importorskip("tvm")
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}
"""Largest |difference| relative to the largest |value|, or to 1. In bf16 one step of the last place
is 2^-8 = 4e-3; a kernel may round where the reference does not, and the other way round."""
EXACT = frozenset(
    {"embedding", "append", "cache_write", "select_rows", "cast", "full", "arange", "permute"}
    | {"expand", "slice", "concat", "stack", "split", "gather", "take", "amax", "amin", "argmax"}
    | {"maximum", "minimum", "where", "dispatch", "neg", "abs", "relu", "topk", "lt", "eq", "ne"}
    | {"logical_and", "logical_or", "logical_not"}
)
"""Operators that place, choose or round once: every bit must be the reference's."""
FOUND = [case for dtype in TOLERANCE for case in cases(dtype)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    backend = get("tvm")
    planned = pipeline.apply(program(FOUND), ["plan_memory"])
    emission = backend.emit(planned, EmitOptions())
    folder: Path = tmp_path_factory.mktemp("kernels")
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return backend.load(folder, {"meta": emission.meta, "weights": None}, planned)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest |difference| over max(1, |wanted|max)."""
    if wanted.numel() == 0:
        return 0.0
    scale = max(1.0, float(wanted.double().abs().max()))
    return float((got.double() - wanted.double()).abs().max()) / scale


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.id)
def test_kernel_matches_the_reference(case: Case, loaded: Executable) -> None:
    tolerance = TOLERANCE["bf16" if case.low_precision else "f32"]
    if case.op in EXACT:
        tolerance = 0.0
    for env in POINTS:
        inputs = case.inputs(env)
        wanted = run_graph(case.graph, [x.clone() for x in inputs.values()])
        got = loaded.run(case.id, {k: x.clone() for k, x in inputs.items()})
        for (name, tensor), reference in zip(got.items(), wanted, strict=True):
            assert tensor.shape == reference.shape
            assert tensor.dtype == reference.dtype
            error = relative_error(tensor, reference)
            assert error <= tolerance, f"{name} at {env}: {error:.2e} > {tolerance}"


def test_bf16_stores_round_ties_to_even(loaded: Executable) -> None:
    tie = 2.0**-8
    row = [1 + tie, 1 + 3 * tie, -1 - tie, 1 + tie * 1.01, 3.4e38, float("inf"), -0.0, 1e-40, 0.5]
    x = torch.tensor([row])
    got = loaded.run("cast_1_f32", {"x": x})["y0"]
    assert torch.equal(got.view(torch.int16), x.bfloat16().view(torch.int16))
    nan = loaded.run("cast_1_f32", {"x": torch.full((1, 9), float("nan"))})["y0"]
    assert bool(nan.isnan().all())
