"""Near-misses of patterns: how much of a rule's pattern is there, and what the rest lacks.

The matcher answers yes or no. Here the same pattern is held against each node greedily, taking the
option and the order of operands that fit best, and each part that does not fit is put into words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from dsc.ir.graph import Node, Operand, Value, Weight
from dsc.ir.op import traits_of
from dsc.rewrite import pattern as patterns
from dsc.rewrite.base import NearMiss
from dsc.rewrite.rule import Rule
from dsc.rewrite.scope import Scope

LEAST = 2
"""Operators that must match before a place counts as a near-miss; and half of the pattern."""


@dataclass(frozen=True)
class _Fit:
    """How a pattern fits: operators matched, operators missing, what is bound, what is wrong."""

    matched: int = 0
    missing: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    culprits: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[int, int]:
        """The better fit has fewer faults, then more operators."""
        return (-self.missing - len(self.wrong), self.matched)

    def fault(self, why: str, missing: int, *culprits: Operand | None) -> _Fit:
        """The fit with one more fault."""
        names = tuple(x.name for x in culprits if x is not None)
        return _Fit(
            self.matched, self.missing + missing, self.values,
            (*self.wrong, why), (*self.culprits, *names),
        )  # fmt: skip


def near_misses(rule: Rule, scope: Scope) -> Iterator[NearMiss]:
    """Places in a graph that at least half of a rule's pattern fits, and what is wrong there.

    Rules that propose without a pattern speak for themselves, through what they reject.
    """
    if rule.anchors or type(rule).find is not Rule.find:
        return
    for root in patterns.roots(rule.pattern(patterns.Names())):
        for node in scope.graph.nodes:
            if node.op not in root.ops:
                continue
            fit = _call(root, node, _Fit(), scope)
            enough = fit.matched >= max(LEAST, fit.missing)
            if fit.wrong and enough:
                where = node.loc or str(node.outputs[0])
                names = tuple(dict.fromkeys((node.outputs[0].name, *fit.culprits)))
                total = fit.matched + max(fit.missing, len(fit.wrong))
                yield NearMiss(rule.name, where, "; ".join(fit.wrong), names, fit.matched, total)


def _fit(pattern: patterns.Pattern, operand: Operand | None, fit: _Fit, scope: Scope) -> _Fit:
    """`fit` extended by a pattern held against an operand."""
    if isinstance(pattern, patterns.Either):
        tried = (_fit(option, operand, fit, scope) for option in pattern.options)
        return max(tried, key=lambda found: found.rank)
    if isinstance(pattern, patterns.Number):
        if scope.constant(operand) == pattern.value:
            return fit
        return fit.fault(f"{operand} is not the constant {pattern.value:g}", 0, operand)
    if isinstance(pattern, patterns.Bind):
        return _bind(pattern, operand, fit, scope)
    assert isinstance(pattern, patterns.Call)
    node = scope.producer(operand)
    if node is None:
        what = "a weight" if isinstance(operand, Weight) else "an input"
        why = f"{operand} is {what}, not a result of {_ops(pattern)}"
        return fit.fault(why, _size(pattern), operand)
    if node.op not in pattern.ops:
        why = f"{operand} is made by {node.op}, not by {_ops(pattern)}"
        absent = fit.fault(why, _size(pattern), operand)
        if len(node.inputs) != len(pattern.operands):
            return absent
        through = _operands(pattern, node.inputs, fit.fault(why, 1, operand), scope)
        return max((absent, through), key=lambda found: found.rank)
    return _call(pattern, node, fit, scope)


def _bind(pattern: patterns.Bind, operand: Operand | None, fit: _Fit, scope: Scope) -> _Fit:
    value = scope.constant(operand) if pattern.kind == "number" else operand
    if value is None:
        return fit.fault(f"{pattern.name} must be a scalar constant, {operand} is none", 0, operand)
    if pattern.kind == "weight" and not isinstance(value, Weight):
        return fit.fault(f"{pattern.name} must be a weight, {operand} is computed", 0, operand)
    known = fit.values.get(pattern.name)
    if known is not None and known != value:
        blamed = known if isinstance(known, (Value, Weight)) else None
        why = f"{pattern.name} must be one value, it is {known} in one place and {value} in another"
        return fit.fault(why, 0, blamed, operand)
    values = {**fit.values, pattern.name: value}
    return _Fit(fit.matched, fit.missing, values, fit.wrong, fit.culprits)


def _call(pattern: patterns.Call, node: Node, fit: _Fit, scope: Scope) -> _Fit:
    if len(pattern.operands) != len(node.inputs):
        why = f"{node.op} has {len(node.inputs)} operands, not {len(pattern.operands)}"
        return fit.fault(why, _size(pattern), node.outputs[0])
    fit = _Fit(fit.matched + 1, fit.missing, fit.values, fit.wrong, fit.culprits)
    for name, wanted in pattern.attrs.items():
        found = node.attrs.get(name)
        if found != wanted:
            why = f"{name} of {node.outputs[0]} is {found}, not {wanted}"
            fit = fit.fault(why, 0, node.outputs[0])
    orders = [node.inputs]
    if traits_of(node.op).commutative and node.inputs[0] != node.inputs[1]:
        orders = [*permutations(node.inputs)]
    tried = (_operands(pattern, order, fit, scope) for order in orders)
    return max(tried, key=lambda found: found.rank)


def _operands(
    pattern: patterns.Call, order: tuple[Operand | None, ...], fit: _Fit, scope: Scope
) -> _Fit:
    for wanted, operand in zip(pattern.operands, order, strict=True):
        fit = _fit(wanted, operand, fit, scope)
    return fit


def _ops(pattern: patterns.Call) -> str:
    return " or ".join(sorted(pattern.ops))


def _size(pattern: patterns.Pattern) -> int:
    """The least number of operators that a pattern holds."""
    if isinstance(pattern, patterns.Either):
        return min(_size(option) for option in pattern.options)
    if isinstance(pattern, patterns.Call):
        return 1 + sum(map(_size, pattern.operands))
    return 0
