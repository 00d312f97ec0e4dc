"""Which passes run, and with which options: read off what a backend can and what was asked."""

from __future__ import annotations

from typing import Any

import pytest

from dsc import backends, pipeline
from dsc.asked import CACHES, check_cache_codes, check_states
from dsc.backends.base import Capabilities
from dsc.errors import UnsupportedOperator, UsageError
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.interface import State, Storage
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_source
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import PassRecord
from dsc.targets import Target, parse_target

PLAIN = {
    "hoist_select_rows", "specialise_entries", "absorb_mla", "choose_formats", "fuse",
    "own_outputs",
}  # fmt: skip
"""What runs for a backend that can nothing, over a canonical program."""


def a_program(stage: Stage = Stage.CANONICAL) -> Program:
    text = f'program "p" {{stage={stage.name}}}\ngraph main(%x: f32[4]) {{ return %x }}'
    return parse_program(text)


def texts(asked: dict[str, Any], can: dict[str, Any]) -> dict[str, str]:
    """The passes of a canonical program, as text by name."""
    options = pipeline.PipelineOptions(**asked)
    passes = pipeline.passes_for(a_program(), Capabilities(**can), options)
    return {each.name: each.text for each in passes}


@pytest.mark.parametrize(
    ("can", "asked", "more"),
    [
        ({}, {}, set()),
        ({"shared_experts": True}, {}, {"merge_shared_expert"}),
        ({"shared_experts": True}, {"fusion_level": 2}, set()),
        ({"shared_experts": True}, {"ranks": 2}, {"shard", "cut_at_collectives"}),
        ({"collectives": True}, {"ranks": 2}, {"shard"}),
        ({"collectives": True}, {}, set()),
        ({"states": (Storage.CONTIGUOUS, Storage.GROWN)}, {}, {"append_cache_in_place"}),
        ({"states": (Storage.GROWN, Storage.PAGED)}, {"cache": "paged"}, {"append_cache_in_place"}),
        ({"states": (Storage.GROWN, Storage.CONTIGUOUS)}, {}, set()),
        ({"caches": ("i8",)}, {"cache_format": "int8"}, {"quantize_cache"}),
        ({"fuse": 1}, {}, set()),
        ({"fuse": 2}, {}, {"merge_projections"}),
        ({"experts": ExpertKernels(True, 8, 1.0, 2)}, {}, {"lower_moe_dispatch"}),
    ],
)
def test_passes_run_where_they_apply(
    can: dict[str, Any], asked: dict[str, Any], more: set[str]
) -> None:
    assert texts(asked, can).keys() == PLAIN | more
    assert texts(asked, {**can, "absorbed": False}).keys() == (PLAIN | more) - {"absorb_mla"}


def test_what_was_traced_is_raised_first() -> None:
    passes = pipeline.passes_for(
        a_program(Stage.TRACED), Capabilities(), pipeline.PipelineOptions()
    )
    names = [each.name for each in passes]
    assert tuple(names[: len(pipeline.RAISE)]) == pipeline.RAISE
    assert set(names[len(pipeline.RAISE) :]) == PLAIN


@pytest.mark.parametrize(
    ("level", "fuse", "text"),
    [(3, 3, "fuse"), (3, 1, "fuse{level=1,asked=3}"), (1, 3, "fuse{level=1}"),
     (1, 1, "fuse{level=1}"), (0, 0, "fuse{level=0}")],
)  # fmt: skip
def test_fusion_is_told_the_level_that_was_asked_where_it_is_not_taken(
    level: int, fuse: int, text: str
) -> None:
    assert texts({"fusion_level": level}, {"fuse": fuse})["fuse"] == text


def test_caches_have_pages_only_where_they_are_asked_for() -> None:
    can = {"states": (Storage.CONTIGUOUS, Storage.PAGED)}
    passes = (texts({"cache": cache, "prefill_chunk": 7}, can) for cache in CACHES)
    assert [each["append_cache_in_place"] for each in passes] == [
        "append_cache_in_place{slack=7}", "append_cache_in_place{slack=7,page=64}",
        "append_cache_in_place{slack=7}",
    ]  # fmt: skip
    defaults = texts({"ranks": 4, "parallel": "ep"}, can)
    assert defaults["append_cache_in_place"] == "append_cache_in_place"  # 512 is the default
    assert defaults["shard"] == "shard{ranks=4,parallel=ep}"


@pytest.mark.parametrize("level", [-1, 4])
def test_a_level_that_there_is_not_is_refused(level: int) -> None:
    with pytest.raises(UsageError, match=f"fusion_level {level}") as refused:
        pipeline.PipelineOptions(fusion_level=level)
    assert refused.value.hint == "one of 0, 1, 2, 3"


@pytest.mark.parametrize(
    ("name", "has"),
    [("raise_mla", False), ("merge_shared_expert", False), ("specialise_entries", True),
     ("fuse", True), ("no_pass", False)],
)  # fmt: skip
def test_entries_are_there_from_one_pass_on(name: str, has: bool) -> None:
    assert pipeline.has_entries(name) == has


def test_layouts_and_states_that_a_backend_does_not_hold_are_refused() -> None:
    def prepared(backend: str, program: Program, **asked: Any) -> None:
        options = pipeline.PipelineOptions(**asked)
        pipeline.prepare(program, backends.get(backend), Target("cpu"), options)

    with pytest.raises(UsageError, match="cache 'rings'") as refused:
        prepared("reference", a_program(), cache="rings")
    assert refused.value.hint == "one of contiguous, paged, in-place"
    with pytest.raises(UsageError, match="the onnxruntime backend takes no caches in pages"):
        prepared("onnxruntime", a_program(), cache="paged")
    for name in ("tvm", "triton", "null"):
        with pytest.raises(UsageError, match=f"the {name} backend never grows them"):
            prepared(name, a_program(), cache="in-place")
    with pytest.raises(UsageError, match="cache_format 'f16'") as refused:
        prepared("reference", a_program(), cache_format="f16")
    assert "bf16, fp8, int8" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="the onnxruntime backend takes no caches in fp8"):
        prepared("onnxruntime", a_program(), cache_format="fp8")
    with pytest.raises(UsageError, match="the tvm backend takes no caches in int8"):
        prepared("tvm", a_program(), cache_format="int8", codes=False)
    with pytest.raises(UnsupportedOperator, match="it has no caches of latent attention"):
        prepared("reference", a_program(), cache_format="fp8")
    with pytest.raises(UnsupportedOperator, match="has no caches of attention"):
        prepared("reference", a_program(), cache="paged")
    with pytest.raises(UnsupportedOperator, match="cannot be written in place:\nit has no caches"):
        prepared("onnxruntime", a_program(), cache="in-place")
    prepared("reference", a_program())


def test_a_latent_that_is_not_read_as_one_is_told_with_its_reason() -> None:
    raised, quantised = PassReport(), PassReport()
    for layer in (3, 4):
        raised.miss("MlaAttention", f"layers.{layer}", "its mask is odd")
    records = [
        PassRecord(name, name, 0.0, {}, False, report)
        for name, report in (("raise_mla", raised), ("quantize_cache", quantised))
    ]
    told = (
        "it has no caches of latent attention\nthat of layers.3 is computed head by head: its mask"
    )
    with pytest.raises(UnsupportedOperator, match=told) as refused:
        check_cache_codes(a_program(), records, "fp8")
    assert "layers.4" not in str(refused.value)


def test_what_is_emitted_is_the_program_where_nothing_is_cut() -> None:
    """One object, so that it is kept and read once; weights that nobody reads are left out."""
    text = """program "p" {stage=CANONICAL}
weights { @w : f32[4] = source "w" : f32[4]
@idle : f32[4] = source "idle" : f32[4] }
graph main(%x: f32[4]) { %y = add %x, @w return %y }"""
    options = pipeline.PipelineOptions()
    program = parse_program(text, random_source({"w": TensorType(DType.f32, (4,))}))
    found = pipeline.prepare(program, backends.get("reference"), Target("cpu"), options)
    assert found.program.weights.keys() == {"w"}
    assert found.emitted is found.program


def test_weights_are_numbers_until_a_program_is_lowered() -> None:
    """A program that stores none in a format is the same one; a lowered one keeps its formats."""

    def stored(kind: str, stage: str) -> Program:
        return parse_program(f"""program "p" {{stage={stage}}}
        weights {{ @w : {kind}[4,5] = source "w" : {kind}[4,5] }}
        graph main(%x: f32[2,5]) {{ %y = linear %x, @w return %y }}""")

    for stage in ("CANONICAL", "LOWERED"):
        plain = stored("f32", stage)
        assert pipeline._in_numbers(plain) is plain
    lowered, coded = stored("f8e4m3{2x*,f32}", "LOWERED"), stored("f8e4m3{2x*,f32}", "CANONICAL")
    assert pipeline._in_numbers(lowered) is lowered
    numbers = pipeline._in_numbers(coded)
    assert any(t.format is not None for t in coded.weight_types().values())
    assert all(t.format is None for t in numbers.weight_types().values())


def test_states_that_cannot_be_held_are_all_named() -> None:
    kind = TensorType(DType.f32, (2,))
    states = [State(f"s{i}", "t", kind, each) for i, each in enumerate(Storage)]
    program: Any = type("P", (), {"states": states})()
    can = Capabilities(states=(Storage.GROWN, Storage.RING))
    with pytest.raises(UnsupportedOperator) as refused:
        check_states(program, "mine", can)
    assert refused.value.what == (
        "the mine backend holds no such states as s1 (contiguous), s2 (paged), s4 (fixed)"
    )
    check_states(program, "mine", Capabilities(states=tuple(Storage)))


def test_a_program_is_taken_back_only_where_that_loses_nothing() -> None:
    """A lowered one for a pass over optimised ones; no canonical one for a pass over traced."""
    lowered = a_program(Stage.LOWERED)
    assert pipeline._ready(lowered, pipeline.make("own_outputs")).stage is Stage.LOWERED
    assert pipeline._ready(lowered, pipeline.make("fuse")).stage is Stage.OPTIMIZED
    assert pipeline._ready(a_program(Stage.PLANNED), pipeline.make("fuse")).stage is Stage.OPTIMIZED
    with pytest.raises(UsageError) as refused:
        pipeline._ready(a_program(), pipeline.make("cut_at_collectives"))
    assert refused.value.what == (
        "cut_at_collectives takes a program at stage PLANNED, this one is at CANONICAL"
    )
    assert refused.value.hint == (
        "run what leads there before it: -p hoist_select_rows,specialise_entries,choose_formats,"
        "fuse,own_outputs,cut_at_collectives"
    )
    with pytest.raises(UsageError) as refused:
        pipeline._ready(a_program(), pipeline.make("raise_rope"))
    assert refused.value.hint == (
        "take the text from before it: dsc inspect MODEL --after raise_swiglu"
    )
    with pytest.raises(UsageError) as refused:
        pipeline._ready(a_program(), pipeline.make("fold_empty"))
    assert (refused.value.hint or "").endswith("--after input")


def test_a_text_is_read_at_the_stages_of_the_first_pass() -> None:
    assert [*pipeline.stages_for([])] == [*Stage]
    passes = [pipeline.make("own_outputs"), pipeline.make("raise_rope")]
    assert [*pipeline.stages_for(passes)] == sorted(passes[0].needs)


@pytest.mark.parametrize(
    ("text", "kind", "arch", "gpu"),
    [("cpu", "cpu", "", False), ("cpu:znver4", "cpu", "znver4", False),
     ("cuda:sm_90", "cuda", "sm_90", True), ("hip:gfx942", "hip", "gfx942", True)],
)  # fmt: skip
def test_a_target_is_read_and_told(text: str, kind: str, arch: str, gpu: bool) -> None:
    found = parse_target(text)
    assert (found.kind, found.arch, found.is_gpu, str(found)) == (kind, arch, gpu, text)


@pytest.mark.parametrize("text", ["", "cuda", "cuda:gfx942", "tpu:cpu", "sm_90"])
def test_a_target_that_nobody_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"unknown target '{text}'"):
        parse_target(text)
