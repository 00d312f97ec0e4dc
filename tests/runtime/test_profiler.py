"""The profiler: what is collected, the table, the trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dsc
from dsc.runtime.profiler import Event, Profiler, active, span

from .test_session import BACKENDS, small_lm


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reports(backend: str, tmp_path: Path) -> None:
    compiled = dsc.compile(small_lm(), backend=backend, max_context=32, prefill_chunk=8)
    session = compiled.session(max_batch=1)
    session.prefill([[1, 2, 3]])
    with dsc.Profiler() as prof:
        for _ in range(3):
            session.decode([4])
    session.decode([5])
    rows = {row.name: row for row in prof.rows()}
    assert rows["decode"].calls == 3
    if backend == "reference":
        assert rows["rms_norm"].calls == 3
        inside = sum(e.seconds for e in prof.events if e.category == "step")
        assert 0 < inside <= rows["decode"].seconds
    prof.export_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(trace) == len(prof.events)
    assert all(e["ph"] == "X" and e["dur"] >= 0 for e in trace)


def test_nothing_is_collected_outside() -> None:
    assert active() is None
    with Profiler() as outer:
        with Profiler() as inner, span("a", "step"):
            pass
        with span("b", "step"):
            pass
    assert [e.name for e in inner.events] == ["a"]
    assert [e.name for e in outer.events] == ["b"]
    assert active() is None


def test_rows_sum_and_sort(capsys: pytest.CaptureFixture[str]) -> None:
    prof = Profiler(
        [Event("a", "step", 0, 2.0, 100), Event("b", "step", 0, 3.0), Event("a", "step", 0, 2.0)]
    )
    assert [(r.name, r.calls, r.seconds, r.bytes) for r in prof.rows()] == [
        ("a", 2, 4.0, 100), ("b", 1, 3.0, 0),
    ]  # fmt: skip
    assert [r.name for r in prof.rows("name")] == ["a", "b"]
    assert [r.name for r in prof.rows("calls", row_limit=1)] == ["a"]
    prof.print_stats()
    assert "57.1%" in capsys.readouterr().out


def test_an_error_leaves_no_profiler_behind() -> None:
    with pytest.raises(ZeroDivisionError), Profiler():
        torch.tensor(1 // 0)
    assert active() is None
