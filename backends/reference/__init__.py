"""The `reference` backend: the interpreter over an artifact's weights.

It emits nothing but the program itself and runs it operator by operator in plain torch on the CPU.
Slow and simple: what the other backends are compared with, and what runs where no toolchain does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsc.backends.base import Capabilities, EmitOptions, Support, Yes
from dsc.errors import UsageError
from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.formats import CACHED, CODINGS
from dsc.ir.graph import Graph, Node
from dsc.ir.interface import Storage
from dsc.ir.interpreter import Interpreter
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.runtime.admission import Admitted
from dsc.runtime.emission import Emission
from dsc.runtime.executable import Executable
from dsc.runtime.nodes import plan_nodes
from dsc.runtime.profiler import EntryRun, StepTime, active, lengths_of
from dsc.targets import Target


class ReferenceBackend:
    """Every operator by its reference."""

    name = "reference"

    def capabilities(self, target: Target) -> Capabilities:
        """All element types and formats; caches are functional, or in pages."""
        return Capabilities(
            fuse=3,
            collectives=True,
            states=tuple(Storage),
            formats=tuple(CODINGS),
            activations=("f8e4m3",),
            powers=True,
            caches=CACHED,
        )

    def supports(self, node: Node) -> Support:
        """Every operator has a reference."""
        return Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Nothing but the plan: the artifact's program.dsc is what runs, a node at a time."""
        plan = plan_nodes(program, {"backend": self.name}, allocator="torch")
        options.admit(plan)
        return Emission(files={}, plan=plan)

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Interpret `program`, whose weights are those of the artifact."""
        return ReferenceExecutable(program)


class ReferenceExecutable(Admitted):
    """An interpreter behind the interface of an executable."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._interpreter = Interpreter(program)

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Set torch's threads, which the whole process shares. Raises `UsageError` for `pin`."""
        if pin:
            raise UsageError("torch's threads cannot be pinned", hint="leave out pin")
        if threads is not None:
            torch.set_num_threads(threads)

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Operator by operator; each index that is computed is looked at before it is read."""
        guard = self.admissions[graph.name].guard(env)
        profiler = active()
        watch = _Watch(graph) if profiler is not None else None
        observe = None if watch is None else watch.observe
        tensors = {v.name: tensor_of(inputs[v.name]) for v in graph.inputs}
        results = self._interpreter.run(graph.name, tensors, observe, guard)
        if profiler is not None and watch is not None:
            profiler.ran(EntryRun(graph, env, lengths_of(inputs), lambda: watch.steps))
        arrays = {id(x): inputs[name] for name, x in tensors.items()}  # updated in place
        owned = _owned(graph, tensors, results)
        return {n: arrays.get(id(x), array_of(x.contiguous())) for n, x in owned.items()}


def _owned(
    graph: Graph, inputs: Mapping[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Results with memory of their own, as compiled code gives them; updates in place stay."""
    updates = {graph.output_names[out] for out, _ in graph.aliases}
    taken = {x.untyped_storage().data_ptr() for x in inputs.values()}
    for name, x in results.items():
        if name not in updates and x.untyped_storage().data_ptr() in taken:
            results[name] = x.clone()
        taken.add(results[name].untyped_storage().data_ptr())
    return results


class _Watch:
    """Notes when each node of a graph ended, and which experts it chose."""

    def __init__(self, graph: Graph) -> None:
        self._tops = {id(node) for node in graph.nodes}  # a body's values may be named alike
        self._chosen: dict[str, int] = {}
        self._last = time.perf_counter()
        self.steps: list[StepTime] = []

    def observe(self, node: Node, results: tuple[Any, ...]) -> None:
        """Called after each node, those of a body before their owner."""
        now = time.perf_counter()
        name = node.outputs[0].name
        if node.op == "route":
            self._chosen[name] = len(results[0].unique())
        if id(node) in self._tops:
            chosen = self._choice(node)
            self.steps.append(StepTime(name, node.op, self._last, now - self._last, chosen))
            self._last = time.perf_counter()

    def _choice(self, node: Node) -> int | None:
        """Distinct experts of a node that reads the router's indices themselves."""
        if node.op != "experts":
            return None
        return self._chosen.get(node.operands[1].name)
