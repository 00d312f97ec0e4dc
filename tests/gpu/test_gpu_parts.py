"""Parts that fail, hang, end or are judged: stand-ins for what a card's machine may do."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import bars, checks, parts, steps

STEP = {"ms": 2.0, "of copy speed": 0.7, "of limit": 0.7, "attention_ms": 0.6,
        "products": {"of matrix peak": 0.7}}  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """What parts are given, unpacked: of stand-ins alone."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    (folder / "about.json").write_text('{"target": "cuda:sm_90", "layers": {"671b-3l": 3}}')
    return folder


def stand_in(place: Path, text: str, name: str = "python") -> Path:
    """A program that is started in place of another."""
    tool = place / name
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    return tool


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_part_that_ends_or_hangs_keeps_what_it_found_and_costs_its_budget_at_most(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = {
        "speeds": "echo '{\"copy\": 3}' > $OWN; echo Traceback >&2; kill -SEGV $$",
        "tokens": 'echo \'{"bf16": {"ok": true}}\' > $OWN; sleep 60 & echo $! > $OWN.pid; wait',
        "block": "exit 7",
        "flex": 'echo \'{"flex": {"us": 3.5}}\' > $OWN',
    }
    cases = "\n".join(f"{name}) {text};;" for name, text in each.items())
    tool = stand_in(tmp_path, f"OWN={archive}/found.json\ncase $5 in\n{cases}\nesac")
    monkeypatch.setattr(sys, "executable", str(tool))
    quick = {name: parts.Part(parts.PARTS[name].measure, 1, 0.5) for name in each}
    monkeypatch.setattr(parts, "PARTS", quick)
    out, began = tmp_path / "gpu.json", time.perf_counter()
    found = parts.run(archive, [], out)
    assert time.perf_counter() - began < 5
    assert json.loads(out.read_text()) == found
    assert "not the one" in found["about"]["note"]  # such stand-ins were made by nobody
    assert found["speeds"]["copy"] == 3
    assert found["speeds"]["error"] == "it ended with -11: Traceback"
    assert found["tokens"]["bf16"] == {"ok": True}
    assert found["tokens"]["left out"] == "it was not done after 0 s"
    assert is_gone(int((archive / "found.json.pid").read_text()))
    assert found["block"]["error"].startswith("it ended with 7")
    assert found["flex"]["flex"] == {"us": 3.5}
    assert found["flex"]["part_s"] < 0.5


def test_what_would_begin_after_the_deadline_is_left_out(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "DEADLINE_S", 0.3)
    monkeypatch.setattr(parts, "END_S", 0.5)
    monkeypatch.setattr(sys, "executable", str(stand_in(tmp_path, "sleep 9")))
    found = parts.run(archive, ["tokens", "block"], tmp_path / "gpu.json")
    assert "was not done" in found["speeds"]["left out"]
    assert found["tokens"] == found["block"] == {"left out": "after the deadline"}
    assert "products" not in found


def test_budgets_are_more_than_is_thought_and_thoughts_fit_the_deadline() -> None:
    assert all(part.budget_s >= 2 * part.thought_s for part in parts.PARTS.values())
    thoughts = [x.thought_s for name, x in parts.PARTS.items() if not name.startswith("tiles of")]
    assert sum(thoughts) <= parts.DEADLINE_S  # other tiles are tried in what is left


@pytest.mark.parametrize(
    ("says", "status", "told"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"ok": True}),
        ("==== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, {"ok": True}),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors", 9,
         {"ok": False}),
        ("python: no module named numpy", 1, {"ok": False}),
        ("it is done", 0, {"ok": False}),  # nothing was looked at
        ("========= Error: Device not supported. Please refer to the documentation", 1, None),
    ],
)  # fmt: skip
def test_the_sanitizer_is_believed_where_it_looked(
    says: str, status: int, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rows in (("tiny/bf16", 2), ("a model", 9), ("b model", 5), ("operators", 1)):
        (tmp_path / name).mkdir(parents=True)
        weight = f'@w : f32[{rows}] = source "w" : f32[{rows}]'
        text = f'program "p" {{stage=LOWERED}}\nweights {{\n  {weight}\n}}\n'
        (tmp_path / name / "program.dsc").write_text(text)
    (tmp_path / "says").write_text(says)
    tool = stand_in(tmp_path, f"cat {tmp_path}/says; exit {status}", "compute-sanitizer")
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    found: dict[str, Any] = {}
    checks.sanitised("memcheck", tmp_path, {}, found.__setitem__)
    if told is None:
        assert found == {
            "left out": "the sanitizer does not take this device: Device not supported"
        }
        assert bars.judged({"memcheck": found})["memcheck clean"]["missing"].endswith("supported")
        return
    assert [*found] == ["bf16", "b model", "a model"]  # the smallest first
    assert found["bf16"]["ok"] is told["ok"]
    assert bars.judged({"memcheck": found})["memcheck clean"] == told


def test_bars_are_those_of_the_card() -> None:
    half = {"us": 1200.0}
    found: dict[str, Any] = {
        "about": {"layers": {"671b-3l": 3}},
        "moonlight-6l": {"decode at 512": STEP},
        "671b-3l": dict.fromkeys(
            ("decode at 512", "decode at 4096", "decode at 8000", "prefill of 4096"),
            STEP,
        ),
        "671b-3l fp8": {"decode at 512": {"ms": 1.5}, "prefill of 4096": {"error": "no room"}},
        "671b-3l fp8, head too": {"decode at 512": {"ms": 1.3}},
        "block": {"decode at 4096, default": half, "decode at 4096, reduce-overhead": {"us": 590},
                  "prefill of 4096, default": {"error": "no compiler"}},
        "tokens": {"bf16": {"ok": True, "chosen on the device as by the host": False}},
    }  # fmt: skip
    for card, holds in (("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", False)):
        told = bars.judged(found | {"speeds": {"card": card}})
        share = told["moonlight-6l decode at 512, of copy speed"]
        assert share == {"figure": 0.7, "least": 0.65 if holds else 0.75, "ok": holds}
    assert not told["671b-3l decode at 8000, of copy speed"]["ok"]
    assert told["FP8 decode at 512, times as fast as bf16"]["figure"] == pytest.approx(4 / 3, 1e-3)
    head = told["FP8 decode at 512 with the head in FP8 too, times as fast as bf16"]
    assert (head["figure"], head["ok"]) == (1.538, False)
    block = told["attention block, decode at 4096, times as fast as torch.compile"]
    assert (block["figure"], block["ok"]) == (2.95, False)  # the faster of both ways to compile
    block = told["attention block, prefill of 4096, times as fast as torch.compile"]
    assert block["missing"] == "block, prefill of 4096, default, us: no compiler"
    ratio = told["FP8 prefill of 4096, times as fast as bf16"]
    assert ratio["missing"] == "671b-3l fp8, prefill of 4096, ms: no room"
    assert told["tokens of tiny-v3 in bf16"] == {"ok": False}
    other = bars.judged(found | {"speeds": {"card": "NVIDIA L4"}})
    assert other["671b-3l decode at 512, of copy speed"]["least"] is None


def test_a_speed_that_cannot_be_read_leaves_the_others(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Timer:
        def __init__(self, memory: object) -> None:
            self.close = lambda: None

        def copy_speed(self) -> float:
            return 4e12

        def product_speed(self, place: Path, kind: str) -> float:
            if kind == "fp8":
                raise RuntimeError("the product that reads the matrix peak is wrong")
            return 9e14

    (archive / "a model").mkdir()
    (archive / "a model" / "dsc.json").touch()
    driver = SimpleNamespace(kind="cuda", arch="sm_90", close=lambda: None)
    monkeypatch.setattr(steps, "driver_for", lambda place: driver)
    monkeypatch.setattr(steps, "Timer", Timer)
    found: dict[str, Any] = {}
    steps.speeds(archive, {}, found.__setitem__)
    assert (found["copy"], found["bf16"], found["int8"]) == (4e12, 9e14, 9e14)
    assert found["no fp8"] == "RuntimeError: the product that reads the matrix peak is wrong"
    assert steps.speed({"speeds": found}, "copy") == 4e12
    assert math.isnan(steps.speed({"speeds": found}, "fp8"))
    peers = {"speeds": found, "torch's speeds": {"fp8": {"a second": 1e15}}}
    assert steps.speed(peers, "fp8") == 1e15


def test_tokens_agree_where_the_reference_is_sure() -> None:
    import numpy as np

    expected = [(1, 2, 5.0), (0, 2, 6.0), (2, 1, 0.01), (1, 0, 4.0)]
    rows = [[0, 5, 0.02], [6, 0, 0.01], [0, 2.01, 2], [0.01, 4, 0]]
    found = checks.agreement(expected, np.array(rows, np.float32))
    assert (found["ok"], found["same"], found["compared"]) == (True, 3, 3)
    rows[0] = [6, 5, 0]
    assert not checks.agreement(expected, np.array(rows, np.float32))["ok"]
    rows[0] = [0, float("nan"), 0]
    assert not checks.agreement(expected, np.array(rows, np.float32))["ok"]
