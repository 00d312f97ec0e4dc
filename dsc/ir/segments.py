"""Cut entries at their collectives: what lies between is code that needs no other rank.

So a backend that knows nothing of ranks runs a sharded program: it emits the segments as entries of
their own, and the collectives happen between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import traits_of
from dsc.ir.program import Program
from dsc.ir.traits import Role


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an entry without collectives, as a graph that is an entry of its own."""

    graph: Graph


Step: TypeAlias = Segment | Node
"""A segment to run, or a collective."""


def cut(program: Program) -> Program:
    """The program whose entries are the segments of all entries, `decode_0` and so on.

    Each is for the steps of its entry.
    """
    pieces = {
        name: [step.graph for step in steps(graph) if isinstance(step, Segment)]
        for name, graph in program.entries.items()
    }
    found = {graph.name: graph for each in pieces.values() for graph in each}
    guards = [
        replace(guard, entry=graph.name)
        for guard in program.guards
        for graph in pieces.get(guard.entry, ())
    ]
    return replace(program, entries=found).declaring(guards=tuple(guards))


def joined(program: Program, pieces: Program) -> Program:
    """The program with each stretch taken from its segment in `pieces`, to be compared as a whole.

    What a segment does not give out has another name here, so that nobody else can read it.
    """

    def put_together(graph: Graph) -> Graph:
        nodes: list[Node] = []
        for step in steps(graph):
            if isinstance(step, Node):
                nodes.append(step)
            else:
                nodes += _inlined(pieces.entries[step.graph.name])
        return graph.with_nodes(nodes)

    return replace(program.map_entries(put_together), weights=pieces.weights)


def _inlined(piece: Graph) -> Sequence[Node]:
    """The nodes of a segment: its outputs under the names that they go out by."""
    given = {x.name: x.name for x in piece.inputs}
    out = {x.name: name for x, name in zip(piece.outputs, piece.output_names, strict=True)}
    names = {v.name: f"{piece.name}.{v.name}" for v in piece.values()} | given | out

    def known(x: Operand) -> Operand:
        return replace(x, name=names[x.name]) if isinstance(x, Value) else x

    return piece.mapped(known).nodes


def steps(graph: Graph) -> list[Step]:
    """The segments and collectives of an entry, in order."""
    stretches = list(_stretches(graph.nodes))
    later = {x.name for x in graph.outputs}
    found: list[Step] = []
    for number in range(len(stretches) - 1, -1, -1):
        nodes = stretches[number]
        if _talks(nodes[0]):
            found.append(nodes[0])
        else:
            found.append(Segment(_segment(graph, nodes, f"{graph.name}_{number}", later)))
        later |= {x.name for node in nodes for x in node.operands}
    return found[::-1]


def _stretches(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Runs of nodes without a collective, and each collective alone."""
    current: list[Node] = []
    for node in nodes:
        if not _talks(node):
            current.append(node)
            continue
        if current:
            yield current
        yield [node]
        current = []
    if current:
        yield current


def _segment(graph: Graph, nodes: Sequence[Node], name: str, later: set[str]) -> Graph:
    """`nodes` as a graph: what they read from before comes in, what is read later goes out."""
    made = {v.name for node in nodes for v in node.outputs}
    read = {x.name: x for node in nodes for x in node.operands if isinstance(x, Value)}
    inputs = tuple(x for key, x in read.items() if key not in made)
    outputs = tuple(v for node in nodes for v in node.outputs if v.name in later)
    places = {v.name: i for i, v in enumerate(inputs)}
    aliases = []
    for output, source in graph.aliases:
        at = next((i for i, v in enumerate(outputs) if v == graph.outputs[output]), None)
        state = places.get(graph.inputs[source].name)
        if at is not None and state is not None:
            aliases.append((at, state))
    names = tuple(v.name for v in outputs)
    return Graph(name, inputs, tuple(nodes), outputs, names, tuple(aliases))


def _talks(node: Node) -> bool:
    return traits_of(node.op).role is Role.COLLECTIVE
