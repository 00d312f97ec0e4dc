"""From graphs to plans: which kernel runs each node, on which buffers, with which sizes.

Kernels are shared between nodes, layers and entries: equal launch keys get one name.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.backends.tvm.checks import Later, entry_checks, lower_check
from dsc.backends.tvm.kernels import lowering
from dsc.backends.tvm.launch import Launch, Unsupported
from dsc.backends.tvm.machine import Machine
from dsc.errors import UnsupportedOperator
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, Node
from dsc.ir.index_ranges import Computed, index_ranges
from dsc.ir.lanes import moves_nothing
from dsc.ir.op import brings_none
from dsc.ir.program import Program
from dsc.runtime.nodes import Values
from dsc.runtime.placing import place
from dsc.runtime.plan import READ, STATUS, STATUS_BYTES, WRITE, Draft, EntryPlan, Ref
from dsc.runtime.plan import Launch as Step


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
    lower = lowering(node.op, any(x.type.stored is not x.type for x in node.operands))
    if lower is None:
        why = f"no kernel for the operator {node.op}{brings_none(node.op, 'tvm')}"
        raise Unsupported(why)
    return lower(node, machine)


def plan_program(
    program: Program, machine: Machine, reuse: bool = True
) -> tuple[dict[str, EntryPlan], KernelTable]:
    """The plan of every entry, and the kernels that they call."""
    table = KernelTable()
    plans = {
        name: place(draft_entry(graph, program.symbols, machine, table), program.symbols, reuse)
        for name, graph in program.entries.items()
    }
    return plans, table


def draft_entry(
    graph: Graph, ranges: Mapping[str, Range], machine: Machine, table: KernelTable
) -> Draft:
    """The launches of a graph, in order."""
    values = Values(graph)
    launches = values.draft.launches
    checks = entry_checks(graph, ranges, index_ranges(graph, ranges))
    later = [(c.computed, n) for n, c in enumerate(checks, 1) if isinstance(c, Later)]
    for node in graph.nodes:
        if moves_nothing(node) or all(0 in v.type.shape for v in node.outputs):
            continue
        launches += [_guard(found, n, values, table) for found, n in later if found.node is node]
        try:
            call = launch_of(node, machine)
        except Unsupported as reason:
            raise UnsupportedOperator(f"{node.op}: {reason}", where=node.loc or None) from None
        arguments = (*values.arguments(node, call.scratch), *call.sizes)
        launches.append(
            Step(table.name(call), arguments, loc=node.loc, op=node.op, node=node.outputs[0].name)
        )
    return values.draft


def _guard(found: Computed, number: int, values: Values, table: KernelTable) -> Step:
    """The launch that checks an index before the node that reads it."""
    if found.value is None:
        raise UnsupportedOperator("a region that computes an index", where=found.node.loc or None)
    call = lower_check(found, number)
    status = Ref(values.draft.add(STATUS, "", STATUS_BYTES), WRITE, STATUS_BYTES)
    arguments = (*values.refs(found.value, READ), status, *call.sizes)
    return Step(table.name(call), arguments, loc=found.node.loc)
