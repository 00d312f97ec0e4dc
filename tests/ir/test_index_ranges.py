"""What an entry demands of its index inputs, carried back from what operators say of theirs."""

from __future__ import annotations

from typing import Any

import pytest

from dsc.ir.dims import Range, symbol
from dsc.ir.graph import Weight
from dsc.ir.index_ranges import (
    IndexRanges,
    PageDemand,
    Span,
    giving_indices,
    index_ranges,
    known_span,
)
from dsc.ir.parser import parse_graph, parse_program

S = symbol("S")


def ranges(*lines: str, inputs: str) -> IndexRanges:
    body = "\n".join(lines)
    text = (
        f'program "p" {{stage=CANONICAL}}\nsymbols {{S=[1,8]}}\ngraph main({inputs}) {{\n{body}\n}}'
    )
    program = parse_program(text)
    return index_ranges(program.entries["main"], program.symbols)


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


def test_a_computed_index_is_what_its_reader_takes_and_not_what_that_was_made_of() -> None:
    found = ranges(
        "%j = add %i, %i : i32[S]",
        "%k = cast %j {dtype=i64} : i64[S]",
        "%y = take %x, %k {axis=0} : f32[S,3]",
        'return %y as "y"',
        inputs="%x: f32[5,3], %i: i32[S]",
    )
    assert [str(c.value) for c in found.computed] == ["%k"]
    known = ranges(
        "%t, %k = topk %x {k=2} : f32[2], i64[2]",
        "%y = take %z, %k {axis=0} : f32[2]",
        'return %y as "y"',
        inputs="%x: f32[9], %z: f32[4]",
    )
    assert [str(c.value) for c in known.computed] == ["%k"], "known to lie in 9 is not in 4"


@pytest.mark.parametrize(
    ("given", "made", "holds"),
    [("u8", "i8", False), ("i8", "u8", False), ("u8", "i16", True), ("i16", "i32", True)],
)
def test_a_cast_is_looked_through_where_it_holds_every_value(
    given: str, made: str, holds: bool
) -> None:
    """200 of u8 is -56 of i8: what is demanded of the one says nothing of the other."""
    found = ranges(
        f"%j = cast %i {{dtype={made}}} : {made}[S]",
        "%k = cast %j {dtype=i64} : i64[S]",
        "%y = take %x, %k {axis=0} : f32[S,3]",
        'return %y as "y"',
        inputs=f"%x: f32[999,3], %i: {given}[S]",
    )
    assert [d.input for d in found.demands] == ["i"] * holds
    assert len(found.computed) == (not holds)


def test_an_order_is_demanded_of_elements_in_that_order_alone() -> None:
    for moved, demands in (("permute %b {dims=[1,0]}", 0), ("reshape %b {shape=[3,2]}", 1)):
        found = ranges(
            f"%c = {moved} : i64[3,2]",
            "%d = reshape %c {shape=[6]} : i64[6]",
            "%y = grouped_mm %x, %w, %d : f32[6,4]",
            'return %y as "y"',
            inputs="%x: f32[6,3], %w: f32[6,3,4], %b: i64[2,3]",
        )
        assert (len(found.demands), len(found.computed)) == (demands, 1 - demands)


TAKE = "%y = take %x, %k {axis=0} return %y"
WHAT = "an index"
CASES: dict[str, tuple[str, str, list[Any], list[str]]] = {
    "each demand once": (
        "%x: f32[5,3], %k: i64[S]",
        "%a = take %x, %k {axis=0} %b = take %x, %k {axis=0} %c = take %x, %k {axis=1}"
        " return %a, %b, %c",
        [("k", Span(0, 4), WHAT), ("k", Span(0, 2), WHAT)], [],
    ),
    "a region's operand": (
        "%x: f32[5,3], %i: i64[S]",
        "%y = fused %x, %i {body=graph f(%a: f32[5,3], %k: i64[S]) { %r = reshape %k {shape=[1,S]}"
        " %y = take %a, %r {axis=0} return %y }} return %y",
        [("i", Span(0, 4), WHAT)], [],
    ),
    "what a region gives on": (
        "%x: f32[5,3], %i: i64[S]",
        "%k = fused %i {body=graph f(%i: i64[S]) { %r = reshape %i {shape=[1,S]} return %r }} "
        + TAKE,
        [("i", Span(0, 4), WHAT)], [],
    ),
    "what a region computes": (
        "%x: f32[5,3], %i: i64[S]",
        "%k = fused %i {body=graph f(%i: i64[S]) { %r = add %i, %i return %r }} " + TAKE,
        [], ["y.y take 1 %k 0..4"],
    ),
    "what a region computes and reads": (
        "%x: f32[5,3], %i: i64[S]",
        "%y = fused %x, %i {body=graph f(%a: f32[5,3], %i: i64[S]) { %k = add %i, %i"
        " %z = take %a, %k {axis=0} return %z }} return %y",
        [], ["y.z take 1 None 0..4"],
    ),
    "what is computed, and read in a region": (
        "%x: f32[5,3], %i: i64[S]",
        "%k = add %i, %i %y = fused %x, %k {body=graph f(%a: f32[5,3], %i: i64[S]) {"
        " %r = reshape %i {shape=[S,1]} %z = take %a, %r {axis=0} return %z }} return %y",
        [], ["y.z take 1 %k 0..4"],
    ),
    "what is known to lie inside": (
        "%x: f32[8,3]", "%k = arange {start=0, end=S, dtype=i64} " + TAKE, [], [],
    ),
    "what may lie above": (
        "%x: f32[7,3]", "%k = arange {start=0, end=S, dtype=i64} " + TAKE,
        [], ["y.y take 1 %k 0..6"],
    ),
    "what may lie below": (
        "%x: f32[9,3]", "%k = arange {start=-1, end=8, dtype=i64} " + TAKE,
        [], ["y.y take 1 %k 0..8"],
    ),
    "what starts above": (
        "%x: f32[8,3]", "%k = arange {start=3, end=8, dtype=i64} " + TAKE, [], [],
    ),
    "what is known of a part": (
        "%x: f32[8,3]", "%a = arange {start=0, end=8, dtype=i64}"
        " %k = slice %a {axis=0, start=2, end=5} " + TAKE, [], [],
    ),
    "what is known, outside, in a region": (
        "%x: f32[4,3]", "%a = arange {start=0, end=8, dtype=i64} %y = fused %x, %a {body=graph"
        " f(%x: f32[4,3], %k: i64[8]) { %y = take %x, %k {axis=0} return %y }} return %y",
        [], ["y.y take 1 None 0..3"],
    ),
    "pages": (
        "%c: f32[9,4,3], %n: f32[2,1,3], %l: i64[2], %t: i64[2,5]",
        "%d = cache_write %c, %n, %l, %t return %d",
        [("l", Span(0, 19), "ROOM"), ("t", Span(-1, 8), "the number of a page, or -1 for none"),
         PageDemand("t", "l", 4)], [],
    ),
    "no pages": (
        "%c: f32[2,9,3], %n: f32[2,1,3], %l: i64[2]", "%d = cache_write %c, %n, %l return %d",
        [("l", Span(0, 8), "ROOM")], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_demands_come_back_to_inputs_and_what_is_computed_is_told_apart(name: str) -> None:
    inputs, lines, demands, computed = CASES[name]
    graph = parse_graph(f"graph main({inputs}) {{ {lines} }}")
    found = index_ranges(graph, {"S": Range(1, 8)})
    room = {d.what for d in found.demands} - {WHAT, "the number of a page, or -1 for none"}
    told = [(d.input, d.span, "ROOM" if d.what in room else d.what) for d in found.demands]
    assert [*told, *found.pages] == demands
    assert [
        f"{c.node.outputs[0].name}.{c.reader.outputs[0].name} {c.reader.op} {c.place}"
        f" {c.value} {c.span.low}..{c.span.high}"
        for c in found.computed
    ] == computed
    assert found.facts == [[d.input, d.span.low, d.span.high, d.what] for d in found.demands]


def test_sizes_without_a_range_are_not_known_to_be_inside() -> None:
    text = "graph g(%x: f32[ROWS,3]) { %k = arange {start=0, end=S, dtype=i64} " + TAKE + " }"
    for rows, computed in (("8", 1), ("S", 0)):
        found = index_ranges(parse_graph(text.replace("ROWS", rows)), {})
        assert len(found.computed) == computed


def test_an_entry_can_give_what_it_computes_of_indices_each_once() -> None:
    program = parse_program("""
    program "p" {stage=CANONICAL}
    graph main(%x: f32[5,3], %i: i64[2]) {
      %k = add %i, %i
      %y = take %x, %k {axis=0}
      %z = take %x, %k {axis=0}
      return %y as "y", %z as "z"
    }
    graph plain(%x: f32[5,3], %i: i64[2]) {
      %y = take %x, %i {axis=0}
      return %y as "y"
    }
    """)
    given = giving_indices(program)
    assert given.entries["main"].output_names == ("y", "z", "index:%k")
    assert str(given.entries["main"].outputs[-1]) == "%k"
    assert given.entries["plain"] is program.entries["plain"]


def test_what_is_known_of_a_result_follows_what_it_was_made_of() -> None:
    graph = parse_graph("""graph g(%x: f32[6,9], %i: i64[6]) {
      %a = arange {start=1, end=7, dtype=i64}
      %b = reshape %a {shape=[2,3]}
      %c = permute %b {dims=[1,0]}
      %w = cast %c {dtype=i32}
      %v, %k = topk %x {k=2}
      %j = cast %k {dtype=f32}
      %n = add %i, %i
      return %b, %w, %k, %j, %n
    }""")
    known = [known_span(x, graph.nodes) for x in graph.outputs]
    assert known == [Span(1, 6, True), None, Span(0, 8), None, None]
    turned = next(n.output for n in graph.nodes if n.op == "permute")
    assert known_span(turned, graph.nodes) == Span(1, 6)
    assert known_span(graph.inputs[1], graph.nodes) is None
    assert known_span(Weight("w", graph.inputs[1].type), graph.nodes) is None
