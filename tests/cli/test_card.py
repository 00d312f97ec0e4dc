"""The line on the card works as it stands: `dsc compile models/v3.py --backend triton`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")


LINE = ("compile", "models/v3.py", "--backend", "triton")


def run(root: Path, place: Path, *words: str) -> str:
    """What a `dsc` line says in a folder that has the models."""
    if not (place / "models").exists():
        (place / "models").symlink_to(root / "models")
    done = subprocess.run(
        [sys.executable, "-c", "from dsc.cli import main; main()", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(root), "XDG_STATE_HOME": str(place / "state")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_models_v3_compiles_to_cubins_without_a_gpu(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path, *LINE)
    manifest = json.loads((tmp_path / "v3-triton" / "dsc.json").read_text())
    assert manifest["targets"] == ["cuda:sm_90"]
    cubins = list((tmp_path / "v3-triton").rglob("*.cubin"))
    assert cubins
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cubins)


@pytest.mark.slow
def test_a_compile_for_two_targets_tells_of_its_kernels(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path, *LINE, "--target", "cuda:sm_90", "--target", "hip:gfx942", "-o", "out")
    found = json.loads(run(root, tmp_path, "inspect", "out", "--kernels", "--json"))
    for target, card, unit in (("sm_90", "H200", "mma"), ("gfx942", "MI300X", "v_mfma bf16")):
        kernels = [each for each in found["kernels"] if each["target"] == target]
        assert {each["spill_bytes"] for each in kernels} == {0}
        assert all(each["registers"] and each["programs"] for each in kernels)
        products = [each for each in kernels if each["kernel"].startswith("gemm")]
        assert len(products) > 8
        assert all(unit in " ".join(each["matrix"]) for each in products)
        (step,) = (s for s in found["steps"] if (s["card"], s["step"]) == (card, "decode"))
        launches = (each["in"]["decode"]["launches"] for each in kernels if "decode" in each["in"])
        assert step["launches"] == sum(launches)
        assert step["floor_bytes"] <= step["bytes"] <= 2 * step["floor_bytes"]
        assert 0 < step["floor_seconds"] < step["seconds"]
    shown = run(root, tmp_path, "inspect", "out", "--kernels")
    assert "kernels for gfx942" in shown
    assert ".cubin" not in shown, "files are listed where nothing is told of kernels"
    assert "steps, modelled" in shown
