"""Kernels over codes are held to the program's own text: sound ones pass, wrong ones do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.backends.reference import ReferenceBackend, ReferenceExecutable
from dsc.cli import main
from dsc.cli.verify import heard_of_all
from dsc.ir.ops.quant import takes_codes
from dsc.ir.program import Program
from dsc.ir.safetensors import SafetensorsFile
from dsc.ir.types import DType
from dsc.ir.weights import DictSource, LayeredSource, evaluate
from dsc.rewrite.widen import FP32_ROUNDINGS, in_fp32
from dsc.runtime import collectives
from dsc.verification import (
    Interpreted,
    compare,
    held_to_text,
    rounds,
    session_logits,
)
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.family import small
from tests.frontends.test_codes import WIDE, folder, tensors_of
from tests.runtime.test_other_weights import break_last

IDS = np.random.default_rng(0).integers(0, 300, 48).tolist()
WRONG = "model.layers.1.self_attn.o_proj.weight"


def compiled(dtype: DType = DType.f32, **options: Any) -> Program:
    """A small model as it is compiled: its text, over weights that are made of the source."""
    source = canonical_lm(Sizes(dtype=dtype, layers=3, vocab=300), max_context=64)
    return dsc.compile(source, max_context=64, prefill_chunk=64, **options).program


def doubled(program: Program, name: str = WRONG) -> Program:
    """What kernels would compute that take twice the scale of one weight."""
    twice = DictSource({name: program.source.load(name) * 2})
    return replace(program, source=LayeredSource((twice, program.source)))


@pytest.mark.parametrize(
    ("quant", "dtype", "rows", "measured"),
    [
        ("int4", DType.f32, False, False),
        ("int4", DType.bf16, False, True),
        ("fp8", DType.f32, True, True),
        ("fp8", DType.f16, True, True),
    ],
)
def test_kernels_that_say_what_the_text_says_pass_and_a_doubled_term_fails(
    quant: str, dtype: DType, rows: bool, measured: bool
) -> None:
    program = compiled(dtype, backend="reference", quant=quant)
    assert rounds(program)
    said, noise = held_to_text(program, IDS)
    assert noise.measured == measured

    def failures(kernels: Program) -> list[str]:
        found = compare(session_logits(Interpreted(kernels), IDS), said, IDS, noise)
        return found.failures(require=0.0, most_excluded=1.0)

    assert failures(program) == []
    assert not measured or failures(in_fp32(program, 2.0**-22)) == []
    assert any("typical position" in line for line in failures(doubled(program)))
    assert rows == any(takes_codes(n) for graph in program.entries.values() for n in graph.nodes)


def test_a_row_whose_codes_change_either_way_is_explained() -> None:
    """A number beside the border of two codes crosses it when weights move one way, not both."""
    program = compiled(backend="reference", quant="fp8")
    said, noise = held_to_text(program, IDS)
    ways = []
    for share in (FP32_ROUNDINGS, -FP32_ROUNDINGS):
        moved = session_logits(Interpreted(in_fp32(program, share)), IDS)
        ways.append(np.sqrt(np.mean(np.square(moved.astype(np.float64) - said), -1)))
    assert (ways[0] != ways[1]).any()
    np.testing.assert_array_equal(noise.errors, np.maximum(*ways))


def test_what_computes_on_the_numbers_of_its_source_is_held_to_that() -> None:
    assert not rounds(compiled(backend="reference"))
    assert not rounds(compiled(DType.bf16, backend="reference", cache_format="fp8"))


@pytest.mark.parametrize("dtype", [DType.bf16, DType.f32])
def test_codes_stay_as_they_are_and_plain_weights_are_widened_and_moved(dtype: DType) -> None:
    """In fp16 scales of other numbers would be other scales."""
    program = compiled(dtype, backend="reference", quant="int4")
    exact, moved = in_fp32(program), in_fp32(program, 2.0**-20)
    coded = {n for n, e in program.weights.items() if e.type.format is not None}
    plain = program.weights.keys() - coded
    assert coded
    for name in coded:
        assert exact.weights[name] == program.weights[name]
    for name in plain:
        before, now, then = (
            evaluate(p.weights[name], p.source).float() for p in (program, exact, moved)
        )
        assert exact.weights[name].type.dtype is DType.f32
        assert bool((before == now).all())
        share = ((then - now) / now).abs()[now != 0]
        assert 0.1 * 2.0**-20 < float(share.mean()) < 3 * 2.0**-20
    assert {s.type.dtype for s in exact.states} == {DType.f32}
    assert not any(
        v.type.dtype is DType.bf16 for g in exact.entries.values() for n in g.walk()
        for v in n.outputs
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of plain weights."""
    config = small(**WIDE)
    raw = config.model_dump(exclude_none=True)
    return folder(tmp_path_factory.mktemp("plain") / "model", raw, tensors_of(config))


Verified = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verified:
    """Run `dsc verify`: its status, its document, and what it says of failures."""

    def run(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr("sys.argv", ["dsc", "verify", str(out), "--json", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(told.out), told.err

    return run


def test_an_artifact_in_codes_is_right_unless_its_weights_or_its_kernels_are_not(
    checkpoint: Path, verified: Verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dsc.compile(checkpoint, backend="reference", dtype="fp32", quant="int4").save(out)
    status, said, _ = verified(out)
    assert (status, said["ok"], said["oracle"], said["formats"]) == (0, True, "text", ["i4", "i8"])
    assert said["text"]["max_logit_diff"] < 1e-4
    assert said["max_logit_diff"] > 100 * said["text"]["max_logit_diff"]
    assert {"greedy_agreement", "excluded", "perplexity"} <= said.keys()
    assert all(check["ok"] for check in said["checks"])

    def wrong(self: object, folder: Path, manifest: object, program: Program) -> Any:
        is_ours = f"{WRONG}.scale" in program.source.types
        return ReferenceExecutable(doubled(program, f"{WRONG}.scale") if is_ours else program)

    with monkeypatch.context() as patched:
        patched.setattr(ReferenceBackend, "load", wrong)
        status, said, told = verified(out)
    assert (status, said["ok"]) == (1, False)
    assert "a logit's error at a typical position of prefill" in told

    (path,) = (out / "weights").iterdir()
    name = next(n for n in SafetensorsFile.open(path).entries if n.endswith("o_proj.weight.scale"))
    break_last(path, name)
    status, said, told = verified(out)
    assert (status, said["ok"]) == (1, False)
    assert [line.startswith(name) for line in said["failures"]] == [True]


def test_what_is_wrong_on_any_rank_is_told_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "share", lambda key, lines: [lines, ["a is 1", "b is 2"]])
    assert heard_of_all(["c is 3"]) == ["rank 0: c is 3", "rank 1: a is 1", "rank 1: b is 2"]
    assert heard_of_all([]) == ["rank 1: a is 1", "rank 1: b is 2"]
    monkeypatch.setattr("dsc.cli.verify.speaks", lambda: False)
    assert heard_of_all(["c is 3"]) == []
    monkeypatch.undo()
    assert heard_of_all(["c is 3"]) == ["c is 3"]
