"""The words in which a pass tells where it fired and where it nearly did, to the letter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dsc.ir.program import Program
from dsc.rewrite.base import NearMiss, Pass, PassReport
from dsc.rewrite.explain import explain_pass, summary
from tests.rewrite.harness import program_of

TEXT = "graph g(%x: f32[2]) { %a = neg %x\n %b = abs %a\n return %b }"


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([], ""),
        (["norm", "norm"], "norm"),
        (["layers.3.mlp"], "layers.3.mlp"),
        (["layers.1.mlp", "layers.0.mlp"], "layers.{0..1}.mlp"),
        ([f"layers.{n}.mlp" for n in (10, 0, 1, 2, 9, 5)], "layers.{0..2,5,9..10}.mlp"),
        ([f"layers.{n}" for n in (0, 2)], "layers.{0,2}"),
        (["layers.1.a", "layers.1.b"], "layers.1.a, layers.1.b"),
        (["players.1"], "players.1"),
        (list("abcd"), "a, b, c, d"),
        (list("abcde"), "a, b, c, d and 1 more"),
        (list("abcdef"), "a, b, c, d and 2 more"),
    ],
)
def test_places_are_told_in_few_words(places: Sequence[str], told: str) -> None:
    assert summary(places) == told


class Tells(Pass):
    """A pass that reports what it is given and changes nothing."""

    def __init__(self, *near: NearMiss, fired: Sequence[tuple[int, list[str]]] = ()) -> None:
        object.__setattr__(self, "told", (near, fired))

    def run(self, program: Program, report: PassReport) -> Program:
        """Report."""
        near, fired = self.told  # type: ignore[attr-defined]
        for times, places in fired:
            report.fire("Rule", times, places)
        report.near += near
        return program


def told(*near: NearMiss, fired: Sequence[tuple[int, list[str]]] = ()) -> list[str]:
    """The lines that such a pass is explained in, without the title."""
    return str(explain_pass(program_of(TEXT), Tells(*near, fired=fired))).splitlines()[1:]


def test_times_and_places_add_up() -> None:
    assert told(fired=[(1, ["m"])]) == ["fired   Rule once: m"]
    assert told(fired=[(1, [""])]) == ["fired   Rule once"]
    assert told(fired=[(1, ["m"]), (2, ["n", ""])]) == ["fired   Rule 3 times: m, n"]
    assert told() == ["nothing here looks like what it rewrites"]


def test_a_near_miss_is_told_with_its_parts_and_lines() -> None:
    assert told(NearMiss("Rule", "m", "one; two", ("b", "x", "gone"), 2, 3)) == [
        "missed  Rule at m, where 2 of 3 parts fit:",
        "          one",
        "          two",
        "            | %b = abs %a : f32[2]",
        "            | %x: f32[2] is an input of main",
    ]
    assert told(NearMiss("Rule", "", "one", ("a",))) == [
        "missed  Rule at %a:",
        "          one",
        "            | %a = neg %x : f32[2]",
    ]


def test_the_same_reason_elsewhere_is_the_same_and_the_best_comes_first() -> None:
    near = [
        NearMiss("Rule", "half", "small", (), 2, 4),
        NearMiss("Rule", "larger", "large", (), 4, 8),
        NearMiss("Rule", "layers.0", "%a is odd", (), 3, 4),
        NearMiss("Rule", "layers.1", "%b is odd", (), 3, 4),
        NearMiss("Other", "whole", "no", (), 1, 1),
    ]
    assert [line for line in told(*near) if line.startswith("missed")] == [
        "missed  Other at whole:",
        "missed  Rule at layers.{0..1}, where 3 of 4 parts fit:",
        "missed  Rule at larger, where 4 of 8 parts fit:",
        "missed  Rule at half, where 2 of 4 parts fit:",
    ]


@pytest.mark.parametrize(("letters", "cut"), [(141, False), (142, True)])
def test_a_line_of_160_characters_is_shown_whole(letters: int, cut: bool) -> None:
    name = "b" * letters
    program = program_of(TEXT.replace("%b", f"%{name}"))
    last = str(explain_pass(program, Tells(NearMiss("Rule", "m", "no", (name,))))).splitlines()[-1]
    line = last.removeprefix("            | ")
    assert len(line) == 160
    assert line.endswith("…") == cut


def test_a_report_counts_and_leaves_out_places_without_a_name() -> None:
    report = PassReport()
    report.fire("A")
    report.fire("A", 2, ["m", ""])
    report.fire("B", places=[""])
    report.miss("C", "n", "why", ["x"])
    assert report.near == [NearMiss("C", "n", "why", ("x",), 1, 1)]
    assert report.as_dict() == {
        "fired": {"A": 3, "B": 1}, "missed": [("C", "n", "why")], "facts": {},
        "places": {"A": ["m"]},
    }  # fmt: skip
