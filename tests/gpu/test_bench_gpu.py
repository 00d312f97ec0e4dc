"""`bench.gpu` from its folder to its JSON, on a driver that holds the calls and runs no kernel."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from dsc.ir.parser import parse_program
from dsc.runtime.limit import step_work, working_set
from tests.backends.test_triton_driver import driver, run_with

pytest.importorskip("triton")
__all__ = ["driver"]
MODELS: Mapping[str, Any] = {"tiny": ("tiny", {"num_hidden_layers": 2}, {"quant": "fp8"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the card's machine would be given."""
    place = tmp_path_factory.mktemp("gpu") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LIMITS", {"max_context": 640, "max_batch": 2, "prefill_chunk": 16})
        size = gpu.prepare(place, "cuda:sm_90", MODELS)
    assert 0 < size < gpu.MOST_BYTES
    return place


def test_the_command_measures_steps_and_says_what_it_could_not(
    driver: Path, folder: Path, tmp_path: Path
) -> None:
    line = [sys.executable, "-m", "bench.gpu", "run", str(folder)]
    done = run_with(driver, tmp_path / "log", line)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["speeds"]["copy"] == pytest.approx(4e12, rel=1e-3)
    assert found["speeds"]["fp8"] == pytest.approx(1e15, rel=1e-3)
    assert "torch has no CUDA" in found["peers"]["error"]
    assert found["sanitizer"]["left out"]
    step = found["tiny"]["decode at 512"]
    assert "prefill of 4096" not in found["tiny"]  # the artifact holds no such context
    program = parse_program((folder / "tiny" / "program.dsc").read_text())
    assert step["floor_bytes"] == working_set(step_work(program, 1, 1, 512))
    assert step["launches"] == sum(row["launches"] for row in step["kernels"].values())
    assert step["bytes"] == sum(row["bytes"] for row in step["kernels"].values())
    assert step["kernels_ms"] == pytest.approx(2e-3 * step["launches"], rel=0.05)
    share = step["floor_bytes"] / 4e12 / (step["kernels_ms"] / 1e3)
    assert step["of copy speed"] == pytest.approx(share, abs=1e-3)
    assert found["target"] == "cuda:sm_90"


def test_the_sanitizer_sees_the_smallest_model_and_ends_in_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, large = tmp_path / "tool", 'program "p" {stage=LOWERED}\nweights {\n'
    tool.write_text('#!/bin/sh\ncase $2 in racecheck) exec sleep 9;; esac\necho SUMMARY "$7"\n')
    tool.chmod(0o755)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "program.dsc").write_text(
        f'{large}  @w : f32[99999,99999] = source "w" : f32[99999,99999]\n}}\n'
    )
    (tmp_path / "b").symlink_to(folder / "tiny")
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    found = gpu._sanitizer(tmp_path, ["a", "b"], time.perf_counter() + 2)
    assert found["memcheck"] == {"status": 0, "told": [f"SUMMARY {tmp_path / 'b'}"]}
    assert found["racecheck"] == {"left out": "it was not done in time"}


def test_more_than_is_carried_to_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "MOST_BYTES", 10)
        with pytest.raises(ValueError, match="10 are the most"):
            gpu.prepare(tmp_path / "large", "cuda:sm_90", {})
