"""What steps move and compute, in numbers worked out by hand beside each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dsc.ir.parser import parse_program
from dsc.runtime.costs import Moved, entry_cost, label, moved, real_sizes, step_events
from dsc.runtime.limit import Work, prefill_work, step_work, working_set
from dsc.runtime.profiler import EntryRun, StepTime

SMALL = Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc"
STEP = """program "p" {stage=LOWERED}
symbols {B=[1,4], S=[1,8], C=[8,60]}
weights {
  @w : f32[5,8] = source "w" : f32[5,8]
  @embed : f32[9,8] = source "e" : f32[9,8]
}
graph step(%ids: i64[B,S], %lengths: i64[B], %q: f32[B,S,4,6], %qr: f32[B,S,4,4],
  %c0: f32[B,S,6], %r0: f32[B,S,4], %past.latent: f32[B,C,6], %past.rope: f32[B,C,4]) {
  %x = embedding %ids, @embed loc "model.embed"
  %y = linear %x, @w loc "model.layers.0.mlp"
  %c = cache_write %past.latent, %c0, %lengths
  %r = cache_write %past.rope, %r0, %lengths
  %o = latent_attention %q, %qr, %c, %r, %lengths {scale=0.5}
  return %y, %o, %c updates %past.latent, %r updates %past.rope
}
"""
MOE = """program "moe" {stage=LOWERED}
symbols {N=[1,16]}
weights {
  @up : f32[8,12,4] = source "up" : f32[8,12,4]
  @down : f32[8,4,6] = source "down" : f32[8,4,6]
  @own : f32[4,4] = source "own" : f32[4,4]
}
graph main(%x: f32[N,4], %idx: i64[N,2], %w: f32[N,2]) {
  %y = experts %x, %idx, %w, @up, @down
  %z = fused %x, %idx, %w, @up, @down, @own {body=graph b(%x: f32[N,4], %idx: i64[N,2],
    %w: f32[N,2], %up: f32[8,12,4], %down: f32[8,4,6], %own: f32[4,4]) {
    %v = reshape %x {shape=[N,4]}
    %l = linear %v, %own
    %s = silu %l
    %t = silu %s
    %m = experts %t, %idx, %w, %up, %down
    return %m
  }}
  return %y, %z
}
"""
B, S, C, HELD = 2, 3, 50, 16
"""Of 10 and 15 tokens in the cache the mean is 12.5, of which 13 rows hold some, and 3 new ones."""
SIZES = {"B": B, "S": S, "C": C}
LENGTHS = [10, 15]
LINEAR = Moved(5 * 8 * 4, 0, B * S * (8 + 5) * 4, 2 * B * S * 5 * 8)


def attention(rows: int) -> Moved:
    heads = B * S * 4
    operands = heads * (6 + 4 + 6) * 4 + B * 8
    return Moved(0, B * rows * (6 + 4) * 4, operands, 2 * heads * rows * (6 + 4 + 6))


WANTED = [
    Moved(B * S * 8 * 4, 0, B * S * (8 + 8 * 4), 0),
    LINEAR,
    Moved(0, 0, 2 * B * S * 6 * 4 + B * 8, 0),
    Moved(0, 0, 2 * B * S * 4 * 4 + B * 8, 0),
    attention(HELD),
]


def test_each_node_moves_its_weights_the_rows_that_hold_tokens_and_what_it_computes() -> None:
    graph = parse_program(STEP).entries["step"]
    real = real_sizes(graph, SIZES, LENGTHS)
    assert [moved(graph, node, real) for node in graph.nodes] == WANTED
    assert moved(graph, graph.nodes[-1], SIZES) == attention(C)
    assert (LINEAR.stored, LINEAR.bytes) == (160, 160 + 312)
    assert attention(HELD).stored == attention(HELD).caches


def test_a_whole_run_costs_what_its_nodes_do() -> None:
    graph = parse_program(STEP).entries["step"]
    stored = sum(m.weights + m.caches for m in WANTED)
    whole = stored + sum(m.activations for m in WANTED)
    flops = LINEAR.flops + attention(HELD).flops
    assert entry_cost(graph, SIZES, LENGTHS) == (whole, flops, stored)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [(None, C), ([], C), ([0, 0], 3), ([4], 7), ([4, 5], 8), ([90, 90], C), ([1, 2, 2], 5)],
)
def test_of_a_capacity_the_mean_of_the_sequences_and_the_new_tokens_count(
    lengths: Sequence[int] | None, rows: int
) -> None:
    graph = parse_program(STEP).entries["step"]
    assert real_sizes(graph, SIZES, lengths) == {**SIZES, "C": rows}


def test_an_entry_of_one_token_has_no_symbol_for_it() -> None:
    graph = parse_program(STEP).entries["step"]
    assert real_sizes(graph, {"B": B, "C": C}, [4, 6]) == {"B": B, "C": 6}


def test_of_pages_those_that_hold_tokens_count() -> None:
    text = """graph step(%q: f32[B,S,4,6], %qr: f32[B,S,4,4], %past.latent: f32[N,4,6],
      %past.rope: f32[N,4,4], %lengths: i64[B], %block_table: i64[B,M]) {
      %o = latent_attention %q, %qr, %past.latent, %past.rope, %lengths, %block_table {scale=0.5}
      return %o
    }"""
    (graph,) = parse_program(text).entries.values()
    sizes = {"B": 2, "S": 3, "N": 40, "M": 20}
    assert real_sizes(graph, sizes, [9, 9]) == sizes | {"N": 6, "M": 3}
    assert real_sizes(graph, sizes, [10, 10]) == sizes | {"N": 8, "M": 4}


def test_who_reads_a_cache_as_a_whole_reads_its_rows() -> None:
    text = """graph step(%c0: f32[B,S,6], %lengths: i64[B], %past: f32[B,C,6]) {
      %c = cache_write %past, %c0, %lengths
      %all = sum %c {axes=[1]}
      return %all, %c updates %past
    }"""
    (graph,) = parse_program(text).entries.values()
    write, whole = (moved(graph, node, SIZES) for node in graph.nodes)
    assert (write.caches, whole.caches) == (0, B * C * 6 * 4)
    assert whole.activations == B * 6 * 4


EXPERT = 4 * (12 * 4 + 4 * 6)


@pytest.mark.parametrize(("chosen", "read"), [(None, 6), (3, 3), (0, 0), (8, 8)])
def test_of_stacked_experts_those_that_were_chosen_are_read(chosen: int | None, read: int) -> None:
    """At most as many as the tokens can choose, where nobody tells; inside a region as outside."""
    graph = parse_program(MOE).entries["main"]
    for node, other in zip(graph.nodes, (0, 4 * 4 * 4), strict=True):
        assert moved(graph, node, {"N": 3}, chosen).weights == read * EXPERT + other


def test_a_region_is_called_by_what_it_computes() -> None:
    graph = parse_program(MOE).entries["main"]
    assert [label(node) for node in graph.nodes] == ["experts", "linear+silu+experts"]
    text = """graph g(%x: f32[4]) {
      %y = fused %x {body=graph b(%x: f32[4]) { %z = cast %x {dtype=bf16} return %z }}
      return %y
    }"""
    ((node,),) = (g.nodes for g in parse_program(text).entries.values())
    assert label(node) == "fused"


def test_the_events_of_a_run_are_its_steps_with_what_each_cost() -> None:
    """What no node of the graph stands for cost nothing that is known."""
    graph = parse_program(STEP).entries["step"]
    steps = [
        StepTime("x", "take", 1.0, 0.5),
        StepTime("y", "gemm", 2.0, 0.25),
        StepTime("y", "gemm_tail", 3.0, 0.25, again=True),
        StepTime("none", "copy", 4.0, 0.125),
    ]
    run = EntryRun(graph, SIZES, LENGTHS, lambda: steps, lambda: [64, 128])
    found = list(step_events(run))
    assert [(e.name, e.kernel, e.start, e.seconds) for e in found] == [
        ("embedding", "take", 1.0, 0.5), ("linear", "gemm", 2.0, 0.25),
        ("linear", "gemm_tail", 3.0, 0.25), ("copy", "copy", 4.0, 0.125),
    ]  # fmt: skip
    assert [(e.bytes, e.flops, e.stored) for e in found] == [
        (WANTED[0].bytes, 0, WANTED[0].stored), (LINEAR.bytes, LINEAR.flops, LINEAR.stored),
        (0, 0, 0), (0, 0, 0),
    ]  # fmt: skip
    assert [e.live for e in found] == [64, 128, None, None]
    mlp = "model.layers.0.mlp"
    assert [e.loc for e in found] == ["model.embed", mlp, mlp, ""]
    assert {e.category for e in found} == {"step"}
    assert [e.live for e in step_events(EntryRun(graph, SIZES, None, lambda: steps[:1]))] == [None]


def test_a_step_reads_as_many_experts_as_even_routing_chooses() -> None:
    """Of 8 one token chooses 2; two tokens 8 (1 - (6/8)^2) = 3.5 of them; 100 tokens all."""
    text = """program "p" {stage=CANONICAL}
    symbols {B=[1,1], S=[1,100], P=[0,300], L=[1,100]}
    weights {
      @embed : f32[9,4] = source "e" : f32[9,4]
      @gate : f32[8,4] = source "gate" : f32[8,4]
      @up : f32[8,12,4] = source "up" : f32[8,12,4]
      @down : f32[8,4,6] = source "down" : f32[8,4,6]
    }
    graph step(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
      %past.0.latent: f32[B,P,4]) {
      %x = embedding %input_ids, @embed
      %flat = reshape %x {shape=[B*S,4]}
      %idx, %w = route %flat, @gate {score="sigmoid", top_k=2, normalise=true}
      %y = experts %flat, %idx, %w, @up, @down
      %z = reshape %y {shape=[B,S,4]}
      %c = append %past.0.latent, %x, %lengths
      %s = select_rows %z, %logits_at
      %logits = linear %s, @embed
      return %logits as "logits", %c as "present.0.latent" updates %past.0.latent
    }"""
    program = parse_program(text)
    (graph,) = program.entries.values()
    at = [node.op for node in graph.nodes].index("experts")
    for tokens, experts in ((1, 2), (2, round(3.5)), (100, 8)):
        work = step_work(program, 1, tokens, 0)[at]
        assert work == Work(experts * EXPERT, 2 * tokens * 2 * (12 * 4 + 4 * 6))


def test_a_prompt_is_work_by_chunks() -> None:
    program = parse_program(SMALL.read_text())
    whole, rest = step_work(program, 2, 4, 0), step_work(program, 2, 3, 8)
    assert prefill_work(program, 2, 11, 4) == [*whole, *step_work(program, 2, 4, 4), *rest]
    assert prefill_work(program, 2, 4, 4) == whole
    assert prefill_work(program, 2, 0, 4) == []


def test_the_working_set_is_what_a_step_reads() -> None:
    assert working_set([Work(1.25, 9), Work(2.5, 9)]) == 4
    assert working_set([]) == 0
