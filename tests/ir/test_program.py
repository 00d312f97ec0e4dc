"""A program: what it says of itself, and that what is not changed is the same object."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsc.errors import UsageError
from dsc.ir.dims import Range
from dsc.ir.graph import Graph
from dsc.ir.interface import Storage, updates
from dsc.ir.limits import OPEN, Limits
from dsc.ir.parser import parse_graph
from dsc.ir.program import ANY_SIZE, Program, graph_symbols, is_causal_step, program_of
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, MetaSource, leaf

F4 = TensorType(DType.f32, (4,))
PLAIN = parse_graph("graph g(%x: f32[4], %n: f32[4]) { %y = add %x, %n return %y }")
STEP_INPUTS = "%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L]"
STEP = parse_graph(f"""graph step({STEP_INPUTS}, %past: f32[B,P,3], %new: f32[B,S,3]) {{
  %now = append %past, %new, %lengths return %now as "present" updates %past }}""")
PAGED = parse_graph(f"""graph step({STEP_INPUTS}, %past: f32[N,4,3], %new: f32[B,S,3],
  %table: i64[B,M]) {{ %now = cache_write %past, %new, %lengths, %table
  return %now as "present" updates %past }}""")


def test_a_step_of_a_language_model_takes_all_four_inputs_whatever_else() -> None:
    assert is_causal_step(STEP)
    for gone in ("input_ids", "positions", "lengths", "logits_at"):
        kept = tuple(v for v in STEP.inputs if v.name != gone)
        assert not is_causal_step(Graph("g", kept, (), kept[:1]))
    assert Program("p", {"a": STEP}).is_causal_lm
    assert not Program("p", {"a": STEP, "b": PLAIN}).is_causal_lm


def test_states_that_nobody_declares_are_those_of_the_updates_of_a_language_model() -> None:
    (state,) = Program("p", {"a": STEP, "b": STEP}).states
    assert (state.input, state.output, state.storage) == ("past", "present", Storage.GROWN)
    other = replace(state, storage=Storage.CONTIGUOUS)
    assert Program("p", {"a": STEP}).declaring(states=(other,)).states == (other,)
    plain = replace(PLAIN, aliases=((0, 0),))
    assert Program("p", {"a": plain}).states == ()
    assert Program("p", {}).states == ()


def test_an_update_of_one_axis_is_no_state_of_tokens_and_one_of_two_is() -> None:
    text = "graph g(%p: f32[SHAPE]) { %q = neg %p return %q updates %p }"
    found = [list(updates(parse_graph(text.replace("SHAPE", s)))) for s in ("B", "B,P", "B,4")]
    assert [[state.storage for state in each] for each in found] == [[], [Storage.CONTIGUOUS], []]


def test_entries_bear_the_names_that_the_program_gives_them() -> None:
    program = Program("p", {"g": PLAIN, "other": PLAIN})
    assert [graph.name for graph in program.entries.values()] == ["g", "other"]
    assert program.entries["g"] is PLAIN


def test_weights_are_there_where_none_is_asked_for_or_their_source_has_values() -> None:
    types, weights = {"w": F4}, {"w": leaf("w", F4)}
    program = Program("p", {"g": PLAIN}, weights, source=MetaSource(types))
    assert not program.has_weights
    assert replace(program, weights={}).has_weights
    assert replace(program, source=DictSource({"w": torch.zeros(4)})).has_weights
    assert Program("p", {"g": PLAIN}).has_weights


def test_limits_are_those_declared_or_what_symbols_and_pages_allow() -> None:
    symbols = {"B": Range(1, 3), "S": Range(1, 5), "P": Range(0, 40)}
    program = Program("p", {"a": STEP}, symbols=symbols)
    assert program.page is None
    assert program.limits == Limits(3, 40, 5)
    assert program.limited(Limits(2, 99, 1)).limits == Limits(2, 40, 1)
    paged = Program("p", {"a": PAGED}, symbols={"S": Range(1, 5), "M": Range(1, 10)})
    assert paged.page == 4
    assert paged.limits == Limits(OPEN, 4 * 10 - 5, 5)
    whole = Program("p", {"a": STEP}, symbols={"S": Range(1, 5), "M": Range(1, 10)})
    assert whole.limits.max_context == 10 - 5, "no pages: a block is a row"


def test_an_entry_that_is_not_there_and_inputs_that_are_missing_are_named() -> None:
    program = Program("p", {"a": PLAIN, "b": PLAIN})
    assert program.entry("b") is program.entries["b"]
    assert program.entry("b", ["n", "x", "more"]) is program.entries["b"]
    with pytest.raises(UsageError) as caught:
        program.entry("c")
    assert (caught.value.what, caught.value.hint) == ("no entry c", "one of a, b")
    for given, missing in ((["n"], "x"), ([], "x, n")):
        with pytest.raises(UsageError, match=f"^entry a needs the inputs {missing}$"):
            program.entry("a", given)


def test_what_changes_nothing_gives_the_program_itself() -> None:
    program = Program("p", {"a": PLAIN, "b": STEP}, {"w": leaf("w", F4)})
    assert program.map_entries(lambda graph: graph) is program
    changed = program.map_entries(lambda g: replace(g, nodes=()) if g.name == "b" else g)
    assert [len(graph.nodes) for graph in changed.entries.values()] == [1, 0]
    assert program.with_weights({}) is program
    assert sorted(program.with_weights({"v": leaf("v", F4)}).weights) == ["v", "w"]
    assert program.at(Stage.TRACED) is program
    assert program.at(Stage.LOWERED).stage is Stage.LOWERED


def test_weights_that_no_entry_reads_nor_returns_are_pruned() -> None:
    graph = parse_graph("""graph g(%x: f32[4], @a: f32[4], @b: f32[4], @c: f32[4]) {
      %y = fused %x {body=graph i(%z: f32[4]) { %q = mul %z, @b return %q }}
      %z = add %y, @a return %z, @c }""")
    weights = {name: leaf(name, F4) for name in "abcd"}
    program = Program("p", {"g": graph}, weights)
    assert program.used_weights() == {"a", "b", "c"}
    assert list(program.pruned().weights) == ["a", "b", "c"]
    whole = replace(program, weights={name: weights[name] for name in "abc"})
    assert whole.pruned() is whole


def test_a_graph_alone_is_a_program_at_the_first_stage_where_it_is_legal() -> None:
    graph = parse_graph("graph g(%x: f32[S,4], @w: f32[4]) { %y = add %x, @w return %y, @v }"
                        .replace("@w: f32[4]", "@w: f32[4], @v: f32[4]"))  # fmt: skip
    program = program_of(graph)
    assert list(program.entries) == ["g"]
    assert {n: e.type for n, e in program.weights.items()} == {"w": F4, "v": F4}
    assert program.symbols == {"S": Range(0, ANY_SIZE)}
    assert (program.stage, program.has_weights) == (Stage.TRACED, False)
    given = program_of(graph, DictSource({"w": torch.ones(4), "v": torch.ones(4)}))
    assert given.has_weights
    later = (Stage.CANONICAL, Stage.OPTIMIZED, Stage.LOWERED)
    assert program_of(graph, stages=later).stage is Stage.CANONICAL
    sort = parse_graph("graph g(%x: f32[4]) { %y, %i = sort %x {axis=0} return %y }")
    assert program_of(sort, stages=later).stage is Stage.CANONICAL, "none fits: the first"
    region = "graph g(%x: f32[4]) { %y = fused %x {body=graph i(%z: f32[4]) { %q = neg %z"
    fused = parse_graph(region + " return %q }} return %y }")
    assert program_of(fused, stages=later).stage is Stage.LOWERED


def test_symbols_are_those_of_values_attributes_and_bodies() -> None:
    graph = parse_graph("""graph g(%x: f32[A,4]) {
      %f = full {shape=[B+1,2], value=0.0, dtype=f32}
      %s = slice %x {axis=0, start=C, end=C+2}
      %y = fused %s {body=graph i(%z: f32[2,4]) {
        %q = full {shape=[D], value=0.0, dtype=f32} %n = neg %z return %n }}
      return %y }""")
    assert graph_symbols(graph) == {"A", "B", "C", "D"}
