"""The line on the card works as it stands: `dsc compile models/v3.py --backend triton`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
def test_models_v3_compiles_to_cubins_without_a_gpu(root: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(root / "models")
    line = [sys.executable, "-c", "from dsc.cli import main; main()"]
    done = subprocess.run(
        [*line, "compile", "models/v3.py", "--backend", "triton"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "XDG_STATE_HOME": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "v3-triton" / "dsc.json").read_text())
    assert manifest["targets"] == ["cuda:sm_90"]
    cubins = list((tmp_path / "v3-triton").rglob("*.cubin"))
    assert cubins
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cubins)
