"""Passes are text, with their options: what was printed reads back as the same passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest

from dsc import backends, pipeline
from dsc.backends.base import Capabilities
from dsc.errors import UsageError
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.interface import Storage
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass
from dsc.rewrite.options import Option, options_of
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

TWO = Target("cpu", "znver4")


def read(text: str) -> list[Pass]:
    return pipeline.read(text, backends.get)


def text(passes: list[Pass]) -> str:
    return ",".join(each.text for each in passes)


def others(known: Option) -> list[Any]:
    """Values of an option that are not its default."""
    if known.of:
        return [getattr(pipeline.capabilities_of(backends.get("tvm")), known.of)]
    if known.kind is bool:
        return [not known.default]
    if known.kind is int:
        return [n for n in known.among or (known.least or 1, 12345) if n != known.default]
    if known.kind is str:
        return [word for word in known.among if word != known.default]
    words = (known.default[:1], known.default[::-1], () if known.among else ("a.b", "c.*"))
    return [found for found in words if found != known.default]


@pytest.mark.parametrize("name", pipeline.PASSES)
def test_every_option_of_every_pass_reads_back_as_it_was(name: str) -> None:
    kind = pipeline.kind_of(name)
    values = {known.name: others(known) for known in options_of(kind).values()}
    assert all(values.values())
    given = [{key: value} for key, found in values.items() for value in found]
    together = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    for options in [{}, *given, *together]:
        each = kind(**options)
        assert (each.text == name) == (not options)
        assert read(each.text) == [each]


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_passes_of_every_backend_are_text_that_gives_them_again(
    backend: str, ranks: int
) -> None:
    can = pipeline.capabilities_of(backends.get(backend))
    asked = pipeline.PipelineOptions(fusion_level=1, prefill_chunk=64, ranks=ranks, parallel="ep")
    passes = pipeline.passes_for(canonical_lm(Sizes()).at(Stage.TRACED), can, asked)
    assert read(text(passes)) == passes
    assert text(read(text(passes))) == text(passes)
    assert ("ranks=4,parallel=ep" in text(passes)) == (ranks == 4)
    assert ("slack=64" in text(passes)) == (can.states[0] is Storage.CONTIGUOUS)
    assert ("kernels=" + backend in text(passes)) == (can.experts is not None)
    assert f"fuse{{level={min(can.fuse, 1)}" in text(passes)
    assert ("asked=1" in text(passes)) == (can.fuse == 0)


def test_what_depends_on_the_target_is_told_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tvm = backends.get("tvm")
    kind, usual = type(tvm), type(tvm).capabilities

    def two_kinds(self: Any, target: Target) -> Capabilities:
        can = usual(self, target)
        return replace(can, experts=ExpertKernels(True, 7, 1.0, 2)) if target == TWO else can

    monkeypatch.setattr(kind, "capabilities", two_kinds)
    usually, here = (pipeline.capabilities_of(tvm, t) for t in (Target("cpu"), TWO))
    names = [pipeline.make("lower_moe_dispatch", kernels=c.experts).text for c in (usually, here)]
    assert names == [
        "lower_moe_dispatch{kernels=tvm}",
        "lower_moe_dispatch{kernels=tvm@cpu:znver4}",
    ]
    assert [each.kernels.tile for name in names for each in read(name)] == [1, 7]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        (" fuse { level = 1 , asked=2 } , ,shard{},", "fuse{level=1,asked=2},shard"),
        ("fuse{asked=2,level=1}", "fuse{level=1,asked=2}"),
        ("fuse{level=3},shard{ranks=2,parallel=tp+ep}", "fuse,shard"),
        ("specialise_entries{entries=[ decode , prefill ]}", None),
        ("", ""),
    ],
)
def test_spaces_order_and_defaults_mean_nothing(written: str, plain: str | None) -> None:
    wanted = written.replace(" ", "") if plain is None else plain
    assert text(read(written)) == wanted


NAMED = {
    "fuse{level=7}": ("fuse: level is 7", "level of fuse is one of 0, 1, 2, 3"),
    "fuse{level=high}": ("fuse: level is high", "one of 0, 1, 2, 3"),
    "fuse{level=true}": ("fuse: level is true", "one of 0, 1, 2, 3"),
    "fuse{levl=1}": ("fuse has no option 'levl'", "did you mean level? One of level, limits"),
    "fuse{level=1,level=2}": ("fuse: 'level=2' stands twice", "pass{option=value"),
    "fuse{level}": ("fuse: 'level' cannot be read", "pass{option=value"),
    "fuse{limits=gcc}": ("unknown backend 'gcc'", "tvm"),
    "fuse{level=1": ("passes cannot be read from 'fuse{level=1' on", "pass{option=value"),
    "fuse;shard": ("passes cannot be read from 'fuse;shard' on", "pass{option=value"),
    "fuze{level=1}": ("no pass is called 'fuze'", "did you mean fuse?"),
    "absorb_mla{level=1}": ("absorb_mla has no option 'level'", "one of entries"),
    "name_values{level=1}": ("name_values has no option 'level'", "write its name alone"),
    "append_cache_in_place{slack=-1}": ("slack is -1", "a whole number, at least 0"),
    "append_cache_in_place{slack=1e3}": ("slack is 1e3", "a whole number, at least 0"),
    "shard{ranks=0}": ("shard: ranks is 0", "a whole number, at least 1"),
    "shard{parallel=pp}": ("shard: parallel is pp", "one of tp+ep, tp, ep"),
    "fold_constants{weights=no}": ("fold_constants: weights is no", "true or false"),
    "fold_constants{weights=1}": ("fold_constants: weights is 1", "true or false"),
    "specialise_entries{entries=decode}": ("entries is decode", "in brackets, a list of decode"),
    "specialise_entries{entries=[decode,drafts]}": ("[decode,drafts]", "decode, extend, prefill"),
}


@pytest.mark.parametrize("wrong", NAMED)
def test_what_is_wrong_is_one_error_with_what_is_allowed(wrong: str) -> None:
    what, hint = NAMED[wrong]
    with pytest.raises(UsageError) as told:
        read(f"raise_rope,{wrong}")
    assert what in told.value.what
    assert hint in (told.value.hint or "")


def test_an_option_is_checked_however_it_is_given() -> None:
    with pytest.raises(UsageError, match="fuse: level is 9"):
        pipeline.make("fuse", level=9)


def test_an_option_without_a_text_form_is_no_option() -> None:
    @dataclass(frozen=True)
    class Scaled(Pass):
        factors: dict[str, float] | None = None

    with pytest.raises(TypeError, match="option factors of Scaled has no text form"):
        Scaled()


# --- the list -------------------------------------------------------------------------------------


def names(program: Program, can: Capabilities, **asked: Any) -> list[str]:
    passes = pipeline.passes_for(program, can, pipeline.PipelineOptions(**asked))
    return [each.name for each in passes]


def test_the_list_has_each_pass_once_and_they_run_in_its_order() -> None:
    order = list(pipeline.PASSES)
    assert len(order) == len(pipeline.SLOTS) == len(set(order))
    everything = Capabilities(
        experts=ExpertKernels(True, 1, 1.0, 1),
        shared_experts=True,
        fuse=3,
        states=(Storage.CONTIGUOUS, *Storage),
        activations=("i8",),
        pairs=True,
    )
    traced = canonical_lm(Sizes()).at(Stage.TRACED)
    wishes: list[dict[str, Any]] = [
        {},
        {"ranks": 2},
        {"cache": "paged"},
        {"cache_format": "fp8"},
        {"quant": "int4"},
        {"quant": "fp8"},
    ]
    runs = [names(traced, everything, **asked) for asked in wishes]
    for run in runs:
        assert run == sorted(run, key=order.index)
    assert {name for run in runs for name in run} == set(order)


def test_each_condition_of_the_list_decides() -> None:
    program = canonical_lm(Sizes())
    least = names(program, Capabilities(absorbed=False))
    assert least == [
        "hoist_select_rows", "specialise_entries", "choose_formats", "fuse", "own_outputs",
    ]  # fmt: skip
    assert names(program.at(Stage.TRACED), Capabilities(absorbed=False)) == [
        *pipeline.RAISE,
        *least,
    ]

    def added(can: dict[str, Any], **asked: Any) -> set[str]:
        found = names(program, Capabilities(**{"absorbed": False, **can}), **asked)
        return set(found) - set(least)

    shared = {"shared_experts": True}
    assert added(shared) == {"merge_shared_expert"}
    assert added(shared, fusion_level=2) == set()
    assert added({"absorbed": True}) == {"absorb_mla"}
    in_place = {"append_cache_in_place"}
    assert added({"states": (Storage.CONTIGUOUS, Storage.GROWN)}) == in_place
    assert added({"states": tuple(Storage)}, cache="paged") == in_place
    assert added(shared, ranks=2) == {"shard", "cut_at_collectives"}
    assert added({"collectives": True}, ranks=2) == {"shard"}
    assert added({"experts": ExpertKernels(True, 1, 1.0, 1)}) == {"lower_moe_dispatch"}
    assert added({"fuse": 2}) == {"merge_projections"}
    assert added({"fuse": 1}) == set()


def test_a_word_is_read_as_what_an_option_is() -> None:
    known = {kind: Option("o", kind, None) for kind in (bool, int, str, tuple)}
    for kind, word, value in (
        (bool, "true", True), (bool, "false", False), (bool, "no", "no"), (int, "-12", -12),
        (int, "1.5", "1.5"), (str, "true", "true"), (tuple, "[a, b,]", ("a", "b")),
        (tuple, "[]", ()), (tuple, "a", "a"),
    ):  # fmt: skip
        assert known[kind].read(word, lambda backend, member: None) == value, word
