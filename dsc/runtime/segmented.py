"""Runs a sharded program on a backend that knows nothing of ranks: segments, collectives between.

The backend has compiled each stretch between two collectives as an entry. Here they are called one
after another, and collectives run in the current group, by their references.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_node
from dsc.ir.program import Program
from dsc.ir.segments import Segment, Step, steps
from dsc.runtime.executable import Call, Executable, set_threads
from dsc.runtime.profiler import span


class SegmentedExecutable(Executable):
    """The entries of a program over an executable of its segments."""

    def __init__(self, segments: Executable, program: Program) -> None:
        self.program = program
        self.segments = segments
        self._steps: dict[str, list[Step]] = {}

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Set the threads of the segments. Raises `UsageError` where that is impossible."""
        set_threads(self.segments, threads, pin)

    def bind(self, entry: str, inputs: Mapping[str, Array]) -> Call:
        """A call of an entry on dense arrays by name: each segment is bound when it is due."""
        return partial(self._run, self.program.entry(entry, inputs), inputs)

    def _run(self, graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry. Raises `UsageError`, `RankError`."""
        values = dict(inputs)
        for step in self._steps.setdefault(graph.name, steps(graph)):
            if isinstance(step, Segment):
                given = {v.name: values[v.name] for v in step.graph.inputs}
                with span(step.graph.name, "segment"):
                    values |= self.segments.bind(step.graph.name, given)()
            else:
                with span(step.op, "collective"):
                    operands = [tensor_of(values[x.name]) for x in step.operands]
                    (made,) = run_node(step, operands, {})
                    values[step.output.name] = array_of(made.contiguous())
        named = zip(graph.output_names, graph.outputs, strict=True)
        return {name: values[x.name] for name, x in named}
