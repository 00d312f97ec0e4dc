"""Merged projections: which linears become one, what they compute, and which stay apart and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsc.ir.graph import Weight
from dsc.ir.interpreter import Interpreter
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import Source, WeightExpr, apply, evaluate, random_source
from dsc.passes.absorb_mla import AbsorbMla
from dsc.passes.merge_projections import MergeProjections, _joined
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import Manager
from dsc.rewrite.verify import compare_programs
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.passes.test_raise_models import raised, stored
from tests.rewrite.harness import program_of


def merged(program: Program) -> tuple[Program, PassReport]:
    report = PassReport()
    done = MergeProjections().run(program, report)
    verify(done)
    return done, report


def ops(program: Program, entry: str = "main") -> list[str]:
    return [n.op for n in program.entries[entry].nodes]


@pytest.mark.parametrize("name", ["v3_ragged", "v2_bf16", "v3_two_layers_bf16", "own"])
def test_models_compute_the_same(name: str) -> None:
    before = raised(stored(name))
    after, report = merged(before)
    assert report.fired["merge"] >= 2
    found = compare_programs(before, after, MergeProjections.tolerance)
    assert found.ok, found


def test_the_projections_of_v3_layers() -> None:
    """q_a | kv_a in each layer, gate | up in the dense one and in the other's shared experts."""
    program = Manager().run(canonical_lm(Sizes()), [SpecialiseEntries(), AbsorbMla()])
    after, report = merged(program)
    assert report.fired == {"merge": 12}
    assert not report.missed
    for entry in ("decode", "extend", "prefill"):
        assert report.facts[entry]["linears"] == [15, 11]
        assert ops(after, entry).count("linear") == 11
    names = {n for n in after.weights if "-" in n}
    assert {n.partition("layers.")[2] for n in names} == {
        "0.self_attn.q_a_proj-kv_a_proj_with_mqa.weight",
        "1.self_attn.q_a_proj-kv_a_proj_with_mqa.weight",
        "0.mlp.gate_proj-up_proj.weight",
        "1.mlp.shared_experts.gate_proj-up_proj.weight",
    }
    assert not any("self_attn.q_a_proj.weight" in n for n in after.weights)
    splits = [n for n in after.entries["decode"].nodes if n.op == "split"]
    assert [len(n.outputs) for n in splits] == [3, 2, 2, 3, 2, 2]  # the split of kv_a is taken in


PAIR = """graph main(%x: f32[N,8], @a: f32[4,8], @b: f32[6,8]{more}) {{
  %y = linear %x, @a{a}
  %z = linear %x, @b{b}
  {rest}
  return %y, %z{also}
}}"""


def pair(more: str = "", a: str = "", b: str = "", rest: str = "", also: str = "") -> Program:
    return program_of(PAIR.format(more=more, a=a, b=b, rest=rest, also=also), Stage.CANONICAL)


@pytest.mark.parametrize("biased", ["ab", "a", "b"])
def test_biases_are_merged_and_absent_ones_are_zeros(biased: str) -> None:
    more = "".join(f", @{c}.bias: f32[{n}]" for c, n in (("a", 4), ("b", 6)) if c in biased)
    given = {c: f", @{c}.bias" if c in biased else "" for c in "ab"}
    before = pair(more, given["a"], given["b"])
    after, _ = merged(before)
    assert ops(after) == ["linear", "split"]
    linear = after.entries["main"].nodes[0]
    bias = linear.inputs[2]
    assert isinstance(bias, Weight)
    value = evaluate(after.weights[bias.name], after.source)
    assert value.shape == (10,)
    assert (value[:4].abs().max() > 0) == ("a" in biased)
    assert (value[4:].abs().max() > 0) == ("b" in biased)
    assert compare_programs(before, after, 1e-6).ok


def test_more_than_two() -> None:
    before = pair(", @c: f32[2,8]", rest="%u = linear %x, @c", also=", %u")
    after, report = merged(before)
    assert ops(after) == ["linear", "split"]
    assert report.facts == {"main": {"linears": [3, 1]}}
    assert compare_programs(before, after, 1e-6).ok


def test_results_that_are_also_read_whole_keep_their_split() -> None:
    before = pair(rest="%p, %q = split %z {sizes=[2,4]}", also=", %p, %q")
    after, _ = merged(before)
    assert ops(after) == ["linear", "split", "split"]
    assert compare_programs(before, after, 1e-6).ok


def test_a_split_of_another_axis_stays() -> None:
    text = """graph main(%x: f32[2,4,8], @a: f32[4,8], @b: f32[6,8]) {
      %y = linear %x, @a
      %z = linear %x, @b
      %p, %q = split %z {sizes=[1,3], axis=1}
      return %y, %p, %q
    }"""
    before = program_of(text, Stage.CANONICAL)
    after, _ = merged(before)
    assert ops(after) == ["linear", "split", "split"]
    assert compare_programs(before, after, 1e-6).ok


def test_every_element_is_the_same_up_to_the_order_of_a_sum() -> None:
    before = pair()
    after, _ = merged(before)
    x = {"x": torch.randn(3, 8, dtype=torch.float32)}
    one, other = (Interpreter(p).run("main", x) for p in (before, after))
    for name, wanted in one.items():
        torch.testing.assert_close(other[name], wanted, rtol=1e-6, atol=1e-6)


# --- near-misses ----------------------------------------------------------------------------------


def stays(program: Program) -> str:
    """Why the pass leaves a program alone."""
    report = PassReport()
    assert MergeProjections().run(program, report) is program
    assert not report.fired
    return "; ".join(why for _, _, why in report.missed)


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    program = pair(", %r: f32[N,8]", rest="%u = linear %r, @a", also=", %u")
    assert stays(program) == "@a is also read elsewhere"


def test_a_weight_that_is_an_output_stays() -> None:
    assert stays(pair(also=", @b")) == "@b is also read elsewhere"


def test_one_weight_read_twice_stays() -> None:
    program = pair(rest="%u = linear %x, @a", also=", %u")
    assert stays(program) == "one weight is read twice among a, b, a"


def test_entries_that_group_differently_stay() -> None:
    one, other = pair(), pair()
    alone = program_of(
        "graph main(%x: f32[N,8], @a: f32[4,8]) {\n%y = linear %x, @a\nreturn %y\n}",
        Stage.CANONICAL,
    )
    same = replace(one, entries={"p": one.entries["main"], "q": other.entries["main"]})
    after, report = merged(same)
    assert report.fired == {"merge": 2}
    assert print_graph(after.entries["p"]).replace("graph p", "graph q") == print_graph(
        after.entries["q"]
    )
    mixed = replace(one, entries={"p": one.entries["main"], "q": alone.entries["main"]})
    assert stays(mixed) == "@a is also read elsewhere"


def test_weights_kept_in_different_forms_stay() -> None:
    f8 = Source("b", TensorType(DType.f8e4m3, (6, 8)))
    scale = Source("b.scale", TensorType(DType.f32, (1, 1)))
    quantised = apply("dequantize", apply("scaled", f8, scale, block=(128, 128)), dtype=DType.f32)
    program = pair()
    sources = {"a": TensorType(DType.f32, (4, 8)), "b": f8.type, "b.scale": scale.type}
    mixed = replace(
        program, weights={**program.weights, "b": quantised}, source=random_source(sources)
    )
    told = "the weights are kept in different forms: @a in f32, @b in f8e4m3{128x128,f32}"
    assert stays(mixed) == told


@pytest.mark.parametrize(("block", "fired"), [((4, 8), True), ((1, 4), True), ((3, 8), False)])
def test_weights_in_codes_stay_where_one_would_cut_blocks_of_the_other(
    block: tuple[int, int], fired: bool
) -> None:
    """They would be packed dequantised: 4 rows of @a are no whole blocks of 3."""
    weights, types = dict[str, WeightExpr](), dict[str, TensorType]()
    for name, rows in (("a", 4), ("b", 6)):
        codes = TensorType(DType.f8e4m3, (rows, 8))
        scales = TensorType(DType.f32, (-(-rows // block[0]), -(-8 // block[1])))
        types |= {name: codes, f"{name}.scale": scales}
        stored = apply("scaled", Source(name, codes), Source(f"{name}.scale", scales), block=block)
        weights[name] = apply("dequantize", stored, dtype=DType.f32)
    program = replace(pair(), weights=weights, source=random_source(types))
    if fired:
        assert merged(program)[1].fired == {"merge": 1}
    else:
        assert stays(program) == "the weights are kept in codes, and concat at 4 cuts a block of 3"


@pytest.mark.parametrize(
    "text",
    [
        "graph main(%x: f32[N,8], %r: f32[N,8], @a: f32[4,8], @b: f32[6,8]) {\n"
        "%y = linear %x, @a\n%z = linear %r, @b\nreturn %y, %z\n}",
        "graph main(%x: f32[N,8], %a: f32[4,8], %b: f32[6,8]) {\n"
        "%y = linear %x, %a\n%z = linear %x, %b\nreturn %y, %z\n}",
        "graph main(%x: f32[N,8], @a: f32[4,8], @b: f32[6,8], %c: f32[6]) {\n"
        "%y = linear %x, @a\n%z = linear %x, @b, %c\nreturn %y, %z\n}",
    ],
    ids=["two inputs", "weights that are values", "a bias that is a value"],
)
def test_what_is_no_pair_of_projections_stays(text: str) -> None:
    assert stays(program_of(text, Stage.CANONICAL)) == ""


def test_a_taken_name_is_left_alone() -> None:
    program = pair()
    program = replace(
        program, weights={**program.weights, "a-b": Source("a-b", TensorType(DType.f32, (1,)))}
    )
    after, _ = merged(program)
    assert "a-b_" in after.weights


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["m.gate.weight", "m.up.weight"], "m.gate-up.weight"),
        (["m.l.gate.weight", "m.l.up.weight", "m.l.z.weight"], "m.l.gate-up-z.weight"),
        (["a", "b"], "a-b"),
        (["m.a", "m.b"], "m.a-b"),
        (["a.weight", "b.weight"], "a-b.weight"),
        (["m.w", "m.n.w"], "m.w-n.w"),
        (["a.n.w", "b.n.w"], "a-b.n.w"),
        (["m.a.b.w", "m.c.w"], "m.a.b-c.w"),
    ],
)
def test_a_merged_weight_is_called_after_all_of_its_parts(names: list[str], joined: str) -> None:
    assert _joined(names) == joined


def test_two_groups_of_one_name_are_two_weights() -> None:
    text = """graph main(%x: f32[N,8], %r: f32[N,8], @a: f32[4,8], @b-c: f32[6,8], @a-b: f32[4,8],
      @c: f32[6,8]) {
      %p = linear %x, @a
      %q = linear %x, @b-c
      %s = linear %r, @a-b
      %t = linear %r, @c
      return %p, %q, %s, %t
    }"""
    before = program_of(text, Stage.CANONICAL)
    after, report = merged(before)
    assert list(after.weights) == ["a-b-c", "a-b-c_"]
    assert report.facts == {"main": {"linears": [4, 2]}}
    assert compare_programs(before, after, 1e-6).ok


def test_biases_may_be_kept_otherwise_than_matrices() -> None:
    """A format is of matrices: biases are of one type, as the operator wants."""
    program = pair(", @c: f32[4], @d: f32[6]", ", @c", ", @d")
    after, report = merged(program)
    assert report.fired == {"merge": 1}
    assert list(after.weights) == ["a-b", "c-d"]
