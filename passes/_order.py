"""Which nodes have ended when a node starts, where lanes run at the same time: for `plan_memory`.

A node waits for the last of what it depends on in each other lane, unless that has ended anyway: a
value that it reads must be written, and storage that it overwrites in place must have been read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.lanes import NO_STEP, LaneOf


@dataclass(frozen=True)
class Order:
    """`before[i]` has bit j set when node j has ended as node i starts; `waits` by position.

    `before` is empty where there is one lane: then all earlier nodes have ended.
    """

    before: tuple[int, ...]
    waits: Mapping[int, tuple[int, ...]]

    def after_all(self, nodes: int, position: int) -> bool:
        """Whether all of a set of nodes have ended when the one at `position` starts."""
        return not self.before or not nodes & ~self.before[position]


def order(graph: Graph, roots: Mapping[str, Operand], lane_of: LaneOf) -> Order:
    """The order of a graph's nodes. `roots` says whose bytes each value is."""
    lanes = [lane_of(node) for node in graph.nodes]
    if len(set(lanes)) < 2:
        return Order((), {})
    before: list[int] = []
    waits: dict[int, tuple[int, ...]] = {}
    tips: dict[str, int] = {}
    touched = _Touched({}, {})
    for position, (node, lane) in enumerate(zip(graph.nodes, lanes, strict=True)):
        if node.op in NO_STEP:
            before.append(0)
            continue
        tip = tips.get(lane)
        ended = 0 if tip is None else before[tip] | 1 << tip
        missing, found = touched.by(node, roots) & ~ended, []
        while missing:
            last = missing.bit_length() - 1
            found.append(last)
            ended |= before[last] | 1 << last
            missing &= ~ended
        if found:
            waits[position] = tuple(sorted(found))
        before.append(ended)
        tips[lane] = position
        touched.note(position, node, roots)
    return Order(tuple(before), waits)


@dataclass
class _Touched:
    """For each storage the node that last wrote it, and those that have read it since, as bits."""

    written: dict[str, int]
    read: dict[str, int]

    def by(self, node: Node, roots: Mapping[str, Operand]) -> int:
        """The nodes that must have ended before a node may touch what it touches."""
        reads, writes = _storages(node, roots)
        found = 0
        for name in reads:
            found |= self.written.get(name, 0)
        for name in writes:
            found |= self.written.get(name, 0) | self.read.get(name, 0)
        return found

    def note(self, position: int, node: Node, roots: Mapping[str, Operand]) -> None:
        """Keep in mind what a node has touched."""
        reads, writes = _storages(node, roots)
        for name in reads:
            self.read[name] = self.read.get(name, 0) | 1 << position
        for name in writes:
            self.written[name], self.read[name] = 1 << position, 0


def _storages(node: Node, roots: Mapping[str, Operand]) -> tuple[list[str], list[str]]:
    """The storages that a node reads and writes, weights aside: nobody writes them."""
    reads = [roots[x.name] for x in node.operands if isinstance(x, Value)]
    writes = [roots[v.name] for v in node.outputs]
    return _names(reads), _names(writes)


def _names(found: list[Operand]) -> list[str]:
    return [x.name for x in found if isinstance(x, Value)]
