"""From graphs to plans: which kernel runs each node, on which buffers, with which sizes.

Kernels are shared between nodes, layers and entries: equal launch keys get one name. Scratch memory
lies behind the planned arena, and since steps run one after another, all steps share it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsc.backends.tvm.checks import Later, entry_checks, lower_check
from dsc.backends.tvm.kernels import lowering
from dsc.backends.tvm.launch import Launch, Unsupported
from dsc.backends.tvm.machine import Machine
from dsc.errors import UnsupportedOperator, UsageError
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Graph, Node
from dsc.ir.index_ranges import Computed, index_ranges
from dsc.ir.memory import ALIGNMENT, MemoryPlan
from dsc.ir.types import DType, TensorType
from dsc.runtime.plan import BufferRef, EntryPlan, Step, buffer

if TYPE_CHECKING:
    from dsc.ir.program import Program

VIEWS = frozenset({"reshape"})
"""Operators whose result is its operand's bytes: no kernel runs."""


@dataclass
class KernelTable:
    """The kernels of a library by name, each built once."""

    names: dict[tuple[Hashable, ...], str] = field(default_factory=dict)
    launches: dict[str, Launch] = field(default_factory=dict)

    def name(self, launch: Launch) -> str:
        """The name of the kernel that `launch` calls."""
        found = self.names.get(launch.key)
        if found is None:
            found = f"{launch.name}_{len(self.names)}"
            self.names[launch.key] = found
            self.launches[found] = launch
        return found

    def build(self) -> dict[str, Any]:
        """All kernels as TVM functions."""
        return {name: launch.maker(*launch.static) for name, launch in self.launches.items()}


def launch_of(node: Node, machine: Machine) -> Launch:
    """The launch of a node. Raises `Unsupported` with the reason when there is none."""
    lower = lowering(node.op)
    if lower is None:
        raise Unsupported(f"no kernel for the operator {node.op}")
    return lower(node, machine)


def plan_program(program: Program, machine: Machine) -> tuple[dict[str, EntryPlan], KernelTable]:
    """The plan of every entry, and the kernels that they call. The program must be planned."""
    table = KernelTable()
    plans = {}
    for name, graph in program.entries.items():
        if name not in program.memory:
            raise UsageError(f"entry {name} has no memory plan", hint="run plan_memory first")
        plans[name] = plan_entry(graph, program.memory[name], program.symbols, machine, table)
    return plans, table


def _guard(found: Computed, number: int, memory: MemoryPlan, table: KernelTable) -> Step:
    """The step that checks an index before the node that reads it."""
    if found.value is None:
        raise UnsupportedOperator("a region that computes an index", where=found.node.loc or None)
    launch = lower_check(found, number)
    status = BufferRef("status", "", 0, TensorType(DType.i64, (1,)))
    scalars = tuple((f"n{i}", size) for i, size in enumerate(launch.sizes))
    reads = (buffer(found.value, memory),)
    return Step(table.name(launch), reads, (status,), scalars, loc=found.node.loc)


def plan_entry(
    graph: Graph,
    memory: MemoryPlan,
    ranges: Mapping[str, Range],
    machine: Machine,
    table: KernelTable,
) -> EntryPlan:
    """The steps of a graph, in order."""
    steps, scratch = [], 0
    checks = entry_checks(graph, ranges, index_ranges(graph, ranges))
    later = [(c.computed, n) for n, c in enumerate(checks, 1) if isinstance(c, Later)]
    for node in graph.nodes:
        if node.op in VIEWS or all(0 in v.type.shape for v in node.outputs):
            continue
        steps += [_guard(found, n, memory, table) for found, n in later if found.node is node]
        try:
            launch = launch_of(node, machine)
        except Unsupported as reason:
            raise UnsupportedOperator(f"{node.op}: {reason}", where=node.loc or None) from None
        writes = [buffer(v, memory) for v in node.outputs]
        if launch.scratch:
            kind = TensorType(DType.u8, (launch.scratch,))
            writes.append(BufferRef("arena", "scratch", memory.size, kind))
            scratch = max(scratch, bounds(launch.scratch, ranges).hi)
        steps.append(
            Step(
                table.name(launch),
                tuple(None if x is None else buffer(x, memory) for x in node.inputs),
                tuple(writes),
                tuple((f"n{i}", size) for i, size in enumerate(launch.sizes)),
                loc=node.loc,
                op=node.op,
                node=node.outputs[0].name,
            )
        )
    return EntryPlan(tuple(steps), memory.size + -(-scratch // ALIGNMENT) * ALIGNMENT)
