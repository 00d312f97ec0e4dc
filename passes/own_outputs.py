"""Give every output storage of its own: one that is an input, a weight or another output is copied.

What           a cast to its own type behind each output that shares its storage, unless declared.
Why it pays    an entry's outputs are written where the caller wants them; kernels copy nothing.
Preconditions  stage CANONICAL or later.
Before         graph main(%x: f32[8]) {
                 %a = exp %x : f32[8]
                 return %a, %x
               }
After          graph main(%x: f32[8]) {
                 %a = exp %x : f32[8]
                 %copy = cast %x {dtype=f32} : f32[8]
                 return %a, %copy as "x"
               }

What a declared update of an input gives is that input, written in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.analyses import written_roots
from dsc.ir.graph import Graph, GraphBuilder, Operand, Value
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class OwnOutputs(Pass):
    """Copy what would be given back twice, or is not the entry's to give."""

    needs = frozenset(Stage) - {Stage.TRACED}
    ensures = Stage.PLANNED

    def run(self, program: Program, report: PassReport) -> Program:
        """Copy in each entry, and say how many copies it took."""
        owned = program.map_entries(own_outputs)
        for name, graph in owned.entries.items():
            copies = len(graph.nodes) - len(program.entries[name].nodes)
            report.facts[name] = {"copies": copies}
        return owned.at(Stage.PLANNED)


def own_outputs(graph: Graph) -> Graph:
    """Copy each output that is an input, a weight or another output, unless declared an update."""
    roots = written_roots(graph)
    declared = dict(graph.aliases)
    taken: set[str] = set()
    outputs: list[Operand] = []
    copies = GraphBuilder(taken={v.name for v in graph.values()})
    inputs = {v.name for v in graph.inputs}
    for index, operand in enumerate(graph.outputs):
        root = roots[operand.name] if isinstance(operand, Value) else operand
        updates = index in declared and graph.inputs[declared[index]].name == root.name
        if updates or (isinstance(root, Value) and root.name not in inputs | taken):
            taken.add(root.name)
            outputs.append(operand)
            continue
        outputs += copies.call("cast", operand, dtype=operand.type.dtype, hint="copy")
    return graph.with_nodes((*graph.nodes, *copies.nodes), outputs) if copies.nodes else graph
