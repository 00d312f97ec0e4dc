"""Weights of products become codes, within the bound of their format; all others stay."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc import backends, pipeline
from dsc.errors import CheckpointError, UnsupportedOperator, UsageError
from dsc.ir.formats import CODINGS
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.streams import blocks
from dsc.ir.types import DType
from dsc.ir.weights import Apply, Source, WeightExpr, apply, evaluate, random_source, source_types
from dsc.models.configs import TINY_CHECKPOINT
from dsc.passes import quantize_weights
from dsc.passes.quantize_weights import Kind, QuantizeWeights
from dsc.pipeline import PipelineOptions
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import Watch
from dsc.rewrite.verify import compare_programs
from dsc.runtime import packing
from dsc.targets import Target
from tests.runtime.test_session import small_lm

TEXT = """program "m" {stage=CANONICAL}
symbols {N=[1,8]}
weights {
  @embed.weight : f32[16,64] = source "embed.weight" : f32[16,64]
  @a.weight : f32[6,64] = source "a.weight" : f32[6,64]
  @up : f32[3,8,64] = stack(source "e.0" : f32[8,64], concat(source "e.1" : f32[4,64],
    source "e.2" : f32[4,64]) {axis=0}, source "e.3" : f32[8,64])
  @down : f32[3,64,4] = source "d" : f32[3,64,4]
  @kv : f32[8,64] = source "kv" : f32[8,64]
  @part : f32[4,64] = slice(source "kv" : f32[8,64]) {axis=0, start=0, end=4}
  @odd : f32[6,7] = source "odd" : f32[6,7]
  @head.weight : f32[9,64] = source "head.weight" : f32[9,64]
}
graph main(%ids: i64[N], %idx: i64[N,2], %w: f32[N,2], %z: f32[N,7]) {
  %x = embedding %ids, @embed.weight
  %a = linear %x, @a.weight
  %e = experts %x, %idx, %w, @up, @down
  %k = linear %e, @kv
  %s = silu %k
  %p = einsum %e, @part {eq="nd,ed->ne"}
  %o = linear %z, @odd
  %l = linear %e, @head.weight
  %logits = cast %l {dtype=bf16}
  %r = silu %a
  %t = silu %o
  return %logits, %r, %s, %p, %t
}
"""


def model() -> Program:
    program = parse_program(TEXT)
    types = source_types(program.weights.values())
    return parse_program(TEXT, random_source(types))


def quantised(**options: Any) -> tuple[Program, PassReport]:
    report = PassReport()
    return QuantizeWeights(**options).run(model(), report), report


def codes_of(expr: WeightExpr) -> DType | None:
    return expr.args[0].type.dtype if isinstance(expr, Apply) and expr.op == "dequantize" else None


@pytest.mark.parametrize("codes", ["i8", "i4"])
@pytest.mark.parametrize("group", [32, 48, 128])
def test_weights_of_products_have_codes_within_their_bound(codes: str, group: int) -> None:
    program, report = quantised(codes=codes, group=group)
    found = {name: codes_of(expr) for name, expr in program.weights.items()}
    kind = DType(codes)
    assert found == {
        "embed.weight": None, "a.weight": kind, "up": kind, "down": kind, "kv": None, "part": None,
        "odd": DType.i8 if codes == "i8" else None, "head.weight": DType.i8,
    }  # fmt: skip
    for name, each in found.items():
        if each is None:
            assert program.weights[name] == model().weights[name]
            continue
        expr = program.weights[name]
        assert isinstance(expr, Apply)
        exact = evaluate(model().weights[name], program.source)
        step = evaluate(expr.args[0], program.source).parts[1].float()
        step = step.repeat_interleave(group, -1)[..., : exact.shape[-1]]
        error = (evaluate(expr, program.source) - exact).abs()
        assert (error <= step * CODINGS[each].absolute * (1 + 1e-5)).all()
        assert error.any()
    missed = {where: why for _, where, why in report.missed}
    assert missed["kv"] == "einsum reads kv too"
    assert missed.get("odd", "") == ("" if codes == "i8" else "7 columns, and 2 codes share a byte")


def test_only_what_is_a_result_has_the_codes_of_the_head() -> None:
    program, report = quantised(codes="i8", head="i4")
    assert codes_of(program.weights["head.weight"]) is DType.i4
    assert [n for n, e in program.weights.items() if codes_of(e) is DType.i4] == ["head.weight"]
    assert report.facts == {"i8": 4, "i4": 1}


@pytest.mark.parametrize("codes", ["i8", "none"])
def test_tables_have_codes_where_they_are_asked_for_and_tied_heads_have_the_same(
    codes: str,
) -> None:
    every = {"a.weight", "up", "down", "odd", "head.weight"} if codes == "i8" else set()
    program, report = quantised(codes=codes, table="i4")
    found = {n: str(c) for n, e in program.weights.items() if (c := codes_of(e)) is not None}
    assert found == {"embed.weight": "i4", **dict.fromkeys(every, "i8")}
    tied = TEXT.replace("linear %e, @head.weight", "linear %e, @embed.weight")
    tied = tied.replace('  @head.weight : f32[9,64] = source "head.weight" : f32[9,64]\n', "")
    head = parse_program(tied)
    done = QuantizeWeights(codes=codes, table="i4").run(head, PassReport())
    assert codes_of(done.weights["embed.weight"]) is DType.i4
    stays = QuantizeWeights(codes="i8").run(head, report)
    assert codes_of(stays.weights["embed.weight"]) is None
    assert ("quantise", "embed.weight", "embedding reads embed.weight too") in report.missed
    kept, _ = quantised(codes=codes, table="i4", keep=("embed",))
    assert codes_of(kept.weights["embed.weight"]) is None
    wide, _ = quantised(codes=codes, table="i4", wide=("embed",))
    assert codes_of(wide.weights["embed.weight"]) is DType.i8


@pytest.mark.parametrize(("op", "is_head"), [("all_gather", True), ("all_reduce", False)])
def test_ranks_that_put_their_logits_side_by_side_have_a_head(op: str, is_head: bool) -> None:
    attrs = {"all_gather": "{axis=1, ranks=2}", "all_reduce": "{ranks=2}"}[op]
    program = parse_program(TEXT.replace("cast %l {dtype=bf16}", f"{op} %l {attrs}"))
    done = QuantizeWeights(codes="i8", head="i4").run(program, PassReport())
    assert (codes_of(done.weights["head.weight"]) is DType.i4) is is_head


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("a.weight", "a.weight"),
        ("head", "head.weight"),
        ("e.2", "up"),
        ("e", "up"),
        ("hea*", "head.weight"),
        ("*[23]", "up"),
    ],
)
def test_a_pattern_keeps_what_it_names(keep: str, kept: str) -> None:
    program, report = quantised(keep=(keep,))
    assert codes_of(program.weights[kept]) is None
    assert ("quantise", kept, f"{keep} is kept") in report.missed
    assert sum(codes_of(e) is not None for e in program.weights.values()) == 4


def test_what_is_named_wide_has_8_bits() -> None:
    program, report = quantised(codes="i4", wide=("e.2", "a"), keep=("a",))
    found = {name: codes_of(expr) for name, expr in program.weights.items()}
    assert (found["up"], found["down"], found["a.weight"]) == (DType.i8, DType.i4, None)
    assert report.facts == {"i8": 2, "i4": 1}


@pytest.mark.parametrize("option", ["keep", "wide"])
@pytest.mark.parametrize("keep", ["hea", "a.weight.", "x*"])
def test_a_pattern_that_names_nothing_is_refused(keep: str, option: str) -> None:
    with pytest.raises(UsageError, match="no weight is called") as told:
        quantised(**{option: (keep,)})
    assert "such as" in str(told.value)


def test_a_weight_that_is_in_a_format_stays_in_it() -> None:
    once, _ = quantised()
    report = PassReport()
    assert QuantizeWeights(codes="i4").run(once, report) is once
    assert ("quantise", "up", "it is stored as i8 already") in report.missed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_codes_cannot_say_is_named(value: float, tmp_path: Path) -> None:
    made = QuantizeWeights().run(model(), PassReport())
    made.source.load("e.2")[1, 3] = value
    with pytest.raises(CheckpointError, match="holds NaN or infinity") as told:
        packing.pack(made, tmp_path / "weights")
    assert told.value.where == "up"


def test_a_stack_is_packed_piece_by_piece() -> None:
    program, _ = quantised(codes="i4")
    expr = program.weights["up"]
    assert isinstance(expr, Apply)
    (scaled,) = expr.args
    assert isinstance(scaled, Apply)
    for part in scaled.args:
        assert isinstance(part, Apply)
        assert part.op == "stack"
        joined = part.args[1]
        assert isinstance(joined, Apply)
        assert joined.op == "concat"
        assert isinstance(joined.args[0], Apply)
        assert isinstance(joined.args[0].args[0], Source)
        whole = evaluate(part, program.source)
        pieces = [torch.as_tensor(b).reshape(-1) for b in blocks(part, program.source, 64)]
        assert len(pieces) > 3
        assert torch.equal(torch.cat(pieces), whole.reshape(-1))


@pytest.mark.parametrize("codes", ["i8", "i4"])
def test_verification_holds_codes_to_their_bound_and_all_else_to_every_bit(codes: str) -> None:
    each = QuantizeWeights(codes=codes)
    made, before = quantised(codes=codes)[0], model()
    assert compare_programs(before, each.comparable(before, made)).worst == 0.0
    for name, expr in made.weights.items():
        if codes_of(expr) is None:
            continue
        assert isinstance(expr, Apply)
        stored = expr.args[0]
        assert isinstance(stored, Apply)
        steps, scales = stored.args
        doubled = apply("scaled", steps, apply("add", scales, scales), block=(1, 32))
        exact = before.weights[name]
        for wrong in (
            apply("dequantize", doubled, dtype=DType.f32),
            quantize_weights.quantised(
                apply("add", exact, exact), Kind(stored.type.dtype, (1, 32), DType.f16)
            ),
            apply("neg", expr),
        ):
            shown = each.comparable(before, made.with_weights({name: wrong}))
            assert not compare_programs(before, shown).ok, name
    other = parse_program(TEXT.replace("silu %a", "tanh %a")).entries
    assert not compare_programs(before, each.comparable(before, replace(made, entries=other))).ok


@pytest.mark.parametrize("quant", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("widest", [10**9, 0], ids=["full", "shrunk"])
def test_a_compile_can_verify_it(quant: str, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("twin", "verify"):
        monkeypatch.setattr(f"dsc.rewrite.{module}.WIDEST", widest)
    monkeypatch.setattr(quantize_weights, "WIDEST", widest)
    embedding = "int4" if quant == "int8" else "none"
    watch = Watch(verify_each=True)
    options = PipelineOptions(quant=quant, quant_embedding=embedding, watch=watch)
    done = pipeline.prepare(small_lm(), backends.get("null"), Target("cpu"), options)
    name = "insert_fp8" if quant == "fp8" else "quantize_weights"
    (record,) = [r for r in done.records if r.name == name]
    assert record.report.fired
    assert "difference 0.0" in record.verified


# --- as a user asks for it ------------------------------------------------------------------------


def test_codes_are_counted_and_the_head_can_be_kept() -> None:
    every: list[dict[str, Any]] = [
        {}, {"quant": "int8"}, {"quant": "int4"}, {"quant": "int4", "keep": ["lm_head"]},
    ]  # fmt: skip
    sizes = []
    for asked in every:
        compiled = dsc.compile(TINY_CHECKPOINT, backend="null", weights="none", **asked)
        types = compiled.program.weight_types().values()
        sizes.append(sum(int(str(t.nbytes)) for t in types))
        notes = [note for note in compiled.report["notes"] if note.startswith("weights:")]
        assert bool(notes) == bool(asked)
    plain, int8, int4, kept = sizes
    assert 0.5 < int8 / plain < 0.62, "the embedding and the router stay"
    assert 0.36 < int4 / plain < 0.43
    vocabulary, width = 2048, 256
    assert kept - int4 == vocabulary * width * 2 - vocabulary * (width + width // 32 * 2)


def test_where_a_backend_reads_no_codes_a_note_says_so() -> None:
    asked: Any = {"quant": "int8", "group_size": 24, "weights": "none"}
    compiled = dsc.compile(TINY_CHECKPOINT, backend="onnxruntime", **asked)
    told, plain = compiled.report["notes"][-2:]
    count = re.fullmatch(r"weights: (\d+) in int8", told)
    assert count is not None
    assert plain == (
        f"{count[1]} of them are packed dequantised for onnxruntime: its blocks have 24 columns;"
        " a power of two from 16 to 256 is due"
    )
    assert all(t.format is None for t in compiled.program.weight_types().values())


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"backend": "tvm"}, "no kernel of embedding takes i8"),
        ({"backend": "onnxruntime", "group_size": 24}, "its blocks have 24 columns"),
        ({"backend": "null", "keep": ["e"]}, "e is kept"),
    ],
)
def test_an_embedding_that_cannot_be_codes_is_refused_with_the_reason(
    asked: dict[str, Any], why: str
) -> None:
    chosen = backends.get(asked.pop("backend"))
    asked["keep"] = tuple(asked.get("keep", ()))
    options = PipelineOptions(quant_embedding="int8", **asked)
    with pytest.raises(UnsupportedOperator, match=f"cannot be codes on {chosen.name}:\n.*{why}"):
        pipeline.prepare(small_lm(), chosen, Target("cpu"), options)
    options = PipelineOptions(quant_embedding="int8")
    functions = parse_program("graph main(%x: f32[3]) { %y = silu %x return %y }")
    with pytest.raises(UnsupportedOperator, match="it looks up no rows of a weight"):
        pipeline.prepare(functions, backends.get("null"), Target("cpu"), options)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"quant": "int3"}, "quant 'int3'"),
        ({"quant": None}, "quant is None"),
        ({"keep": ["lm_head"]}, "'lm_head' is kept, and nothing is quantised"),
        ({"quant": "int8", "keep": "lm_head"}, "keep is 'lm_head'"),
        ({"quant": "int8", "keep": [7]}, "keep is"),
        ({"quant": "int8", "keep": ["lm_head:int8"]}, "says 8 bits, and quant is int8"),
        ({"quant": "int8", "keep": ["lm_head:fp8"]}, "'lm_head:fp8' says FP8, and quant is int8"),
        ({"quant": "fp8", "keep": ["lm_heat:fp8"]}, "no weight is called 'lm_heat'"),
        ({"quant": "int8", "keep": ["lm_heat"]}, "no weight is called 'lm_heat'"),
        ({"quant_embedding": "fp8"}, "quant_embedding 'fp8'"),
        ({"quant_embedding": "int8", "keep": ["lm_head:int8"]}, "says 8 bits, and quant is none"),
    ],
)
def test_what_cannot_be_asked_is_told(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dsc.compile(TINY_CHECKPOINT, backend="null", weights="none", **asked)


def test_fp8_takes_the_head_where_it_is_named() -> None:
    for keep, head in (((), None), (("head:fp8",), DType.f8e4m3)):
        options = PipelineOptions(quant="fp8", keep=keep)
        chosen = backends.get("null").capabilities(Target("cpu"))
        passes = pipeline.passes_for(model(), chosen, options)
        (each,) = (p for p in passes if p.name == "insert_fp8")
        found = each.run(model(), PassReport()).weights
        assert codes_of(found["head.weight"]) is head
        assert codes_of(found["a.weight"]) is DType.f8e4m3


def test_the_options_of_the_pass_are_text() -> None:
    each = QuantizeWeights(codes="i4", keep=("lm_head", "*.self_attn.*"))
    assert each.text == "quantize_weights{keep=[lm_head,*.self_attn.*],codes=i4}"
    (read,) = pipeline.read(each.text, lambda name: pytest.fail(name))
    assert read == each
