"""The API around a compile: options, limits, saving, loading, what a report holds."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module, util
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

import dsc
from dsc import api, hardware
from dsc.api import check_memory, compile_program
from dsc.backends.base import No
from dsc.backends.triton.backend import TritonBackend
from dsc.compiled import check_kinds
from dsc.errors import (
    ArtifactError,
    MemoryLimitError,
    UnsupportedOperator,
    UsageError,
    VerificationError,
)
from dsc.frontends import schema
from dsc.frontends.family import ModelConfig
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_program
from dsc.ir.types import PRECISIONS, Precision
from dsc.runtime.plan import EntryPlan, Plan
from dsc.runtime.probes import PRODUCTS
from dsc.targets import Target
from tests.runtime.test_session import small_lm


def test_a_saved_model_is_what_was_compiled(tmp_path: Path) -> None:
    compiled = dsc.compile(small_lm(), backend="reference", max_context=32, prefill_chunk=8)
    out = compiled.save(tmp_path / "out")
    loaded = dsc.load(out)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(loaded.session().prefill(ids), compiled.session().prefill(ids))
    assert (loaded.max_context, loaded.max_batch, loaded.prefill_chunk) == (32, 4, 8)
    with pytest.raises(ArtifactError, match="exists already"):
        compiled.save(out)
    with pytest.raises(UsageError, match="copy its folder"):
        loaded.save(tmp_path / "again")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": "4"},
        {"max_context": 3.5},
        {"prefill_chunk": True},
        {"threads": "2"},
        {"ranks": [2]},
        {"fusion_level": None},
        {"dtype": ["fp32"]},
        {"backend": 7},
        {"cache": b"paged"},
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_named(wrong: dict[str, Any]) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(UsageError, match=re.escape(f"{name} is {value!r}")) as refused:
        dsc.compile("no such model", **wrong)
    assert refused.value.hint in ("give a whole number", "give a text")


@pytest.mark.parametrize(
    ("backend", "known"),
    [("onnxruntime", "opset, caches, prepack"), ("tvm", "form, tune"), ("null", None)],
)
def test_an_option_that_no_backend_reads_is_refused(backend: str, known: str | None) -> None:
    """Before the model is looked for, with those that there are."""
    with pytest.raises(UsageError, match=f"the {backend} backend has no option opsett") as refused:
        dsc.compile("no such model", backend=backend, backend_options={"opsett": 23})
    assert known is None or known in (refused.value.hint or "")


def test_what_another_backend_takes_over_is_compiled_for_its_own_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TritonBackend, "supports", lambda *_: No("not today"))
    compiled = dsc.compile(
        small_lm(), backend="triton", target="cuda:sm_90", fallback="reference", max_context=32
    )
    assert (compiled.backend, compiled.targets) == ("reference", ("cpu",))
    assert compiled.session().prefill(torch.tensor([[1, 2]])).isfinite().all()


def test_element_types_have_one_name_wherever_they_are_chosen() -> None:
    assert get_args(Precision) == tuple(PRECISIONS) == tuple(PRODUCTS)
    named = get_args(get_args(ModelConfig.model_fields["dtype"].annotation)[0])
    assert named == tuple(schema.DTYPES)
    assert {schema.DTYPES[name] for name in named} == set(PRECISIONS.values())


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    compiled = dsc.compile(small_lm(), backend="null", max_context=32, prefill_chunk=8)
    report = json.loads((compiled.save(tmp_path / "out") / "report.json").read_text())
    passes = {p["name"]: p for p in report["passes"]}
    assert passes["absorb_mla"]["fired"] == {"absorb": 2}
    assert report["cache_bytes_per_token"] == (6 + 4) * 4
    decode = report["entries"]["decode"]
    assert decode["nodes"] > 10
    assert decode["arena_bytes"] >= decode["arena_lower_bound"] > 0


def test_a_memory_limit_refuses_and_says_what_would_fit() -> None:
    dsc.set_memory_limit("cpu", 0.016)
    try:
        options: dict[str, Any] = {"backend": "null", "max_batch": 4, "prefill_chunk": 8}
        with pytest.raises(MemoryLimitError, match="max_context=") as refused:
            dsc.compile(small_lm(), max_context=96, **options)
        hint = refused.value.hint or ""
        fits = int(hint.partition("max_context=")[2].partition(" ")[0])
        dsc.compile(small_lm(), max_context=fits, **options)
        with pytest.raises(MemoryLimitError):
            dsc.compile(small_lm(), max_context=fits + 1, **options)
    finally:
        dsc.set_memory_limit("cpu", None)


@pytest.mark.parametrize(
    ("room", "told"),
    [
        (15_999_280, "max_context=99991 would fit"),
        (15_999_279, "max_context=99990 would fit"),
        (880, "max_context=1 would fit"),
        (879, "a smaller prefill_chunk shrinks the arena; the weights stay"),
        (-1, "a smaller prefill_chunk shrinks the arena; the weights stay"),
        (-5_250_000, "a smaller prefill_chunk shrinks the arena; the weights stay"),
        (-5_250_001, "the weights alone are more: quant takes fewer bits, ranks share them"),
    ],
)
def test_the_message_of_a_memory_limit_adds_up(room: int, told: str) -> None:
    """Caches that a step returns grown: of 2 sequences twice the context and a chunk, 40 B each."""
    program, limits = small_lm(), Limits(2, 100_000, 9)
    weights, caches = 4 * 642, 2 * 40 * (2 * 100_000 + 9)
    plan = Plan({"step": EntryPlan((), (), (), (), arena_bytes=5_250_000, lower_bound=9)})
    need = weights + 5_250_000 + caches
    try:
        dsc.set_memory_limit("cpu", need / 1e6)
        check_memory(program, plan, Target("cpu"), limits)
        limit = weights + 5_250_000 + room
        dsc.set_memory_limit("cpu", limit / 1e6)
        with pytest.raises(MemoryLimitError) as refused:
            check_memory(program, plan, Target("cpu"), limits)
    finally:
        dsc.set_memory_limit("cpu", None)
    check_memory(program, plan, Target("cpu"), limits)
    assert refused.value.what == (
        f"21.3 MB on cpu, the limit is {limit / 1e6:.1f} MB"
        " (weights 0.0, arena 5.2, caches 16.0 MB)"
    )
    assert (refused.value.hint or "").endswith(f": {told}")


def test_an_absorbed_step_makes_nothing_that_grows_with_the_context() -> None:
    """Only the caches themselves have rows for every cached token; prefill still expands inside."""
    program = dsc.compile(small_lm(), backend="null", fusion_level=0, max_context=32).program
    for entry in ("decode", "extend"):
        graph = program.entries[entry]
        grown = {v for n in graph.nodes for v in n.outputs if "C" in v.type.symbols}
        assert {n.op for n in graph.nodes if grown & set(n.outputs)} == {"cache_write"}
        assert "mla_attention" not in {n.op for n in graph.nodes}
    assert "mla_attention" in {n.op for n in program.entries["prefill"].nodes}


def test_memory_reuse_can_be_off() -> None:
    sizes = []
    for reuse in (True, False):
        compiled = compile_program(small_lm(), backend="null", memory_reuse=reuse)
        sizes.append(compiled.report["entries"]["prefill"]["arena_bytes"])
    assert sizes[0] < sizes[1]


def test_dumps_are_numbered_and_parse(tmp_path: Path) -> None:
    dsc.compile(small_lm(), backend="null", dump_dir=tmp_path)
    *texts, listed = sorted(tmp_path.iterdir())
    assert texts[0].name == "00_input.dsc"
    assert texts[-1].name.endswith("_own_outputs.dsc")
    assert listed.read_text().count("\n") == len(texts) - 1
    for path in texts:
        parse_program(path.read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion_level": 4}, "fusion_level 4"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
        ({"backend": "gcc"}, "unknown backend 'gcc'"),
        ({"target": "cuda:sm_90"}, "makes no code for cuda:sm_90"),
        ({"target": "cuda:sm_12"}, "unknown target"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_context": 0}, "max_context is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"print_ir_after": ("nonsense",)}, "nonsense"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dsc.compile(small_lm(), **{"backend": "reference", **options})  # type: ignore[arg-type]


def test_verify_each_compares_before_and_after() -> None:
    compiled = dsc.compile(
        small_lm(), backend="tvm", max_context=32, prefill_chunk=8, verify_each=True
    )
    verified = {p["name"]: p["verified"] for p in compiled.report["passes"]}
    assert verified["absorb_mla"]
    assert verified["append_cache_in_place"]


def test_a_program_that_breaks_a_rule_is_refused_before_it_is_compiled() -> None:
    text = 'program "open" {stage=CANONICAL} graph main(%x: f32[B,4]) { %y = silu %x return %y }'
    with pytest.raises(VerificationError, match="symbols without a range: B"):
        dsc.compile(parse_program(text), backend="reference")


@pytest.mark.parametrize("verb", ["compile", "export", "bisect"])
def test_the_command_has_the_defaults_of_the_api(verb: str) -> None:
    ours = signature(dsc.compile).parameters
    theirs = signature(getattr(import_module(f"dsc.cli.{verb}"), verb)).parameters
    shared = {n for n in ours.keys() & theirs.keys() if theirs[n].default is not None}
    assert {"fusion_level", "prefill_chunk"} <= shared - {"model"}
    numbers = {"activation_bits"}  # words of the command
    if verb == "export":  # grown, in ONNX's words
        assert (theirs["cache"].default, ours["cache"].default) == ("grown", "contiguous")
        shared -= {"cache"}
    assert all(theirs[name].default == ours[name].default for name in shared - numbers)
    assert all(theirs[n].default == str(ours[n].default) for n in shared & numbers)
    assert (ours["max_batch"].default, ours["ranks"].default) == (4, 1)
    assert ours["parallel"].default == "tp+ep"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, ["cuda:sm_90"]), ("auto", ["cuda:sm_90"]), ([], ["cuda:sm_90"]),
        ("cpu:znver4", ["cpu:znver4"]), (["cpu", "cuda:sm_80"], ["cpu", "cuda:sm_80"]),
    ],
)  # fmt: skip
def test_targets_are_the_backends_first_or_those_asked(
    asked: Any, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    can = SimpleNamespace(targets=("cuda:sm_90", "cpu"))
    backend: Any = SimpleNamespace(name="mine", capabilities=lambda _: can)
    assert [*map(str, api._targets(asked, backend))] == found
    with pytest.raises(UsageError, match="the mine backend makes no code for hip:gfx942") as told:
        api._targets(["cpu", "hip:gfx942"], backend)
    assert told.value.hint == "it takes cpu, cuda"


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (("cuda:sm_90", "cuda:sm_80", "hip:gfx942"), "cuda:sm_80"), (("hip:gfx942",), "hip:gfx942"),
        (("cpu", "cuda:sm_80"), "cpu"),
    ],
)  # fmt: skip
def test_code_for_gpus_is_for_the_one_at_hand(
    known: Sequence[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [hardware.Gpu("a card", f"cuda:sm_{arch}", 1 << 30) for arch in (75, 80, 90)]
    monkeypatch.setattr(hardware, "gpus", lambda: cards)
    backend: Any = SimpleNamespace(capabilities=lambda _: SimpleNamespace(targets=known))
    assert [*map(str, api._targets(None, backend))] == [found]


@pytest.mark.parametrize(
    ("installed", "name"),
    [({"tvm", "onnxruntime"}, "tvm"), ({"onnxruntime"}, "onnxruntime"), (set(), "reference")],
)
def test_the_best_backend_is_the_first_that_is_installed(
    installed: set[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    others = set(api.PREFERENCE) - installed
    monkeypatch.setattr(util, "find_spec", lambda n, *_: None if n in others else find(n))
    assert api.best_backend().name == name


def test_options_are_counted_from_one_and_named() -> None:
    api._check_options(0, "bf16", 1, 1, 1)
    api._check_options(3, None, 1, None, 1)
    check_kinds(int, True, a=None, b=0)
    for optional, value in ((False, None), (True, True), (True, "1")):
        with pytest.raises(UsageError, match=f"a is {value!r}"):
            check_kinds(int, optional, b=1, a=value)


def test_a_model_says_what_it_is_before_it_is_saved(tmp_path: Path) -> None:
    program = replace(small_lm(), meta={"config": {"vocab_size": 9}, "other": 1})
    steps: list[tuple[str, int, int]] = []
    compiled = dsc.compile(
        program, backend="null", max_context=32, progress=lambda *step: steps.append(step)
    )
    assert compiled.manifest == {"config": {"vocab_size": 9}, "generation": {}, "source": ""}
    assert ("planning", 0, 0) in steps
    seconds = compiled.report["seconds"]
    assert [*seconds] == ["trace", "passes", "emit"]
    assert all(0 <= spent < 60 and round(spent, 3) == spent for spent in seconds.values())
    assert (compiled.max_batch, compiled.has_weights, compiled.tokenizer) == (4, True, None)
    with pytest.raises(UsageError, match="0 threads asked"):
        compiled.set_threads(0)
    beyond: list[dict[str, Any]] = [{"max_batch": 5}, {"max_context": 33}, {"max_batch": 0}]
    for wrong in [*beyond, {"threads": 0}]:
        with pytest.raises(UsageError):
            compiled.session(**wrong)
    session = compiled.session(max_batch=2)
    assert (session.max_batch, session.max_context) == (2, 32)
    session = compiled.session(max_context=7)
    assert (session.max_batch, session.max_context) == (4, 7)


def test_what_a_fallback_does_not_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "supports", lambda *_: No("not today"))
    asked: dict[str, Any] = {"backend": "triton", "backend_options": {"compile": "late"}}
    compiled = dsc.compile(small_lm(), max_context=32, fallback="null", **asked)
    assert compiled.backend == "null"
    (note,) = [note for note in compiled.report["notes"] if "whole program" in note]
    assert note.startswith("the whole program runs on null: the triton backend does not take")
    with pytest.raises(UnsupportedOperator, match="not today"):
        dsc.compile(small_lm(), max_context=32, **asked)


def test_a_model_is_shown_in_a_line(tmp_path: Path) -> None:
    compiled = dsc.compile(small_lm(), backend="null", max_context=32)
    name = compiled.program.name
    assert repr(compiled) == f"<{name}: decode, extend, prefill by null for cpu>"
    out = compiled.save(tmp_path / "out")
    assert repr(dsc.load(out)) == f"<{name} in {out}: decode, extend, prefill by null for cpu>"


def test_a_session_tells_once_what_stands_in_for_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dsc.compiled")  # as it is before a verb ran in this process
    compiled = dsc.compile(small_lm(), backend="null", max_context=32)
    compiled.session()
    assert caplog.messages == [], "the null backend is asked for by its name"
    executable: Any = compiled.executable
    executable.computes, executable.stand_in = True, "an interpreter stands in"
    compiled.session()
    compiled.session()
    assert caplog.messages == ["an interpreter stands in"]


def test_the_tokenizer_is_that_of_the_model_or_of_the_folder_that_was_loaded(
    root: Path, tmp_path: Path
) -> None:
    file = root / "models" / "tiny-v3" / "tokenizer.json"
    compiled = dsc.compile(small_lm(), backend="null", max_context=32)
    told = replace(compiled, _files={"tokenizer.json": file})
    assert told.tokenizer.get_vocab_size() > 9
    loaded = dsc.load(told.save(tmp_path / "with"))
    assert loaded.tokenizer.get_vocab() == told.tokenizer.get_vocab()
    bare = dsc.load(compiled.save(tmp_path / "without"))
    assert bare.tokenizer is None
    assert replace(bare, _files={"tokenizer.json": file}).tokenizer is None, "the folder counts"
    compiled.save(tmp_path / "with", force=True)
    with pytest.raises(ArtifactError, match="was replaced after it was opened"):
        assert dsc.CompiledModel(loaded.program, "null", {}, _artifact=loaded._artifact).tokenizer
