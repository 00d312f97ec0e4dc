"""The `null` backend: plans and counts, computes nothing.

It takes every program, on a machine with nothing installed and with no weight in memory. Its
artifact says what a step of each entry costs; running an entry gives zeros of the right shapes, so
that sessions, command line and scheduling can be tried at any size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsc.backends.base import Capabilities, EmitOptions, Support, Yes
from dsc.ir.analyses import total_cost
from dsc.ir.arrays import Array, zeros
from dsc.ir.dims import Dim, evaluate
from dsc.ir.formats import CACHED, CODINGS
from dsc.ir.graph import Graph, Node
from dsc.ir.interface import Storage
from dsc.ir.program import Program
from dsc.runtime.admission import Admitted
from dsc.runtime.emission import Emission
from dsc.runtime.executable import Executable
from dsc.runtime.nodes import plan_nodes
from dsc.targets import KNOWN, Target

COSTS = "null/costs.json"


class NullBackend:
    """Costs in the place of code."""

    name = "null"

    def capabilities(self, target: Target) -> Capabilities:
        """Everything, for every target."""
        targets = ("cpu", *(f"{kind}:{arch}" for kind, archs in KNOWN.items() for arch in archs))
        return Capabilities(
            targets=targets,
            states=(Storage.CONTIGUOUS, *Storage),
            fuse=3,
            collectives=True,
            formats=tuple(CODINGS),
            activations=("f8e4m3",),
            powers=True,
            caches=CACHED,
        )

    def supports(self, node: Node) -> Support:
        """Nothing is computed, so everything is supported."""
        return Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """The cost of each entry as expressions over the symbols, and at their upper bounds."""
        costs = {name: entry_cost(graph, program) for name, graph in program.entries.items()}
        text = json.dumps(costs, indent=1, sort_keys=True).encode()
        plan = plan_nodes(program, {"backend": self.name}, options.reuse)
        options.admit(plan)
        return Emission(files={COSTS: text}, plan=plan, meta={"costs": costs})

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """An executable that reads no weight."""
        return NullExecutable(program)


class NullExecutable(Admitted):
    """Checks its inputs and returns zeros; a cache that is written in place comes back as it is."""

    stand_in = "the null backend plans and counts, and computes nothing"
    computes = False

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Zeros of the shapes that the entry declares for these inputs."""
        in_place = graph.updated_inputs()
        results: dict[str, Array] = {}
        for name, value in zip(graph.output_names, graph.outputs, strict=True):
            if name in in_place:
                results[name] = inputs[in_place[name]]
                continue
            held = value.type.stored
            results[name] = zeros([evaluate(d, env) for d in held.shape], held.dtype)
        return results


def entry_cost(graph: Graph, program: Program) -> dict[str, Any]:
    """Bytes and flops of one run: as dims over the symbols, and with every symbol at its most."""
    most = {name: bounds.hi for name, bounds in program.symbols.items()}
    cost = total_cost(graph.nodes)
    parts: dict[str, Dim] = {f.name: getattr(cost, f.name) for f in fields(cost)}
    at_most = {k: evaluate(d, most) for k, d in parts.items()}
    return {
        "nodes": len(graph.nodes),
        "cost": {k: str(d) for k, d in parts.items()},
        "most": at_most,
    }
