"""Applies rules to programs: one sweep of a rule, one rebuild of the graph.

A sweep collects every match of a rule, skips those that overlap an earlier one, and rebuilds the
graph once. Its cost is linear in the graph, however many matches fire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dsc.ir.analyses import live
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import WeightExpr
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.near import near_misses
from dsc.rewrite.rule import Facts, Match, Reject, RewriteBuilder, Rule, one
from dsc.rewrite.scope import Scope

MAX_ROUNDS = 64


class DidNotSettle(Exception):
    """Rules that keep undoing each other."""


def apply_rules(
    program: Program, rules: Sequence[Rule], report: PassReport, rounds: int = MAX_ROUNDS
) -> Program:
    """Sweep `rules` in order, again and again until none fires. The same object when none did.

    Raises `DidNotSettle` when rules still fire after `rounds` rounds of many.
    """
    memo: dict[Any, Any] = {}
    for round_number in range(rounds):
        before = program
        round_report = PassReport(fired=report.fired, places=report.places, explain=report.explain)
        for rule in rules:
            program = sweep(program, rule, round_report, memo)
        if program is before:
            report.near.extend(round_report.near)
            return program
        if round_number == rounds - 1 and rounds > 1:
            fired = ", ".join(r.name for r in rules)
            raise DidNotSettle(f"after {rounds} rounds these rules still fire: {fired}")
    return program


@dataclass(frozen=True)
class RaisePass(Pass):
    """A pass that sweeps `rules` over what was traced, and `then` others where one fired."""

    rules: ClassVar[Sequence[Rule]] = ()
    then: ClassVar[Sequence[Rule]] = ()

    needs = frozenset({Stage.TRACED})
    tolerance = 1e-5

    def run(self, program: Program, report: PassReport) -> Program:
        """One sweep, then the others."""
        raised = apply_rules(program, self.rules, report)
        return raised if raised is program else apply_rules(raised, self.then, report)


def sweep(
    program: Program, rule: Rule, report: PassReport, memo: dict[Any, Any] | None = None
) -> Program:
    """Rewrite all non-overlapping matches of one rule in every entry."""
    memo = {} if memo is None else memo
    added: dict[str, WeightExpr] = {}
    entries: dict[str, Graph] = {}
    for name, graph in program.entries.items():
        scope = Scope(program.with_weights(added), graph, memo)
        chosen = _choose(rule, scope, report)
        entries[name] = _rebuild(rule, scope, chosen, added) if chosen else graph
    if all(entries[k] is g for k, g in program.entries.items()):
        return program
    return replace(program, entries=entries).with_weights(added)


def _choose(rule: Rule, scope: Scope, report: PassReport) -> list[tuple[Match, Facts]]:
    """Matches that fire: accepted by `check`, none overlapping an earlier one."""
    chosen: list[tuple[Match, Facts]] = []
    claimed: set[int] = set()
    missed: dict[tuple[str, str], tuple[str, ...]] = {}
    for match in rule.find(scope):
        if isinstance(match, Reject):
            where = _place(scope, match.culprits)
            missed[where, str(match)] = _names(match)
            continue
        if any(id(n) in claimed for n in match.nodes if id(n) not in match.shared):
            continue
        facts = rule.check(match)
        if isinstance(facts, Reject):
            where = match.root.loc or str(match.root.outputs[0])
            missed[where, str(facts)] = (match.root.outputs[0].name, *_names(facts))
            continue
        claimed |= {id(n) for n in match.nodes if id(n) not in match.shared}
        chosen.append((match, facts))
    if chosen:
        report.fire(rule.name, len(chosen), [match.root.loc for match, _ in chosen])
    for (where, reason), culprits in missed.items():
        report.miss(rule.name, where, reason, culprits)
    if report.explain:
        report.near += near_misses(rule, scope)
    return chosen


def _names(reject: Reject) -> tuple[str, ...]:
    return tuple(x.name for x in reject.culprits)


def _place(scope: Scope, culprits: tuple[Operand, ...]) -> str:
    for operand in culprits:
        node = scope.producer(operand)
        if node is not None and node.loc:
            return node.loc
    return str(culprits[0]) if culprits else scope.graph.name


def _rebuild(
    rule: Rule,
    scope: Scope,
    chosen: list[tuple[Match, Facts]],
    added: dict[str, WeightExpr],
) -> Graph:
    graph = scope.graph
    here: dict[int, list[tuple[Match, Facts]]] = {}
    for match, facts in chosen:
        here.setdefault(id(match.root), []).append((match, facts))
    replaced = {v.name for match, _ in chosen for v in match.replaced}
    taken = {v.name for v in graph.values()}
    env: dict[str, Operand] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        for match, facts in here.get(id(node), ()):
            b = RewriteBuilder(taken, node.loc, {**scope.program.weights, **added})
            results = one(rule.rewrite(b, _resolve(match, env), facts))
            _check_results(rule, match, results)
            nodes += _adopt_names(b.nodes, match.replaced, results, env)
            added.update(b.added)
        if not all(v.name in replaced for v in node.outputs):
            nodes.append(_step_aside(substitute(node, env), replaced, taken))
    outputs = tuple(_final(x, env) for x in graph.outputs)
    return live(replace(graph, nodes=tuple(nodes), outputs=outputs))


def _step_aside(node: Node, replaced: set[str], taken: set[str]) -> Node:
    """Give up the names of results that were replaced, where another result is still needed."""
    if not any(v.name in replaced for v in node.outputs):
        return node
    names = GraphBuilder(taken=taken)
    outputs = tuple(
        Value(names.fresh(v.name), v.type) if v.name in replaced else v for v in node.outputs
    )
    return replace(node, outputs=outputs)


def _resolve(match: Match, env: Mapping[str, Operand]) -> Match:
    """The match with bound operands replaced by what earlier rewrites put in their place."""

    def now(value: Any) -> Any:
        if isinstance(value, Value):
            return _final(value, env)
        if isinstance(value, tuple):
            return tuple(now(v) for v in value)
        return substitute(value, env) if isinstance(value, Node) else value

    return replace(match, values={k: now(v) for k, v in match.values.items()})


def _check_results(rule: Rule, match: Match, results: tuple[Operand, ...]) -> None:
    if len(results) != len(match.replaced):
        raise TypeError(f"{rule.name} gave {len(results)} results for {len(match.replaced)}")
    for old, new in zip(match.replaced, results, strict=True):
        if old.type != new.type:
            raise TypeError(f"{rule.name} replaced {old}: {old.type} by {new}: {new.type}")


def _adopt_names(
    nodes: list[Node],
    replaced: tuple[Value, ...],
    results: tuple[Operand, ...],
    env: dict[str, Operand],
) -> list[Node]:
    """Let new values take the names of those they replace, and fill `env` for later nodes."""
    fresh = {v.name for n in nodes for v in n.outputs}
    renamed: dict[str, Operand] = {}
    for old, new in zip(replaced, results, strict=True):
        if isinstance(new, Value) and new.name in fresh and new.name not in renamed:
            renamed[new.name] = old
        else:
            env[old.name] = renamed.get(new.name, new) if isinstance(new, Value) else new
    return [_rename(n, renamed) for n in nodes]


def _rename(node: Node, names: Mapping[str, Operand]) -> Node:
    if not names:
        return node
    outputs = tuple(
        Value(names[v.name].name, v.type) if v.name in names else v for v in node.outputs
    )
    return replace(substitute(node, names), outputs=outputs)


def substitute(node: Node, env: Mapping[str, Operand]) -> Node:
    """`node` reading `env`'s operands in place of the values of those names."""
    if not any(isinstance(x, Value) and x.name in env for x in node.inputs):
        return node
    inputs = tuple(None if x is None else _final(x, env) for x in node.inputs)
    return replace(node, inputs=inputs)


def _final(operand: Operand, env: Mapping[str, Operand]) -> Operand:
    while isinstance(operand, Value) and operand.name in env:
        operand = env[operand.name]
    return operand
