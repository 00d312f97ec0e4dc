"""What the tests of captured functions share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsc.ir.interpreter import Interpreter
from dsc.ir.program import Program
from tests.frontends.tracing import checked


class Interpreted:
    """A program in the place of a compiled model."""

    backend = "reference"

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return Interpreter(self.program).run(next(iter(self.program.entries)), inputs)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """Programs that were compiled, by an interpreter in the place of a backend."""
    programs: list[Program] = []

    def compile_program(program: Program, **_: Any) -> Interpreted:
        checked(program)
        programs.append(program)
        return Interpreted(program)

    monkeypatch.setattr("dsc.api.compile_program", compile_program)
    monkeypatch.setenv("DSC_CACHE", "off")  # what was compiled by a backend stays out
    torch._dynamo.reset()
    yield programs
    torch._dynamo.reset()
