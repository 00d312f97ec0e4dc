"""Patterns and sweeps: what matches, what is left alone, what a rewrite keeps."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dsc.ir.graph import GraphBuilder, Operand
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify_graph
from dsc.rewrite.base import PassReport
from dsc.rewrite.driver import DidNotSettle, apply_rules, sweep
from dsc.rewrite.pattern import Names, Pattern, match_node
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import Scope
from tests.rewrite.harness import EvidenceFailed, check_rule, program_of


class Double(Rule):
    """neg(neg(x))  ==>  x."""

    examples = ("graph g(%x: f32[B]) { %a = neg %x\n %b = neg %a\n return %b }",)
    near_misses = {"there is one": "graph g(%x: f32[B]) { %a = neg %x\n return %a }"}  # noqa: RUF012

    def pattern(self, p: Names) -> Pattern:
        return p.neg(p.neg(p.x))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        x: Operand = m.x
        return x


class Flip(Rule):
    """add(a, b)  ==>  add(b, a), for ever."""

    def pattern(self, p: Names) -> Pattern:
        return p.add(p.a, p.b)

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        first, second = m.root.operands
        return b.call("add", second, first)


def run(rule: Rule, text: str) -> tuple[str, PassReport]:
    report = PassReport()
    after = sweep(program_of(text), rule, report)
    graph = after.entries["main"]
    verify_graph(graph, after.weight_types())
    return print_graph(graph), report


def test_a_match_is_replaced_and_its_name_is_gone() -> None:
    text, report = run(Double(), "graph g(%x: f32[2]) { %a = neg %x\n %b = neg %a\n return %b }")
    assert text == 'graph main(%x: f32[2]) {\n  return %x as "b"\n}\n'
    assert report.fired == {"Double": 1}


def test_an_interior_value_that_is_read_elsewhere_stops_the_match() -> None:
    text = "graph g(%x: f32[2]) { %a = neg %x\n %b = neg %a\n %c = abs %a\n return %b, %c }"
    before, report = run(Double(), text)
    assert before == print_graph(parse_graph(text.replace("graph g", "graph main")))
    assert "%a" in report.missed[0][2]


def test_overlapping_matches_fire_one_after_another() -> None:
    text = "graph g(%x: f32[2]) { %a = neg %x\n %b = neg %a\n %c = neg %b\n return %c }"
    once, report = run(Double(), text)
    assert once.count("neg") == 1
    assert report.fired == {"Double": 1}


def test_commutative_operators_match_in_both_orders() -> None:
    class Half(Rule):
        """x * 0.5  ==>  x / 2."""

        def pattern(self, p: Names) -> Pattern:
            return p.mul(p.x, 0.5)

        def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
            (two,) = b.call("full", shape=(), value=2.0, dtype=DType.f32)
            return b.call("div", m.x, two)

    for order in ("%h, %x", "%x, %h"):
        text, report = run(
            Half(),
            "graph g(%x: f32[2]) { %h = full {shape=[], value=0.5, dtype=f32}\n"
            f" %y = mul {order}\n return %y }}",
        )
        assert "%y = div %x, %full" in text
        assert report.fired == {"Half": 1}


def test_a_rejected_match_is_reported_with_its_reason() -> None:
    class Never(Double):
        """neg(neg(x)), refused."""

        def check(self, m: Match) -> Facts | Reject:
            return reject("it may not be", m.x)

    _, report = run(
        Never(), 'graph g(%x: f32[2]) { %a = neg %x\n %b = neg %a loc "m"\n return %b }'
    )
    assert report.fired == {}
    assert report.missed == [("Never", "m", "it may not be (%x: f32[2])")]


def test_rules_that_never_settle_are_found_out() -> None:
    program = program_of("graph g(%a: f32[2], %b: f32[2]) { %c = add %a, %b\n return %c }")
    with pytest.raises(DidNotSettle, match="Flip"):
        apply_rules(program, (Flip(),), PassReport(), rounds=4)


def test_nothing_to_do_gives_the_same_object() -> None:
    program = program_of("graph g(%x: f32[2]) { %a = neg %x\n return %a }")
    assert apply_rules(program, (Double(),), PassReport()) is program


def test_the_evidence_of_a_wrong_rule_fails() -> None:
    class Wrong(Double):
        """neg(neg(x))  ==>  neg(x)."""

        def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
            return b.call("neg", m.x)

    with pytest.raises(EvidenceFailed, match="not equal bit for bit"):
        check_rule(Wrong())
    check_rule(Double())


def test_a_sweep_is_linear_in_the_graph() -> None:
    b = GraphBuilder()
    x: Operand = b.input("x", TensorType(DType.f32, (2,)))
    for i in range(12_000):
        (x,) = b.call("neg" if i % 6 < 2 else "abs", x, hint=f"v{i}")
    graph = b.finish([x])
    start = time.process_time()
    after = sweep(Program("long", {"main": graph}), Double(), PassReport()).entries["main"]
    assert len(after.nodes) == 8_000
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("pattern", "line", "fits"),
    [
        (lambda p: p.neg(p.number("k")), "%y = neg %x", False),
        (lambda p: p.neg(p.number("k")), "%h = full {shape=[], value=0.5, dtype=f32} %y = neg %h",
         True),
        (lambda p: p.neg(p.weight("w")), "%y = neg %x", False),
        (lambda p: p.neg(p.weight("w")), "%y = neg @v", True),
        (lambda p: p.neg(p.x), "%y = neg @v", True),
    ],
    ids=["no number", "a number", "no weight", "a weight", "anything"],
)  # fmt: skip
def test_a_name_binds_what_is_of_its_kind(
    pattern: Callable[[Names], Pattern], line: str, fits: bool
) -> None:
    program = program_of(f"graph g(%x: f32[3], @v: f32[3]) {{\n {line}\n return %y }}")
    (graph,) = program.entries.values()
    found = list(match_node(pattern(Names()), graph.nodes[-1], Scope(program, graph)))
    assert bool(found) is fits
