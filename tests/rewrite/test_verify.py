"""Comparing programs: what agrees is let pass, what a faulty pass changes is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsc.errors import VerificationError
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, Node
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import MetaSource, Source, random_source
from dsc.rewrite.base import EXACT
from dsc.rewrite.verify import (
    Comparison,
    compare_programs,
    difference,
    pinned,
    relative_difference,
    same_bits,
    weight_elements,
)
from dsc.rewrite.widen import runnable
from tests.ir.test_shrink import layer

STEP = """program "lm" {stage=CANONICAL}
symbols {B=[1,4], L=[1,8], P=[0,32], S=[1,8]}
weights {
  @embed : bf16[50,12] = source "embed" : bf16[50,12]
  @kv_b : bf16[22,6] = source "kv_b" : bf16[22,6]
  @gate : bf16[8,12] = source "gate" : bf16[8,12]
  @gate_up : bf16[8,10,12] = source "gate_up" : bf16[8,10,12]
  @down : bf16[8,12,5] = source "down" : bf16[8,12,5]
}
graph step(%input_ids: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
    %past.latent: bf16[B,P,6], %past.rope: bf16[B,P,2]) {
  %x = embedding %input_ids, @embed
  %flat, %latent, %rope = split %x {sizes=[4,6,2]}
  %c = append %past.latent, %latent, %lengths
  %r = append %past.rope, %rope, %lengths
  %q = reshape %latent {shape=[B,S,2,3]}
  %qr = reshape %flat {shape=[B,S,2,2]}
  %o = mla_attention %q, %qr, %c, %r, @kv_b, %lengths {scale=0.5}
  %of = reshape %o {shape=[B,S,16]}
  %oc = slice %of {axis=2, start=0, end=12}
  %h = add %x, %oc
  %i, %w = route %h, @gate {score="sigmoid", groups=2, keep=1, top_k=2, normalise=true, scale=2.5}
  %e = experts %h, %i, %w, @gate_up, @down
  %y = add %h, %e
  %z = select_rows %y, %logits_at
  return %z as "logits", %c as "present.latent" updates %past.latent,
    %r as "present.rope" updates %past.rope
}
"""


def step() -> Program:
    program = parse_program(STEP)
    verify(program)
    types = {k: e.type for k, e in program.weights.items()}
    return replace(program, source=random_source(types))


def edited(program: Program, op: str, **attrs: Any) -> Program:
    """The program with attributes of every `op` changed."""

    def edit(node: Node) -> Node:
        return replace(node, attrs=node.attrs.updated(**attrs)) if node.op == op else node

    return program.map_entries(lambda g: g.with_nodes(map(edit, g.nodes)))


def in_place(program: Program) -> Program:
    """The program with caches of capacity C written in place."""
    from dsc.ir.dims import symbol
    from dsc.ir.graph import Value

    graph = program.entries["step"].substitute({"P": symbol("C") - symbol("S")})
    states = {"past.latent", "past.rope"}

    def cache(value: Value) -> Value:
        if value.name not in states:
            return value
        b, _, d = value.type.shape
        return Value(value.name, value.type.with_shape((b, symbol("C"), d)))

    nodes = []
    for node in graph.nodes:
        if node.op == "append":
            first = cache(node.operands[0])  # type: ignore[arg-type]
            node = Node("cache_write", (first, *node.inputs[1:]), node.attrs, node.outputs)
        nodes.append(node)
    graph = replace(graph, inputs=tuple(map(cache, graph.inputs)), nodes=tuple(nodes))
    symbols = {"B": Range(1, 4), "L": Range(1, 8), "S": Range(1, 8), "C": Range(1, 64)}
    made = replace(program, entries={"step": graph}, symbols=symbols, stage=Stage.OPTIMIZED)
    verify(made)
    return made


def caught(before: Program, after: Program, *words: str, tolerance: float = EXACT) -> Comparison:
    found = compare_programs(before, after, tolerance)
    assert not found.ok
    for word in words:
        assert word in found.failure, found.failure
    return found


def test_a_program_agrees_with_itself() -> None:
    found = compare_programs(step(), step())
    assert found.ok
    assert found.runs == 4, "three sizes, one of them ragged too"
    assert "full form: 4 runs of step agree" in str(found)


@pytest.mark.parametrize("tolerance", [EXACT, 1e-4])
def test_faults_of_passes_are_caught(tolerance: float) -> None:
    before = step()
    found = caught(before, edited(before, "mla_attention", scale=0.51), "output logits",
                   "entry step", "full form", "B=2", "S=3", tolerance=tolerance)  # fmt: skip
    assert str(found) == found.failure
    caught(before, edited(before, "route", scale=2.4), "logits", tolerance=tolerance)
    caught(before, edited(before, "slice", start=1, end=13), "logits", tolerance=tolerance)
    assert compare_programs(before, edited(before, "route", fill=-9.0), tolerance).ok


def test_a_perturbation_of_three_tolerances_is_caught() -> None:
    text = """program "p" {stage=CANONICAL} symbols {B=[1,4]}
    graph main(%x: f32[B,4]) { %k = full {shape=[], value=VALUE, dtype=f32}
      %y = add %x, %k return %y }"""
    one, two, three = (parse_program(text.replace("VALUE", v)) for v in ("1.0", "1.00005", "1.01"))
    assert compare_programs(one, two, 1e-4).ok
    caught(one, two, "bit for bit")
    found = caught(one, three, "tolerance 0.001", tolerance=1e-3)
    assert found.worst > 1e-3


def test_outputs_and_entries_must_remain() -> None:
    before = step()
    graph = before.entries["step"]
    fewer = replace(graph, outputs=graph.outputs[:1], output_names=("logits",), aliases=())
    caught(before, replace(before, entries={"step": fewer}), "output present.latent is gone")
    two = replace(before, entries={"a": graph, "b": graph})
    caught(two, replace(two, entries={"a": graph}), "the entries b are gone")
    caught(two, replace(two, entries={"a": graph, "b": graph, "c": graph}), "no counterpart")
    renamed = replace(graph, output_names=("logit", *graph.output_names[1:]))
    caught(before, replace(before, entries={"step": renamed}), "output logits is gone")


def test_an_input_that_is_no_cache_must_keep_its_shape() -> None:
    text = """program "p" {stage=CANONICAL}
    graph main(%x: f32[2,WIDTH]) { %y = sum %x {axes=[1]} return %y }"""
    four, six = (parse_program(text.replace("WIDTH", n)) for n in ("4", "6"))
    caught(four, six, "input x was (2, 4) and is (2, 6)")


def test_a_cache_may_grow_and_not_shrink() -> None:
    text = """program "p" {stage=CANONICAL}
    graph main(%past: f32[2,ROWS,3]) { %y = neg %past return %y as "present" updates %past }"""
    four, three = (parse_program(text.replace("ROWS", n)) for n in "43")
    caught(four, three, "input past was (2, 4, 3) and is (2, 3, 3); entry main, full form")


def test_a_cache_that_is_stored_otherwise_is_told_with_both_types() -> None:
    text = """program "p" {stage=CANONICAL}
    graph main(%past: f32[2,4,3]) { %y = neg %past return %y as "present" updates %past }"""
    one, two = (parse_program(text.replace("f32", dtype)) for dtype in ("f32", "bf16"))
    caught(one, two, "cache past was f32[2,4,3] and is bf16[2,4,3]: no past is of both")


def test_a_cache_that_lost_its_last_row_is_told_with_its_shapes() -> None:
    text = """program "p" {stage=CANONICAL} symbols {B=[1,4], P=[0,9], S=[1,9]}
    graph main(%past: f32[B,P,2], %new: f32[B,S,2], %lengths: i64[B]) {
      %c = append %past, %new, %lengths %d = slice %c {axis=1, start=FIRST, end=P+S}
      return %d as "present" updates %past }"""
    one, two = (parse_program(text.replace("FIRST", n)) for n in "01")
    caught(one, two, "present was torch.float32 (2, 8, 2) and is torch.float32 (2, 7, 2)")


def test_a_tolerance_may_be_met_exactly() -> None:
    text = """program "p" {stage=CANONICAL}
    graph main(%x: f32[2]) { %y = full {shape=[2], value=VALUE, dtype=f32} return %y }"""
    one, two = (parse_program(text.replace("VALUE", v)) for v in ("1.0", "1.5"))
    assert compare_programs(one, two, 0.5).ok
    caught(one, two, "output y differs by 0.5, tolerance 0.499", tolerance=0.499)


def test_sixteen_bits_round_where_every_bit_counts_or_where_that_is_asked_for() -> None:
    text = """program "p" {stage=CANONICAL}
    graph main(%x: f32[7]) {
      %a = cast %x {dtype=bf16}\n %y = cast %a {dtype=f32}\n return %READ as "y" }"""
    rounded, plain = (parse_program(text.replace("READ", name)) for name in "yx")
    assert compare_programs(rounded, plain, 1e-6).ok
    assert compare_programs(rounded, plain, EXACT, widen=True).ok
    assert not compare_programs(rounded, plain, EXACT).ok
    assert not compare_programs(rounded, plain, 1e-6, widen=False).ok


def test_one_entry_may_become_several() -> None:
    before = step()
    graph = before.entries["step"]
    entries = {"decode": graph.substitute({"S": 1, "L": 1}), "prefill": graph}
    found = compare_programs(before, replace(before, entries=entries))
    assert found.ok
    assert found.entries == ["decode", "prefill"]
    wrong = entries["decode"]
    nodes = [replace(n, attrs=n.attrs.updated(scale=0.6)) if n.op == "mla_attention" else n
             for n in wrong.nodes]  # fmt: skip
    entries["decode"] = wrong.with_nodes(nodes)
    caught(before, replace(before, entries=entries), "entry decode (from step)")


def test_caches_in_place_are_compared_by_their_filled_rows() -> None:
    before = step()
    after = in_place(before)
    found = compare_programs(before, after, 1e-5)
    assert found.ok, found
    assert found.runs == 4
    assert compare_programs(after, after).ok, "inputs are cloned: a write in place is not seen"


def test_the_rows_just_written_are_compared_too() -> None:
    text = """program "p" {stage=CANONICAL} symbols {B=[1,4], P=[0,9], S=[1,9]}
    graph main(%past: f32[B,P,2], %new: f32[B,S,2], %lengths: i64[B]) {
      %k = full {shape=[], value=VALUE, dtype=f32} %n = mul %new, %k
      %c = append %past, %n, %lengths return %c as "present" updates %past }"""
    one, two = (parse_program(text.replace("VALUE", v)) for v in ("1.0", "2.0"))
    assert compare_programs(one, one).ok
    caught(one, two, "output present")


def test_a_write_at_the_wrong_row_is_caught() -> None:
    before = step()
    text = STEP.replace("%c = append", "%one = full {shape=[B], value=1.0, dtype=i64}\n"
                        "  %later = minimum %lengths, %one\n  %c = append").replace(
                        "%latent, %lengths", "%latent, %later")  # fmt: skip
    after = replace(parse_program(text), source=before.source)
    caught(before, after, "output")


def test_a_pass_that_is_right_only_for_full_pasts_is_caught_by_the_ragged_run() -> None:
    before = step()
    text = STEP.replace("%c = append", "%p = full {shape=[B], value=0.0, dtype=i64}\n"
                        "  %all = arange {start=P, end=P+1, dtype=i64}\n"
                        "  %full = add %p, %all\n  %c = append").replace(
                        "%latent, %lengths", "%latent, %full")  # fmt: skip
    after = replace(parse_program(text), source=before.source)
    caught(before, after, "lengths [5, 3]")


# --- routing near-ties ----------------------------------------------------------------------------

ROUTER = """program "r" {stage=CANONICAL} symbols {B=[1,4], S=[1,8]}
weights { @gate : f32[6,8] = source "gate" : f32[6,8]
  @noise : f32[8] = source "noise" : f32[8] }
graph main(%x: f32[B,S,8], %g: f32[6,16,8], %d: f32[6,8,8]) {
  %n = mul %x, @noise
  %i, %w = route %n, @gate {score="sigmoid", top_k=2, normalise=true}
  %y = experts %x, %i, %w, %g, %d
  return %y
}"""


def router(noise: torch.Tensor, spread: float) -> Program:
    """A router over experts whose scores differ by `spread`, on inputs scaled by `noise`."""
    program = parse_program(ROUTER)
    from dsc.ir.weights import DictSource

    base = torch.randn(8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    tensors = {"gate": base + spread * rows, "noise": noise}
    return replace(program, source=DictSource(tensors))


def test_near_ties_take_the_first_programs_experts() -> None:
    one = router(torch.ones(8), 1e-7)
    bumped = torch.ones(8)
    bumped[::2] += 1e-6
    two = router(bumped, 1e-7)
    found = compare_programs(one, two, 1e-4)
    assert "near-ties" in str(found)
    assert found.excluded > 0
    assert "routing decisions" in found.failure, "all decisions here are near-ties: too many"


def test_a_decision_that_is_no_near_tie_must_hold() -> None:
    one = router(torch.ones(8), 1.0)
    flipped = replace(one, source=type(one.source)({  # type: ignore[call-arg]
        "gate": one.source.load("gate").flip(0), "noise": torch.ones(8)}))  # fmt: skip
    assert not compare_programs(one, flipped, 1e-4).ok
    same = compare_programs(one, router(torch.ones(8) + 1e-7, 1.0), 1e-4)
    assert same.ok
    assert same.decisions > 0


def test_a_router_that_decides_otherwise_is_caught_though_its_experts_are_forced() -> None:
    before = step()
    after = edited(before, "route", keep=2)
    caught(before, after, "routing decisions differ beyond any near-tie", tolerance=1e-4)
    caught(before, after, "output logits", tolerance=EXACT)


# --- wide programs --------------------------------------------------------------------------------


def test_a_wide_program_is_shrunk_and_the_pass_applied_to_it() -> None:
    before = layer("671b")
    assert weight_elements(before) > 2e8
    with pytest.raises(VerificationError, match="too wide"):
        compare_programs(before, before)
    seen: list[Program] = []

    def right(program: Program) -> Program:
        seen.append(program)
        return program.map_entries(lambda g: g.with_nodes(g.nodes))

    found = compare_programs(before, right(before), reapply=right)
    assert found.ok
    assert found.form == "shrunk"
    assert "shrunk form" in str(found)
    assert weight_elements(seen[-1]) < 1e6

    def wrong(program: Program) -> Program:
        return edited(program, "mla_attention", scale=0.2)

    assert "shrunk form" in caught_wide(before, wrong)


def caught_wide(before: Program, change: Callable[[Program], Program]) -> str:
    found = compare_programs(before, change(before), 1e-3, reapply=change)
    assert not found.ok
    return found.failure


# --- numbers --------------------------------------------------------------------------------------


def test_bits_and_differences() -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([0.0, nan, inf, 1.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([-0.0, nan, inf, 1.0]))
    assert not same_bits(a, torch.tensor([0.0, 1.0, inf, 1.0]))
    assert same_bits(a.bfloat16(), a.bfloat16())
    assert relative_difference(a, a) == 0
    assert relative_difference(a, torch.tensor([0.0, nan, inf, 1.5])) == 0.5
    assert relative_difference(a, torch.tensor([0.0, nan, -inf, 1.0])) == inf
    assert relative_difference(a, torch.tensor([0.0, 1.0, inf, 1.0])) == inf
    assert relative_difference(torch.tensor([100.0]), torch.tensor([101.0])) == 0.01
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0


def test_differences_in_words() -> None:
    ints = torch.tensor([1, 2, 3, 4])
    assert difference(ints, torch.tensor([1, 0, 3, 0])) == "2 of 4 elements differ"
    assert difference(ints / 1, ints + 0.5) == "the largest difference is 0.125"
    found = Comparison("shrunk", 4, 1.2e-3, 10, 2, entries=["a", "b"])
    told = "shrunk form: 4 runs of a, b agree, difference 1.2e-03"
    assert str(found) == f"{told}, 2 of 10 near-ties excluded"
    assert str(replace(found, decisions=0)) == told


def test_symbols_are_pinned_that_are_numbers_afterwards() -> None:
    text = "graph g(%x: f32[B,S], %past: f32[B,P+S], %l: i64[L]) { return %x, %past, %l }"
    graph = parse_graph(text)
    assert pinned(graph, graph) == {}
    assert pinned(graph, graph.substitute({"S": 1, "L": 2})) == {"S": 1, "L": 2}
    assert pinned(graph, graph.substitute({"S": 1, "P": 3})) == {"S": 1}, "P + S is no symbol"
    fewer = parse_graph("graph g(%x: f32[4], %y: f32[B,7]) { return %x, %y }")
    assert pinned(graph, fewer) == {}, "of another rank, and of another name"


def test_widening_makes_sixteen_bits_thirty_two() -> None:
    program = runnable(step(), widen=True)
    verify(program)
    dtypes = {v.type.dtype for v in program.entries["step"].values()}
    assert dtypes == {DType.f32, DType.i64}
    assert program.source.load("embed").dtype == torch.float32
    assert torch.equal(program.source.load("embed"), step().source.load("embed").float())


def test_missing_weights_are_seeded_random() -> None:
    t = TensorType(DType.bf16, (3, 4))
    graph = Graph("main", (), (), ())
    program = Program("p", {"main": graph}, {"w": Source("w", t)}, source=MetaSource({"w": t}))
    made = [runnable(program, widen=False).source.load("w") for _ in range(2)]
    assert torch.equal(*made)
    assert made[0].dtype == torch.bfloat16


def test_routers_are_matched_only_where_both_programs_have_as_many() -> None:
    before = step()
    other = STEP.replace(
        "  %h = add %x, %oc\n",
        "  %h = add %x, %oc\n"
        '  %j, %v = route %oc, @gate {score="softmax", top_k=2, normalise=true}\n',
    )
    after = replace(parse_program(other), source=before.source)
    found = compare_programs(before, after, 1e-5)
    assert found.ok, found.failure
