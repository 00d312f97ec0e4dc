"""Random calls of entries, right and wrong: the sample of the bar `random_calls`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.guarded import Guarded
from bench.random_calls import Call, Kind, Outcome, draw, executable_door, one_call, save
from dsc.runtime import artifact


@pytest.mark.parametrize("backend", ["onnxruntime", "reference", "null"])
def test_an_executable_refuses_wrong_calls_in_one_error(backend: str, tmp_path: Path) -> None:
    save(Kind(backend, "contiguous", "executable"), tmp_path / "out")
    program = artifact.read(tmp_path / "out", trust=True).program
    door, outcome, bad = executable_door(tmp_path / "out", program), Outcome(), []
    for number in range(60):
        call = draw(program, "executable", 1, number)
        bad += [x for x in [one_call(door, call, True, outcome)] if x]
    assert not bad, bad
    assert outcome.worked > 15
    assert outcome.refused > 15


@pytest.mark.parametrize("at_end", [True, False])
def test_a_byte_beside_a_buffer_is_seen(at_end: bool) -> None:
    def beside(call: Call, given: Mapping[str, Guarded], taken: list[Guarded]) -> Any:
        memory = given["x"]
        near = memory.address - 1 if at_end else memory.address + memory.bytes.size
        ctypes.c_uint8.from_address(near).value = 0
        return np.zeros(1)

    call = Call("main", {}, {"x": np.zeros(5, np.float32)})
    assert one_call(beside, call, at_end, Outcome()) == "wrote outside of a buffer"
