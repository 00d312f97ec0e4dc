"""`dsc bisect` names the pass that breaks a program, and leaves both sides of it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dsc import pipeline
from dsc.errors import UsageError
from dsc.ir.graph import Attrs, Node
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.verify import relative_difference
from dsc.rewrite.widen import runnable

from .broken import ASKED, BROKEN, break_pass, long_steps, ran
from .conftest import Invoke

SMALL = Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc"


@dataclass(frozen=True)
class HalveTheScale(Pass):
    """A pass that is wrong: latent attention with half of its scale."""

    def run(self, program: Program, report: PassReport) -> Program:
        def changed(node: Node) -> Node:
            if node.op != "latent_attention":
                return node
            return replace(node, attrs=Attrs({**node.attrs, "scale": node.attrs["scale"] / 2}))

        return program.map_entries(lambda g: g.with_nodes(map(changed, g.nodes)))


@dataclass(frozen=True)
class Crash(Pass):
    """A pass that fails."""

    def run(self, program: Program, report: PassReport) -> Program:
        raise ZeroDivisionError("a dim of zero")


def put(monkeypatch: pytest.MonkeyPatch, wrong: type[Pass]) -> None:
    """Register a pass under the name of its class, and run it in the place of a good one."""
    table = dict(pipeline.PASSES)
    table["append_cache_in_place"] = f"{__name__}:{wrong.__name__}"
    monkeypatch.setattr(pipeline, "PASSES", table)
    monkeypatch.setattr(wrong, "__init__", lambda self, **options: None)
    monkeypatch.setattr(wrong, "name", property(lambda self: "append_cache_in_place"))


def bisected(invoke: Invoke, folder: Path, *more: str) -> tuple[int, str]:
    line = ("bisect", str(SMALL), "--backend", "tvm", "-o", str(folder), *more)
    done = invoke(*line)
    return done.exit_code, done.stdout


def test_good_passes_are_not_blamed(invoke: Invoke, tmp_path: Path) -> None:
    code, text = bisected(invoke, tmp_path / "found", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["pass"] is None
    outcomes = {each["pass"]: each["outcome"] for each in found["checked"]}
    assert "agree" in outcomes["absorb_mla"]
    assert not (tmp_path / "found").exists()


def test_a_broken_pass_is_named_with_its_worst_output(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, HalveTheScale)
    code, text = bisected(invoke, tmp_path / "found")
    assert code == 1
    assert text.startswith("append_cache_in_place breaks the program: output logits")
    assert ".logits" in text.splitlines()[2]
    assert "dsc opt" in text
    before, after = (
        parse_program((tmp_path / "found" / name).read_text())
        for name in ("before.dsc", "after.dsc")
    )
    sizes = {"B": 1, "P": 4, "S": 1, "L": 1}
    inputs = sample_inputs(before.entries["decode"], sizes)
    first, second = (
        Interpreter(runnable(p, False)).run("decode", inputs)["logits"] for p in (before, after)
    )
    assert relative_difference(first, second) > 1e-4


def test_the_errors_are_listed_by_output(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, HalveTheScale)
    _, text = bisected(invoke, tmp_path / "found", "--json")
    errors = json.loads(text)["errors"]
    assert errors
    assert max(errors, key=errors.__getitem__) == next(iter(errors))
    assert not any("present" in name for name in errors)  # caches are written before attention


def test_a_pass_that_fails_is_named(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, Crash)
    code, text = bisected(invoke, tmp_path / "found")
    assert code == 1
    assert "append_cache_in_place breaks the program: it failed: ZeroDivisionError" in text
    assert (tmp_path / "found" / "before.dsc").is_file()
    assert not (tmp_path / "found" / "after.dsc").exists()


def test_mistakes_are_told(invoke: Invoke, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at"):
        invoke("bisect", str(tmp_path / "none.dsc"))
    with pytest.raises(UsageError, match="unknown backend"):
        invoke("bisect", str(SMALL), "--backend", "gcc")


@pytest.mark.parametrize("name", BROKEN)
def test_the_line_repeats_the_pass_with_the_options_it_ran_with(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    invoke: Invoke,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    break_pass(monkeypatch, name)
    done = invoke("bisect", long_steps(tmp_path), *ASKED, "-o", str(tmp_path / "found"))
    assert done.exit_code == 1
    assert done.stdout.startswith(f"{name} breaks the program")
    repeat = done.stdout.partition("repeat it with: dsc ")[2].replace("\n", " ")
    assert "{}={}".format(*BROKEN[name]) in repeat
    code, told = ran(capsys, *shlex.split(repeat))
    assert code == 1
    assert f"pass {name} changed what the program computes" in told
