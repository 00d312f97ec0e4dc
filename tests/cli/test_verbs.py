"""Each verb asks the API for what the user typed, and prints what comes back."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from dsc.backends.null import NullExecutable
from dsc.backends.triton.client import InterpretedExecutable
from dsc.cli import build_app, console, doctor
from dsc.cli.bench import summary
from dsc.cli.compile import default_output
from dsc.cli.ranks import spelled
from dsc.errors import ArtifactError, UsageError
from dsc.runtime import launch, sharded
from dsc.runtime.profiler import span
from dsc.runtime.protocol import PASSED, Turn

from .conftest import GENERATION, VOCAB, CountingModel, CountingSession, FakeApi, Invoke


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts that hold what the verbs that measure ask for."""
    monkeypatch.setattr(CountingModel, "limits", (4, 4096))


def test_compile_passes_only_what_was_asked(api: FakeApi, invoke: Invoke, tmp_path: Path) -> None:
    line = f"compile m.py --backend tvm --target cpu --max-batch 4 -o {tmp_path}/o"
    result = invoke(*line.split())
    assert result.exit_code == 0
    (asked,) = api.asked
    assert asked.pop("progress") is not None
    assert asked == {
        "model": "m.py",
        "backend": "tvm",
        "target": ["cpu"],
        "max_batch": 4,
        "fusion_level": 3,
        "prefill_chunk": 512,
        "cache": "contiguous",
        "cache_format": "bf16",
        "quant": "none",
        "quant_embedding": "none",
        "activation_bits": 8,
        "nsamples": 4,
        "verify_each": False,
    }
    assert (tmp_path / "o" / "dsc.json").is_file()


def test_compile_names_the_folder_after_model_and_backend(
    api: FakeApi, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("compile", "models/v3.py").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["v3-reference"]
    (tmp_path / "R1").mkdir()
    assert default_output("R1/", "tvm") == Path("R1-tvm")


def test_compile_keeps_an_existing_folder(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="exists already"):
        invoke("compile", "m.py", "-o", str(artifact))
    assert not api.asked
    assert invoke("compile", "m.py", "-o", str(artifact), "--force").exit_code == 0


def test_compile_json_is_one_document(api: FakeApi, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compile", "m.py", "--json", "-o", str(tmp_path / "o"))
    document = json.loads(result.stdout)
    assert document["backend"] == "reference"
    assert document["bytes"] > 0
    assert all(seconds >= 0 for seconds in document["phases"].values())
    assert "writing" in document["phases"]


def test_compile_json_shares_standard_output_with_nothing(api: FakeApi, invoke: Invoke) -> None:
    with pytest.raises(UsageError, match="--dump-dir"):
        invoke("compile", "m.py", "--json", "--print-ir-after", "all")


def test_export_asks_for_onnx(api: FakeApi, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("export", "m.py", "--opset", "24", "-o", str(tmp_path / "o")).exit_code == 0
    assert api.asked[0]["backend"] == "onnxruntime"
    assert api.asked[0]["backend_options"] == {"opset": 24, "indices": False}


def test_bench_measures_both_phases(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    line = ("bench", str(artifact), "--prompt-len=8", "--tokens=4", "--rounds=2", "--repeats=2")
    document = json.loads(invoke(*line, "--threads=1", "--no-pin", "--json").stdout)
    assert api.loaded == [{"path": artifact, "trust": False, "threads": 1, "pin": False}]
    for phase, each in (("prefill", 1), ("decode", 4)):
        found = document[phase]
        assert found["rounds"] == 2
        assert found["steps"] == each * (2 - found["rounds_dropped"] % 2)  # all, if none is steady
        share, passed = found["of_limit"], found["limit_passed"]
        assert passed == (share is None or share > PASSED) == bool(found["limit_note"])
    low, high = document["decode"]["quartiles_ms"]
    assert low <= document["decode"]["median_ms"] <= high


def test_a_share_of_a_limit_is_told_as_measured_until_the_limit_is_none() -> None:
    turns = [Turn(1.0, (2.0, 2.0), 1.0)] * 3
    cases = ((1.0, 0.5, ""), (2.1, 1.05, "the probes are wrong"), (4.0, None, "faster"))
    for seconds, share, said in cases:
        found = summary(turns, 1, partial(max, seconds))
        assert found["of_limit"] == share
        assert said in found["limit_note"]
        assert found["of_limit_quartiles"] == (None if share is None else [share, share])
    unread = summary(turns, 1, None, "code for a GPU")
    assert (unread["of_limit"], unread["limit_note"]) == (None, "code for a GPU")


def test_code_for_a_gpu_is_not_judged_by_a_processor(
    api: FakeApi, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingModel, "targets", ("cuda:sm_90",))
    line = ("bench", str(artifact), "--prompt-len=8", "--tokens=2", "--rounds=1", "--repeats=1")
    shown = invoke(*line, "--threads=1").stdout
    assert "this is code for cuda:sm_90" in shown
    assert "% of the limit" not in shown


def test_a_profile_leaves_warm_up_runs_out(
    api: FakeApi, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(self: CountingSession, ids: Any) -> Any:
        with span("decode", "entry"):
            return self.prefill(ids[:, None])

    monkeypatch.setattr(CountingSession, "decode", timed)
    monkeypatch.setattr(CountingModel, "targets", ("cuda:sm_90",))
    line = ("profile", str(artifact), "--tokens=5", "--warmup=3")
    document = json.loads(invoke(*line, "--json").stdout)
    (row,) = document["steps"]
    assert (row["name"], row["runs"]) == ("decode", 5)
    assert 0 < row["least_s"] <= row["median_s"] <= row["p95_s"]
    assert document["machine"] is None
    shown = invoke(*line).stdout
    assert "5 runs" in shown
    assert "code for cuda:sm_90" in shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench --batch 5", "--batch 5: the artifact takes 4 sequences"),
        ("bench --prompt-len 5000", "--prompt-len: 5000 tokens, and the artifact holds 4096"),
        ("bench --context 4000", "--rounds and a warm-up: 4320 tokens"),
        ("profile --context 4096", "--tokens and --warmup: 4114 tokens"),
        ("profile --phase prefill --prompt-len 4097", "--prompt-len: 4097"),
    ],
)
def test_what_an_artifact_does_not_hold_is_told_in_options(
    line: str, said: str, api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    verb, *options = line.split()
    with pytest.raises(UsageError, match=re.escape(said)):
        invoke(verb, str(artifact), *options)


@pytest.mark.parametrize("verb", ["verify", "bench", "profile"])
def test_what_computes_nothing_is_neither_measured_nor_verified(
    verb: str, api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.executable = NullExecutable(api.model.program)
    with pytest.raises(UsageError, match=r"nothing to be .*: the null backend .* computes nothing"):
        invoke(verb, str(artifact))


@pytest.mark.parametrize("verb", ["verify", "bench", "profile"])
def test_an_interpreter_is_never_taken_for_compiled_code(
    verb: str, api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    api.model.executable = object.__new__(InterpretedExecutable)
    few = () if verb == "verify" else ("--tokens=2", "--threads=1")
    assert "Triton's interpreter stands in" in " ".join(
        invoke(verb, str(artifact), *few).stderr.split()
    )


OTHER = {
    "against": "hf", "phase": "prefill", "group_by": "layer", "sort_by": "bytes",
    "require": 0.5, "top_p": 0.5, "min_p": 0.5, "temperature": 0.5, "repetition_penalty": 1.5,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "pin": False, "prompt": "a text",
}  # fmt: skip
"""Values of options that take not any number, word or flag."""


@pytest.mark.parametrize("verb", ["generate", "bench", "profile", "verify"])
def test_ranks_are_given_every_option(
    verb: str, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the line that was typed, with all of its options."""
    command = get_command(build_app()).commands[verb]  # type: ignore[attr-defined]
    typed = {p.name: p for p in command.params if p.name not in ("artifact", "model", "ranks")}
    compiling = ("revision", "backend", "dtype", "quant", "max_context", "rope_scaling", "output")
    typed = {n: p for n, p in typed.items() if n not in compiling}  # of a model
    typed = {n: p for n, p in typed.items() if p.name not in ("help", "hashes", "file", "greedy")}
    values = {n: OTHER.get(n, True if p.is_flag else 7) for n, p in typed.items()}
    if "most_excluded" in values:
        values |= {"most_excluded": 0.25, "text": str(artifact / "dsc.json")}
    if "trace" in values:
        values["trace"] = str(artifact / "trace")
    lines: list[list[str]] = []

    def started(line: list[str], _: int) -> int:
        lines.append(line)
        return 0

    monkeypatch.setattr(sharded, "opened", lambda _: sharded.Sharded(artifact, {"ranks": 2}))
    monkeypatch.setattr(launch, "run", started)
    invoke(verb, str(artifact), *spelled(values))
    (line,) = lines
    if verb == "generate":  # a prompt is handed over in a file
        assert values.pop("prompt") not in line
        assert any(word.startswith("--file=") for word in line)
    assert set(spelled(values)) <= set(line)


def test_profile_prints_rows_and_writes_a_trace(
    api: FakeApi, invoke: Invoke, artifact: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    line = ("profile", str(artifact), "--tokens=2", "--trace", str(trace), "--threads=1")
    document = json.loads(invoke(*line, "--json").stdout)
    assert document["rows"] == []  # the fake reports nothing
    assert document["memory"]["weights"] > 0
    assert document["machine"]["read_bytes_per_s"] > 1e8
    assert {e["ph"] for e in json.loads(trace.read_text())["traceEvents"]} == {"M"}
    assert (document["steps"], document["warmup"]) == ([], 2)
    prefill = ("profile", str(artifact), "--phase", "prefill", "--threads=1", "--batch=2")
    memory = json.loads(invoke(*prefill, "--json").stdout)["memory"]
    assert memory["caches_a_token"] == 2 * (6 + 4) * 4  # latent and rope in fp32 of one layer


def test_verify_compares_with_the_oracle(api: FakeApi, invoke: Invoke, artifact: Path) -> None:
    result = invoke("verify", str(artifact), "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["max_logit_diff"] == 0
    assert document["greedy_agreement"] == 1
    assert {"excluded", "perplexity"} <= set(document)
    assert document["cache_format"] == "bf16"
    asked = {"model": "somewhere", "backend": "reference", "dtype": "fp32"}
    assert api.asked == [asked | {"cache_format": "bf16", "max_context": 4096}]


def test_phases_have_bars_counts_and_seconds_of_their_own() -> None:
    with console.progress_bar() as progress:
        progress("passes: fuse", 3, 27)
        (bar,) = progress._bars.tasks
        assert (bar.description, bar.fields["count"], bar.completed) == ("passes: fuse", "3/27", 3)
        progress("passes: own_outputs", 26, 27)
        progress("weights: head", 1_200_000, 6_300_000_000)
        (bar,) = progress._bars.tasks
        assert bar.fields["count"].startswith("1.2 MB/6.3 GB, ")
        assert bar.fields["count"].endswith("B/s")
        progress("passes: again", 0, 0)
        assert list(progress.seconds()) == ["passes", "weights"]
        assert progress._bars.tasks == []


def test_verify_of_fp32_measures_no_rounding(
    api: FakeApi, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fp32 rounds is derived: nobody is told to wait for a run that does not happen."""
    phases: list[str] = []
    monkeypatch.setattr(console, "progress_bar", lambda: nullcontext(phases.append))
    invoke("verify", str(artifact))
    assert phases == ["loading", "running the compiled model", "running the oracle (reference)"]


def test_verify_fails_where_every_position_is_a_tie(
    api: FakeApi, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(self: object, ids: np.ndarray[Any, Any], all_logits: bool = False) -> Any:
        shape = (*ids.shape, VOCAB) if all_logits else (len(ids), VOCAB)
        return np.zeros(shape, np.float32)

    monkeypatch.setattr(CountingSession, "prefill", flat)
    result = invoke("verify", str(artifact), "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (document["excluded"], document["ok"]) == (1, False)
    assert "near-ties" in document["failures"][0]
    assert invoke("verify", str(artifact), "--most-excluded=1").exit_code == 0


def test_verify_refuses_a_text_of_one_token(
    api: FakeApi, invoke: Invoke, artifact: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("a")
    with pytest.raises(UsageError, match="1 tokens are too few"):
        invoke("verify", str(artifact), "--text", str(text))


def test_verify_against_transformers_needs_a_checkpoint(
    api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    with pytest.raises(UsageError, match="checkpoint folders only"):
        invoke("verify", str(artifact), "--against", "hf")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_verify_refuses_a_text_that_is_none(
    content: bytes | None, api: FakeApi, invoke: Invoke, artifact: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    if content is None:
        assert invoke("verify", str(artifact), "--text", str(text)).exit_code == 2
        return
    text.write_bytes(content)
    with pytest.raises(UsageError, match="no UTF-8"):
        invoke("verify", str(artifact), "--text", str(text))


def test_the_help_says_what_force_replaces_and_in_which_order_prompts_are_answered(
    invoke: Invoke,
) -> None:
    def told(verb: str) -> str:
        return " ".join(invoke(verb, "--help").stdout.replace("│", " ").split())

    assert "Replace the page at PAGE.html" in told("diff")
    assert "Prompts of --prompt come first, then those of --file" in told("generate")


def test_inspect_shows_a_models_ir(api: FakeApi, invoke: Invoke) -> None:
    assert invoke("inspect", "m.py").stdout == "after absorb_mla\n"
    assert invoke("inspect", "m.py", "--after", "raise_mla").stdout == "after raise_mla\n"
    with pytest.raises(UsageError, match="no pass 'fuse' ran"):
        invoke("inspect", "m.py", "--after", "fuse")


def test_inspect_shows_what_an_artifact_holds(invoke: Invoke, artifact: Path) -> None:
    shown = invoke("inspect", str(artifact)).stdout.splitlines()
    assert "the program" not in shown, "which may be pages"
    assert shown[-1] == f"text IR  {artifact / 'program.dsc'} has all"
    document = json.loads(invoke("inspect", str(artifact), "--report", "--json").stdout)
    assert document == {"limits": {"max_context": 64}, "generation": GENERATION, "needs": {}}
    for lines in (shown, invoke("inspect", str(artifact), "--report").stdout.splitlines()):
        said = dict(line.split(maxsplit=1) for line in lines[:4])
        assert said["limits"] == "--max-context 64"
        assert said["stops"] == 'at 7, "###"'
        assert said["chooses"] == "draws: --top-p 0.9"
    listed = invoke("inspect", str(artifact), "--kernels").stdout.split()
    assert listed == ["7", "B", os.path.join("null", "kernel.txt")]


def test_an_artifact_that_is_no_json_is_refused(invoke: Invoke, artifact: Path) -> None:
    (artifact / "dsc.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"dsc\.json is no JSON object"):
        invoke("inspect", str(artifact))


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    here = doctor.Toolchain("plain", "json", "json", "cpu")
    missing = doctor.Toolchain("absent", "no_such_package", "nsp", "cpu")
    monkeypatch.setattr(doctor, "TOOLCHAINS", (here, missing))
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["cpu"]["cores"] >= 1
    assert [b["version"] for b in found["backends"]] == ["2.0.9", ""]
    assert found["backends"][1]["to_do"] == "pip install nsp"


def test_doctor_tells_damaged_from_missing() -> None:
    version, problem = doctor.imported_version("antigravity_is_not_here")
    assert version == ""
    damaged = doctor.Toolchain("x", "x", "dist", "cpu")
    assert doctor._remedy(damaged, problem).startswith("pip install --force-reinstall dist")


def test_doctor_promises_only_what_is_launched() -> None:
    from dsc.hardware import Gpu

    amd, new, old = (Gpu("x", t, 1) for t in ("hip:gfx942", "cuda:sm_90", "cuda:sm_70"))
    triton = next(t for t in doctor.TOOLCHAINS if t.backend == "triton")
    assert triton.runs_on((old,)) == ""
    assert triton.runs_on((amd, new, old)) == "cuda:sm_90, hip:gfx942"
    assert {t.runs_on((new,)) for t in doctor.TOOLCHAINS if t is not triton} == {"cpu"}
