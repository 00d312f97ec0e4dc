"""What breaks amid a run on triton: no later answer is wrong for it, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsc import hardware
from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend, client, compile
from dsc.backends.triton.client import InterpretedExecutable
from dsc.backends.triton.launch import Kernel
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.schedule import resolve
from dsc.errors import DeviceError, UsageError
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import GraphBuilder
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.targets import Target


@pytest.fixture
def doubling(tmp_path: Path) -> Iterator[InterpretedExecutable]:
    """A program of one sum, in the interpreter."""
    pytest.importorskip("triton")
    b = GraphBuilder("main")
    x = b.input("x", TensorType(DType.f32, (3,)))
    program = Program("p", {"main": b.finish([b.add(x, x)])})
    emission = TritonBackend().emit(program, EmitOptions(extra={"compile": False}))
    for name, data in emission.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    executable = TritonBackend().load(tmp_path, {}, program)
    assert isinstance(executable, InterpretedExecutable)
    yield executable
    executable.close()


def test_the_answer_to_a_call_that_was_interrupted_is_nobody_elses(
    doubling: InterpretedExecutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    def run(value: float) -> list[float]:
        (y,) = doubling.run("main", {"x": np.full(3, value, np.float32)}).values()
        return list(y)

    assert run(1) == [2, 2, 2]
    with monkeypatch.context() as patched:
        patched.setattr(client, "read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(2)
    with pytest.raises(DeviceError, match="the process that interprets main ended"):
        run(3)


def test_an_interrupted_compile_keeps_what_it_made_and_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    kept = dict[str, Any]()
    answer = json.dumps({"key": "a", "record": {}})
    code = f"import time; print({answer!r}, flush=True); time.sleep(60)"

    def start(*given: object) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", code]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
        return started[-1]

    def interrupted(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compile, "_start", start)
    kernels = dict.fromkeys("ab", Kernel("m", "f", {}, {}, (), 4, 1))
    with pytest.raises(KeyboardInterrupt):
        compile._compile_all(
            kernels, Target("cuda", "sm_90"), tmp_path, tmp_path, kept.__setitem__, interrupted
        )
    assert kept == {"a": {}}
    assert [process.poll() is None for process in started] == [False]


def test_code_that_no_manifest_lists_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes of what is listed were looked at, and the user has trusted that alone."""
    card = hardware.Gpu("a card", "cuda:sm_80", 1 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: [card])
    chosen: list[str] = []
    backend, program = TritonBackend(), Program("p", {})
    monkeypatch.setattr(backend, "load_on", lambda device, *given: chosen.append(device))
    place = tmp_path / "triton/sm_80/kernels.json"
    place.parent.mkdir(parents=True)
    place.touch()
    for listed in ("plan.json", "triton/sm_80/kernels.json"):
        backend.load(tmp_path, {"files": {listed: {}}}, program)
    assert chosen == ["interpret", "cuda:sm_80"]


def test_a_grid_that_no_gpu_launches_is_refused_before_anything_runs() -> None:
    b, many = GraphBuilder("main"), symbol("B")
    x = b.input("x", TensorType(DType.f32, (many, 2, 3)))
    y = b.input("y", TensorType(DType.f32, (many, 3, 2)))
    graph = b.finish([b.matmul(x, y)])
    program = Program("p", {"main": graph}, symbols={"B": Range(0, 1 << 40)})
    entry = lower_program(program, "cuda:sm_90")[0].entries["main"]
    assert resolve(entry, {"B": 65535}).calls[0].grid == (1, 65535, 1)
    with pytest.raises(UsageError, match="matmul at these sizes takes a grid of 1 x 65536 x 1"):
        resolve(entry, {"B": 65536})
