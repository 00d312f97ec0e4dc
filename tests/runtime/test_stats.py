"""The table of a profile, from events that are made up: rows, orders, shares, captions, traces."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dsc.ir.ranks import entered
from dsc.runtime import probes, profiler
from dsc.runtime.probes import Machine
from dsc.runtime.profiler import Event, Profiler, Row, entry_span, lengths_of, span
from dsc.runtime.stats import OUTSIDE, cells, entry_rows, grouped, nested, table, working_set

MACHINE = Machine(bandwidth=1e9, matrix=1e10, threads=3, size=5_000_000, dtype="fp32")
RUNS = [
    Event("decode", "entry", 0.0, 10.0, 600, 60, stored=500),
    Event("a", "step", 1.0, 4.0, 100, 10, "model.layers.0.mlp", "k1", 64, stored=50),
    Event("b", "step", 5.0, 2.0, 0, 20, "model.layers.1", "k2", 128),
    Event("decode", "entry", 20.0, 6.0, 600, 60, stored=300),
    Event("a", "step", 20.0, 1.0, 100, 10, "model.layers.0.mlp", "k1", stored=50),
    Event("a", "step", 21.0, 2.0, 100, 10, "model.layers.0.mlp", "k3", stored=50),
    Event("prefill", "entry", 30.0, 8.0, 900, 90, stored=700),
    Event("whole", "step", 50.0, 1.0, 7, 5, "fit.py:12.5"),
]


def rows(group_by: str = "operator", sort_by: str = "name", limit: int = 0) -> list[Row]:
    return grouped(RUNS, sort_by, limit, group_by)


def test_rows_hold_each_runs_seconds_and_the_costs_of_steps() -> None:
    found = {r.name: r for r in rows()}
    assert list(found) == ["a", "b", f"decode {OUTSIDE}", "prefill", "whole"]
    a, rest, prefill = found["a"], found[f"decode {OUTSIDE}"], found["prefill"]
    assert (a.calls, a.seconds, a.bytes, a.flops, a.stored) == (3, 7.0, 300, 30, 150)
    assert list(a.runs.values()) == list(a.self_runs.values()) == [4.0, 3.0]
    assert (a.median, a.self_median, a.least, a.p95) == (3.5, 3.5, 3.0, 4.0)
    assert (rest.calls, rest.seconds, rest.bytes, rest.flops, rest.stored) == (2, 7.0, 0, 0, 0)
    assert list(rest.runs.values()) == [4.0, 3.0]
    assert (prefill.seconds, prefill.bytes, prefill.flops, prefill.stored) == (8.0, 900, 90, 700)
    assert len({run for r in rows() for run in r.runs}) == 4, "runs of entries, and what is alone"


@pytest.mark.parametrize(
    ("sort_by", "first"),
    [
        ("seconds", ["prefill", "a", f"decode {OUTSIDE}", "b", "whole"]),
        ("total", ["prefill", "a", f"decode {OUTSIDE}", "b", "whole"]),
        ("self", ["prefill", "a", f"decode {OUTSIDE}", "b", "whole"]),
        ("calls", ["a", f"decode {OUTSIDE}", "b", "prefill", "whole"]),
        ("bytes", ["prefill", "a", "whole", "b", f"decode {OUTSIDE}"]),
        ("flops", ["prefill", "a", "b", "whole", f"decode {OUTSIDE}"]),
    ],
)
def test_the_largest_row_comes_first_and_equal_ones_by_name(sort_by: str, first: list[str]) -> None:
    assert [r.name for r in rows(sort_by=sort_by)] == first
    assert [r.name for r in rows(sort_by=sort_by, limit=2)] == first[:2]


def test_seconds_are_ordered_by_the_median_of_runs_times_their_number() -> None:
    """Not by their sum: a's slow run counts like its others."""
    events = [Event("a", "step", 10.0 * n, 8.0 if n == 2 else 1.0) for n in range(5)]
    events += [Event("b", "step", 100.0 + 10 * n, 3.0) for n in range(2)]
    for sort_by in ("seconds", "self"):
        assert [r.name for r in grouped(events, sort_by, 0, "operator")] == ["b", "a"]


def test_a_module_has_what_lies_in_it() -> None:
    found = {r.name: r for r in rows("module")}
    names = ["model", "model.layers", "model.layers.0", "model.layers.0.mlp", "model.layers.1"]
    rest = [f"decode {OUTSIDE}", "prefill"]
    assert set(found) == {"(model)", *names, *rest, "fit.py:12.5"}
    assert (found["model"].seconds, found["model"].self_seconds) == (9.0, 0.0)
    assert (found["model"].calls, found["model.layers.0.mlp"].calls) == (0, 3)
    assert (found["(model)"].seconds, found["(model)"].bytes) == (10.0, 307)
    assert found["model.layers.0"].flops == 30
    assert (found["prefill"].bytes, found["prefill"].flops) == (0, 0), "told under operators"


def test_kernels_and_layers_are_groups_of_their_own() -> None:
    assert {r.name: r.calls for r in rows("kernel")} == {
        "k1": 2, "k2": 1, "k3": 1, "whole": 1, f"decode {OUTSIDE}": 2, "prefill": 1,
    }  # fmt: skip
    assert {r.name: r.bytes for r in rows("layer")} == {
        "model.layers.0": 300, "model.layers.1": 0, "fit.py:12.5": 7, f"decode {OUTSIDE}": 0,
        "prefill": 0,
    }  # fmt: skip


def test_what_runs_inside_its_own_group_counts_once() -> None:
    events = [
        Event("f", "step", 0.0, 5.0, loc="m.a"), Event("f", "step", 1.0, 2.0, loc="m.a.b"),
        Event("g", "step", 1.5, 1.0, loc="m"),
    ]  # fmt: skip
    f, g = grouped(events, "name", 0, "operator")
    assert (f.calls, f.seconds, f.self_seconds) == (2, 5.0, 4.0)
    assert (g.calls, g.seconds, g.self_seconds) == (1, 1.0, 1.0)
    modules = {r.name: r.seconds for r in grouped(events, "name", 0, "module")}
    assert modules == {"(model)": 5.0, "m": 5.0, "m.a": 4.0, "m.a.b": 1.0}


def test_an_event_lies_in_another_when_it_begins_and_ends_in_it_to_the_rounding_of_clocks() -> None:
    def around(*spans: tuple[float, float]) -> list[int]:
        events = [Event(str(i), "step", start, seconds) for i, (start, seconds) in enumerate(spans)]
        return [len(outer) for _, _, outer in nested(events)]

    assert around((0, 2), (0, 1), (1, 1)) == [0, 1, 1]
    assert around((1, 1), (0, 2)) == [1, 0]
    assert around((0, 2), (0, 2)) == [0, 1]
    assert around((0, 4), (1, 2), (1, 1), (3, 1)) == [0, 1, 2, 1]
    assert around((0, 2), (1, 1.1)) == [0, 0]
    assert around((0, 2), (1, 1 + 1.9e-6)) == [0, 1]
    assert around((0, 2), (1, 1 + 2.1e-6)) == [0, 0]
    assert around((0, 1e-6), (5e-7, 5e-7 + 0.9e-9)) == [0, 1]
    assert around((0, 1e-6), (5e-7, 5e-7 + 1.1e-9)) == [0, 0]
    (_, alone, _), *_ = nested([Event("a", "step", 0, 1), Event("b", "step", 0, 1 + 1e-7)])
    assert alone == 1
    assert [alone for _, alone, _ in nested([Event("a", "step", 0, 1)] * 2)] == [0.0, 1]


def test_entries_are_told_as_wholes_and_the_largest_sets_the_working_set() -> None:
    decode, prefill = entry_rows(RUNS)
    assert (decode.name, decode.calls, decode.seconds, decode.stored) == ("decode", 2, 16.0, 800)
    assert list(decode.runs.values()) == [10.0, 6.0]
    assert (prefill.name, prefill.stored) == ("prefill", 700)
    assert working_set(RUNS) == 700
    assert working_set(RUNS[:6]) == 400
    assert working_set([]) == 0


@pytest.mark.parametrize(
    ("runs", "p95"),
    [(1, 1.0), (2, 2.0), (19, 19.0), (20, 19.0), (21, 20.0), (40, 38.0), (100, 95.0), (0, 0.0)],
)
def test_95_percent_of_the_runs_keep_within_p95(runs: int, p95: float) -> None:
    row = Row("a", runs={n: float(runs - n) for n in range(runs)})
    assert row.p95 == p95
    assert sum(s <= p95 for s in row.runs.values()) >= 0.95 * runs


def test_a_row_without_runs_is_all_zeros() -> None:
    row = Row("a")
    assert (row.median, row.self_median, row.least, row.p95) == (0.0, 0.0, 0.0, 0.0)
    assert cells(row, 1.0, MACHINE) == [
        "a", "0.000", "0.0%", "0.000", "0.000", "0.000", "-", "-", "-", "-", "-", "-", "-",
    ]  # fmt: skip


def test_a_row_tells_of_one_run() -> None:
    """2 runs of 4 and 2 s, 3 calls: 1.5 a run; 8 MB and 6 GFLOP in all, 6 MB of them stored."""
    row = Row("a", 3, 6.0, 3.0, 8_000_000, 6 * 10**9, 6_000_000, {0: 4.0, 1: 2.0}, {0: 2.0, 1: 1.0})
    slow = Machine(bandwidth=4e6, matrix=4e9, threads=1)
    first = ["a", "1500.000", "75.0%", "3000.000", "2000.000", "4000.000", "1.5", "4.00", "3.000"]
    assert cells(row, 2.0, slow) == [*first, "0.00", "25%", "1.00", "25%"]
    assert cells(row, 2.0, None) == [*first, "0.00", "-", "1.00", "-"]
    at = [Machine(1e6, 1e9, 1), Machine(0.999e6, 0.999e9, 1)]
    assert [(cells(row, 2.0, m)[-3], cells(row, 2.0, m)[-1]) for m in at] == [
        ("100%", "100%"), ("cached", "100%"),
    ]  # fmt: skip


def shown(found: Any) -> list[str]:
    out = Console(file=io.StringIO(), width=200)
    out.print(found)
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def test_the_table_tells_runs_columns_and_what_shares_are_of() -> None:
    found = table(RUNS, "name", 2, "operator", MACHINE)
    assert [str(c.header) for c in found.columns] == [
        "operator", "self ms", "self %", "median ms", "least", "p95", "calls", "MB", "GFLOP",
        "GB/s", "of read", "GFLOP/s", "of matrix",
    ]  # fmt: skip
    assert [c.justify for c in found.columns] == ["left"] + ["right"] * 12
    assert [c.no_wrap for c in found.columns] == [False] + [True] * 12
    assert found.row_count == 2
    assert str(found.caption).splitlines() == [
        "decode: 2 runs, median 8000.000 ms, least 6000.000, p95 10000.000",
        "prefill: 1 runs, median 8000.000 ms, least 8000.000, p95 8000.000",
        "a row tells of one run: the median over runs, the fastest, what 95% of them kept within",
        f"{OUTSIDE}: what a run takes to prepare its inputs and to start and leave the code",
        "read 1.0 GB/s over 5 MB, fp32 matrix product 10 GFLOP/s, 3 threads",
    ]
    total = 3.5 + 2.0 + 3.5 + 8.0 + 1.0  # of all rows, not of those that are shown
    assert f" {3.5 / total:.1%} " in next(line for line in shown(found) if line.startswith("│ a "))
    assert table(RUNS, "name", 0, "operator", MACHINE).row_count == 5
    whole = str(table(RUNS[6:], "name", 0, "operator", None, False).caption).splitlines()
    assert [line.partition(":")[0] for line in whole] == ["prefill", "a row tells of one run"]


def test_a_table_says_what_came_faster_than_was_measured() -> None:
    def said(read: float, computed: float, shares: Machine | None = MACHINE) -> list[str]:
        event = Event("a", "step", 0.0, 1.0, int(read), int(computed), stored=int(read))
        lines = str(table([event], "name", 0, "operator", shares, False).caption).splitlines()
        return [line.partition(":")[0] for line in lines if line.startswith("of ")]

    assert said(1e9, 1e10) == []
    assert said(1e9 + 1, 1e10) == ["of read"]
    assert said(1e9, 1e10 + 1) == ["of matrix"]
    assert said(1e12, 1e13, None) == []


def test_a_machine_is_measured_over_what_a_step_reads_where_shares_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def measured(size: int, coded: bool) -> Machine:
        assert not coded
        asked.append(size)
        return MACHINE

    monkeypatch.setattr(probes, "machine", measured)
    alone = [Event("a", "step", 0.0, 1.0, 5), Event("b", "step", 0.0, 1.0, 0, 5)]
    table(RUNS, "name", 0, "operator", None)
    table(alone[:1], "name", 0, "operator", None)
    table(alone[1:], "name", 0, "operator", None)
    assert asked == [700, probes.READ_BYTES, probes.READ_BYTES]
    table(RUNS, "name", 0, "operator", None, shares=False)
    table(RUNS, "name", 0, "operator", MACHINE)
    table([Event("a", "step", 0.0, 1.0)], "name", 0, "operator", None)
    assert len(asked) == 3


def test_a_machine_is_told_in_its_units_and_shared_by_ranks() -> None:
    assert str(MACHINE) == "read 1.0 GB/s over 5 MB, fp32 matrix product 10 GFLOP/s, 3 threads"
    assert MACHINE.as_dict() == {
        "read_bytes_per_s": 1e9, "read_bytes": 5_000_000, "matrix_flop_per_s": 1e10,
        "matrix_dtype": "fp32", "coded_op_per_s": None,
    }  # fmt: skip
    codes = replace(MACHINE, coded=4e10)
    assert "fp32 matrix product 10 GFLOP/s (of codes 40), 3 threads" in str(codes)
    assert codes.shared(4).coded == 1e10
    part = MACHINE.shared(4)
    assert (part.bandwidth, part.matrix, part.threads, part.size) == (2.5e8, 2.5e9, 3, 5_000_000)


def test_a_reading_is_the_median_of_a_few() -> None:
    readings = iter([5.0, 1.0, 100.0, 4.0, 2.0])
    assert probes.steadily(lambda: next(readings)) == 4.0
    with pytest.raises(StopIteration):
        next(readings)


def test_a_probe_counts_what_its_threads_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least `PASS_BYTES` in a call, by as many passes as that takes, and one before."""
    asked: list[Any] = []

    class Fixed:
        forms = ("a", "b", "c")

        def fill(self, *given: int) -> None:
            asked.append(given[1:])

        def read(self, form: str, address: int, *given: int) -> float:
            asked.append((form, *given))
            return {"a": 4.0, "b": 1.0, "c": 2.0}[form]

    for name, value in (("PASS_BYTES", 10240), ("LEAST_BYTES", 512), ("READ_BYTES", 6144)):
        monkeypatch.setattr(probes, name, value)
    monkeypatch.setattr(probes, "loops", Fixed)
    for threads, size, part, passes in ((2, 1100, 512, 10), (3, 1, 512, 7), (2, 99999, 3072, 2)):
        with probes.ReadProbe(threads, size) as probe:
            assert probe.size == part * threads
            assert asked.pop(0) == (part * threads, threads)
            assert probe.forms == ("b", "c")
            asked.clear()
            assert probe() == part * threads * passes / 1.0
        told = (part * threads, threads)
        assert asked == [(f, *told, n) for f in probe.forms for n in (1, passes)]
        assert not len(probe.memory)
        asked.clear()


def test_a_product_counts_two_operations_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "seconds_of", lambda run: run() is None or 0.5)
    monkeypatch.setattr(probes, "loops", lambda: None)
    for coded in (False, True):
        with probes.MatrixProbe(1, (3, 8, 16), "fp32", coded) as probe:
            assert probe() == 2 * 3 * 8 * 16 / 0.5


def test_products_of_codes_are_held_against_their_own_peak() -> None:
    """A second of each at its peak is the whole; without a peak of their own they share one."""
    event = Event("a", "step", 0.0, 2.0, 0, int(5e10), coded=int(4e10))
    both = replace(MACHINE, coded=4e10)
    for machine, share in ((both, "100%"), (MACHINE, "250%")):
        shown = table([event], "name", 0, "operator", machine)
        assert list(shown.columns[-1].cells) == [share]


# --- spans ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(profiler, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_time_aside_is_taken_out_of_every_span_around_it(clock: list[float]) -> None:
    """What was left out came first: a span ends when it ended."""
    with Profiler() as prof:
        with span("outer", "entry", lambda: (9, 8, 7)):
            clock[0] += 1
            with span("inner", "step"), prof.aside():
                clock[0] += 4
            clock[0] += 2
            with span("later", "step"):
                clock[0] += 0.5
        with span("after", "step"):
            clock[0] += 1
    assert prof.events == [
        Event("inner", "step", 105.0, 0.0),
        Event("later", "step", 107.0, 0.5),
        Event("outer", "entry", 104.0, 3.5, 9, 8, stored=7),
        Event("after", "step", 107.5, 1.0),
    ]


def test_events_keep_the_order_in_which_they_were_reported() -> None:
    first, second, third = (Event(name, "step", 0.0, 1.0) for name in "abc")
    closed: list[int] = []
    with Profiler([first]) as prof:
        prof.later(lambda: [second])
        prof.add(third)
        prof.at_end(lambda: closed.append(1))
        prof.at_end(lambda: closed.append(2))
        assert closed == []
    assert closed == [1, 2]
    assert prof.events == [first, second, third] == prof.events


def test_lengths_are_plain_numbers() -> None:
    assert lengths_of({}) is None
    assert lengths_of({"lengths": iter("12")}) == [1, 2]


def test_a_run_of_an_entry_costs_what_its_shapes_say(clock: list[float]) -> None:
    from dsc.ir.parser import parse_program

    text = "graph main(%x: f32[N,4], %w: f32[5,4]) { %y = linear %x, %w return %y }"
    ((_, graph),) = parse_program(text).entries.items()
    shapes = {"x": (3, 4), "w": (5, 4)}
    given = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    with entry_span(graph, given):
        clock[0] += 1
    with Profiler() as prof, entry_span(graph, given):
        clock[0] += 1
    moved, flops = 4 * (3 * 4 + 5 * 4 + 3 * 5), 2 * 3 * 5 * 4
    assert prof.events == [Event("main", "entry", 101.0, 1.0, moved, flops)]


# --- the trace ------------------------------------------------------------------------------------


def test_a_trace_tells_times_from_its_first_event_in_microseconds(tmp_path: Path) -> None:
    events = [
        Event("b", "step", 2.5, 0.5, 3, 4, "m", "k", 64),
        Event("e", "entry", 2.0, 1.0),
        Event("r", "collective", 2.25, 0.25, live=0),
    ]
    Profiler(events).export_chrome_trace(tmp_path / "t.json")
    told = json.loads((tmp_path / "t.json").read_text())
    assert told["displayTimeUnit"] == "ms"
    spans = [e for e in told["traceEvents"] if e["ph"] == "X"]
    none = {"bytes": 0, "flops": 0, "loc": "", "kernel": ""}
    assert spans == [
        {"name": "b", "cat": "step", "ph": "X", "pid": 0, "tid": 2, "ts": 5e5, "dur": 5e5,
         "args": {"bytes": 3, "flops": 4, "loc": "m", "kernel": "k"}},
        {"name": "e", "cat": "entry", "ph": "X", "pid": 0, "tid": 0, "ts": 0, "dur": 1e6,
         "args": none},
        {"name": "r", "cat": "collective", "ph": "X", "pid": 0, "tid": 1, "ts": 2.5e5,
         "dur": 2.5e5, "args": none},
    ]  # fmt: skip
    counters = [(e["ts"], e["args"], e["tid"]) for e in told["traceEvents"] if e["ph"] == "C"]
    assert counters == [(5e5, {"arena": 64}, 0), (2.5e5, {"arena": 0}, 0)]
    named = [(e["name"], e["tid"], e["args"]) for e in told["traceEvents"] if e["ph"] == "M"]
    assert named == [
        ("process_name", 0, {"name": "dsc"}),
        ("thread_name", 0, {"name": "steps"}), ("thread_sort_index", 0, {"sort_index": 0}),
        ("thread_name", 1, {"name": "between ranks"}), ("thread_sort_index", 1, {"sort_index": 1}),
        ("thread_name", 2, {"name": "operators"}), ("thread_sort_index", 2, {"sort_index": 2}),
    ]  # fmt: skip


def test_a_trace_without_events_names_its_process_and_its_rank(tmp_path: Path) -> None:
    group: Any = SimpleNamespace(rank=1, size=2)
    with entered(group):
        Profiler().export_chrome_trace(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"] == [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "dsc, rank 1"}}
    ]
