"""The search over ways to cut bf16 products: its choice, its cache, its results."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tvm")

from dsc.backends.tvm import TvmBackend, executable, objects, tuning
from dsc.backends.tvm.kernels.panels import panel_bytes
from dsc.backends.tvm.machine import FLAGS, Machine, cpu_of, machine_for
from dsc.backends.tvm.objects import Kernel
from dsc.backends.tvm.tuning import FEW, MANY, Tiling, agreed, choose, ways
from dsc.errors import BackendUnavailable, InternalError
from dsc.ir.program import Program
from dsc.runtime.standalone import lacking
from dsc.targets import parse_target

BOTH = Machine("host", lanes=16, rows=4, columns=4, bf16=True, narrows=True)
RULE = Tiling.of(BOTH)


def times(**changed: tuple[float, float]) -> dict[tuple[str, int], dict[int, float]]:
    """One second for all candidates but the changed ones, such as pairs_64=(few, many)."""
    found = {(way, n): {FEW: 1.0, MANY: 1.0} for way in ways(BOTH) for n in tuning.COLUMNS}
    for name, (few, many) in changed.items():
        way, _, columns = name.partition("_")
        found[way, int(columns)] = {FEW: few, MANY: many}
    return found


def test_tiles_come_first_and_leave_vectors_alone() -> None:
    host = replace(BOTH, tiles=True)
    assert ways(host) == ["tiles", "widened", "pairs"]
    assert ways(replace(BOTH, narrows=False)) == ["widened"]
    for way in ways(host):
        assert Tiling.of(replace(Tiling.of(host), way=way).on(host)).way == way
    assert not Tiling.of(host).on(host).pairs


def test_tiles_are_refused_where_nobody_gives_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(executable, "tiles_allowed", lambda: False)
    manifest = {"meta": {"tiles": True, "cpu_needs": []}, "weights": None}
    with pytest.raises(BackendUnavailable, match="AMX"):
        executable.TvmExecutable(tmp_path, manifest, Program("p", {}))


@pytest.mark.parametrize(
    ("needs", "lacks"),
    [
        (["x86_64", "aarch64"], "aarch64" if platform.machine() == "x86_64" else "x86_64"),
        ([platform.machine(), "a_later_one"], "a_later_one"),
    ],
)
def test_code_for_another_cpu_is_refused_before_it_runs(
    needs: list[str], lacks: str, tmp_path: Path
) -> None:
    meta = {"cpu": "a-later-cpu", "cpu_needs": needs}
    with pytest.raises(BackendUnavailable, match=f"for a-later-cpu and needs {lacks}, which"):
        executable.TvmExecutable(tmp_path, {"meta": meta, "weights": None}, Program("p", {}))


def test_a_cpu_gives_what_its_own_code_needs() -> None:
    assert not lacking(cpu_of("").needs)
    assert "avx_vnni" in cpu_of("alderlake").needs
    assert "avx512f" not in cpu_of("alderlake").needs


def test_what_a_virtual_machine_hides_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsc.backends.tvm import build

    whole = build.describe_cpu("")
    hidden = next((x for x in ("avx512f", "avx2", "dotprod") if whole.has(x)), "")
    if not hidden:
        pytest.skip("this CPU has nothing that could be hidden")
    monkeypatch.setattr(build, "lacking", lambda needs: [x for x in needs if x == FLAGS[hidden]])
    found = build.describe_cpu("")
    assert found.without == (hidden,)
    assert not found.has(hidden)
    assert not (found.has("avx512vnni") and hidden != "dotprod")
    assert set(found.needs) < set(whole.needs)
    assert build.describe_cpu("x86-64-v4").has("avx512f")
    text = str(build.tvm_target(found.name, found.triple, found.without))
    assert f"-{hidden}" in text


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [
        (times(), RULE),
        (times(widened_32=(0.95, 0.95)), RULE),
        (times(widened_32=(0.8, 1.0)), replace(RULE, narrow=32)),
        (times(widened_32=(1.0, 0.8)), replace(RULE, wide=32)),
        (times(pairs_64=(1.0, 0.5)), replace(RULE, way="pairs")),
        (times(pairs_64=(1.0, 0.95)), RULE),
        (times(pairs_64=(1.0, 0.5), pairs_16=(1.3, 1.0)), RULE),
        (times(pairs_32=(0.1, 0.1)), RULE),
    ],
    ids=["level", "noise", "few", "many", "way", "way_noise", "way_costs_decoding", "other_cut"],
)
def test_what_is_clearly_faster_is_chosen(measured: Any, wanted: Tiling) -> None:
    assert choose(measured, RULE) == wanted


def test_a_cpu_with_one_way_to_multiply_keeps_it() -> None:
    one = {c: t for c, t in times(widened_16=(1.0, 0.5)).items() if c[0] == "widened"}
    assert choose(one, RULE) == replace(RULE, wide=16)


def test_measurements_that_disagree_change_nothing() -> None:
    faster, level = times(widened_32=(0.5, 1.0)), times()
    assert agreed([faster, faster], RULE) == replace(RULE, narrow=32)
    assert agreed([faster, level], RULE) == RULE


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Tuning is on, with an empty cache; each search leaves a mark and finds 32 columns faster."""
    marks: list[int] = []

    def search(machine: Machine, threads: int) -> Any:
        marks.append(threads)
        return [times(widened_32=(0.5, 1.0))] * 2

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSC_TUNE", raising=False)
    monkeypatch.setattr(tuning, "time_candidates", search)
    return marks


def host() -> Machine:
    """The host, as if it had both ways."""
    return replace(BOTH, cpu=machine_for(parse_target("cpu")).cpu)


def test_a_choice_is_kept_by_its_whole_key(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_target("cpu")
    first = tuning.tuned(host(), target, 1, asked=True)
    assert first == (replace(host(), narrow=32), "timing")
    assert tuning.tuned(host(), target, 1, asked=True) == first
    assert timed == [1]
    tuning.tuned(host(), target, 2, asked=True)
    tuning.tuned(replace(host(), rows=3), target, 1, asked=True)
    assert timed == [1, 2, 1]
    monkeypatch.setattr(tuning, "processor", lambda: {"model name": "of LLVM's same name"})
    tuning.tuned(host(), target, 1, asked=True)
    assert timed == [1, 2, 1, 1]


def test_a_choice_that_was_never_offered_is_a_miss(timed: list[int]) -> None:
    key = tuning.key_of(host(), 1)
    tuning.store(key, Tiling("widened", 32, 64))
    assert tuning.load(key) == Tiling("widened", 32, 64)
    for never in (Tiling("widened", 17, 64), Tiling("by hand", 32, 64)):
        tuning.store(key, never)
        assert tuning.load(key) is None


def test_rules_where_nothing_is_to_be_timed(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = parse_target("cpu:x86-64-v4")
    assert tuning.tuned(host(), elsewhere, 1, asked=True) == (host(), "rule")
    plain = replace(host(), bf16=False)
    assert tuning.tuned(plain, parse_target("cpu"), 1, asked=True) == (plain, "rule")
    assert tuning.tuned(host(), parse_target("cpu"), 1, asked=False) == (host(), "rule")
    monkeypatch.setenv("DSC_TUNE", "0")
    assert tuning.tuned(host(), parse_target("cpu"), 1, asked=True) == (host(), "rule")
    assert timed == []


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_candidates_are_built_ahead_where_nothing_is_known(
    known: bool, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machine_for(parse_target("cpu"))
    built: list[str] = []

    def objects_of(kernels: list[Kernel]) -> None:
        built.extend(kernel.symbol for kernel in kernels)
        raise InternalError("which is no matter here")

    monkeypatch.setattr(objects, "objects_of", objects_of)
    monkeypatch.setattr(tuning, "_ahead", None)
    if known:
        tuning.store(tuning.key_of(machine, len(os.sched_getaffinity(0))), Tiling.of(machine))
    TvmBackend().warm(model=True)
    if tuning._ahead is not None:  # a machine of one core builds nothing ahead
        tuning._ahead.join()
        wanted = machine.bf16 and not known
        assert built == [k.symbol for k in tuning._kernels(machine).values() if wanted]
    built.clear()
    monkeypatch.setattr(tuning, "_ahead", None)
    TvmBackend().warm(model=False)
    monkeypatch.setenv("DSC_TUNE", "0")
    TvmBackend().warm(model=True)
    assert tuning._ahead is None


def test_every_candidate_is_right_on_odd_shapes(tmp_path: Path) -> None:
    """All ways and cuts against fp64; a cut changes no bit, and neither do other rows."""
    machine = machine_for(parse_target("cpu"))
    if not machine.bf16:
        pytest.skip("this CPU has no AVX-512")
    seed = torch.Generator().manual_seed(0)
    rows, m, k = 21, 83, 2080
    x, w = (torch.randn(n, k, generator=seed).bfloat16() for n in (rows, m))
    exact = x.double() @ w.double().T
    bound = x.double().abs() @ w.double().abs().T * (k / 2**24) + exact.abs() * 2**-8
    panels = torch.zeros(panel_bytes(rows, k), dtype=torch.uint8)
    runs = tuning.build(machine, tmp_path, 1, m, k)
    first: dict[str, torch.Tensor] = {}
    for (way, _), run in runs.items():
        y, alone = (torch.zeros(n, m, dtype=torch.bfloat16) for n in (rows, 1))
        run(*(t.data_ptr() for t in (x, w, y, panels)), rows)
        assert bool(((y.double() - exact).abs() <= bound).all())
        run(*(t.data_ptr() for t in (x[5:], w, alone, panels)), 1)
        assert torch.equal(alone[0], y[5])
        assert torch.equal(y, first.setdefault(way, y))


def test_timing_covers_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build(machine: Machine, folder: Path, threads: int) -> Any:
        def candidate(way: str, columns: int) -> Any:
            return lambda *arguments: calls.append((way, columns, arguments[4]))

        return {(way, n): candidate(way, n) for way in ways(BOTH) for n in tuning.COLUMNS}

    monkeypatch.setattr(tuning, "build", build)
    for found in tuning.time_candidates(BOTH, 1):
        assert list(found) == [(way, n) for way in ways(BOTH) for n in tuning.COLUMNS]
        assert all(np.isfinite(list(t.values())).all() for t in found.values())
    assert set(calls) == {(*each, rows) for each in found for rows in (FEW, MANY)}
    assert asdict(RULE) == {"way": "widened", "narrow": 16, "wide": 64}
