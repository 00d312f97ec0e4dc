"""What the verbs print, line by line: tables of a report, of a measurement, of a comparison."""

from __future__ import annotations

import io
import json
import resource
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from dsc import verification
from dsc.cli import bench, console, measuring, profile, verify
from dsc.cli.kernel_tables import print_kernels
from dsc.cli.report_tables import human_count, print_report
from dsc.ir.formats import Format
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.report import cache_bytes
from dsc.runtime import limit, probes
from dsc.runtime.profiler import Event
from dsc.runtime.protocol import Turn, take_turns
from dsc.verification import Check, Comparison

from .conftest import VOCAB, CountingModel, CountingSession, FakeApi, Invoke

# --- a report -------------------------------------------------------------------------------------

COSTS = {
    "weight_bytes": 4000, "read_bytes": 1500, "written_bytes": 20, "flops": 7, "parameters": 1000,
}  # fmt: skip
LAYER = {"nodes": 3, "regions": {"gemm": 1, "norm": 2}, "cache_bytes_per_token": 40, **COSTS}
REPORT = {
    "parameters": 70_272,
    "cache_bytes_per_token": 70_272,
    "seconds": {"trace": 1.234, "passes": 0.5},
    "passes": [
        {
            "name": "absorb_mla", "text": "absorb_mla{entries=[decode]}", "seconds": 0.0126,
            "nodes": {"decode": 20, "prefill": 30}, "changed": True, "fired": {"absorb": 2},
            "places": {"absorb": ["model.layers.0.attn", "model.layers.1.attn"]},
            "missed": [
                ["absorb", "model.layers.0", "too long"], ["absorb", "model.layers.1", "too long"],
                ["absorb", "", "a mask"],
            ],
        },
        {"name": "fuse", "nodes": {"decode": 9}, "changed": True},
        {"name": "own_outputs", "fired": {"copy": 1}, "missed": []},
        {"seconds": 1},
    ],
    "entries": {
        "decode": {
            "nodes": 9, "launches": 4, "at": {"B": 1, "P": 8},
            "arena_bytes": 64, "arena_lower_bound": 0,
            "points": [
                {"at": {"P": 8, "B": 1}, **COSTS}, {"at": {"P": 9, "B": 1}, **COSTS, "flops": 1e12},
            ],
            "layers": [
                {"layer": "embed", **LAYER, "regions": {}, "cache_bytes_per_token": 0},
                {"layer": "layers.0", **LAYER, "launches": 2},
                {"layer": "layers.1", **LAYER, "launches": 2},
                {"layer": "layers.2", **LAYER, "nodes": 4},
            ],
        },
        "prefill": {"nodes": 8, "points": [{"at": {"S": 512}, **COSTS}]},
    },
    "packed": {
        "bytes": 3100, "ranks": 2, "layers": [
            {"layer": "embed", "bytes": 100, "formats": {"bf16": 100}},
            *({"layer": f"layers.{i}", "bytes": 1500, "formats": {"f32": 20, "i8": 1480}}
              for i in range(2)),
        ],
    },
    "notes": ["a note", "and " + chr(7)],
}  # fmt: skip
SHOWN = """\
parameters            70.27 k
cache, a token        70,272 B
weights, packed       3,100 B, each of 2 ranks
seconds               trace 1.23, passes 0.50

passes
pass                            ms  nodes  fired                                 missed
absorb_mla{entries=[decode]}    13  20+30  absorb x2 (model.layers.{0..1}.attn)       3
fuse                             0      9  changed                                    -
own_outputs                      0         copy x1                                    -
?                             1000         -                                          -
  absorb_mla: absorb did not fire at model.layers.{0..1}: too long
  absorb_mla: absorb did not fire: a mask

entries, a step
entry    at       nodes  launches  params  weights    read  written    flop  arena  at least
decode   B=1 P=8      9         4  1.00 k   4.0 kB  1.5 kB     20 B       7   64 B         -
         B=1 P=9                   1.00 k   4.0 kB  1.5 kB     20 B  1.00 T
prefill  S=512        8         -  1.00 k   4.0 kB  1.5 kB     20 B       7      -         -

decode by layer (B=1 P=8), each
layer          nodes  launches  params  weights    read  written  flop  cache/token  regions
embed              3         -  1.00 k   4.0 kB  1.5 kB     20 B     7            -  -
layers.{0..1}      3         2  1.00 k   4.0 kB  1.5 kB     20 B     7         40 B  gemm, norm x2
layers.2           4         -  1.00 k   4.0 kB  1.5 kB     20 B     7         40 B  gemm, norm x2

packed weights, of each of 2 ranks
layer            each  together  in
embed           100 B     100 B  bf16 100 B
layers.{0..1}  1.5 kB    3.0 kB  i8 1.5 kB, f32 20 B
all            3.1 kB    3.1 kB  i8 3.0 kB, bf16 100 B, f32 40 B
note: a note
note: and ?
"""


def shown(report: dict[str, Any], entry: str | None = None) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=160, highlight=False), report, entry)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def test_a_report_is_shown_to_the_letter() -> None:
    assert shown(REPORT) == SHOWN
    assert shown({}) == "the report is empty\n"
    assert shown({"entries": {}}) == ""
    alone = shown(REPORT, "prefill")
    assert "entries, a step" in alone
    assert "S=512" in alone
    assert "decode by layer" not in alone
    assert "B=1" not in alone


def test_kernels_are_told_apart_from_their_launches() -> None:
    """A kernel of no modelled step has no line among launches, and is counted below them."""
    static = {
        "target": "sm_90", "warps": 4, "registers": 32, "spill_bytes": 0, "shared": 512,
        "programs": 16, "occupancy": 1.0, "bound": "warps", "matrix": {},
    }  # fmt: skip
    part = {"launches": 3, "bytes": 2_000, "stored": 1_000, "flops": 7_000_000_000}
    report = {
        "kernels": [
            {**static, "kernel": "gemm_1", "in": {"decode": part}},
            {**static, "kernel": "sample_2", "in": {}},
        ],
        "choices": [], "steps": [], "assumptions": ["a line"],
    }  # fmt: skip
    shown = io.StringIO()
    print_kernels(Console(file=shown, width=100), report)
    kernels, launches = shown.getvalue().split("launches for sm_90")
    assert "sample_2" in kernels
    assert "gemm_1" in kernels
    assert "x3 2.0 kB/1.0 kB 7.00 G" in launches
    assert "sample_2" not in launches
    assert "1 more" in launches


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (999, "999"), (1000, "1.00 k"), (999_999, "1000.00 k"), (1_000_000, "1.00 M"),
        (1_000_000_000, "1.00 B"), (10**12, "1.00 T"), (2_500_000_000_000, "2.50 T"), (0, "0"),
    ],
)  # fmt: skip
def test_a_number_of_things_is_spelled(count: float, said: str) -> None:
    assert human_count(count) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1000.0 kB"), (1e6, "1.0 MB"),
        (21.6e9, "21.6 GB"), (1e12, "1.0 TB"), (2.5e15, "2500.0 TB"),
    ],
)  # fmt: skip
def test_a_number_of_bytes_is_spelled(count: float, said: str) -> None:
    assert console.human_bytes(count) == said


# --- bench ----------------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts that hold what the verbs that measure ask for."""
    monkeypatch.setattr(CountingModel, "limits", (4, 4096))


class FixedProbe:
    """Reads a speed that is known; keeps what it was asked to read."""

    asked: ClassVar[list[tuple[int, Any]]] = []
    reads = 1e15

    def __init__(self, threads: int, size: int = 0, dtype: str = "") -> None:
        self.asked.append((threads, size or dtype))
        self.size, self.dtype = size, dtype

    def __enter__(self) -> FixedProbe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self) -> float:
        return self.reads if self.size else 8e15


@pytest.mark.usefixtures("room")
def test_bench_reads_as_much_as_all_ranks_and_judges_by_a_ranks_share(
    api: FakeApi, invoke: Invoke, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FixedProbe, "asked", [])
    monkeypatch.setattr(probes, "ReadProbe", FixedProbe)
    monkeypatch.setattr(probes, "MatrixProbe", FixedProbe)
    monkeypatch.setattr(measuring, "machine_threads", lambda _: (3, 2))
    line = ("bench", str(artifact), "--prompt-len=8", "--context=20", "--tokens=2", "--rounds=1")
    found = json.loads(invoke(*line, "--repeats=1", "--batch=3", "--json").stdout)
    program = api.model.program
    prompt = limit.prefill_work(program, 3, 8, 8)
    step = limit.step_work(program, 3, 1, 20 + 2)
    reads = [2 * limit.working_set(work) for work in (step, prompt)]
    assert FixedProbe.asked == [(3, reads[0]), (3, "fp32"), (3, reads[1])]
    for phase, work, tokens in (("prefill", prompt, 24), ("decode", step, 3)):
        seconds = found[phase]["median_ms"] / 1e3
        least = limit.limit_seconds(work, 1e15 / 2, 8e15 / 2)
        assert found[phase]["of_limit"] == pytest.approx(least / seconds)
        assert found[phase]["tokens_per_s"] == pytest.approx(tokens / seconds)
    assert (found["ranks"], found["threads"], found["batch"]) == (2, 3, 3)
    assert (found["prefill"]["tokens"], found["decode"]["context"]) == (8, 20)
    assert found["machine"]["read_bytes"] == reads[0]
    assert api.model.sessions == [(3, 24)] + 3 * [(3, 8)]  # decoding, then prefills and a warm-up


def test_bench_times_steps_after_a_warm_up() -> None:
    calls: list[Any] = []

    class Session:
        def prefill(self, ids: Any) -> None:
            calls.append(("prefill", ids.shape))

        def decode(self, ids: Any) -> None:
            calls.append(("decode", *ids))

    made: list[Any] = []

    def session(**asked: int) -> Session:
        made.append(asked)
        return Session()

    turns = bench.measure_decode(Session(), VOCAB, 1, 5, 3, 2, lambda: 1.0)
    assert [len(turn.seconds) for turn in turns] == [3, 3]
    (first, *steps) = calls
    assert first == ("prefill", (1, 5))
    ids = measuring.random_ids(VOCAB, 1, 3)[0]
    assert steps == 3 * [("decode", each) for each in ids]
    calls.clear()
    model = SimpleNamespace(session=session)
    turns = bench.measure_prefill(model, VOCAB, 2, 7, 4, lambda: 1.0)
    assert [len(turn.seconds) for turn in turns] == [1, 1, 1, 1]
    assert calls == 5 * [("prefill", (2, 7))]
    assert made == 5 * [{"max_batch": 2, "max_context": 7}]


def test_a_bench_says_how_many_rounds_are_done() -> None:
    said: list[tuple[str, int, int]] = []

    def progress(*step: Any) -> None:
        said.append(step)

    probe = bench.told(lambda: 2.5, progress, "decode", 3)
    turns = take_turns(probe, lambda: [1.0], 3)
    assert {turn.before for turn in turns} == {2.5}
    assert said == [("decode", done, 3) for done in (0, 0, 1, 2, 3)]


def test_a_summary_counts_steady_rounds_alone_where_there_are_any() -> None:
    """Rounds whose probes are a tenth apart stay; the limit is that at the mean of the two."""
    turns = [
        Turn(1.0, (1.0, 3.0), 1.0), Turn(0.9, (2.0, 2.0), 1.0), Turn(0.5, (9.0, 9.0), 1.0),
    ]  # fmt: skip
    found = bench.summary(turns, 6, lambda speed: speed / 2)
    share = [0.5 / 2, 0.475 / 2]
    assert found == {
        "tokens_per_s": 3.0, "median_ms": 2000.0, "quartiles_ms": [1750.0, 2250.0],
        "of_limit": sum(share) / 2,
        "of_limit_quartiles": pytest.approx([0.240625, 0.246875]), "limit_note": "",
        "limit_passed": False,
        "steps": 4, "rounds": 3, "rounds_dropped": 1,
    }  # fmt: skip
    none = bench.summary(turns[2:], 6, None, "code for a GPU")
    assert (none["median_ms"], none["rounds"], none["rounds_dropped"]) == (9000.0, 1, 1)


@pytest.mark.parametrize(
    ("share", "told", "said"),
    [
        (1.0, True, ""),
        (1.02, True, ""),
        (1.03, True, "steps are faster than the probes say that they can be, 1.03 times"),
        (1.1, True, "steps are faster than the probes say that they can be, 1.10 times"),
        (1.2, False, "steps are faster than the probes say that they can be, 1.20 times"),
    ],
)
def test_a_share_above_one_is_explained(share: float, told: bool, said: str) -> None:
    found = bench.summary([Turn(1.0, (1.0,), 1.0)], 1, lambda _: share)
    assert (found["of_limit"] is not None) == told
    assert found["limit_note"].endswith(said)
    assert bool(found["limit_note"]) == found["limit_passed"] == bool(said)


def test_bench_prints_both_phases_and_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    phase = {
        "tokens_per_s": 1234.56, "median_ms": 1.5, "quartiles_ms": [1.25, 2.0], "of_limit": 0.756,
        "limit_note": "", "rounds": 15, "rounds_dropped": 2,
    }  # fmt: skip
    result = {
        "prefill": phase,
        "decode": {**phase, "of_limit": None, "limit_note": "no share"},
        "machine": {
            "read_bytes_per_s": 40.26e9, "read_bytes": 5_000_000, "matrix_dtype": "bf16",
            "matrix_flop_per_s": 812.4e9, "coded_op_per_s": None,
        },
        "ranks": 2, "threads": 4, "load_s": 0.126, "peak_rss_bytes": 7_340_000_000,
    }  # fmt: skip
    bench._show(result)
    step = "    1234.6 tokens/s   1.500 ms a step (quartiles 1.250 to 2.000)"
    machine = (
        "machine  read 40.3 GB/s over 5.0 MB, bf16 matrix product 812 GFLOP/s, 4 threads;"
        " loaded in 0.13 s, peak RSS 7.3 GB"
    )
    assert capsys.readouterr().out.splitlines() == [
        f"prefill  {step}   76% of the limit   2 of 15 rounds dropped",
        f"decode   {step}   2 of 15 rounds dropped",
        "         no share",
        machine + " on each of 2 ranks",
    ]
    bench._show({**result, "ranks": 1})
    assert capsys.readouterr().out.splitlines()[-1] == machine
    restless = {**phase, "rounds_dropped": 15}
    bench._show({**result, "prefill": restless})
    assert "limit   of all 15 rounds, none of which was steady" in capsys.readouterr().out
    told: Any = result["machine"]
    bench._show({**result, "machine": {**told, "coded_op_per_s": 2e12}})
    assert "812 GFLOP/s (of codes 2000), 4 threads" in capsys.readouterr().out


@pytest.mark.parametrize(("system", "most"), [("darwin", 7), ("linux", 7168)])
def test_the_most_memory_is_in_bytes(
    system: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert bench.peak_rss() == most


# --- profile --------------------------------------------------------------------------------------


class Noted(CountingSession):
    """Notes what it is asked, and reports steps while it is profiled."""

    calls: ClassVar[list[Any]] = []

    def prefill(self, ids: Any, all_logits: bool = False) -> Any:
        self.calls.append(("prefill", ids.shape))
        return super().prefill(ids, all_logits)

    def decode(self, next_ids: Any) -> Any:
        self.calls.append(int(next_ids[0]))
        return None


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> type[Noted]:
    """Sessions that note what they are asked."""
    monkeypatch.setattr(Noted, "calls", [])

    def session(self: CountingModel, max_batch: int, max_context: int) -> Noted:
        self.sessions.append((max_batch, max_context))
        return Noted(max_batch, max_context)

    monkeypatch.setattr(CountingModel, "session", session)
    return Noted


@pytest.mark.usefixtures("room")
def test_a_profile_of_decoding_warms_up_with_tokens_of_its_own(
    api: FakeApi, invoke: Invoke, artifact: Any, noted: type[Noted], monkeypatch: Any
) -> None:
    asked: list[Any] = []
    speed = probes.Machine(1e9, 4e9, 3)

    def machine(*given: Any) -> probes.Machine:
        asked.append(given)
        return speed

    monkeypatch.setattr(probes, "machine", machine)
    monkeypatch.setattr(measuring, "machine_threads", lambda _: (3, 2))
    line = ("profile", str(artifact), "--context=9", "--tokens=5", "--warmup=3", "--batch=2")
    found = json.loads(invoke(*line, "--json").stdout)
    assert api.model.sessions == [(2, 17)]
    ids = [
        int(each) for each in measuring.random_ids(measuring.vocabulary(api.model.program), 2, 8)[0]
    ]
    assert noted.calls == [("prefill", (2, 9)), *ids[5:], *ids[:5]]
    assert asked == [(3, probes.READ_BYTES, "fp32", False)]  # no event said what a step reads
    assert found["machine"]["read_bytes_per_s"] == 1e9 / 2
    with pytest.raises(Exception, match="4097 tokens, and the artifact holds 4096"):
        invoke("profile", str(artifact), "--context=4000", "--tokens=90", "--warmup=7")
    api.model.sessions.clear()
    noted.calls.clear()
    prefill = ("--phase=prefill", "--prompt-len=6", "--tokens=2", "--warmup=3", "--json")
    invoke("profile", str(artifact), *prefill)
    assert api.model.sessions == 5 * [(1, 6)]
    assert noted.calls == 5 * [("prefill", (1, 6))]


def test_the_memory_of_a_profile_is_weights_caches_and_the_largest_step() -> None:
    model = CountingModel()
    weights = sum(t.nbytes for t in model.program.weight_types().values())
    events = [Event("a", "step", 0, 1, live=live) for live in (64, None, 128, 0)]
    known = {"weights": weights, "caches_a_token": 3 * cache_bytes(model.program)}
    assert profile.memory_facts(model, events, 3) == {**known, "intermediates_at_most": 128}
    assert profile.memory_facts(model, events[1:2], 3) == known


# --- verify ---------------------------------------------------------------------------------------

EXACT = Comparison(
    positions=40, max_logit_diff=0.25, rms_logit_diff=0.5, greedy_agreement=1.0, excluded=0.1,
    perplexity=7.0, oracle_perplexity=None,
    checks=(Check("an error", 0.12345, 0.5), Check("another", 3.0, 2.0)),
)  # fmt: skip


def test_a_comparison_is_told_in_words() -> None:
    left_out = (
        "4 of 40 positions were left out: there the oracle's two best tokens lie closer than 10"
        " times the error that bf16 leaves in a logit, so that rounding alone may swap them"
    )
    lines = [
        "positions          40",
        "max_logit_diff     0.25",
        "rms_logit_diff     0.5",
        "greedy_agreement   1.0",
        "excluded           0.1",
        "perplexity         7.0",
        "oracle_perplexity  None",
        "right              an error: 0.123, at most 0.5",
        "WRONG              another: 3, at most 2",
    ]
    assert [*verify._lines(EXACT, "bf16")] == [*lines, left_out]
    assert [*verify._lines(replace(EXACT, excluded=0.0), "bf16")][4:5] == ["excluded           0.0"]
    assert len([*verify._lines(replace(EXACT, excluded=0.0), "bf16")]) == len(lines)


@pytest.mark.parametrize(
    ("excluded", "agreement", "count"),
    [(0.5, 0.9, 0), (0.51, 0.9, 1), (0.1, 0.89, 1), (1.0, 0.0, 1), (0.99, 0.0, 2)],
)
def test_bounds_of_agreement_are_met_when_they_are_reached(
    excluded: float, agreement: float, count: int
) -> None:
    found = replace(EXACT, checks=(), excluded=excluded, greedy_agreement=agreement)
    assert len(found.failures(0.9, 0.5)) == count
    assert replace(EXACT, checks=(Check("an error", 0.5, 0.5),)).failures() == []


def test_codes_are_named_where_they_are_part_of_an_error(
    api: FakeApi, invoke: Invoke, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {
        "a": TensorType(DType.i4, (2, 32), Format((1, 32), DType.f16)),
        "b": TensorType(DType.f8e4m3, (2, 32), Format((1, 32), DType.f32)),
        "c": TensorType(DType.f32, (2, 32)),
    }
    monkeypatch.setattr(Program, "weight_types", lambda _: stored)
    found = json.loads(invoke("verify", str(artifact), "--json").stdout)
    assert (found["formats"], found["failures"]) == (["f8e4m3", "i4"], [])
    monkeypatch.setattr(Comparison, "failures", lambda *_: ["an error"])
    failed = json.loads(invoke("verify", str(artifact), "--json").stdout)
    assert failed["failures"] == [
        "an error",
        "weights are stored as f8e4m3, i4: where the source has them finer, what codes cost is"
        " part of this (dsc compile --calibrate measures that)",
    ]


def stock_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' model say what the artifact's does."""
    monkeypatch.setattr(verify, "check_oracle", lambda *_: None)
    monkeypatch.setattr(
        verification,
        "transformers_logits",
        lambda _, ids, **_angles: np.eye(VOCAB, dtype=np.float32)[(np.asarray(ids) + 1) % VOCAB],
    )


@pytest.mark.parametrize(
    ("against", "wanted"), [("reference", ["fp8"]), ("hf", ["bf16", "fp8"])]
)  # fmt: skip
def test_verify_compares_caches_in_codes_with_such_and_measures_them_beside_numbers(
    against: str, wanted: list[str], api: FakeApi, invoke: Invoke, artifact: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("dsc.asked.cache_format_of", lambda _: "fp8")
    stock_model(monkeypatch)
    found = json.loads(invoke("verify", str(artifact), "--against", against, "--json").stdout)
    assert (found["dtype"], found["cache_format"], found["ok"]) == ("fp32", "fp8", True)
    assert sorted(asked["cache_format"] for asked in api.asked) == wanted


@pytest.mark.parametrize("against", ["reference", "hf"])
def test_verify_measures_what_bf16_rounds(
    against: str, api: FakeApi, invoke: Invoke, artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that type and, unless that was the oracle, in fp32 by the same interpreter."""
    phases: list[str] = []
    monkeypatch.setattr(console, "progress_bar", lambda: nullcontext(phases.append))
    monkeypatch.setattr(verification, "compute_dtype", lambda _: "bf16")
    stock_model(monkeypatch)
    found = json.loads(invoke("verify", str(artifact), "--against", against, "--json").stdout)
    assert phases[2:] == [f"running the oracle ({against})", "measuring what bf16 does (reference)"]
    assert sorted(asked["dtype"] for asked in api.asked) == ["bf16", "fp32"]
    assert {(asked["model"], asked["backend"]) for asked in api.asked} == {
        ("somewhere", "reference")
    }
    assert (found["dtype"], found["against"], found["ok"]) == ("bf16", against, True)
    assert found["positions"] == 64  # all that the artifact holds
