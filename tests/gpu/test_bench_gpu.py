"""`bench.gpu` from its archive to its JSON, on a driver that holds the calls and runs no kernel."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import archive, modelled, prepare
from dsc.ir.parser import parse_program
from dsc.runtime.limit import step_work, working_set
from tests.backends.test_triton_driver import driver, run_with

pytest.importorskip("triton")
__all__ = ["driver"]
MODELS: Mapping[str, Any] = {"671b-3l": ("tiny", {"num_hidden_layers": 2}, {"quant": "fp8"})}
FORMS: Mapping[str, Any] = {"bf16": {}}
CASES = ("rms_norm_1", "add_1", "argmax_0", "rows_f8", "write_i8")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the card's machine would be given."""
    place = tmp_path_factory.mktemp("gpu") / "gpu.tar.xz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LIMITS", {"max_context": 640, "max_batch": 2, "prefill_chunk": 16})
        patch.setattr(prepare, "TOKENS", 6)
        size = prepare.prepare(place, "cuda:sm_90", MODELS, FORMS, CASES, {})
    assert 0 < size < archive.MOST_BYTES - archive.checkout_bytes()
    return place


@pytest.fixture(scope="module")
def found(driver: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command writes."""
    place = tmp_path_factory.mktemp("out")
    line = [sys.executable, "-m", "bench.gpu", "run", str(packed), "--out", str(place / "gpu.json")]
    line += ["tokens", "671b-3l", "moonlight-6l", "memcheck", "operators", "codes", "block"]
    done = run_with(driver, place / "log", line)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "gpu.json").read_text())


def test_each_part_is_there_with_its_figures_or_its_reason(found: Any) -> None:
    assert found["speeds"]["copy"] == pytest.approx(4e12, rel=1e-3)
    assert found["speeds"]["fp8"] == pytest.approx(1e15, rel=1e-3)
    assert found["speeds"]["card"] == "fake 0"
    assert found["block"]["error"] == "RuntimeError: torch has no CUDA here"
    assert found["memcheck"]["left out"] == "no compute-sanitizer on this machine"
    assert "moonlight-6l" in found["moonlight-6l"]["error"]  # the archive has no such model
    assert found["about"]["target"] == "cuda:sm_90"
    assert "note" not in found["about"]


def test_a_step_has_the_bytes_of_its_plan_and_shares_of_its_time(found: Any, packed: Path) -> None:
    step = found["671b-3l"]["decode at 512"]
    assert "prefill of 4096" not in found["671b-3l"]  # the artifact holds no such context
    folder = archive.unpacked(packed, packed.parent / "unpacked") / "671b-3l"
    program = parse_program((folder / "program.dsc").read_text())
    assert step["floor_bytes"] == working_set(step_work(program, 1, 1, 512))
    assert step["launches"] == sum(row["launches"] for row in step["kernels"].values())
    assert step["bytes"] == sum(row["bytes"] for row in step["kernels"].values())
    assert step["kernels_ms"] == pytest.approx(2e-3 * step["launches"], rel=0.05)
    for way in ("one by one", "a graph", "a graph, none begins early"):
        assert step["ways"][way] == pytest.approx(step["kernels_ms"], rel=0.05)
    assert step["tokens"].keys() == {"likeliest", "drawn"}
    assert step["of copy speed"] == pytest.approx(step["floor_bytes"] / 4e9 / step["ms"], abs=2e-3)
    assert step["finite"]


def test_the_model_of_a_card_speaks_of_the_steps_that_are_measured(
    found: Any, packed: Path
) -> None:
    said = modelled.modelled(packed, "H200")
    step, measured = said["671b-3l"]["decode at 512"], found["671b-3l"]["decode at 512"]
    assert {*said["671b-3l"]} < {*found["671b-3l"]}
    for name in ("launches", "bytes", "flops", "floor_bytes"):
        assert step[name] == measured[name], name
    assert step["ms"] == step["kernels_ms"] >= 2.6e-3 * step["launches"]
    bar = said["bars"]["671b-3l decode at 512, of copy speed"]
    assert (bar["figure"], bar["least"]) == (step["of copy speed"], 0.88)


def test_what_no_kernel_computed_is_not_right(found: Any) -> None:
    tokens = found["tokens"]["bf16"]
    assert (tokens["ok"], tokens["same"]) == (False, 0)
    assert found["operators"]["cases"] == 3
    assert found["operators"]["wrong"].keys() | found["codes"]["wrong"].keys() == {*CASES}
    assert all("AssertionError" in x for x in found["codes"]["wrong"].values())
    told = found["bars"]
    assert told["tokens of tiny-v3 in bf16"] == {"ok": False}
    assert told["operators over odd shapes"] == {"ok": False}
    assert told["memcheck clean"] == {
        "missing": "memcheck, a model: no compute-sanitizer on this machine"
    }
    share = told["671b-3l decode at 512, of copy speed"]
    assert share["least"] is None
