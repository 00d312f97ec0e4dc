"""What breaks amid a run on triton: no later answer is wrong for it, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend, client
from dsc.backends.triton.client import InterpretedExecutable
from dsc.ir.graph import GraphBuilder
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType


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
    with pytest.raises(RuntimeError, match="interpreting main failed: the process ended"):
        run(3)
