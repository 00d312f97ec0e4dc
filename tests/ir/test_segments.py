"""Entries cut at their collectives, and put together again to be compared as a whole."""

from __future__ import annotations

from dsc.ir.parser import parse_program
from dsc.ir.segments import Segment, cut, joined, steps
from dsc.ir.verifier import verify_graph

PROGRAM = parse_program("""program "p" {stage=CANONICAL}
  symbols {N=[1,8]}
  graph main(%x: f32[N,4], %z: f32[N,4]) {
    %a = silu %x
    %b = neg %a
    %c = add %a, %b
    %r = all_reduce %c {ranks=2}
    %d = exp %r
    %e = mul %d, %z
    return %e, %c
  }""")


def test_what_was_cut_is_put_together_with_names_of_its_own_inside() -> None:
    """Results of a segment keep their names; what stays inside bears the segment's as well."""
    found = list(steps(PROGRAM.entries["main"]))
    assert [type(step) is Segment for step in found] == [True, False, True]
    pieces = cut(PROGRAM)
    assert list(pieces.entries) == ["main_0", "main_2"]
    (whole,) = joined(PROGRAM, pieces).entries.values()
    verify_graph(whole)
    assert [n.op for n in whole.nodes] == ["silu", "neg", "add", "all_reduce", "exp", "mul"]
    assert [n.output.name for n in whole.nodes] == [
        "main_0.a", "main_0.b", "c", "r", "main_2.d", "e",
    ]  # fmt: skip
    assert [x.name for x in whole.nodes[2].operands] == ["main_0.a", "main_0.b"]
    assert [x.name for x in whole.nodes[5].operands] == ["main_2.d", "z"]
