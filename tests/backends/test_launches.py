"""What is said of launches and memory is what runs: counted when emitted, and when run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from bench.plans import launches_a_layer, plan_of
from dsc.api import CompiledModel
from dsc.errors import MemoryLimitError
from dsc.ir.dims import evaluate
from dsc.ir.program import Program
from dsc.report import cache_bytes
from dsc.runtime.plan import ALIGNMENT, Plan
from tests.backends.canonical_lm import Sizes, canonical_lm

OPTIONS: dict[str, Any] = {"max_batch": 2, "max_context": 24, "prefill_chunk": 8}
EXTRA: dict[str, dict[str, Any]] = {"tvm": {"tune": False}, "triton": {"compile": False}}
DEVICE = {"tvm": "cpu", "triton": "cuda", "reference": "cpu"}


def tiny() -> Program:
    return canonical_lm(Sizes(layers=2, dense=1), max_batch=2, max_context=24)


def compiled(backend: str) -> CompiledModel:
    return dsc.compile(tiny(), backend=backend, backend_options=EXTRA.get(backend), **OPTIONS)


def needed(program: Program, arena: int) -> int:
    """Bytes of weights, arena and caches."""
    weights = sum(evaluate(t.nbytes, {}) for t in program.weight_types().values())
    rows = OPTIONS["max_batch"] * (OPTIONS["max_context"] + OPTIONS["prefill_chunk"])
    return int(weights + arena + rows * cache_bytes(program))


@pytest.fixture(scope="module", params=list(EXTRA))
def limited(request: pytest.FixtureRequest) -> tuple[str, CompiledModel]:
    """A model that was compiled under a limit that is its need, and would not be under one less."""
    backend = request.param
    pytest.importorskip(backend)
    program, plan = plan_of(tiny(), backend, **OPTIONS)
    need = needed(program, max(entry.arena_bytes for entry in plan.entries.values()))
    try:
        dsc.set_memory_limit(DEVICE[backend], (need - 1) / 1e6)
        with pytest.raises(MemoryLimitError, match="arena"):
            compiled(backend)
        dsc.set_memory_limit(DEVICE[backend], need / 1e6)
        return backend, compiled(backend)
    finally:
        dsc.set_memory_limit(DEVICE[backend], None)


def test_what_runs_is_what_was_emitted_and_what_the_report_says(
    limited: tuple[str, CompiledModel], tmp_path: Path
) -> None:
    backend, model = limited
    folder = model.save(tmp_path / "out")
    places = {"tvm": ["plan.json"], "triton": ["plan.json", "triton/interpret/plan.json"]}
    plans = [Plan.from_json((folder / name).read_bytes()) for name in places[backend]]
    told = {name: entry["launches"] for name, entry in model.report["entries"].items()}
    for plan in plans:
        assert {name: len(entry.launches) for name, entry in plan.entries.items()} == told
    for entry in model.report["entries"].values():
        listed = sum(layer["launches"] for layer in entry["layers"]) + entry["other_launches"]
        assert listed == entry["launches"]
    session = dsc.load(folder, trust=True).session(max_batch=1)
    with dsc.Profiler() as profiler:
        session.prefill(torch.tensor([[1, 2, 3]]))
        session.decode([4])
    ran = [event for event in profiler.events if event.category == "step"]
    unasked = sum(x.op == "sample" for plan in plans[-1:] for x in plan.entries["decode"].launches)
    assert unasked == (4 if backend == "triton" else 0), "ids that this session does not want"
    assert len(ran) == told["extend"] + told["decode"] - 2 * unasked


def test_a_model_runs_at_the_need_that_one_byte_under_it_was_refused(
    limited: tuple[str, CompiledModel],
) -> None:
    backend, model = limited
    session = model.session()
    logits = session.prefill(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] * 2))
    assert torch.isfinite(logits).all()
    if backend == "tvm":
        executable: Any = session.executable
        planned = max(e["arena_bytes"] for e in model.report["entries"].values())
        assert len(executable._arena) - ALIGNMENT == planned


@pytest.mark.parametrize("backend", ["null", *EXTRA])
def test_each_level_launches_no_more_than_the_one_below(backend: str) -> None:
    """A MoE and a dense layer of a decode step."""
    found = [launches_a_layer(tiny(), backend, level) for level in range(4)]
    for layer in ("model.layers.0", "model.layers.1"):
        kind = [counts[layer] for counts in found]
        assert all(a >= b for a, b in itertools.pairwise(kind)), kind
        assert kind[0] > kind[3]


def test_what_allocates_for_itself_says_so_and_what_it_needs_at_least() -> None:
    for backend, allocator in (("onnxruntime", "ONNX Runtime"), ("reference", "torch")):
        model = compiled(backend)
        for entry in model.report["entries"].values():
            assert (entry["arena_bytes"], entry["allocator"]) == (0, allocator)
            assert entry["arena_lower_bound"] > 0
            assert (entry["launches"] == 1) == (backend == "onnxruntime")
        try:
            dsc.set_memory_limit("cpu", needed(model.program, 0) / 1e6)
            with pytest.raises(MemoryLimitError, match="arena"):
                compiled(backend)
        finally:
            dsc.set_memory_limit("cpu", None)
