"""What passes made is kept by all that it depends on, and is what they would make again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc import backends, kept, pipeline
from dsc.backends.reference import ReferenceBackend
from dsc.ir.limits import Limits
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.weights import random_source, source_types
from dsc.pipeline import PipelineOptions
from dsc.rewrite import pass_cache
from dsc.rewrite.manager import Manager, Watch
from dsc.rewrite.pass_cache import PassCache, Prepared
from dsc.targets import Target
from tests.runtime.test_session import small_lm

CPU = Target("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, which keeps whatever passes make."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pass_cache, "WORTH", 0.0)


def prepared(
    program: Program, backend: str = "reference", target: Target = CPU, **asked: Any
) -> Prepared:
    return pipeline.prepare(program, backends.get(backend), target, PipelineOptions(**asked))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran, by name."""
    names: list[str] = []
    one = Manager._one

    def noted(self: Manager, before: Program, each: Any) -> Program:
        names.append(each.name)
        return one(self, before, each)

    monkeypatch.setattr(Manager, "_one", noted)
    return names


@pytest.mark.parametrize("ranks", [1, 2], ids=["whole", "cut at collectives"])
def test_a_second_time_no_pass_runs_and_all_is_the_same(ranks: int, runs: list[str]) -> None:
    first = prepared(small_lm(), "tvm", ranks=ranks)
    assert runs
    runs.clear()
    second = prepared(small_lm(), "tvm", ranks=ranks)
    assert not runs
    for before, after in zip(first[:2], second[:2], strict=True):
        assert print_program(after) == print_program(before)
    assert (print_program(second.emitted) != print_program(second.program)) == (ranks > 1)
    assert [r.report for r in second.records] == [r.report for r in first.records]
    shown = [{**r.as_dict(), "seconds": 0.0} for r in first.records]
    assert [r.as_dict() for r in second.records] == shown


def test_weights_are_those_of_the_program_that_is_compiled_now() -> None:
    program = small_lm()
    prepared(program)
    other = random_source(source_types(program.weights.values()), seed=7)
    found = prepared(replace(program, source=other))
    assert found.program.source is other
    assert found.emitted.source is other


CHANGES: dict[str, dict[str, Any]] = {
    "a limit": {"program": small_lm().declaring(limits=Limits(1, 48, 8))},
    "a fact of the model": {"program": replace(small_lm(), meta={"x": 1})},
    "an option of a pass": {"fusion_level": 1},
    "the list of passes": {"ranks": 2},
    "the backend": {"backend": "null"},
    "the target": {"target": Target("cpu", "znver4")},
    "our sources": {"sources": "edited"},
    "the packages": {"packages": ["torch-99.dist-info"]},
    "how torch is set": {"within": torch.autocast("cpu", torch.bfloat16)},
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_another_ingredient_is_another_entry(
    what: str, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(small_lm())
    runs.clear()
    changed = dict(CHANGES[what])
    if "sources" in changed:
        edited = changed.pop("sources")
        monkeypatch.setattr(kept, "sources", lambda *_: edited)
    if "packages" in changed:
        packages = changed.pop("packages")
        monkeypatch.setattr(kept, "_packages", lambda: packages)
    with changed.pop("within", nullcontext()):
        prepared(changed.pop("program", small_lm()), **changed)
    assert runs


def test_the_key_tells_of_every_source(hashed_sources: Callable[[], set[str]]) -> None:
    PassCache(small_lm(), [], ReferenceBackend(), "cpu")
    files = hashed_sources()
    wanted = {"ir/op.py", "rewrite/lift.py", "passes/fuse.py", "backends/tvm/backend.py"}
    assert wanted | {"pipeline.py"} <= files


@pytest.mark.parametrize("watch", [
    Watch(print_after=("all",)), Watch(verify_each=True), Watch(dump_dir=Path()),
])  # fmt: skip
def test_whoever_looks_at_passes_sees_them_run(
    watch: Watch, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(small_lm())
    runs.clear()
    folder = None if watch.dump_dir is None else tmp_path / "dump"
    prepared(small_lm(), watch=replace(watch, dump_dir=folder))
    assert runs
    assert bool(capsys.readouterr().out) == bool(watch.print_after)


class Foreign(ReferenceBackend):
    """A backend from outside: no hash of ours tells what it says."""


@pytest.mark.parametrize("what", ["operator", "rule", "backend", "no cache"])
def test_nothing_is_kept_beside_code_from_outside(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    match what:
        case "operator":
            monkeypatch.setattr(pass_cache, "added", lambda: {"mine": None})
        case "rule":
            monkeypatch.setattr(pass_cache, "registered_rules", lambda: ("mine",))
        case "no cache":
            monkeypatch.setenv("DSC_CACHE", "off")
    backend = Foreign() if what == "backend" else ReferenceBackend()
    assert PassCache(small_lm(), [], backend, "cpu").key is None
    pipeline.prepare(small_lm(), backend, CPU, PipelineOptions())
    assert kept.entries() == []


def test_what_takes_no_time_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_cache, "WORTH", 1e9)
    prepared(small_lm())
    assert kept.entries() == []


@pytest.mark.parametrize("data", [b"", b"[]", b'{"program": "graph", "emitted": null}'])
def test_an_entry_that_is_no_result_is_none(data: bytes, runs: list[str]) -> None:
    cache = PassCache(small_lm(), [], ReferenceBackend(), "cpu")
    assert cache.key is not None
    kept.put(pass_cache.KIND, cache.key, data)
    assert cache.load() is None


def test_where_all_is_kept_a_compile_needs_no_torch(tmp_path: Path) -> None:
    text = Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc"
    dsc.compile(text, backend="null")
    again = (
        f"import sys, dsc; dsc.compile({str(text)!r}, backend='null').save(sys.argv[1]);"
        " print('torch' in sys.modules)"
    )
    line = [sys.executable, "-c", again, str(tmp_path / "out")]
    told = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    assert told.stdout.decode() == "False\n"
