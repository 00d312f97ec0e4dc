"""Give every intermediate value an offset in one arena, so that dead values' bytes are used again.

What           values become places: arena offsets, or the storage of an input, output or weight.
Why it pays    a step allocates nothing; activations of a layer are laid over those of the last.
Preconditions  stage CANONICAL or later; every symbol in an intermediate's type has a range.
Before         graph main(%x: f32[8]) {
                 %a = exp %x : f32[8]
                 %b = neg %a : f32[8]
                 %c = exp %b : f32[8]
                 return %c, %x
               }
After          graph main(%x: f32[8]) {
                 %a = exp %x : f32[8]
                 %b = neg %a : f32[8]
                 %c = exp %b : f32[8]
                 %copy = cast %x {dtype=f32} : f32[8]
                 return %c, %copy as "x"
               }

In the example a lies at arena+0, b at arena+64, c in the output c and copy in the output x.
Offsets are chosen greedily, largest first, each at the lowest gap among what is live with it
(Pisarchyk & Lee 2020, "greedy by size"). Views share their operand's place. Where nodes run in
several lanes, as collectives do beside what computes, two values share bytes only if all that touch
the first have ended when the second is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsc.ir.analyses import aliases_of
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Attrs, Graph, Node, Operand, Value, Weight
from dsc.ir.lanes import NO_STEP, LaneOf, lane_of
from dsc.ir.memory import ALIGNMENT, MemoryPlan, Place
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.passes._order import Order, order
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Fill `program.memory` with a plan for each entry; without `reuse`, no two values overlap."""

    reuse: bool = True

    needs = frozenset(Stage) - {Stage.TRACED}
    ensures = Stage.PLANNED

    def run(self, program: Program, report: PassReport) -> Program:
        """Plan each entry; give outputs that share storage a copy of their own first."""
        program = program.map_entries(_own_outputs)
        memory = {name: plan(g, program.symbols, self.reuse) for name, g in program.entries.items()}
        for name, found in memory.items():
            report.facts[name] = {"arena_bytes": found.size, "lower_bound": found.lower_bound}
        return replace(program, memory=memory, stage=Stage.PLANNED)


@dataclass(slots=True)
class _Block:
    """One storage: live from its definition to its last use, both inclusive.

    `users` has bit i set where node i touches its bytes.
    """

    name: str
    size: int
    first: int
    last: int
    users: int = 0
    offset: int = -1


def plan(
    graph: Graph, ranges: Mapping[str, Range], reuse: bool = True, lanes: LaneOf = lane_of
) -> MemoryPlan:
    """The memory plan of a graph whose outputs each have storage of their own."""
    roots = storage_roots(graph)
    sequence = order(graph, roots, lanes)
    external = _external(graph, roots)
    blocks: dict[str, _Block] = {}
    for position, node in enumerate(graph.nodes):
        for operand in (*node.operands, *node.outputs):
            root = roots.get(operand.name) if isinstance(operand, Value) else None
            if root is None or root.name in external or isinstance(root, Weight):
                continue
            block = blocks.get(root.name)
            if block is None:
                size = bounds(root.type.nbytes, ranges).hi
                block = blocks[root.name] = _Block(root.name, _aligned(size), position, position)
            block.last = position
            if sequence.before and node.op not in NO_STEP:
                block.users |= 1 << position
    _assign(list(blocks.values()), sequence, reuse)
    places = {}
    for value in graph.values():
        root = roots[value.name]
        if isinstance(root, Weight):
            places[value.name] = Place("weight", root.name)
        elif root.name in external:
            places[value.name] = external[root.name]
        else:
            places[value.name] = Place("arena", "", blocks[root.name].offset)
    size = max((b.offset + b.size for b in blocks.values()), default=0)
    return MemoryPlan(places, size, _peak(list(blocks.values())), sequence.waits)


def storage_roots(graph: Graph) -> dict[str, Operand]:
    """The operand whose bytes each value is: itself, or what a view or in-place operator reads."""
    roots: dict[str, Operand] = {v.name: v for v in graph.inputs}

    def root(x: Operand | None) -> Operand:
        if x is None:
            raise ValueError("an absent operand has no storage")
        return roots[x.name] if isinstance(x, Value) else x

    for node in graph.nodes:
        shared = aliases_of(node)
        for index, value in enumerate(node.outputs):
            if node.op in NO_STEP:
                roots[value.name] = root(node.inputs[0])
            elif index in shared:
                roots[value.name] = root(node.inputs[shared[index]])
            else:
                roots[value.name] = value
    return roots


def _external(graph: Graph, roots: Mapping[str, Operand]) -> dict[str, Place]:
    """Storage that the caller gives, by the name of its root."""
    external = {v.name: Place("input", v.name) for v in graph.inputs}
    for operand, name in zip(graph.outputs, graph.output_names, strict=True):
        if isinstance(operand, Value):
            external.setdefault(roots[operand.name].name, Place("output", name))
    return external


def _own_outputs(graph: Graph) -> Graph:
    """Copy each output that is an input, a weight or another output, unless declared an update."""
    roots = storage_roots(graph)
    declared = dict(graph.aliases)
    taken: set[str] = set()
    outputs: list[Operand] = []
    copies: list[Node] = []
    names = {v.name for v in graph.values()}
    inputs = {v.name for v in graph.inputs}
    for index, operand in enumerate(graph.outputs):
        root = roots[operand.name] if isinstance(operand, Value) else operand
        updates = index in declared and graph.inputs[declared[index]].name == root.name
        if updates or (isinstance(root, Value) and root.name not in inputs | taken):
            taken.add(root.name)
            outputs.append(operand)
            continue
        name = "copy"
        while name in names:
            name += "_"
        names.add(name)
        copy = Value(name, operand.type)
        attrs = Attrs({"dtype": operand.type.dtype})
        copies.append(Node("cast", (operand,), attrs, (copy,)))
        outputs.append(copy)
    return graph.with_nodes((*graph.nodes, *copies), outputs) if copies else graph


def _assign(blocks: list[_Block], sequence: Order, reuse: bool) -> None:
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda b: (-b.size, b.first)):
        offset = 0
        for other in placed:  # sorted by offset
            if reuse and (_apart(block, other, sequence) or _apart(other, block, sequence)):
                continue
            if other.offset - offset >= block.size:
                break
            offset = max(offset, other.offset + other.size)
        block.offset = offset
        placed.append(block)
        placed.sort(key=lambda b: b.offset)


def _apart(first: _Block, second: _Block, sequence: Order) -> bool:
    """Whether all that touch the first block have ended when the second is written."""
    return first.last < second.first and sequence.after_all(first.users, second.first)


def _peak(blocks: list[_Block]) -> int:
    change: dict[int, int] = {}
    for block in blocks:
        change[block.first] = change.get(block.first, 0) + block.size
        change[block.last + 1] = change.get(block.last + 1, 0) - block.size
    live = peak = 0
    for position in sorted(change):
        live += change[position]
        peak = max(peak, live)
    return peak


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
