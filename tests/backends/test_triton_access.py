"""The access checker finds what is planted, and nothing in the kernels that a model runs by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.triton_access import faults_of
from dsc.backends.triton.access import TracedExecutable
from dsc.backends.triton.launch import Kernel, LaunchProgram
from dsc.backends.triton.worker import INTERPRETED
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.runtime.plan import (
    ARENA,
    INPUT,
    OUTPUT,
    READ,
    UPDATE,
    WRITE,
    Buffer,
    EntryPlan,
    Launch,
    Port,
    Ref,
)
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.backends.triton_coded import Case, loaded, program

pytest.importorskip("triton")

SOURCE = Path(__file__).with_name("planted.py")
FAULTS = {
    "overlap": "overlap", "race": "race", "unwritten": "unwritten", "outside": "outside",
    "order": "order", "store_to_operand": "outside", "lanes": "overlap", "undefined": "unwritten",
    "uncounted": "unwritten",
}  # fmt: skip
CLEAN = ("clean", "last_arriver")
N, BLOCK = 64, 16
GRAPH = "graph {}(%x: f32[64], %counter: i32[1]) {{\n  %y = silu %x\n  return %y\n}}\n"
COUNTER = np.zeros(1, np.int32)


def plan_of(function: str) -> tuple[Kernel, EntryPlan]:
    """A planted kernel, and an entry that launches it."""
    pointers = ("x", "y", "scratch")
    signature = dict.fromkeys(pointers, "*fp32") | {"counter": "*i32"}
    signature |= {"N": "constexpr", "BLOCK": "constexpr"}
    kernel = Kernel("planted", function, signature, {"N": N, "BLOCK": BLOCK}, (), 4, 1)
    t, count = TensorType(DType.f32, (N,)), TensorType(DType.i32, (1,))
    buffers = (
        Buffer(INPUT, "x", 4 * N), Buffer(OUTPUT, "y", 4 * N), Buffer(ARENA, "scratch", 4 * N),
        Buffer(INPUT, "counter", 4),
    )  # fmt: skip
    refs = (Ref(0, READ, 4 * N), Ref(1, WRITE, 4 * N), Ref(2, UPDATE, 4 * N), Ref(3, UPDATE, 4))
    return kernel, EntryPlan(
        (Port("x", t, 0), Port("counter", count, 3)), (Port("y", t, 1),), buffers,
        (Launch(kernel.key, refs, (N // BLOCK,), loc="layer"),), 4 * N, 4 * N,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedExecutable]:
    folder = tmp_path_factory.mktemp("planted")
    names = (*FAULTS, *CLEAN)
    text = 'program "planted" {stage=CANONICAL}\n' + "".join(GRAPH.format(n) for n in names)
    program: Program = parse_program(text)
    made = {name: plan_of(name) for name in names}
    kernels = {kernel.key: kernel for kernel, _ in made.values()}
    plan = LaunchProgram("interpret", kernels, {n: entry for n, (_, entry) in made.items()}).plan()
    (folder / "kernels").mkdir()
    (folder / "kernels" / "planted.py").write_text(SOURCE.read_text())
    (folder / INTERPRETED).parent.mkdir()
    (folder / INTERPRETED).write_bytes(plan.to_json())
    executable = TracedExecutable(folder, folder / "none", program)
    yield executable
    executable.close()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(planted: TracedExecutable, name: str) -> None:
    planted.faults.clear()
    planted.run(name, {"x": np.ones(N, np.float32), "counter": COUNTER})
    (fault,) = (f for f in planted.faults if f.kind == FAULTS[name])
    assert fault.launch == (1 if name == "unwritten" else 0)
    assert fault.loc == ("" if name == "unwritten" else "layer")


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_right_has_no_fault(planted: TracedExecutable, name: str) -> None:
    planted.faults.clear()
    x = np.arange(N, dtype=np.float32)
    (y,) = planted.run(name, {"x": x, "counter": COUNTER}).values()
    assert planted.faults == []
    assert np.array_equal(np.asarray(y), 2 * x)


def test_a_model_runs_by_the_plan_of_a_gpu_without_a_fault() -> None:
    """A layer in FP8 with a cache in FP8, in pages: all of a step's kernels, in all entries."""
    model = canonical_lm(Sizes(layers=1, dense=0, dtype=DType.bf16), max_batch=2)
    options = {"quant": "fp8", "cache_format": "fp8", "cache": "paged"}
    assert faults_of("cuda:sm_90", options, model, 50, (26, 2)) == []


def test_a_lookup_by_what_is_no_token_reads_nothing(tmp_path: Path) -> None:
    """-1 comes back as the next token where logits gave none, and no host looks at it."""
    tables = {"plain": "f32[9,70]", "codes": "i4{1x32,f16,i8}[9,70]"}
    lookup = "%y = embedding %i, %w"
    made = program(
        {n: Case((t,), {"i": "i64[2,2]"}, lookup, "f32[2,2,70]") for n, t in tables.items()}
    )
    loaded(made, tmp_path).close()
    out = tmp_path / "out"
    traced = TracedExecutable(out / "triton", out / "weights" / "model.safetensors", made)
    try:
        for name in tables:
            found, _ = traced._interpret(name, {}, {"i": np.array([[-1, 3], [9, 0]])})
            assert traced.faults == []
            assert (found["y"].any(-1) == [[False, True], [False, True]]).all()
    finally:
        traced.close()
