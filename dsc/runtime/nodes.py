"""The buffers of a graph's values, and the simplest lowering: one launch a node.

A value's buffer is that of its storage root: what a view or an update in place reads. Inputs,
outputs and weights are buffers that the caller holds, everything else lies in the arena.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsc.ir.analyses import aliases_of, written_roots
from dsc.ir.dims import Dim, Range
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.lanes import LaneOf, lane_of, moves_nothing
from dsc.ir.program import Program
from dsc.runtime.placing import place
from dsc.runtime.plan import (
    ARENA,
    INPUT,
    OUTPUT,
    READ,
    SCRATCH,
    UPDATE,
    WEIGHT,
    WRITE,
    Argument,
    Draft,
    EntryPlan,
    Launch,
    Plan,
    Port,
    Ref,
)


@dataclass
class Values:
    """Which buffer of a draft each operand of a graph lies in."""

    graph: Graph
    draft: Draft = field(default_factory=Draft)
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the buffers of all values; weights become buffers when they are first read."""
        draft, roots = self.draft, written_roots(self.graph)
        for value in self.graph.inputs:
            number = draft.add(INPUT, value.name, value.type.nbytes)
            self.numbers[value.name] = number
            draft.inputs.append(Port(value.name, value.type.stored, number))
        named = zip(self.graph.output_names, self.graph.outputs, strict=True)
        outputs: dict[str, str] = {}
        for name, operand in named:
            if isinstance(operand, Value):  # a weight that is given lies in a buffer of its own
                outputs.setdefault(roots[operand.name].name, name)
        for value in self.graph.values():
            root = roots[value.name]
            if not isinstance(root, Value):
                self.numbers[value.name] = self.number(root)
                continue
            if root.name not in self.numbers:
                region, name = ARENA, root.name
                if root.name in outputs:
                    region, name = OUTPUT, outputs[root.name]
                self.numbers[root.name] = draft.add(region, name, root.type.nbytes)
            self.numbers[value.name] = self.numbers[root.name]
        for name, operand in zip(self.graph.output_names, self.graph.outputs, strict=True):
            draft.outputs.append(Port(name, operand.type.stored, self.number(operand)))

    def number(self, operand: Operand) -> int:
        """The buffer that an operand lies in."""
        if isinstance(operand, Value):
            return self.numbers[operand.name]
        key = f"@{operand.name}"
        if key not in self.numbers:
            self.numbers[key] = self.draft.add(WEIGHT, operand.name, operand.type.nbytes)
        return self.numbers[key]

    def refs(self, operand: Operand, access: str) -> list[Ref]:
        """All bytes of an operand; of a weight in a format those of each part."""
        stored = [operand]
        if isinstance(operand, Weight):
            stored = [Weight(operand.name + suffix, part) for suffix, part in operand.type.parts]
        return [Ref(self.number(part), access, part.type.nbytes) for part in stored]

    def arguments(self, node: Node, scratch: Dim = 0) -> list[Argument]:
        """A node's present operands, its results, and bytes that it needs for itself."""
        updated = aliases_of(node)
        found: list[Argument] = [ref for x in node.operands for ref in self.refs(x, READ)]
        for index, value in enumerate(node.outputs):
            found += self.refs(value, UPDATE if index in updated else WRITE)
        if scratch != 0:
            number = self.draft.add(ARENA, f"scratch of {node.outputs[0].name}", scratch)
            found.append(Ref(number, SCRATCH, scratch))
        return found


def draft_nodes(graph: Graph, lanes: LaneOf = lane_of) -> Draft:
    """One launch a node, whose kernel is the operator; a view that moves nothing has none."""
    values = Values(graph)
    for node in graph.nodes:
        if not moves_nothing(node):
            values.draft.launches.append(
                Launch(
                    node.op,
                    tuple(values.arguments(node)),
                    lane=lanes(node),
                    loc=node.loc,
                    op=node.op,
                    node=node.outputs[0].name,
                )
            )
    return values.draft


def plan_nodes(
    program: Program, meta: Mapping[str, object], reuse: bool = True, allocator: str = ""
) -> Plan:
    """The plan of a program whose nodes run one by one.

    With an `allocator`, what would lie in the arena is got from that when it is made, and given
    back after its last use.
    """
    entries = {
        name: place(draft_nodes(graph), program.ranges(name), reuse)
        for name, graph in program.entries.items()
    }
    if allocator:
        entries = {n: e.without_arena(allocator) for n, e in entries.items()}
    return Plan(entries, dict(meta))


def whole_entry(
    graph: Graph, ranges: Mapping[str, Range], kernel: str, allocator: str
) -> EntryPlan:
    """An entry that is one launch of something that runs whole graphs, and allocates for itself.

    Its `lower_bound` is that of the graph's nodes one by one.
    """
    values = Values(graph)
    draft = values.draft
    weights = {x.name: x for n in graph.nodes for x in n.operands if isinstance(x, Weight)}
    read: list[Operand] = [*graph.inputs, *weights.values()]
    arguments = [ref for x in read for ref in values.refs(x, READ)]
    results = [ref for x in graph.outputs for ref in values.refs(x, WRITE)]
    both = {ref.buffer for ref in arguments} & {ref.buffer for ref in results}
    arguments = [replace(x, access=UPDATE) if x.buffer in both else x for x in arguments]
    arguments += [ref for ref in results if ref.buffer not in both]
    draft.launches.append(Launch(kernel, tuple(arguments)))
    bound = place(draft_nodes(graph), ranges).lower_bound
    return replace(place(draft, ranges).without_arena(allocator), lower_bound=bound)
