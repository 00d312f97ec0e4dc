"""What an entry admits: every operator with an index refuses what is outside, and nothing more."""

from __future__ import annotations

import pytest
import torch

from dsc.errors import UsageError
from dsc.ir.index_ranges import Span, index_ranges
from dsc.ir.op import registry
from dsc.ir.parser import parse_program
from dsc.ir.samples import sample_inputs
from dsc.runtime.admission import Admission
from tests.ir.strategies import call_graph

INDEXED = sorted((name, operand) for name, d in registry().items() for operand in d.within)


def test_operators_with_integer_operands_say_what_they_may_hold() -> None:
    """An integer operand of a fixed element type is an index, unless named here."""
    free = {("histc", "x")}
    integers = {
        (name, o.name)
        for name, d in registry().items()
        for o in d.operands
        if o.pattern.dtype in ("i64", "I")
    }
    assert integers - set(INDEXED) - free == set()


@pytest.mark.parametrize(("name", "operand"), INDEXED)
def test_an_index_outside_is_refused_and_one_inside_is_not(name: str, operand: str) -> None:
    graph = call_graph(name, registry()[name].example)
    inputs = sample_inputs(graph, {})
    admission = Admission(graph, {})
    admission.check(inputs)
    if operand == "block_table":  # an empty sequence needs no page
        inputs[graph.nodes[0].operands[-1].name].zero_()
    place = next(i for i, o in enumerate(registry()[name].operands) if o.name == operand)
    index = graph.nodes[0].operands[place].name
    span = next(d.span for d in index_ranges(graph, {}).demands if d.input == index)
    assert isinstance(span.low, int)
    assert isinstance(span.high, int)
    for value in (span.low - 1, span.low, span.high, span.high + 1):
        given = inputs[index].clone()
        given.view(-1)[-1 if value >= span.high else 0] = value
        if span.low <= value <= span.high:
            admission.check({**inputs, index: given})
            continue
        with pytest.raises(UsageError, match=f"input {index} holds"):
            admission.check({**inputs, index: given})


def test_indices_are_followed_through_views_and_what_is_computed_is_known() -> None:
    program = parse_program("""
    program "p" {stage=CANONICAL}
    symbols {S=[1,8]}
    graph main(%x: f32[5,3], %i: i64[S]) {
      %a = reshape %i {shape=[1,S]} : i64[1,S]
      %y = take %x, %a {axis=0} : f32[1,S,3]
      %w = slice %i {axis=0, start=0, end=1} : i64[1]
      %z = take %x, %w {axis=0} : f32[1,3]
      %m, %k = topk %x {k=2} : f32[5,2], i64[5,2]
      %g = gather %x, %k {axis=1} : f32[5,2]
      return %y as "y", %z as "z", %g as "g"
    }
    """)
    found = index_ranges(program.entries["main"], program.symbols)
    assert [(d.input, d.span) for d in found.demands] == [("i", Span(0, 4))]
    computed = [(c.node.outputs[0].name, c.value.name if c.value else None) for c in found.computed]
    assert computed == [("z", "w")], "part of an input is no demand on all of it"


def test_a_weight_that_is_an_index_is_no_input_of_its_name() -> None:
    program = parse_program("""
    program "p" {stage=CANONICAL}
    weights {
      @i : i64[2] = source "i" : i64[2]
    }
    graph main(%x: f32[5,3], %i: f32[2]) {
      %y = take %x, @i {axis=0} : f32[2,3]
      return %y as "y", %i as "i"
    }
    """)
    found = index_ranges(program.entries["main"], program.symbols)
    assert found.demands == ()
    assert [str(c.value) for c in found.computed] == ["@i"]


def test_elements_in_another_order_no_longer_ascend() -> None:
    """Rows of groups end in ascending order: a range does, a range whose axes changed does not."""
    text = """
    program "p" {stage=CANONICAL}
    graph main(%x: f32[6,3], %w: f32[6,3,4]) {
      %a = arange {start=1, end=7, dtype=i64} : i64[6]
      %b = reshape %a {shape=[2,3]} : i64[2,3]
      MOVED
      %d = reshape %c {shape=[6]} : i64[6]
      %y = grouped_mm %x, %w, %d : f32[6,4]
      return %y as "y"
    }
    """
    for moved, checked in (
        ("%c = permute %b {dims=[1,0]} : i64[3,2]", 1),
        ("%c = reshape %b {shape=[3,2]} : i64[3,2]", 0),
    ):
        program = parse_program(text.replace("MOVED", moved))
        found = index_ranges(program.entries["main"], program.symbols)
        assert len(found.computed) == checked


def test_a_size_is_told_by_the_input_and_the_option() -> None:
    text = 'program "p" {stage=CANONICAL}\nsymbols {B=[1,4]}\n'
    text += "graph main(%input_ids: i64[B,2], %positions: i64[B,2], %lengths: i64[B],"
    text += ' %logits_at: i64[B,2]) { return %input_ids as "y" }'
    program = parse_program(text)
    admission = Admission(program.entries["main"], program.symbols)
    for batch in (0, 5):
        with pytest.raises(UsageError, match=f"input_ids has {batch} at axis 0") as told:
            admission.check(
                {
                    v.name: torch.zeros((batch, 2)[: v.type.rank], dtype=torch.int64)
                    for v in program.entries["main"].inputs
                }
            )
        assert told.value.hint is not None
        assert ("max_batch" in told.value.hint) == (batch == 5)
