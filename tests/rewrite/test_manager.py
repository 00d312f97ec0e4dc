"""The manager: what is checked at both ends of a pass, what is recorded, shown and dumped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dsc.errors import InternalError, UsageError, VerificationError
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import NearMiss, Pass, PassReport
from dsc.rewrite.manager import Manager, PassRecord, Watch, pass_name
from dsc.rewrite.verify import Comparison

PROGRAM = """program "p" {stage=TRACED}
graph main(%x: f32[2]) {
  %a = neg %x
  %y = neg %a
  return %y
}
"""


@dataclass(frozen=True)
class Step(Pass):
    """A pass of any name that does what it is told."""

    called: str = "step"
    change: ClassVar[Callable[[Program], Program]] = lambda program: program

    @property
    def name(self) -> str:
        """What it is called."""
        return self.called

    @property
    def text(self) -> str:
        """Its name, with an option."""
        return f"{self.called}{{level=1}}"

    def run(self, program: Program, report: PassReport) -> Program:
        """Do as told."""
        report.fire("Rule", 2, ["here", ""])
        return type(self).change(program)


def step(change: Callable[[Program], Program], name: str = "step", **members: Any) -> Pass:
    """A pass that makes `change` of a program."""
    kind = type("Told", (Step,), {"change": staticmethod(change), **members})
    made: Pass = kind(name)
    return made


def same(program: Program) -> Program:
    return program


def shorter(program: Program) -> Program:
    """One node less."""
    graph = program.entries["main"]
    node = replace(graph.nodes[0], outputs=graph.nodes[1].outputs)
    return replace(program, entries={"main": graph.with_nodes([node])})


def at(stage: Stage) -> Callable[[Program], Program]:
    return lambda program: replace(program, stage=stage)


def program() -> Program:
    return parse_program(PROGRAM)


def failure(problem: type[Exception], each: Pass, **watch: Any) -> Any:
    with pytest.raises(problem) as caught:
        Manager(Watch(**watch)).run(program(), [each])
    return caught.value


@pytest.mark.parametrize(
    ("given", "quiet"),
    [
        ({}, True),
        ({"progress": print}, True),
        ({"print_after": ["all"]}, False),
        ({"dump_dir": Path("dumps")}, False),
        ({"verify_each": True}, False),
    ],
)
def test_who_looks_at_single_passes_is_not_quiet(given: dict[str, Any], quiet: bool) -> None:
    assert Watch(**given).is_quiet is quiet


def test_a_record_as_json() -> None:
    near = [NearMiss("Rule", "here", "it is not there")]
    report = PassReport({"Rule": 2}, {"k": 1}, {"Rule": ["here"], "Other": []}, near)
    record = PassRecord("a", "a{b=1}", 0.123456, {"main": 3}, True, report, "agreed")
    assert record.as_dict() == {
        "name": "a", "text": "a{b=1}", "seconds": 0.1235, "changed": True, "nodes": {"main": 3},
        "verified": "agreed", "fired": {"Rule": 2}, "facts": {"k": 1},
        "missed": [("Rule", "here", "it is not there")], "places": {"Rule": ["here"]},
    }  # fmt: skip


def test_passes_run_in_order_and_are_recorded_and_told() -> None:
    told: list[tuple[str, int, int]] = []
    manager = Manager(Watch(progress=lambda *each: told.append(each)))
    done = manager.run(program(), [step(shorter, "a"), step(same, "b")])
    assert [n.op for n in done.entries["main"].nodes] == ["neg"]
    assert told == [("passes: a", 0, 2), ("passes: b", 1, 2), ("passes", 2, 2)]
    shown = [(r.name, r.text, r.nodes, r.changed, r.verified) for r in manager.records]
    assert shown == [
        ("a", "a{level=1}", {"main": 1}, True, ""), ("b", "b{level=1}", {"main": 1}, False, ""),
    ]  # fmt: skip
    assert all(0 <= r.seconds < 1 for r in manager.records)
    report = manager.records[0].report
    assert (report.fired, report.places, report.explain) == ({"Rule": 2}, {"Rule": ["here"]}, False)


def test_a_pass_runs_when_it_is_asked_for() -> None:
    manager = Manager()
    steps = manager.steps(program(), [step(shorter, "a"), step(same, "b")])
    first, after = next(steps)
    assert (first.name, len(after.entries["main"].nodes), len(manager.records)) == ("a", 1, 1)
    assert [p.name for p, _ in steps] == ["b"]


def test_a_pass_is_refused_at_a_stage_that_it_does_not_take() -> None:
    needs = frozenset({Stage.LOWERED, Stage.CANONICAL})
    found = failure(VerificationError, step(same, needs=needs))
    assert str(found) == (
        "pass step needs a program at stage CANONICAL, LOWERED\n"
        "  where:  the program is at TRACED\n"
        "  to do:  run the passes that lead there first; dsc/pipeline.py has them in order"
    )


@pytest.mark.parametrize("stage", [Stage.CANONICAL, Stage.OPTIMIZED])
def test_a_pass_leads_at_least_to_the_stage_that_it_ensures(stage: Stage) -> None:
    done = Manager().run(program(), [step(at(stage), ensures=Stage.CANONICAL)])
    assert done.stage is stage


def test_a_pass_that_falls_short_of_its_stage_is_to_blame() -> None:
    found = failure(InternalError, step(same, ensures=Stage.CANONICAL))
    assert found.what == (
        "pass step made a program that does not verify: it left the program at stage TRACED"
    )
    assert found.program == print_program(program())
    assert found.command == "dsc opt repro.dsc -p 'step{level=1}'"


def broken(program: Program) -> Program:
    graph = program.entries["main"]
    return replace(program, entries={"main": graph.with_nodes(graph.nodes[1:])})


def test_what_goes_wrong_in_a_pass_names_it() -> None:
    def lost(program: Program) -> Program:
        raise KeyError("x")

    found = failure(InternalError, step(broken))
    assert "pass step made a program that does not verify: %a is used before" in found.what
    assert failure(InternalError, step(lost)).what == "pass step failed: KeyError: 'x'"


@pytest.mark.parametrize("problem", [UsageError("no such thing"), OSError("full"), MemoryError()])
def test_what_is_not_the_passes_doing_goes_by(problem: Exception) -> None:
    def fail(program: Program) -> Program:
        raise problem

    assert failure(type(problem), step(fail)) is problem


class Told:
    """Stands for what compares programs."""

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.asked: list[str] = []

    def compare(self, each: Pass, before: Program, after: Program) -> Comparison:
        """Note the pass; answer as told."""
        self.asked.append(each.name)
        return Comparison("full", 1, entries=["main"], failure=self.failure)


def verifying(twin: Told, on: bool = True) -> Manager:
    manager = Manager(Watch(verify_each=on))
    manager.twin = twin  # type: ignore[assignment]
    return manager


def test_passes_that_changed_something_are_compared_on_request() -> None:
    twin = Told()
    passes = [step(same, "a"), step(shorter, "b")]
    manager = verifying(twin)
    manager.run(program(), passes)
    assert twin.asked == ["b"]
    agreed = "full form: 1 runs of main agree, difference 0.0e+00"
    assert [r.verified for r in manager.records] == ["", agreed]
    verifying(twin, on=False).run(program(), passes)
    assert twin.asked == ["b"]


def test_a_pass_that_changes_what_is_computed_is_told() -> None:
    with pytest.raises(InternalError) as caught:
        verifying(Told("output y differs")).run(program(), [step(shorter)])
    assert caught.value.what == "pass step changed what the program computes: output y differs"
    assert caught.value.command == "dsc opt repro.dsc -p 'step{level=1}' --verify-each"


def after(title: str, made: Program) -> str:
    return f"# after {title}\n{print_program(made)}"


@pytest.fixture
def two() -> list[Pass]:
    return [step(shorter, "a"), step(same, "b")]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [([], ""), (["input"], "i"), (["b"], "b"), (["b", "input"], "ib"), (["all"], "iab")],
)
def test_programs_are_printed_after_the_passes_that_are_named(
    names: list[str], wanted: str, two: list[Pass], capsys: pytest.CaptureFixture[str]
) -> None:
    Manager(Watch(print_after=names)).run(program(), two)
    short = shorter(program())
    texts = {
        "i": after("input", program()), "a": after("a{level=1}", short),
        "b": after("b{level=1}", short),
    }  # fmt: skip
    assert capsys.readouterr().out == "".join(f"{texts[each]}\n" for each in wanted)


def test_only_passes_that_run_can_be_printed_after(two: list[Pass]) -> None:
    with pytest.raises(UsageError) as caught:
        Manager(Watch(print_after=["a", "c", "d"])).run(program(), two)
    assert caught.value.what == "no pass that runs is called c, d"
    assert caught.value.hint == "one of a, b, or all"


def test_a_dump_is_numbered_files_and_the_list_of_passes(
    tmp_path: Path, two: list[Pass], capsys: pytest.CaptureFixture[str]
) -> None:
    Manager(Watch(dump_dir=tmp_path)).run(program(), two)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["00_input.dsc", "01_a.dsc", "02_b.dsc", "passes.txt"]
    assert (tmp_path / "passes.txt").read_text() == "a{level=1}\nb{level=1}\n"
    assert (tmp_path / "00_input.dsc").read_text() == after("input", program())
    assert (tmp_path / "01_a.dsc").read_text() == after("a{level=1}", shorter(program()))
    assert capsys.readouterr().out == ""
    assert [pass_name(tmp_path / name) for name in files[:3]] == ["input", "a", "b"]
