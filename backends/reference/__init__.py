"""The `reference` backend: the interpreter over an artifact's weights.

It emits nothing but the program itself and runs it operator by operator in plain torch on the CPU.
Slow and simple: what the other backends are compared with, and what runs where no toolchain does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.backends.base import (
    Capabilities,
    Emission,
    EmitOptions,
    Executable,
    Signature,
    Support,
    Yes,
)
from dsc.ir.graph import Node
from dsc.ir.interpreter import Interpreter, Observer
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.runtime.profiler import Event, active
from dsc.targets import Target

if TYPE_CHECKING:
    import torch


class ReferenceBackend:
    """Every operator by its reference."""

    name = "reference"
    rules: Sequence[Any] = ()

    def capabilities(self, target: Target) -> Capabilities:
        """All element types; caches are functional, or in pages."""
        return Capabilities(dtypes=frozenset(DType), fuse=3, collectives=True, paged_cache=True)

    def supports(self, node: Node) -> Support:
        """Every operator has a reference."""
        return Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Nothing: the artifact's program.dsc is what runs."""
        return Emission(files={})

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Interpret `program`, whose weights are those of the artifact."""
        return ReferenceExecutable(program)


class ReferenceExecutable:
    """An interpreter behind the interface of an executable."""

    def __init__(self, program: Program) -> None:
        self._interpreter = Interpreter(program)

    def signature(self, entry: str) -> Signature:
        """Names, types and aliases of an entry."""
        return Signature.of(self._interpreter.program.entries[entry])

    def run(self, entry: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run an entry on CPU tensors by name. Raises `UsageError`."""
        return self._interpreter.run(entry, inputs, _observer())


def _observer() -> Observer | None:
    """What tells the active profiler of each node; `None` when there is no profiler."""
    profiler = active()
    if profiler is None:
        return None
    last = time.perf_counter()

    def observe(node: Node, results: tuple[Any, ...]) -> None:
        nonlocal last
        now = time.perf_counter()
        moved = sum(t.numel() * t.element_size() for t in results)
        event = Event(node.op, "step", last, now - last, bytes=moved, loc=node.loc)
        profiler.events.append(event)
        last = time.perf_counter()

    return observe
