"""A rule: an equation between graphs, with the evidence for it.

A rule is three pure functions: `pattern` proposes, `check` decides and says why not, `rewrite`
builds the replacement. It carries its own `examples`, `near_misses` and `tolerance`; one harness
(`tests/rewrite/harness.py`) runs those of every rule. A rule that no tree pattern can express
overrides `find`, which proposes matches of any shape; `check` then proves them, by running both
sides if need be (`dsc.rewrite.lift`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import dsc.rewrite.pattern as patterns
from dsc.ir.graph import GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.weights import WeightExpr, random_tensor
from dsc.rewrite.base import EXACT
from dsc.rewrite.scope import Scope


@dataclass(frozen=True)
class Reject:
    """Why a match does not fire, and the operands to blame."""

    reason: str
    culprits: tuple[Operand, ...] = ()

    def __str__(self) -> str:
        blamed = ", ".join(f"{x}: {x.type}" for x in self.culprits)
        return f"{self.reason} ({blamed})" if blamed else self.reason


def reject(reason: str, *culprits: Operand) -> Reject:
    """Refuse a match, with the reason that `dsc opt --explain` shows."""
    return Reject(reason, culprits)


Facts: TypeAlias = Mapping[str, Any]
Result: TypeAlias = Operand | tuple[Operand, ...]


@dataclass(frozen=True)
class Match:
    """A place where a rule may fire.

    `values` holds what the pattern bound (`m.x` reads it), `nodes` all matched nodes, `replaced`
    the values that `rewrite` gives substitutes for, in order. New nodes stand where `root` stood.
    """

    values: Mapping[str, Any]
    nodes: tuple[Node, ...]
    replaced: tuple[Value, ...]
    root: Node
    scope: Scope
    shared: frozenset[int] = field(default_factory=frozenset)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str) -> Any:
        """What is bound to `name`, or `None`."""
        return self.values.get(name)


class RewriteBuilder(GraphBuilder):
    """The `b` of `rewrite`: a graph builder that also takes new weights."""

    def __init__(self, taken: set[str], loc: str, weights: Mapping[str, WeightExpr]) -> None:
        super().__init__(taken=taken, loc=loc)
        self.known = weights
        self.added: dict[str, WeightExpr] = {}

    def weight(self, name: str, expr: WeightExpr) -> Weight:
        """Declare the weight `name`, a new expression. The same name twice must mean the same."""
        previous = self.added.get(name, self.known.get(name))
        if previous is not None and previous != expr:
            return self.weight(name + "_", expr)
        if previous is None:
            self.added[name] = expr
        return Weight(name, expr.type)

    def expr(self, weight: Weight) -> WeightExpr:
        """The expression that `weight` stands for."""
        return self.added[weight.name] if weight.name in self.added else self.known[weight.name]


class Rule:
    """The base of all rules; see the module's head. Instances hold no state."""

    examples: ClassVar[Sequence[str]] = ()
    near_misses: ClassVar[Mapping[str, str]] = {}
    tolerance: ClassVar[float] = EXACT

    @property
    def name(self) -> str:
        """The rule's name, for reports."""
        return type(self).__name__

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The shape that is looked for."""
        raise NotImplementedError(f"{self.name} defines neither pattern nor find")

    anchors: ClassVar[frozenset[str]] = frozenset()
    """Operators at which `propose` is asked; empty for a rule with a `pattern`."""

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """What a rule without a pattern sees at a node in `anchors`."""
        raise NotImplementedError(f"{self.name} has anchors and no propose")

    def check(self, m: Match) -> Facts | Reject:
        """Decide whether a match may fire. Facts found here are handed to `rewrite`."""
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Build the replacement: one operand for each of `m.replaced`."""
        raise NotImplementedError(f"{self.name} does not define rewrite")

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """An input tensor for examples: `value`'s type is concrete. Override for ranges."""
        return random_tensor(value.type, f"{seed}:{value.name}")

    def find(self, scope: Scope) -> Iterator[Match | Reject]:
        """All proposals in a graph, in order; a `Reject` is a near-miss worth telling."""
        if self.anchors:
            for node in scope.graph.nodes:
                found = self.propose(scope, node) if node.op in self.anchors else None
                if found is not None:
                    yield found
            return
        pattern = self.pattern(patterns.Names())
        wanted = frozenset().union(*(r.ops for r in patterns.roots(pattern)))
        for node in scope.graph.nodes:
            if node.op not in wanted:
                continue
            for bound in patterns.match_node(pattern, node, scope):
                leaked = _leak(bound, node, scope)
                if leaked is not None:
                    yield Reject("an interior value is read outside of the match", (leaked,))
                else:
                    values, nodes = bound.values, bound.nodes
                    yield Match(values, nodes, node.outputs, node, scope, bound.shared)


def _leak(bound: patterns.Bound, root: Node, scope: Scope) -> Value | None:
    """An interior value with a reader outside of the match."""
    inside = {id(n) for n in bound.nodes}
    for node in bound.nodes:
        if node is root or id(node) in bound.shared:
            continue
        for value in node.outputs:
            if any(n is None or id(n) not in inside for n, _ in scope.uses[value.name]):
                return value
    return None


def at(scope: Scope, node: Node, *interior: Node, **values: Any) -> Match:
    """A match that replaces all results of `node`; `interior` nodes are claimed with it."""
    return Match(values, (*interior, node), node.outputs, node, scope)


def one(result: Result) -> tuple[Operand, ...]:
    """A result as a tuple."""
    return result if isinstance(result, tuple) else (result,)
