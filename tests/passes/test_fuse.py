"""Fusion: what becomes a region at each level, that it computes the same, what must not fire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dsc import pipeline
from dsc.errors import VerificationError
from dsc.ir.analyses import aliases_of, overwritten, structural_hash
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, Value, Weight
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.regions import Kind, RegionLimits, classify
from dsc.ir.stages import Stage
from dsc.ir.verifier import verify
from dsc.ir.weights import random_tensor
from dsc.passes._regions import refusal
from dsc.passes.append_cache_in_place import AppendCacheInPlace
from dsc.passes.fuse import Fuse
from dsc.passes.own_outputs import OwnOutputs
from dsc.rewrite.base import EXACT, Pass, PassReport
from dsc.rewrite.manager import Manager
from dsc.rewrite.regions import Grouping, inline, inline_graph
from dsc.rewrite.verify import compare_programs
from dsc.runtime.check_plan import check_plan
from dsc.runtime.nodes import plan_nodes
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.ir.strategies import SIZES
from tests.passes.test_raise_models import raised, stored
from tests.rewrite.harness import program_of

LEVELS = (0, 1, 2, 3)
BEFORE = ("specialise_entries", "absorb_mla")
RANGES = {"B": Range(1, 4), "S": Range(1, 8), "T": Range(1, 16), "N": Range(1, 64)}


def prepared(program: Program) -> Program:
    """A canonical program as the passes before fusion leave it for a backend with kernels."""
    (step,) = program.entries.values()
    program = replace(program, entries={"step": step})
    passes: list[Pass] = [*map(pipeline.make, BEFORE), AppendCacheInPlace(slack=8)]
    return Manager().run(program, [*passes, pipeline.make("merge_projections")])


MODELS: dict[str, Callable[[], Program]] = {
    "canonical": lambda: canonical_lm(Sizes()),
    "v3": lambda: raised(stored("v3_ragged")),
    "v3_bf16": lambda: raised(stored("v3_two_layers_bf16")),
    "v2": lambda: raised(stored("v2_bf16")),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Program:
    return prepared(MODELS[request.param]())


def fused(program: Program, level: int = 3, **limits: Any) -> tuple[Program, PassReport]:
    report = PassReport()
    done = Fuse(level, RegionLimits(**limits)).run(program, report)
    verify(done)
    return done, report


def fused_graph(text: str, level: int = 3, **limits: Any) -> tuple[Graph, PassReport]:
    """The graph of a text after fusion."""
    program = replace(program_of(text, Stage.OPTIMIZED), symbols=RANGES)
    done, report = fused(program, level, **limits)
    return done.entries["main"], report


def shown(graph: Graph) -> list[str]:
    """The kernels of a graph by name, views in them too."""
    return [
        "[" + " ".join(n.op for n in node.body.nodes) + "]" if node.body else node.op
        for node in graph.nodes
    ]


def meaning(graph: Graph) -> list[str]:
    """A key of each output: the expression that computes it, whatever the order and the names."""
    known = {v.name: f"%{v.name}" for v in graph.inputs}
    for node in graph.nodes:
        read = [known[x.name] if isinstance(x, Value) else str(x) for x in node.operands]
        text = str(hash((node.op, tuple(read), node.attrs, node.loc)))
        known.update({v.name: f"{text}.{i}:{v.type}" for i, v in enumerate(node.outputs)})
    return [known[x.name] if isinstance(x, Value) else str(x) for x in graph.outputs]


def outputs(graph: Graph, given: dict[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Results on seeded inputs."""
    concrete = graph.substitute({**SIZES, "T": 4, "N": 3})
    inputs = [
        (given or {}).get(v.name, random_tensor(v.type, f"in:{v.name}")).clone()
        for v in concrete.inputs
    ]
    weights: dict[str, torch.Tensor] = {}
    for node in concrete.walk():
        for x in node.operands:
            if isinstance(x, Weight):
                weights[x.name] = random_tensor(x.type, f"w:{x.name}")
    found: list[torch.Tensor] = run_graph(concrete, inputs, weights.__getitem__)
    return found


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_fused_model_computes_the_same_bit_for_bit(model: Program, level: int) -> None:
    done, _ = fused(model, level)
    assert done.stage is Stage.LOWERED
    found = compare_programs(model, done, EXACT)
    assert found.ok, found
    assert found.runs > 2


@pytest.mark.parametrize("level", LEVELS)
def test_inlining_undoes_fusion(model: Program, level: int) -> None:
    done, _ = fused(model, level)
    back = inline(done)
    verify(back)
    assert (back is done) == (level == 0)
    for name, graph in model.entries.items():
        assert meaning(back.entries[name]) == meaning(graph)
        assert len(back.entries[name].nodes) == len(graph.nodes)
        assert {v.name for v in back.entries[name].values()} == {v.name for v in graph.values()}


def test_each_level_has_fewer_kernels(model: Program) -> None:
    reports = [fused(model, level)[1] for level in LEVELS]
    for entry in model.entries:
        counts = [r.facts[entry]["kernels"][1] for r in reports]
        bytes_moved = [r.facts[entry]["bytes"][1] for r in reports]
        assert all(a > b for a, b in pairwise(counts)), counts
        assert all(a >= b for a, b in pairwise(bytes_moved)), bytes_moved


def test_texts_of_fused_programs_read_back(model: Program) -> None:
    done, _ = fused(model)
    text = print_program(done)
    again = parse_program(text)
    assert print_program(again) == text
    for name, graph in done.entries.items():
        assert structural_hash(graph) == structural_hash(again.entries[name])


DENSE = [
    "rms_norm", "q_a_proj-kv_a_proj_with_mqa", "2 rms_norm + rope + 2 cache_write",
    "q_b_proj + rope", "kv_b_proj.k", "latent_attention", "kv_b_proj.v", "o_proj + add",
    "rms_norm", "gate_proj-up_proj + swiglu", "down_proj + add",
]  # fmt: skip
SPARSE = [*DENSE[:9], "route", "experts", DENSE[9], "down_proj + 2 add"]


def test_a_layer_of_v3_in_one_step_of_decoding() -> None:
    _, report = fused(prepared(canonical_lm(Sizes(layers=3, dense=1))))
    decode = report.facts["regions"]["decode"]
    assert decode["0"] == DENSE
    assert decode["1"] == decode["2"] == SPARSE
    expanded = [n for n in DENSE if n not in ("kv_b_proj.k", "kv_b_proj.v")]
    expanded[4] = "mla_attention"
    assert report.facts["regions"]["prefill"]["0"] == expanded


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_number_of_bodies_does_not_grow_with_depth(level: int) -> None:
    reports = [fused(prepared(canonical_lm(Sizes(layers=n, dense=1))), level)[1] for n in (3, 9)]
    for entry in ("decode", "extend", "prefill"):
        few, many = (r.facts[entry] for r in reports)
        assert few["distinct_bodies"] == many["distinct_bodies"]
        assert few["regions"] < many["regions"]


def test_caches_in_regions_stay_in_place_in_the_memory_plan(model: Program) -> None:
    done, _ = fused(model)
    planned = OwnOutputs().run(done, PassReport())
    verify(planned)
    for name, graph in planned.entries.items():
        plan = plan_nodes(planned, {}).entries[name]
        check_plan(plan, planned.symbols)
        writers = [n for n in graph.nodes if n.body is not None and overwritten(n)]
        assert len(writers) == len(graph.aliases) / 2
        for output, source in graph.aliases:
            assert plan.outputs[output].buffer == plan.inputs[source].buffer


def test_the_report_tells_a_lower_level_than_was_asked_for() -> None:
    report = PassReport()
    Fuse(level=1, asked=3).run(prepared(canonical_lm(Sizes())), report)
    assert (report.facts["level"], report.facts["level_asked"]) == (1, 3)
    same = PassReport()
    Fuse(level=2, asked=2).run(prepared(canonical_lm(Sizes())), same)
    assert "level_asked" not in same.facts


def test_traced_programs_are_refused() -> None:
    program = program_of("graph main(%x: f32[4]) {\n%y = neg %x\nreturn %y\n}", Stage.TRACED)
    with pytest.raises(VerificationError, match="needs a program at stage"):
        Manager().run(program, [Fuse()])


# --- what becomes a region ------------------------------------------------------------------------

CHAIN = """graph main(%x: f32[N,8], %r: f32[N,8], @w: f32[16,8], @d: f32[8,8], @g: f32[8]) {
  %p = linear %x, @w
  %a, %b = split %p {sizes=[8,8]}
  %s = swiglu %a, %b
  %y = linear %s, @d
  %z = add %r, %y
  %h = rms_norm %z, @g {eps=1e-06}
  %q = silu %h
  return %q
}"""


@pytest.mark.parametrize(
    ("level", "kernels"),
    [
        (0, ["linear", "split", "swiglu", "linear", "add", "rms_norm", "silu"]),
        (1, ["linear", "[split swiglu]", "linear", "add", "rms_norm", "silu"]),
        (2, ["[linear split swiglu]", "[linear add]", "[rms_norm silu]"]),
        (3, ["[linear split swiglu]", "[linear add]", "[rms_norm silu]"]),
    ],
)
def test_levels(level: int, kernels: list[str]) -> None:
    assert shown(fused_graph(CHAIN, level)[0]) == kernels


def test_row_wise_operators_side_by_side_are_one_region_from_level_3() -> None:
    text = """graph main(%x: f32[N,8], @g: f32[8], @h: f32[8]) {
      %a = rms_norm %x, @g {eps=1e-06}
      %b = rms_norm %x, @h {eps=1e-06}
      %c = silu %b
      return %a, %c
    }"""
    assert shown(fused_graph(text, 2)[0]) == ["rms_norm", "[rms_norm silu]"]
    assert shown(fused_graph(text, 3)[0]) == ["[rms_norm rms_norm silu]"]


def test_attention_is_one_kernel_with_its_views() -> None:
    text = """graph main(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,4]) {
      %kt = permute %k {dims=[0,1,3,2]}
      %s = matmul %q, %kt
      %c = full {shape=[], value=0.5, dtype=f32}
      %t = mul %s, %c
      %p = softmax %t {axis=-1}
      %y = matmul %p, %v
      return %y
    }"""
    plain = replace(program_of(text, Stage.TRACED), symbols=RANGES)
    program = pipeline.apply(plain, ["raise_attention"]).at(Stage.CANONICAL)
    graph = fused(program)[0].entries["main"]
    assert shown(graph) == ["[permute permute permute attention permute]"]
    body = graph.nodes[0].body
    assert body is not None
    assert classify(body) is Kind.ATTENTION
    assert "[permute" not in " ".join(shown(fused(program, 2)[0].entries["main"]))


def test_a_spelled_out_softmax_is_one_kernel() -> None:
    text = """graph main(%x: f32[N,8]) {
      %m = amax %x {axes=[-1], keepdims=true}
      %d = sub %x, %m
      %e = exp %d
      %s = sum %e {axes=[-1], keepdims=true}
      %y = div %e, %s
      return %y
    }"""
    assert shown(fused_graph(text, 2)[0]) == ["[amax sub exp sum div]"]
    assert shown(fused_graph(text, 1)[0]) == ["amax", "[sub exp]", "sum", "div"]
    assert shown(fused_graph(text, 2, reductions=1)[0])[0] == "[amax sub exp]"


def test_rope_goes_into_the_projection_unless_a_cache_takes_it() -> None:
    text = """graph main(%x: f32[B,S,8], %p: i64[B,S], %n: i64[B], %c: f32[B,T,4], @f: f32[2],
      @w: f32[4,8]) {
      %k = linear %x, @w
      %r = rope %k, %p, @f {layout="half"}
      %u = cache_write %c, %r, %n
      return %u updates %c
    }"""
    assert shown(fused_graph(text, 2)[0]) == ["linear", "[rope cache_write]"]
    alone = text.replace("%u = cache_write %c, %r, %n", "").replace("%u updates %c", "%r, %c")
    assert shown(fused_graph(alone, 2)[0]) == ["[linear rope]"]


def test_free_views_stay_outside_of_regions() -> None:
    text = """graph main(%x: f32[N,8], @w: f32[8,8]) {
      %a = reshape %x {shape=[2*N,4]}
      %b = reshape %a {shape=[N,8]}
      %y = linear %b, @w
      %s = silu %y
      %z = reshape %s {shape=[N,2,4]}
      return %z
    }"""
    assert shown(fused_graph(text)[0]) == ["reshape", "reshape", "[linear silu]", "reshape"]
    assert shown(fused_graph(text, free=lambda view: False)[0])[-1] == "[linear silu reshape]"
    ahead = text.replace("%y = linear %b, @w", "%y = exp %b")
    assert shown(fused_graph(ahead)[0]) == ["reshape", "reshape", "[exp silu]", "reshape"]


def test_literals_are_copied_into_every_region_that_reads_them() -> None:
    text = """graph main(%x: f32[N,8], %z: f32[8]) {
      %c = full {shape=[], value=0.5, dtype=f32}
      %a = mul %x, %c
      %b = exp %a
      %d = mul %z, %c
      %e = exp %d
      return %b, %e
    }"""
    graph, _ = fused_graph(text, 1)
    assert shown(graph) == ["[full mul exp]", "[full mul exp]"]
    assert all(len(n.inputs) == 1 for n in graph.nodes)
    back = inline_graph(graph)
    assert [n.op for n in back.nodes].count("full") == 1
    assert meaning(back) == meaning(parse_graph(text))


GRAMMAR = [
    # body, kept, why it is refused (empty: it is a region)
    ("%a = neg %x\n%b = exp %a", "b", ""),
    ("%a = neg %x\n%b = exp %a", "ab", ""),
    ("%a = neg %x\n%b = sum %a {axes=[-1]}\n%c = exp %b", "c", "different rows"),
    ("%a = neg %x\n%b = sum %a {axes=[-1], keepdims=true}\n%c = exp %b", "c", ""),
    ("%a = permute %x {dims=[1,0]}\n%b = exp %a", "b", ""),
    ("%a = permute %x {dims=[1,0]}\n%b = exp %a", "ab", "a result that the region does not"),
    ("%a = exp %x\n%b = permute %a {dims=[1,0]}\n%c = exp %b", "c", "a view between two"),
    ("%a = exp %x\n%b = slice %a {axis=0, start=0, end=4}", "b", "a slice of what"),
    ("%a = permute %x {dims=[1,0]}", "a", "views only"),
    ("%a = rms_norm %x, %g {eps=0.1}\n%b = linear %a, %x", "b", "rms_norm is no prologue"),
    ("%a = exp %x\n%b = linear %a, %x", "b", "exp is no prologue"),
    ("%a = linear %g, %x\n%b = add %a, %x", "b", "spreads what linear computes"),
    ("%a = linear %x, %x\n%b = add %a, %g", "b", ""),
    ("%a = linear %x, %x\n%b, %c = split %a {sizes=[3,5]}\n%d = exp %b", "cd", ""),
    ("%a = linear %x, %x\n%b = softmax %a", "b", "softmax is no epilogue"),
    ("%a = linear %x, %x\n%b = cumsum %a {axis=0}", "b", "cumsum stands alone"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kept", "why"), GRAMMAR)
def test_the_grammar_of_regions(text: str, kept: str, why: str) -> None:
    results = ", ".join(f"%{name}" for name in kept)
    body = parse_graph(f"graph g(%x: f32[8,8], %g: f32[8]) {{\n{text}\nreturn {results}\n}}")
    found = refusal(body.nodes, set(kept), 3, RegionLimits())
    assert (why in found) if why else not found, found


def test_attention_takes_views_alone() -> None:
    text = """graph g(%q: f32[B,S,2,4]) {
      %a = attention %q, %q, %q {scale=0.5, causal=true}
      %b = neg %a
      return %b
    }"""
    nodes = parse_graph(text).nodes
    assert refusal(nodes, {"b"}, 3, RegionLimits()) == "neg with attention"
    graph, _ = fused_graph(text)
    assert shown(graph) == ["attention", "neg"]


def test_the_experts_take_the_residual_and_no_split() -> None:
    text = """graph main(%x: f32[N,8], %i: i64[N,2], %w: f32[N,2], %r: f32[N,8], @g: f32[4,6,8],
      @d: f32[4,8,3]) {
      %y = experts %x, %i, %w, @g, @d
      %z = add %y, %r
      %a, %b = split %z {sizes=[4,4]}
      return %a, %b
    }"""
    assert shown(fused_graph(text, 2)[0]) == ["[experts add]", "split"]


# --- what must not fire ---------------------------------------------------------------------------


def test_no_path_leaves_a_region_and_comes_back() -> None:
    text = """graph main(%x: f32[N,8]) {
      %a = exp %x
      %b = cumsum %a {axis=0}
      %c = add %a, %b
      return %c
    }"""
    graph, report = fused_graph(text)
    assert shown(graph) == ["exp", "cumsum", "add"]
    assert ("exp with add", "main", "what lies between them") not in report.missed
    assert any("lies between" in why for _, _, why in report.missed)


IN_PLACE = """graph main(%c: f32[B,T,4], %x: f32[B,S,4], %n: i64[B]) {{
  {first}
  %u = cache_write %c, %x, %n
  {second}
  return %u updates %c, %y
}}"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("%y = neg %c", ""),
        ("", "%y = neg %u"),
        ("%v = reshape %c {shape=[B,T,4]}\n%y = neg %v", ""),
    ],
)
def test_a_write_in_place_and_a_reader_of_it_are_kept_apart(first: str, second: str) -> None:
    text = IN_PLACE.format(first=first, second=second).replace("%x: f32[B,S", "%x: f32[B,T")
    graph, report = fused_graph(text)
    assert all(n.body is None for n in graph.nodes)
    if second:
        assert any("in place" in why for _, _, why in report.missed)


def test_what_reads_a_cache_before_the_write_still_does() -> None:
    text = """graph main(%c: f32[B,T,4], %x: f32[B,T,4], %n: i64[B], @g: f32[4]) {
      %old = neg %c
      %h = rms_norm %x, @g {eps=1e-06}
      %u = cache_write %c, %h, %n
      %y = add %old, %x
      %z = exp %h
      return %u updates %c, %y, %z
    }"""
    graph, _ = fused_graph(text)
    before = parse_graph(text)
    found, wanted = (outputs(g, {"n": torch.zeros(2, dtype=torch.int64)}) for g in (graph, before))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    reads = next(i for i, n in enumerate(graph.nodes) if any(x.name == "c" for x in n.operands))
    writes = next(i for i, n in enumerate(graph.nodes) if overwritten(n))
    assert reads < writes
    assert aliases_of(graph.nodes[writes]) != {}


def test_ranks_speak_in_the_order_of_the_program() -> None:
    text = """graph main(%x: f32[N,8], %r: f32[N,8]) {
      %a = exp %x
      %b = all_reduce %a {ranks=2}
      %c = exp %r
      %d = all_reduce %c {ranks=2}
      %e = add %a, %d
      %f = add %e, %b
      return %f
    }"""
    graph, _ = fused_graph(text)
    assert shown(graph) == ["exp", "all_reduce", "exp", "all_reduce", "[add add]"]
    grouping = Grouping(parse_graph(text))
    assert grouping.obstacle(0, 4) != ""  # b lies between a and e in the one order of both


@pytest.mark.parametrize(
    "text",
    [
        "%a = linear %x, @w\n%y = linear %a, @w",  # two anchors
        "%a = neg @g\n%y = mul %x, %a",  # shapes differ
        "%a = softmax %x {axis=0}\n%y = neg %a",  # not along rows
        "%a = linear %x, @w\n%y = rms_norm %a, @g {eps=1e-06}",  # a row is more than a tile
        "%a = linear %x, @w\n%y = softmax %a",
        "%p = permute %x {dims=[1,0]}\n%a = exp %p\n%b = permute %a {dims=[1,0]}\n"
        "%c = cumsum %b {axis=0}\n%d = cumsum %p {axis=0}\n%y = add %c, %x",  # a view read twice
        "%a = exp %x\n%b = slice %a {axis=-1, start=0, end=4}\n%c = concat %b, %b {axis=-1}\n"
        "%y = cumsum %c {axis=0}",  # a slice of what is computed
    ],
)
def test_must_not_fire(text: str) -> None:
    whole = f"graph main(%x: f32[N,8], @w: f32[8,8], @g: f32[8]) {{\n{text}\nreturn %y\n}}"
    graph, _ = fused_graph(whole)
    bodies = [[n.op for n in node.body.nodes] for node in graph.nodes if node.body is not None]
    assert bodies in ([], [["exp", "permute"]])


@pytest.mark.parametrize(
    "limits",
    [
        {"anchors": frozenset()}, {"epilogue": frozenset({"reshape"})}, {"operands": 2},
        {"nodes": 1},
    ],
)  # fmt: skip
def test_limits_of_a_backend_hold(limits: dict[str, Any]) -> None:
    text = """graph main(%x: f32[N,8], %r: f32[N,8], @w: f32[8,8]) {
      %y = linear %x, @w
      %z = add %r, %y
      return %z
    }"""
    assert shown(fused_graph(text)[0]) == ["[linear add]"]
    assert shown(fused_graph(text, **limits)[0]) == ["linear", "add"]


# --- exactly so many, and in which words ----------------------------------------------------------

LINEAR = "%a = linear %x, %x\n%b = add %a, %r"
BOUNDS: list[tuple[str, int, dict[str, Any], str]] = [
    (LINEAR, 2, {"nodes": 2, "operands": 2}, ""),
    (LINEAR, 2, {"nodes": 1}, "2 operators of 2 operands are too many for a kernel"),
    (LINEAR, 2, {"operands": 1}, "2 operators of 2 operands are too many for a kernel"),
    (LINEAR, 2, {"anchors": frozenset()}, "the backend's kernel for linear takes nothing else"),
    (LINEAR, 2, {"epilogue": frozenset({"add"})}, ""),
    (LINEAR, 2, {"epilogue": frozenset({"sub"})}, "add is no epilogue of linear"),
    (LINEAR, 1, {}, "linear is fused from level 2"),
    ("%a = linear %x, %x\n%b = linear %a, %x", 3, {}, "linear and linear are two anchors"),
    ("%a = rms_norm %x, %g {eps=0.1}\n%b = neg %a", 2, {"reductions": 1}, ""),
    ("%a = rms_norm %x, %g {eps=0.1}\n%b = neg %a", 1, {}, "rms_norm is fused from level 2"),
    ("%a = rms_norm %x, %g {eps=0.1}\n%b = softmax %a", 2, {"reductions": 2}, ""),
    (
        "%a = rms_norm %x, %g {eps=0.1}\n%b = softmax %a", 2, {"reductions": 1},
        "2 reductions, the backend takes 1 in a region",
    ),
    ("%a = neg %x\n%b = exp %a", 1, {"nodes": 2, "operands": 1, "reductions": 0}, ""),
    ("%a = neg %g\n%b = add %a, %x", 3, {}, "the pointwise operators have different shapes"),
    ("%a = experts %x, %i, %w, %gu, %dn\n%b = add %a, %r", 2, {}, ""),
    ("%a = experts %x, %i, %w, %gu, %dn\n%b = reshape %a {shape=[4,16]}", 2, {}, ""),
    (
        "%a = experts %x, %i, %w, %gu, %dn\n%b, %c = split %a {sizes=[4,4]}", 2, {},
        "a split of what experts computes",
    ),
    (
        "%a = attention %q, %q, %q {scale=0.5, causal=true}", 2, {},
        "attention is fused from level 3",
    ),
]  # fmt: skip
OPERANDS = """%x: f32[8,8], %r: f32[8,8], %g: f32[8], %i: i64[8,2], %w: f32[8,2], %gu: f32[4,6,8],
  %dn: f32[4,8,3], %q: f32[2,8,2,4]"""


@pytest.mark.parametrize(("text", "level", "limits", "why"), BOUNDS)
def test_a_region_is_within_the_limits_of_kernels(
    text: str, level: int, limits: dict[str, Any], why: str
) -> None:
    kept = "b" if "%b" in text else "a"
    body = parse_graph(f"graph g({OPERANDS}) {{\n{text}\nreturn %{kept}\n}}")
    results = {v.name for v in body.nodes[-1].outputs}
    assert refusal(body.nodes, results, level, RegionLimits(**limits)) == why


def test_a_region_without_a_kernel_is_put_back_and_told() -> None:
    graph, report = fused_graph(CHAIN, 2, accepts=lambda node: "norm" not in str(node.body))
    assert shown(graph) == ["[linear split swiglu]", "[linear add]", "rms_norm", "silu"]
    told = [(where, why) for rule, where, why in report.missed if rule == "accepts"]
    assert told == [("", "the backend has no kernel for rms_norm + silu")]


def test_the_report_counts_kernels_and_what_they_move() -> None:
    """At 64 rows of 8 fp32 numbers, 2048 bytes: in one kernel `a`, `b` and `q` stay on the chip."""
    text = """graph main(%x: f32[N,8], %r: f32[N,8]) {
      %a = neg %x
      %b = exp %a
      %s = cumsum %b {axis=0}
      %c = add %s, %r
      %q = neg %c
      return %q
    }"""
    _, report = fused_graph(text, 1)
    assert report.facts == {
        "level": 1,
        "main": {
            "kernels": [5, 3], "bytes": [11 * 2048, 7 * 2048], "regions": 2, "distinct_bodies": 2,
        },
        "regions": {"main": {"": ["neg + exp", "cumsum", "add + neg"]}},
    }  # fmt: skip
    assert report.fired == {"level 1": 2}
