"""What the verbs take, refuse and say: limits that are just met, one and many, in exact words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsc import hardware
from dsc.cli import answers, bisect, console, crash, doctor, inspect, measuring, options, verify
from dsc.errors import InternalError, UsageError
from dsc.generation import Answer
from dsc.hardware import Cpu, Gpu
from dsc.ir import ranks
from dsc.ir.parser import parse_program
from dsc.runtime import artifact as artifacts

from .conftest import SMALL_LM, CountingModel, FakeApi, Invoke, LetterTokenizer

# --- progress -------------------------------------------------------------------------------------


def test_each_phase_has_the_seconds_that_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 1.0, 2.0, 3.5, 3.5, 4.0, 10.0, 11.0, 12.0))  # beginning, steps, end
    with console.progress_bar() as progress:
        monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        progress("reading: a", 1, 9)
        progress("reading: b", 2, 9)
        progress("passes")
        (bar,) = progress._bars.tasks
        assert (bar.description, bar.total, bar.fields["count"]) == ("passes", None, "")
        progress("reading: c", 1, 100_000)
        (bar,) = progress._bars.tasks
        assert (bar.completed, bar.total, bar.fields["count"]) == (1, 100_000, "1/100000")
        assert progress.seconds() == {"reading": 4.5, "passes": 0.5}
    assert console._count(1, 100_001, 0.5) == "1 B/100.0 kB, 2 B/s"
    assert not [*clock]


def test_results_and_remarks_have_streams_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "a" * 100 + " " + "b" * 100
    console.stdout().print(wide)
    console.stderr().print(wide)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (wide + "\n", wide + "\n")
    assert console.tables().width == 160


# --- what is measured, and on what ----------------------------------------------------------------


def test_an_artifact_takes_all_that_it_was_compiled_for() -> None:
    model = SimpleNamespace(max_batch=4, max_context=64)
    measuring.check_fits(model, 4, (64, "--a"), (1, "--b"))
    with pytest.raises(UsageError, match="--batch 5: the artifact takes 4 sequences"):
        measuring.check_fits(model, 5)
    with pytest.raises(UsageError, match="--b: 65 tokens, and the artifact holds 64"):
        measuring.check_fits(model, 4, (64, "--a"), (65, "--b"))


@pytest.mark.parametrize(
    ("threads", "ranks_here", "local", "found"),
    [
        (None, 1, "3", (8, 1)),
        (3, 1, None, (3, 1)),
        (9, 1, None, (8, 1)),
        (3, 2, None, (6, 2)),
        (3, 4, "2", (6, 2)),
        (None, 4, "2", (8, 2)),
    ],
)
def test_threads_of_all_ranks_on_this_machine_are_counted(
    threads: int | None,
    ranks_here: int,
    local: str | None,
    found: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "cpu", lambda: SimpleNamespace(cores=8))
    monkeypatch.setattr(ranks, "current", lambda: SimpleNamespace(size=ranks_here))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert measuring.machine_threads(threads) == found


def test_the_vocabulary_is_the_last_dim_of_the_logits() -> None:
    assert measuring.vocabulary(parse_program(SMALL_LM.read_text())) == 9
    head = 'program "p" {stage=CANONICAL}\ngraph main(%x: f32[4]) { %y = exp %x return %y'
    with pytest.raises(UsageError, match="only causal language models") as refused:
        measuring.vocabulary(parse_program(head + " }"))
    assert refused.value.where == "p: no logits"
    assert measuring.vocabulary(parse_program(head + ' as "logits" }')) == 4
    assert measuring.unread(SimpleNamespace(targets=("cpu:znver4",))) == ""
    elsewhere = SimpleNamespace(targets=("hip:gfx942", "cpu"), executable=None)
    assert measuring.unread(elsewhere).endswith("hip:gfx942")


# --- answers --------------------------------------------------------------------------------------


def answer(reason: str, ids: int = 3) -> Answer:
    found = Answer([1, 2], 9, lambda *_: 0, ids=list(range(ids)), text="abc")
    found.finish_reason = reason  # type: ignore[assignment]
    return found


def test_answers_wait_for_their_turn(capsys: pytest.CaptureFixture[str]) -> None:
    three = [answer("") for _ in range(3)]
    prompts = [("--prompt", text) for text in ("x", "y  y", "z" * 61)]
    printer = answers.Printer(three, prompts, quiet=False)

    def shown() -> str:
        return capsys.readouterr().out

    assert shown() == "== 1 of 3: x\n"
    printer.take(1, "later")
    assert shown() == ""
    printer.take(0, "now")
    assert shown() == "now"
    three[1].finish_reason = "stop"
    three[0].finish_reason = "stop"
    printer.take(0, "!")
    assert shown() == "!\n== 2 of 3: y y\nlater\n== 3 of 3: " + "z" * 59 + "…\n"
    three[2].finish_reason = "length"
    printer.take(2, "end")
    assert shown() == "end\n"
    assert answers.label(0, [("", "z" * 60)]) == f"== 1 of 1: {'z' * 60}\n"
    alone = [answer("stop")]
    answers.Printer(alone, prompts[:1], quiet=True).take(0, "nothing")
    assert shown() == ""
    answers.Printer(alone, prompts[:1], quiet=False).take(0, "no label")
    assert shown() == "no label\n"


@pytest.mark.parametrize(
    ("reasons", "which"),
    [
        ([("length", 3)], "the text"),
        ([("length", 4), ("stop", 3), ("length", 3), ("length", 2)], "answer 3, 4"),
        ([("stop", 3), ("length", 3)], "answer 2"),
        ([("length", 4), ("stop", 1)], ""),
    ],
)
def test_an_answer_that_the_context_cut_off_is_told(
    reasons: list[tuple[str, int]], which: str
) -> None:
    why = (
        " ended before --max-new-tokens: the model was compiled for texts of 64 tokens"
        " (--max-context)"
    )
    assert answers.cut_off([answer(*each) for each in reasons], 4, 64) == which + why * bool(which)


def test_a_prompt_is_called_as_the_user_gave_it(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("text\n\n")
    assert answers.read_prompts(["a"], []) == [("--prompt", "a")]
    assert answers.read_prompts(["a", "b"], [file]) == [
        ("--prompt, number 1", "a"), ("--prompt, number 2", "b"), (f"--file {file}", "text\n"),
    ]  # fmt: skip
    assert answers.encoded(LetterTokenizer(), ("p", "a" * 63), 64) == [0] * 63
    with pytest.raises(UsageError, match="64 tokens") as refused:
        answers.encoded(LetterTokenizer(), ("p", "a" * 64), 64)
    assert refused.value.where == "p"


def test_drawing_is_not_asked_for_with_greedy() -> None:
    answers.check_sampling({"repetition_penalty": 2.0}, True)
    answers.check_sampling({"top_p": 0.5, "min_p": 0.5}, False)
    with pytest.raises(UsageError, match="--min-p says how to draw"):
        answers.check_sampling({"top_p": 0.5, "min_p": 0.5}, True)
    assert answers.facts(("p", "text"), answer("stop")) == {
        "prompt": "text", "text": "abc", "finish_reason": "stop", "prompt_tokens": 2,
        "new_tokens": 3,
    }  # fmt: skip


# --- verify ---------------------------------------------------------------------------------------


def test_verify_reads_as_much_of_a_text_as_it_may(tmp_path: Path) -> None:
    model: Any = CountingModel()
    text = tmp_path / "text"
    text.write_text("abcdef")
    assert verify.token_ids(model, text, 4) == ([0, 1, 2, 3], True)
    text.write_text("ab")
    assert verify.token_ids(model, text, 4) == ([0, 1], True)
    assert len(verify.token_ids(model, None, 1000)[0]) == 64
    model.max_context = 1
    with pytest.raises(UsageError, match="1 tokens are too few") as refused:
        verify.token_ids(model, None, 4)
    assert refused.value.where == "--max-context 1"
    model.max_context, model.tokenizer = 8, None
    ids, is_text = verify.token_ids(model, None, 1000)
    assert ids == np.random.default_rng(0).integers(0, 9, (1, 8))[0].tolist()
    assert not is_text
    with pytest.raises(UsageError, match="no tokenizer to read the text with"):
        verify.token_ids(model, text, 4)


def test_a_model_is_verified_against_the_checkpoint_that_is_named(
    api: FakeApi, invoke: Invoke, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at before it is compiled; of an artifact, what it says it was compiled from."""
    asked: list[tuple[str, str]] = []
    hashed: list[Path] = []
    monkeypatch.setattr(verify, "check_oracle", lambda *given: asked.append(given))
    monkeypatch.setattr(artifacts, "check_hashes", hashed.append)
    invoke("verify", "m.py")
    assert asked == [("reference", "m.py"), ("reference", "somewhere")]
    asked.clear()
    invoke("verify", "m.py", "--checkpoint", "there")
    assert asked == [("reference", "there")] * 2
    asked.clear()
    assert not hashed
    invoke("verify", str(artifact), "--hashes")
    assert asked == [("reference", "somewhere")]
    assert hashed == [artifact]
    with pytest.raises(UsageError, match="--hashes reads an artifact"):
        invoke("verify", "m.py", "--hashes")
    api.model.source = ""
    with pytest.raises(UsageError, match="does not say what it was compiled from"):
        invoke("verify", str(artifact))


# --- what an artifact holds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "lines"),
    [
        ({}, ("None", "none", "only at a limit", "greedily")),
        (
            {
                "backend": "tvm", "targets": ["cpu"], "needs": {"llvm": "LLVM 20"},
                "limits": {"max_batch": 4, "max_context": 64},
                "generation": {"eos_token_id": [7, 8], "stop_strings": ["#"], "do_sample": True},
                "states": [
                    {"storage": "paged", "type": f"{kind}[128]"}
                    for kind in 2 * ("f8e4m3{1x128,f32,behind}", "bf16")
                ],
            },
            ("tvm, cpu, LLVM 20", "--max-batch 4, --max-context 64", 'at 7, 8, "#"', "draws"),
        ),
        (
            {"needs": None, "targets": None, "limits": None, "generation": None, "backend": "\a"},
            ("?", "none", "only at a limit", "greedily"),
        ),
    ],
)  # fmt: skip
def test_the_card_of_an_artifact(manifest: dict[str, Any], lines: tuple[str, ...]) -> None:
    found = inspect.card(manifest, Path("out"))
    assert found.pop("caches", "") == ("paged f8e4m3, paged bf16" if "states" in manifest else "")
    assert found == dict(zip(("backend", "limits", "stops", "chooses"), lines, strict=True))


def test_files_of_the_backend_are_listed_with_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("tvm/b.so", 1500), ("tvm/a/k.o", 7), ("weights/w", 3), ("dsc.json", 3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    inspect._list_kernels(tmp_path)
    assert capsys.readouterr().out.splitlines() == ["       7 B  tvm/a/k.o", "    1.5 kB  tvm/b.so"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("m.py", "--json"), "--json goes with --report"),
        (("m.py", "--kernels", "--entry", "decode"), "kernels are of all entries"),
        (("m.py", "--kernels"), "--kernels reads an artifact"),
        (("m.py", "--report", "--after", "fuse"), "a report is of all passes"),
        (("m.py", "--after", "fuze"), "no pass is called 'fuze'"),
        (("m.py", "--entry", "decod"), "no entry 'decod'"),
        (
            ("m.py", "--entry", "decode", "--after", "raise_mla"),
            "after raise_mla there is no entry",
        ),
        (("OUT", "--config", "tiny", "--backend", "tvm"), "--config, --backend: for models"),
        (("OUT", "--weights", "none"), "--weights: for models"),
        (("OUT", "--after", "fuse"), "an artifact holds only its final program"),
    ],
)
def test_what_inspect_does_not_show_is_told(
    line: tuple[str, ...], said: str, api: FakeApi, invoke: Invoke, artifact: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        invoke("inspect", *(str(artifact) if word == "OUT" else word for word in line))
    assert refused.value.what.startswith(said)
    assert not api.asked


# --- bisect, doctor, crashes, options -------------------------------------------------------------


def test_a_finding_lists_the_five_worst_outputs() -> None:
    program = parse_program(SMALL_LM.read_text())
    errors = {("step", f"o{i}"): e for i, e in enumerate((0.0, 0.1, 0.5, 0.2, 0.3, 0.4, 0.6))}
    worst = bisect.worst_outputs(SimpleNamespace(errors=errors))  # type: ignore[arg-type]
    assert [name for name, _ in worst] == [f"step.o{i}" for i in (6, 2, 5, 4, 3, 1)]
    finding = bisect.Finding("fuse", "fuse{level=1}", "it differs", program, None, worst)
    assert bisect._told(finding, "LINE") == [
        "fuse breaks the program: it differs",
        "worst outputs, difference relative to max(1, |value|max):",
        "         0.6  step.o6",
        "         0.5  step.o2",
        "         0.4  step.o5",
        "         0.3  step.o4",
        "         0.2  step.o3",
        "repeat it with: LINE",
    ]
    alone = bisect.Finding("fuse", "fuse", "it failed", program, None)
    assert bisect._told(alone, "LINE") == [
        "fuse breaks the program: it failed", "repeat it with: LINE",
    ]  # fmt: skip


def test_a_crash_names_the_program_of_the_first_internal_error_in_its_chain() -> None:
    inner, outer = InternalError("a", "text", "dsc opt repro.dsc"), KeyError("b")
    outer.__cause__, inner.__context__ = inner, outer  # a ring ends
    assert [*crash._chain(outer)] == [outer, inner]
    context = ValueError("c")
    context.__context__ = outer
    assert [*crash._chain(context)] == [context, outer, inner]


def test_the_doctor_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = Cpu("EPYC", "x86_64", 8, 16_000_000_000, ("avx2", "fma"))
    findings = [
        doctor.Finding("tvm", "1.0", "cpu", "cpu", ""),
        doctor.Finding("triton", "", "", "", "pip install triton"),
    ]
    doctor._show(cpu, (Gpu("H100", "cuda:sm_90", 80_000_000_000),), findings)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        "cpu  EPYC, 8 cores, 16.0 GB", "     avx2 fma", "gpu  H100, cuda:sm_90, 80.0 GB",
    ]  # fmt: skip
    assert [line.split() for line in lines[-2:]] == [
        ["tvm", "1.0", "cpu", "cpu"], ["triton", "missing", "-", "-", "pip", "install", "triton"],
    ]  # fmt: skip
    doctor._show(Cpu("x", "y", 1, 0, ()), (), [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[1:3]] == [
        "no vector extension that dsc uses", "gpu  none that a driver answers for",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "gpus", "wanted"),
    [
        (("", "it fails"), (), ("", "", "", "pip install --force-reinstall d  (it fails)")),
        (("1", ""), (), ("1", "", "all", "running needs an NVIDIA GPU that is compiled for;"
                                         " compiling needs none")),
        (("1", ""), (Gpu("", "cuda:sm_90", 1),), ("1", "cuda:sm_90", "all", "")),
    ],
)  # fmt: skip
def test_the_doctor_says_what_to_do(
    found: Any, gpus: Any, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "imported_version", lambda _: found)
    toolchain = doctor.Toolchain("b", "p", "d", "all", needs_gpu=True)
    assert doctor.examine(toolchain, gpus) == doctor.Finding("b", *wanted)


def test_options_that_are_false_or_zero_are_given() -> None:
    assert options.chosen(a=None, b=False, c=0, d="") == {"b": False, "c": 0, "d": ""}
