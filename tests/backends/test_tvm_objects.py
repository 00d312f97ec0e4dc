"""Kernels are compiled once: found by all that they depend on, in any process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest

from dsc import kept
from dsc.backends.tvm import library, objects, workers
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import GENERIC
from dsc.backends.tvm.objects import Foreign, Kernel, canonical
from dsc.backends.tvm.schedule import plan_program
from dsc.errors import InternalError, UsageError
from dsc.ir.parser import parse_program
from dsc.ir.traits import Role
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("tvm")

TEXT = """
program "kept" {stage=CANONICAL}
symbols {B=[1,4]}
graph main(%x: f32[B,WIDTH]) {
  %y = silu %x
  %s = sum %y {axes=[-1]}
  return %y, %s
}
"""
COMPILE = """
import sys, dsc
from dsc.backends.tvm import workers
from dsc.ir.parser import parse_program
asked = []
run = workers.run
workers.run = lambda requests, done=None: (asked.extend(requests), run(requests, done))[1]
dsc.compile(parse_program(open(sys.argv[1]).read()), backend="tvm").save(sys.argv[2])
print(len(asked), "tvm" in sys.modules)
"""


def compiled(text: str, folder: Path, **environment: str) -> list[str]:
    """What a compile in a process of its own asked of others, and whether it imported TVM."""
    (folder / "text.dsc").write_text(text)
    out = folder / f"out{len(list(folder.iterdir()))}"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder / "text.dsc"), str(out)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_kernel_that_was_compiled_before_needs_no_compiler(tmp_path: Path) -> None:
    text = TEXT.replace("WIDTH", "48")
    assert compiled(text, tmp_path, PYTHONHASHSEED="1") == ["2", "False"]  # the CPU, the kernel
    assert compiled(text, tmp_path, PYTHONHASHSEED="2") == ["0", "False"]
    assert compiled(text.replace("B=[1,4]", "B=[1,9]"), tmp_path) == ["0", "False"]
    assert compiled(TEXT.replace("WIDTH", "49"), tmp_path) == ["1", "False"]
    for file in (tmp_path / "cache" / "dsc").rglob("*"):
        if file.is_file() and file.parent.name != "cpus":
            file.write_bytes(file.read_bytes()[:-1])
    assert compiled(text, tmp_path) == ["1", "False"]


def test_every_kernel_of_a_model_is_kept_and_has_a_name_of_its_own() -> None:
    _, table = plan_program(canonical_lm(Sizes()), GENERIC)
    kernels = [Kernel.of(name, launch, GENERIC) for name, launch in table.launches.items()]
    assert all(k.key is not None for k in kernels)
    assert len({k.symbol for k in kernels}) == len(kernels) > 5
    again = [Kernel.of("x", launch, GENERIC).symbol for launch in table.launches.values()]
    assert again == [k.symbol for k in kernels]


def test_a_key_holds_all_that_a_kernel_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, table = plan_program(parse_program(TEXT.replace("WIDTH", "48")), GENERIC)
    launch = next(iter(table.launches.values()))
    symbols = {Kernel.of("x", launch, GENERIC).symbol}

    def differs(changed: Launch, machine: object = GENERIC) -> None:
        symbol = Kernel.of("x", changed, machine).symbol  # type: ignore[arg-type]
        assert symbol not in symbols
        symbols.add(symbol)

    differs(replace(launch, static=(*launch.static, 1)))
    differs(replace(launch, maker=objects.canonical))
    differs(launch, replace(GENERIC, narrow=32))
    differs(launch, replace(GENERIC, cpu="x86-64-v3"))
    monkeypatch.setattr(kept, "sources", lambda *_: "other sources")
    differs(launch)
    monkeypatch.setattr(objects, "version", lambda package: "0")
    differs(launch)


class One(NamedTuple):
    """A pair of classes whose values are equal."""

    x: int


class Two(NamedTuple):
    """The other one."""

    x: int


def test_values_are_spelled_apart() -> None:
    alike = [make_dataclass("Same", ["x"], namespace={"__module__": m})(0) for m in ("one", "two")]
    apart = [0, 0.0, -0.0, False, "0", b"0", None, (0,), ((0,),), (0, 0), frozenset({0}), Role.VIEW]
    apart += [One(0), Two(0), *alike]
    assert len({canonical(x) for x in apart}) == len(apart)
    assert canonical(frozenset({"a", "b", "c"})) == canonical(frozenset({"c", "b", "a"}))


def test_code_of_others_is_not_kept() -> None:
    def maker() -> None:
        """Somebody's kernel."""

    for value in (maker, lambda: 0, os.path.join, object(), [maker]):
        with pytest.raises(Foreign):
            canonical(value)
    assert Kernel.of("theirs_3", Launch(maker, ()), GENERIC) == Kernel(
        "theirs_3", Launch(maker, ()), GENERIC, None
    )


def test_a_process_that_ended_while_it_waited_is_replaced() -> None:
    request = ("dsc.backends.tvm.build:describe_cpu", ("x86-64-v3",))
    (first,) = workers.run([request])
    for process in workers._idle:
        process.kill()
        process.wait()
    assert workers.run([request, request]) == [first, first]


def test_a_failure_in_a_process_says_what_it_was() -> None:
    with pytest.raises(UsageError, match="no CPU called 'nothing'"):
        workers.run([("dsc.backends.tvm.build:describe_cpu", ("nothing",))])
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        workers.run([("operator:floordiv", (1, 0))])
    with pytest.raises(InternalError, match="the compiling process ended at os:_exit"):
        workers.run([("os:_exit", (3,))])


def test_what_is_missing_is_made_and_put_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, table = plan_program(canonical_lm(Sizes()), GENERIC)
    kernels = [Kernel.of(name, launch, GENERIC) for name, launch in table.launches.items()]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[object] = []

    def run(requests: list[tuple[str, tuple[object, ...]]], done: object) -> list[bytes]:
        asked.extend(arguments[-1] for _, arguments in requests)
        return [str(arguments[-1]).encode() for _, arguments in requests]

    monkeypatch.setattr(workers, "run", run)
    counts: list[tuple[int, int]] = []

    def progress(what: str, number: int, total: int) -> None:
        counts.append((number, total))

    with monkeypatch.context() as editing:
        editing.setattr(kept, "edited", lambda *folders: folders == objects.OURS)
        objects.objects_of(kernels)
    assert not kept.entries(), "which code made them?"
    asked.clear()
    half = objects.objects_of(kernels[::2])
    found: Mapping[str, bytes] = objects.objects_of(kernels, progress)
    whole = {k.symbol: k.symbol.encode() for k in kernels}
    assert list(found.items()) == list(whole.items()), "linked in another order"
    assert sorted(map(str, asked)) == sorted(found)
    assert counts == [(len(half), len(kernels))]
    assert kept.get("kernels", kernels[0].key or {}) == kernels[0].symbol.encode()


def test_a_library_is_kept_by_all_that_it_is_linked_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys: list[str] = []

    def found(kind: str, key: Mapping[str, object]) -> bytes:
        keys.append(repr(key))
        return b"kept"

    monkeypatch.setattr(kept, "get", found)

    def differs(source: str, **parts: bytes) -> None:
        assert library.compile_library(source, parts, GENERIC) == b"kept"
        assert keys[-1] not in keys[:-1]

    differs("one", a=b"1")
    differs("two", a=b"1")
    differs("one", a=b"2")
    differs("one", b=b"1")
    tool = tmp_path / "compiler"
    tool.write_text("#!/bin/sh\necho another one\n")
    tool.chmod(0o755)
    with monkeypatch.context() as other:
        other.setenv("CXX", str(tool))
        differs("one", a=b"1")
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    differs("one", a=b"1")
