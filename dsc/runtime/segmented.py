"""Runs a sharded program on a backend that knows nothing of ranks: segments, collectives between.

The backend has compiled each stretch between two collectives as an entry. Here they are called one
after another, and collectives run in the current group, by their references.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsc.ir.interpreter import run_node
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.ir.segments import Segment, Step, steps
from dsc.runtime.executable import Executable, set_threads
from dsc.runtime.profiler import span


class SegmentedExecutable:
    """The entries of a program over an executable of its segments."""

    def __init__(self, segments: Executable, program: Program) -> None:
        self.program = program
        self.segments = segments
        self._steps: dict[str, list[Step]] = {}

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Set the threads of the segments. Raises `UsageError` where that is impossible."""
        set_threads(self.segments, threads, pin)

    def run(self, entry: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run an entry on CPU tensors by name. Raises `UsageError`, `RankError`."""
        graph = self.program.entry(entry, inputs)
        values = dict(inputs)
        for step in self._steps.setdefault(entry, steps(graph)):
            if isinstance(step, Segment):
                given = {v.name: values[v.name] for v in step.graph.inputs}
                with span(step.graph.name, "segment"):
                    values |= self.segments.run(step.graph.name, given)
            else:
                with span(step.op, "collective"):
                    operands = [values[x.name] for x in step.operands]
                    (values[step.output.name],) = run_node(step, operands, {})
        named = zip(graph.output_names, graph.outputs, strict=True)
        return {name: values[x.name] for name, x in named}
