"""Near-misses: how much of a pattern is there, and what the rest is said to lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dsc.rewrite.base import NearMiss
from dsc.rewrite.near import near_misses
from dsc.rewrite.pattern import Names, Pattern
from dsc.rewrite.rule import Rule
from dsc.rewrite.scope import Scope
from tests.rewrite.harness import program_of

Shape = Callable[[Any], Pattern]


class Sought(Rule):
    """what is looked for  ==>  nothing."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def pattern(self, p: Names) -> Pattern:
        return self.shape(p)


def found(shape: Shape, lines: str) -> list[NearMiss]:
    """The near-misses of a pattern in a graph whose last value is `%y`."""
    program = program_of(
        'program "p" {stage=TRACED} weights { @w : f32[2,4] = source "w" : f32[2,4] }'
        f" graph g(%x: f32[2,4], %z: f32[2,4]) {{ {lines} return %y }}"
    )
    return list(near_misses(Sought(shape), Scope(program, program.entries["main"])))


HALF = "%h = full {shape=[], value=0.5, dtype=f32}"
MISSES: dict[str, tuple[Shape, str, str, tuple[str, ...], tuple[int, int]]] = {
    "another operator, and what is below it":
        (lambda p: p.silu(p.neg(p.abs(p.x))), "%a = abs %x %b = exp %a %y = silu %b",
         "%b is made by exp, not by neg", ("y", "b"), (2, 3)),
    "another operator of other operands":
        (lambda p: p.silu(p.neg(p.abs(p.x))), "%b = add %x, %z %c = neg %b %y = silu %c",
         "%b is made by add, not by abs", ("y", "b"), (2, 3)),
    "half of it, up to an input":
        (lambda p: p.silu(p.neg(p.abs(p.exp(p.x)))), "%a = neg %x %y = silu %a",
         "%x is an input, not a result of abs", ("y", "x"), (2, 4)),
    "all but a weight that is computed":
        (lambda p: p.sub(p.neg(p.x), p.weight("k")), "%a = neg %x %y = sub %a, %z",
         "k must be a weight, %z is computed", ("y", "z"), (2, 3)),
    "a weight where a result is wanted":
        (lambda p: p.sub(p.neg(p.x), p.abs(p.k)), "%a = neg %x %y = sub %a, @w",
         "@w is a weight, not a result of abs", ("y", "w"), (2, 3)),
    "no constant, in the order that fits best":
        (lambda p: p.mul(p.neg(p.x), p.number("k")), "%a = neg %x %y = mul %z, %a",
         "k must be a scalar constant, %z is none", ("y", "z"), (2, 3)),
    "another constant":
        (lambda p: p.mul(p.neg(p.x), 0.25), f"{HALF} %a = neg %x %y = mul %h, %a",
         "%h is not the constant 0.25", ("y", "h"), (2, 3)),
    "two values of one name":
        (lambda p: p.sub(p.neg(p.x), p.abs(p.x)), "%a = neg %x %b = abs %z %y = sub %a, %b",
         "x must be one value, it is %x in one place and %z in another", ("y", "x", "z"), (3, 4)),
    "two numbers of one name":
        (lambda p: p.sub(p.sub(p.x, p.number("k")), p.number("k")),
         f"{HALF} %o = full {{shape=[], value=2.0, dtype=f32}} %a = sub %x, %h %y = sub %a, %o",
         "k must be one value, it is 0.5 in one place and 2.0 in another", ("y", "o"), (2, 3)),
    "another attribute":
        (lambda p: p.neg(p.softmax(p.x, axis=1)), "%a = softmax %x {axis=0} %y = neg %a",
         "axis of %a is 0, not 1", ("y", "a"), (2, 3)),
    "other operands":
        (lambda p: p.abs(p.neg(p.concat(p.a, p.b, p.c))),
         "%a = concat %x, %z {axis=0} %b = neg %a %y = abs %b",
         "concat has 2 operands, not 3", ("y", "a"), (2, 3)),
    "the option that fits best":
        (lambda p: p.abs(p.neg(p.either(p.exp(p.x), p.silu(p.exp(p.x))))),
         "%a = silu %x %b = neg %a %y = abs %b",
         "%x is an input, not a result of exp", ("y", "x"), (3, 4)),
    "an attribute, all but half of the rest":
        (lambda p: p.neg(p.softmax(p.exp(p.abs(p.x)), axis=1)),
         "%a = softmax %x {axis=0} %y = neg %a",
         "axis of %a is 0, not 1; %x is an input, not a result of exp", ("y", "a", "x"), (2, 4)),
    "the least of what options need":
        (lambda p: p.abs(p.neg(p.silu(p.either(p.exp(p.x), p.x)))), "%a = neg %x %y = abs %a",
         "%x is an input, not a result of silu", ("y", "x"), (2, 3)),
    "the option of fewer faults":
        (lambda p: p.abs(p.either(p.sub(p.number("k"), p.number("m")), p.sub(p.x, p.number("m")))),
         "%a = sub %x, %z %y = abs %a",
         "m must be a scalar constant, %z is none", ("y", "z"), (2, 3)),
    "two faults":
        (lambda p: p.sub(p.neg(p.exp(p.x)), p.abs(p.z)), "%a = neg %x %y = sub %a, %z",
         "%x is an input, not a result of exp; %z is an input, not a result of abs",
         ("y", "x", "z"), (2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_what_is_missing_is_counted_and_said(name: str) -> None:
    shape, lines, reason, culprits, (matched, wanted) = MISSES[name]
    assert found(shape, lines) == [NearMiss("Sought", "%y", reason, culprits, matched, wanted)]


@pytest.mark.parametrize(
    ("shape", "lines"),
    [
        (lambda p: p.silu(p.neg(p.x)), "%a = exp %x %y = silu %a"),
        (lambda p: p.silu(p.neg(p.abs(p.exp(p.tanh(p.x))))), "%a = neg %x %y = silu %a"),
        (lambda p: p.sub(p.neg(p.x), p.weight("k")), "%a = neg %x %y = sub %a, @w"),
        (lambda p: p.sub(p.neg(p.x), p.k), "%a = neg %x %y = sub %a, %z"),
        (lambda p: p.mul(p.neg(p.x), p.number("k")), f"{HALF} %a = neg %x %y = mul %h, %a"),
        (lambda p: p.mul(p.neg(p.x), 0.5), f"{HALF} %a = neg %x %y = mul %h, %a"),
        (lambda p: p.sub(p.neg(p.x), p.abs(p.x)), "%a = neg %x %b = abs %x %y = sub %a, %b"),
    ],
    ids=["one operator", "less than half", "a weight", "any", "a number", "the number", "twice"],
)
def test_too_little_and_all_of_a_pattern_are_no_near_misses(shape: Shape, lines: str) -> None:
    assert found(shape, lines) == []


def test_each_root_is_held_and_its_place_is_told() -> None:
    lines = (
        '%a = neg %x %b = silu %a loc "here" %c = abs %a loc "there"'
        " %d = add %b, %c %y = add %d, %a"
    )
    got = found(lambda p: p.either(p.abs(p.neg(p.exp(p.x))), p.silu(p.neg(p.exp(p.x)))), lines)
    assert [(m.where, m.culprits[0]) for m in got] == [("there", "c"), ("here", "b")]


def test_a_rule_without_a_pattern_speaks_for_itself() -> None:
    program = program_of("graph g(%x: f32[2]) { %a = neg %x %y = abs %a return %y }")
    scope = Scope(program, program.entries["main"])

    class Anchored(Sought):
        anchors = frozenset({"abs"})

    class Finds(Sought):
        def find(self, scope: Scope) -> Any:
            return iter(())

    def shape(p: Any) -> Pattern:
        pattern: Pattern = p.abs(p.neg(p.exp(p.x)))
        return pattern

    assert [len(list(near_misses(r(shape), scope))) for r in (Sought, Anchored, Finds)] == [1, 0, 0]
