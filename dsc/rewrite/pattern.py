"""Patterns: small trees of operators that are matched backwards from a root node.

    p.mul(p.silu(p.gate), p.up)

`p.name` binds an operand, `p.op(...)` matches a node. Commutative operators match in both orders;
a name that occurs twice must bind the same operand. Attributes given as keywords must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

from dsc.ir.graph import Node, Operand, Weight
from dsc.ir.op import traits_of
from dsc.rewrite.scope import Scope


class Pattern:
    """Something an operand can match."""


@dataclass(frozen=True)
class Bind(Pattern):
    """Any operand, by name; `kind` narrows it to a weight, or to a scalar constant's number."""

    name: str
    kind: str = "any"


@dataclass(frozen=True)
class Number(Pattern):
    """A scalar constant equal to `value`."""

    value: float


@dataclass(frozen=True)
class Call(Pattern):
    """A node: its operator, operands, some of its attributes, and which result is meant.

    `label` binds the node itself; a `shared` node may have readers outside of the match.
    """

    ops: frozenset[str]
    operands: tuple[Pattern, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    result: int = 0
    shared: bool = False

    def named(self, label: str) -> Call:
        """The same pattern, which also binds the node as `label`."""
        return replace(self, label=label)

    def may_be_shared(self) -> Call:
        """The same pattern, whose node may be read outside of the match and then stays."""
        return replace(self, shared=True)

    def __getitem__(self, result: int) -> Call:
        return replace(self, result=result)


@dataclass(frozen=True)
class Either(Pattern):
    """The first of several patterns that leads to a match."""

    options: tuple[Pattern, ...]


class Name(Bind):
    """`p.name`: a binding as it stands, an operator's pattern when called."""

    def __call__(self, *operands: Pattern | float, **attrs: Any) -> Call:
        """Match a node of this operator."""
        wanted = tuple(x if isinstance(x, Pattern) else Number(float(x)) for x in operands)
        return Call(frozenset({self.name}), wanted, attrs)


class Names:
    """The `p` that a rule's `pattern` receives."""

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name)

    def weight(self, name: str) -> Bind:
        """A weight, bound to `name`."""
        return Bind(name, "weight")

    def number(self, name: str) -> Bind:
        """A scalar constant; `name` binds its number."""
        return Bind(name, "number")

    def either(self, *options: Pattern) -> Either:
        """Any of several patterns, tried in order."""
        return Either(options)

    def maybe(self, op: str, operand: Pattern) -> Either:
        """`operand`, perhaps under one unary `op`."""
        return Either((operand, Call(frozenset({op}), (operand,))))


@dataclass(frozen=True)
class Bound:
    """What a match has bound so far: operands, numbers and nodes by name, and all its nodes."""

    values: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    shared: frozenset[int] = frozenset()

    def bind(self, name: str, value: Any) -> Bound | None:
        """With one more binding; `None` when `name` is bound to something else."""
        if name in self.values:
            return self if self.values[name] == value else None
        return replace(self, values={**self.values, name: value})


def roots(pattern: Pattern) -> tuple[Call, ...]:
    """The root nodes of a pattern."""
    if isinstance(pattern, Either):
        return tuple(r for option in pattern.options for r in roots(option))
    if isinstance(pattern, Call):
        return (pattern,)
    raise TypeError(f"a pattern starts at an operator, not at {pattern}")


def match_node(pattern: Pattern, node: Node, scope: Scope) -> Iterator[Bound]:
    """All ways in which `pattern` matches with its root at `node`."""
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from match_node(option, node, scope)
        return
    assert isinstance(pattern, Call)
    yield from _call(pattern, node, Bound(), scope)


def _operand(
    pattern: Pattern, operand: Operand | None, bound: Bound, scope: Scope
) -> Iterator[Bound]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _operand(option, operand, bound, scope)
    elif isinstance(pattern, Number):
        if scope.constant(operand) == pattern.value:
            yield bound
    elif isinstance(pattern, Bind):
        value = scope.constant(operand) if pattern.kind == "number" else operand
        if value is None or (pattern.kind == "weight" and not isinstance(value, Weight)):
            return
        found = bound.bind(pattern.name, value)
        if found is not None:
            yield found
    elif isinstance(pattern, Call):
        node = scope.producer(operand)
        if node is not None and node.outputs[pattern.result % len(node.outputs)] == operand:
            yield from _call(pattern, node, bound, scope)


def _call(pattern: Call, node: Node, bound: Bound, scope: Scope) -> Iterator[Bound]:
    if node.op not in pattern.ops or len(pattern.operands) != len(node.inputs):
        return
    if any(node.attrs.get(k) != v for k, v in pattern.attrs.items()):
        return
    start: Bound | None = replace(
        bound,
        nodes=bound.nodes if any(n is node for n in bound.nodes) else (*bound.nodes, node),
        shared=bound.shared | {id(node)} if pattern.shared else bound.shared,
    )
    if pattern.label and start is not None:
        start = start.bind(pattern.label, node)
    if start is None:
        return
    orders: Iterator[tuple[Operand | None, ...]] = iter([node.inputs])
    if traits_of(node.op).commutative and node.inputs[0] != node.inputs[1]:
        orders = permutations(node.inputs)
    for operands in orders:
        partial = [start]
        for wanted, operand in zip(pattern.operands, operands, strict=True):
            partial = [b for found in partial for b in _operand(wanted, operand, found, scope)]
        yield from partial
