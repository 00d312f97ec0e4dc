"""Kernels whose AMX instructions are functions of `tiles.c`, for CPUs that have none."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsc.backends.tvm import amx, executable, machine, objects
from dsc.backends.tvm.kernels import cpp
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.objects import Kernel

SOURCE = Path(__file__).with_suffix(".c")


def modelled(patch: pytest.MonkeyPatch, chosen: Machine, folder: Path) -> None:
    """From now on code is made for a machine, in this process, and calls the model of AMX."""
    from dsc.backends.tvm.build import build_kernel

    for name in ("functions", "byte_functions"):
        text = getattr(amx, name)().replace("llvm.x86.", "amx_").replace(" immarg", "")
        for feature in ("tile", "bf16", "int8"):
            text = text.replace(f",+amx-{feature}", "")
        patch.setattr(amx, name, lambda text=text: text)
    model = folder / "tiles.o"
    line = [cpp.compiler(), "-x", "c", "-O2", "-fPIC", "-c", str(SOURCE), "-o", str(model)]
    subprocess.run(line, check=True)

    def objects_of(kernels: Sequence[Kernel], progress: Any = None) -> dict[str, bytes]:
        made = {
            k.symbol: build_kernel(k.launch.maker, k.launch.static, chosen, k.symbol)
            for k in kernels
        }
        return made | {"tiles": model.read_bytes()}

    patch.setattr(objects, "objects_of", objects_of)
    patch.setattr(machine, "machine_for", lambda target: chosen)
    patch.setattr(executable, "tiles_allowed", lambda: True)
