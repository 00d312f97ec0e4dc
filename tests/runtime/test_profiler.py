"""The profiler: what every backend reports, the table, the trace, the costs beside the times."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import dsc
from dsc.api import compile_program
from dsc.errors import UsageError
from dsc.ir.graph import Graph
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_source, sources
from dsc.runtime.costs import moved, real_sizes
from dsc.runtime.placing import place
from dsc.runtime.plan import Draft, Launch, Ref, live_bytes
from dsc.runtime.probes import Machine
from dsc.runtime.profiler import Event, Profiler, active, span
from dsc.runtime.stats import OUTSIDE, ROOT, cells, entry_rows, nested

from .test_session import BACKENDS, small_lm

MACHINE = Machine(bandwidth=1e9, matrix=1e10, threads=1)
MOE = """program "moe" {stage=CANONICAL}
symbols {N=[1,16]}
weights { @gate : f32[8,4] = source "gate" : f32[8,4]
@up : f32[8,12,4] = source "up" : f32[8,12,4]
@down : f32[8,4,6] = source "down" : f32[8,4,6]
}
graph main(%x: f32[N,4]) {
 %idx, %w = route %x, @gate {score="sigmoid", top_k=2, normalise=true}
 %y = experts %x, %idx, %w, @up, @down
 return %y as "y"
}
"""
EXPERT = 4 * (12 * 4 + 4 * 6)
"""Bytes of one expert of `MOE`."""


@pytest.fixture(scope="module", params=BACKENDS)
def profiled(request: pytest.FixtureRequest) -> Profiler:
    """Three decode steps of the small language model, after one that is not profiled."""
    compiled = dsc.compile(small_lm(), backend=request.param, max_context=32, prefill_chunk=8)
    session = compiled.session(max_batch=1)
    session.prefill([[1, 2, 3]])
    session.decode([5])
    with dsc.Profiler() as prof:
        for _ in range(3):
            session.decode([4])
    session.decode([5])
    return prof


def test_every_backend_reports_every_step(profiled: Profiler) -> None:
    rows = {row.name: row for row in profiled.rows()}
    (entry,) = entry_rows(profiled.events)
    assert (entry.name, entry.calls, len(entry.runs)) == ("decode", 3, 3)
    assert rows["rms_norm"].calls >= 3
    assert any("latent_attention" in name for name in rows)
    steps = [e for e in profiled.events if e.category == "step"]
    inside = sum(e.seconds for e in steps)
    assert 0 < inside <= entry.seconds
    rest = rows[f"decode {OUTSIDE}"]
    assert "decode" not in rows
    assert rest.seconds == rest.self_seconds == pytest.approx(entry.seconds - inside, rel=0.05)


def test_steps_lie_within_their_entries(profiled: Profiler) -> None:
    entries = [e for e in profiled.events if e.category == "entry"]
    for event, _, outer in nested(profiled.events):
        assert [o.category for o in outer] == ([] if event.category == "entry" else ["entry"])
    assert len(entries) == 3


def test_costs_are_those_of_the_run(profiled: Profiler) -> None:
    """The head reads f32[9,8] once and multiplies one row by it, on every backend."""
    entry, *rest = (e for e in profiled.events if e.category == "entry")
    head = 2 * 8 * 9
    weights = 4 * (9 * 8 + 24 * 8 + 10 * 8 + 8 * 12 + 20 * 6)
    assert weights < entry.bytes < 3 * weights
    assert 10 * head < entry.flops < 100 * head
    steps = [e for e in profiled.events if e.category == "step"]
    for cost in ("flops", "bytes"):
        inside = sum(getattr(e, cost) for e in steps)
        assert inside == pytest.approx(sum(getattr(e, cost) for e in (entry, *rest)), rel=0.02)


def test_the_trace_holds_spans_and_live_bytes(profiled: Profiler, tmp_path: Path) -> None:
    profiled.export_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X"]
    counters = [e for e in trace if e["ph"] == "C"]
    assert len(spans) == len(profiled.events)
    assert all(e["dur"] >= 0 for e in spans)
    assert len(counters) == sum(e.live is not None for e in profiled.events)


def test_a_trace_names_its_process_and_threads_and_each_is_a_stack(
    profiled: Profiler, tmp_path: Path
) -> None:
    profiled.export_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in trace if e["ph"] == "M"}
    assert names["process_name", 0, 0] == {"name": "dsc"}
    spans = sorted((e for e in trace if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"]))
    assert spans[0]["ts"] == 0
    threads = {e["cat"]: names["thread_name", e["pid"], e["tid"]]["name"] for e in spans}
    assert threads == {"entry": "steps", "step": "operators"}
    for tid in {e["tid"] for e in spans}:
        own = [e for e in spans if e["tid"] == tid]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(own))  # us


def test_live_bytes_follow_the_plan() -> None:
    kind = TensorType(DType.f32, (16,))
    draft = Draft()
    a, b, c = (draft.add("arena", name, kind.nbytes) for name in "abc")
    out = draft.add("output", "y", kind.nbytes)
    for read, written in ((None, a), (a, b), (b, c), (c, out)):
        refs = () if read is None else (Ref(read, "r", 64),)
        draft.launches.append(Launch("k", (*refs, Ref(written, "w", 64))))
    plan = place(draft, {})
    assert plan.buffers[a].offset == plan.buffers[c].offset != plan.buffers[b].offset
    assert live_bytes(plan, {}) == [64, 128, 128, 64]


def test_tvm_tells_live_bytes(tmp_path: Path) -> None:
    made = dsc.compile(small_lm(), backend="tvm", max_context=32, prefill_chunk=8)
    folder = made.save(tmp_path / "out")
    session = dsc.load(folder, trust=True).session(max_batch=1)
    with dsc.Profiler() as prof:
        session.prefill([[1, 2, 3]])
    live = [e.live for e in prof.events if e.category == "step"]
    (plan,) = (json.loads(path.read_text()) for path in folder.rglob("plan.json"))
    most = max(e["arena_bytes"] for e in plan["entries"].values())
    assert all(n is not None and 0 <= n <= most for n in live)
    assert max(n or 0 for n in live) > 0


def moe() -> Program:
    keys = {s.key: s.type for e in parse_program(MOE).weights.values() for s in sources(e)}
    return parse_program(MOE, random_source(keys))


@pytest.mark.parametrize("backend", ["reference", "tvm"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_bytes_of_experts_are_those_that_were_read(backend: str, rows: int) -> None:
    compiled = dsc.compile(moe(), backend=backend)
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    gate = dsc.compile(moe(), backend="reference").executable
    weight = vars(gate)["_interpreter"].weight("gate")
    distinct = len(torch.nn.functional.linear(x, weight).sigmoid().topk(2, -1)[1].unique())
    with dsc.Profiler() as prof:
        compiled.run({"x": x})
    (experts,) = [e for e in prof.events if "experts" in e.name]
    others = rows * (4 + 4) * 4 + rows * 2 * (8 + 4)  # x and y, indices and weights
    assert experts.bytes == distinct * EXPERT + others
    assert experts.flops == 2 * rows * 2 * (12 * 4 + 4 * 6)


def test_a_cache_counts_the_rows_that_hold_tokens() -> None:
    graph: Graph = dsc.compile(small_lm(), backend="tvm").program.entries["decode"]
    node = next(n for n in graph.nodes if n.op == "latent_attention")
    sizes = {"B": 2, "C": 1000, "L": 1}
    full = moved(graph, node, sizes)
    held = moved(graph, node, real_sizes(graph, sizes, [10, 28]))
    assert full.caches == 2 * 1000 * 10 * 4
    assert held.caches == 2 * 20 * 10 * 4


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


def test_time_aside_is_not_counted() -> None:
    import time

    with Profiler() as prof, span("a", "step"), prof.aside():
        time.sleep(0.05)
    assert prof.events[0].seconds < 0.04


TREE = [
    Event("decode", "entry", 0.0, 10.0),
    Event("linear", "step", 1.0, 4.0, 8_000_000_000, 2, "model.layers.0.mlp.up", "gemm_1"),
    Event("linear", "step", 5.0, 2.0, 100, 2, "model.layers.0.mlp", "gemm_2"),
    Event("norm", "step", 8.0, 1.0, 0, 0, "model.layers.1", "norm_0"),
]


def test_rows_sum_and_sort(capsys: pytest.CaptureFixture[str]) -> None:
    prof = Profiler(TREE)
    rows = prof.rows()
    rest = f"decode {OUTSIDE}"
    assert [(r.name, r.calls, r.seconds, r.self_seconds) for r in rows] == [
        ("linear", 2, 6.0, 6.0), (rest, 1, 3.0, 3.0), ("norm", 1, 1.0, 1.0),
    ]  # fmt: skip
    assert [r.name for r in prof.rows("name")] == [rest, "linear", "norm"]
    assert [r.name for r in prof.rows("self", row_limit=1)] == ["linear"]
    prof.print_stats(machine=MACHINE)
    shown = capsys.readouterr().out
    assert "60.0%" in shown
    assert rest in shown
    assert "norm" in shown, "without a limit every row is shown"
    prof.print_stats(row_limit=2, machine=MACHINE)
    assert "norm" not in capsys.readouterr().out
    assert "decode: 1 runs, median 10000.000 ms" in shown


def test_one_slow_run_moves_no_median() -> None:
    events = []
    for run in range(20):
        start, slow = 100.0 * run, 90.0 if run == 7 else 1.0
        events += [
            Event("decode", "entry", start, slow + 2.0),
            Event("a", "step", start, slow, 0, 0, "model.layers.0"),
            Event("b", "step", start + slow, 2.0, 0, 0, "model.layers.1"),
        ]
    a, b = sorted(Profiler(events).rows("name", group_by="layer")[1:], key=lambda r: r.name)
    assert (a.median, a.least, a.p95, max(a.runs.values())) == (1.0, 1.0, 1.0, 90.0)
    assert (b.median, b.self_median, len(b.runs)) == (2.0, 2.0, 20)
    assert next(r.name for r in Profiler(events).rows("self")) == "b"
    assert cells(b, a.self_median + b.self_median, None)[2] == "66.7%"


def test_shares_are_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """What was read faster than the probe reads lay in caches; a peak that is passed was none."""
    events = [
        Event("a", "step", 0.0, 1.0, 10**10, 2 * 10**10, stored=2 * 10**9),
        Event("b", "step", 1.0, 1.0, 10**10, 10**10, stored=10**8),
    ]
    first, second = Profiler(events).rows("name")
    assert [cells(r, 2.0, MACHINE)[-3] for r in (first, second)] == ["cached", "10%"]
    assert [cells(r, 2.0, MACHINE)[-1] for r in (first, second)] == ["200%", "100%"]
    Profiler(events).print_stats(machine=MACHINE)
    assert "above 100% where a row computes faster than the product" in capsys.readouterr().out


def test_groups() -> None:
    prof = Profiler(TREE)
    rest = f"decode {OUTSIDE}"
    assert {r.name for r in prof.rows(group_by="kernel")} == {rest, "gemm_1", "gemm_2", "norm_0"}
    layers = {r.name: r.seconds for r in prof.rows(group_by="layer")}
    assert layers == {rest: 3.0, "model.layers.0": 6.0, "model.layers.1": 1.0}
    modules = {r.name: (r.seconds, r.self_seconds) for r in prof.rows(group_by="module")}
    assert modules["model.layers.0.mlp"] == (6.0, 2.0)
    assert modules["model.layers"] == (7.0, 0.0)
    assert modules[ROOT] == (7.0, 0.0)


@pytest.mark.parametrize("wrong", [{"sort_by": "size"}, {"group_by": "colour"}])
def test_an_unknown_choice_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong.values()))):
        Profiler(TREE).rows(**wrong)  # type: ignore[arg-type]


def test_a_row_shows_shares_of_the_machine() -> None:
    row = Profiler([Event("x", "step", 0.0, 2.0, 10**9, 10**10, stored=10**9)]).rows()[0]
    assert cells(row, 2.0, MACHINE)[-4:] == ["0.50", "50%", "5.00", "50%"]


def test_an_error_leaves_no_profiler_behind() -> None:
    with pytest.raises(ZeroDivisionError), Profiler():
        torch.tensor(1 // 0)
    assert active() is None


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime", "reference"])
def test_one_thread_computes_what_two_do(backend: str) -> None:
    compiled = dsc.compile(small_lm(), backend=backend, max_context=32, prefill_chunk=8)
    ids = np.arange(8)[None] % 9
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            found.append(compiled.session(threads=threads).prefill(ids))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[2])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-6)


def test_threads_that_cannot_be_had_are_an_error() -> None:
    compiled = dsc.compile(small_lm(), backend="tvm", max_context=32, prefill_chunk=8)
    with pytest.raises(UsageError, match="100 threads"):
        compiled.set_threads(100)
    with pytest.raises(UsageError, match="pinned"):
        compiled.set_threads(100, pin=True)
    compiled.session(pin=False).prefill([[1]])
    null = dsc.compile(small_lm(), backend="null", max_context=32, prefill_chunk=8)
    with pytest.raises(UsageError, match="no threads"):
        null.set_threads(1)


def test_a_program_without_symbols_has_a_profile() -> None:
    text = """program "p" {stage=CANONICAL}
graph main(%x: f32[3,4]) {
 %a = softmax %x
 %y = exp %a
 return %y
}
"""
    compiled = compile_program(parse_program(text), backend="tvm", fusion_level=0)
    with dsc.Profiler() as prof:
        for _ in range(2):
            compiled.run({"x": torch.zeros(3, 4)})
    rows = {row.name: row.calls for row in prof.rows()}
    assert rows["softmax"] == rows["exp"] == 2
