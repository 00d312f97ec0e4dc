"""What the tests of the torch frontend share: trace a function, run what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsc.frontends.torch_export import trace
from dsc.ir.graph import Graph
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.verifier import verify

Function = Callable[..., Any]


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def checked(program: Program) -> Graph:
    """The only graph of a program that verifies and survives printing."""
    verify(program)
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    (graph,) = program.entries.values()
    return graph


def interpreted(program: Program, *tensors: Tensor) -> list[Tensor]:
    (graph,) = program.entries.values()
    inputs = {v.name: x for v, x in zip(graph.inputs, tensors, strict=True)}
    return list(Interpreter(program).run(graph.name, inputs).values())


def traced(function: Function, *tensors: Tensor, dynamic: dict[int, str] | None = None) -> Program:
    """The function traced, with the axes in `dynamic` symbolic in the first argument."""
    dims = {axis: torch.export.Dim(name) for axis, name in (dynamic or {}).items()}
    shapes = {"tensors": (dims, *[None] * (len(tensors) - 1))} if dims else None
    return trace(Lambda(function), tensors, shapes)


def ops_of(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def four_rows(x: Tensor) -> Tensor:
    """Here and not in a test, where pytest would write the assertion anew."""
    assert x.shape[0] == 4, "four rows"
    return x + 1
