"""What a rule may ask about the graph it is matched against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dsc.ir import analyses
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import named
from dsc.ir.program import Program
from dsc.ir.traits import Role

TRANSPARENT = frozenset({"cast", "expand", "reshape"})
"""Operators that keep a scalar constant what it is."""

VIEWS = named(Role.VIEW)


@dataclass(frozen=True)
class Scope:
    """One graph of a program, with the analyses that rules share.

    `memo` lives as long as one call of the driver: proofs are cached there by structural hash, so
    that the identical layers of a model cost one proof.
    """

    program: Program
    graph: Graph
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that defines each value; graph inputs are absent."""
        return analyses.producers(self.graph)

    @cached_property
    def uses(self) -> dict[str, list[analyses.Use]]:
        """Where each value is read: `(node, operand index)`, `(None, i)` for output i."""
        return analyses.uses(self.graph)

    @cached_property
    def position(self) -> dict[str, int]:
        """The index of the node that defines each value; -1 for graph inputs."""
        found = {v.name: -1 for v in self.graph.inputs}
        for index, node in enumerate(self.graph.nodes):
            for value in node.outputs:
                found[value.name] = index
        return found

    @cached_property
    def inputs(self) -> dict[str, Value]:
        """The graph inputs by name."""
        return {v.name: v for v in self.graph.inputs}

    def producer(self, operand: Operand | None) -> Node | None:
        """The node that computes `operand`; `None` for weights and graph inputs."""
        return self.producers.get(operand.name) if isinstance(operand, Value) else None

    def consumers(self, value: Value) -> list[Node]:
        """The nodes that read `value`, in order, once each."""
        found = {id(n): n for n, _ in self.uses[value.name] if n is not None}
        return list(found.values())

    def constant(self, operand: Operand | None) -> float | None:
        """The number that every element of `operand` is, when that is plain to see."""
        node = self.producer(operand)
        while node is not None and node.op in TRANSPARENT:
            node = self.producer(node.inputs[0])
        return float(node.attrs["value"]) if node is not None and node.op == "full" else None

    def through(self, operand: Operand, ops: frozenset[str]) -> Operand:
        """`operand` seen through the first operand of nodes in `ops`: the value they view."""
        *_, last = self.viewed(operand, ops)
        return last

    def viewed(self, operand: Operand, ops: frozenset[str]) -> Iterator[Operand]:
        """`operand` and what it is through the first operands of nodes in `ops`, nearest first."""
        yield operand
        node = self.producer(operand)
        while node is not None and node.op in ops and node.inputs[0] is not None:
            operand = node.inputs[0]
            yield operand
            node = self.producer(operand)

    def forward(self, start: Value, limit: int = 80) -> Iterator[Node]:
        """Nodes that depend on `start`, in graph order, at most `limit` of them."""
        pending = {self._index(n): n for n in self.consumers(start)}
        count = 0
        while pending and count < limit:
            node = pending.pop(min(pending))
            count += 1
            yield node
            for value in node.outputs:
                pending |= {self._index(n): n for n in self.consumers(value)}

    def _index(self, node: Node) -> int:
        return self.position[node.outputs[0].name]
