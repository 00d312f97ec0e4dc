"""Choosing rows before what works row by row: how far up it goes, and where it stays."""

from __future__ import annotations

import pytest
import torch

from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_graph
from dsc.ir.samples import sample_inputs
from dsc.passes.hoist_select_rows import SELECT, hoisted
from dsc.rewrite.base import PassReport

INPUTS = "%x: f32[B,S,4], %at: i64[B,L], %n: f32[4], %t: f32[B,1,4]"
STAYS = {
    "a result is read elsewhere": "%a = neg %x\n %y = select_rows %a, %at\n"
                                  " %z = exp %a\n return %y, %z",
    "a result is given back": "%a = neg %x\n %y = select_rows %a, %at\n return %y, %a",
    "two choices of one value": "%a = neg %x\n %i = add %at, %at\n %y = select_rows %a, %at\n"
                                " %z = select_rows %a, %i\n return %y, %z",
    "it works along the sequence": "%a = cumsum %x {axis=1}\n %y = select_rows %a, %at\n"
                                   " return %y",
    "rows are another axis's": "%a = permute %x {dims=[0,2,1]}\n %b = neg %a\n"
                               " %y = permute %b {dims=[0,2,1]}\n %z = select_rows %y, %at\n"
                               " return %z",
    "an operand has rows for all sequences alike": "%r = arange {start=0, end=S, dtype=f32}\n"
        " %c = reshape %r {shape=[S,1]}\n %a = mul %x, %c\n %y = select_rows %a, %at\n"
        " return %y",
    "the index is computed behind": "%a = neg %x\n %z = full {shape=[], value=0.0, dtype=i64}\n"
        " %i = mul %at, %z\n %y = select_rows %a, %i\n return %y",
}  # fmt: skip
MOVES = {
    "past broadcasts": ("%a = mul %x, %n\n %b = add %a, %t\n %y = select_rows %b, %at\n"
                        " return %y", 1),
    "through both branches": ("%a = neg %x\n %b = exp %x\n %c = mul %a, %b\n"
                              " %y = select_rows %c, %at\n return %y", 1),
    "up to what others read": ("%a = exp %x\n %b = neg %a\n %y = select_rows %b, %at\n"
                               " return %y, %a", 1),
    "several sources": ("%a = cumsum %x {axis=1}\n %b = add %a, %x\n %y = select_rows %b, %at\n"
                        " return %y", 2),
    "of one value twice, each its own": ("%a = neg %x\n %b = exp %x\n"
                                         " %y = select_rows %a, %at\n"
                                         " %z = select_rows %b, %at\n return %y, %z", 2),
}  # fmt: skip


def graph_of(body: str, inputs: str = INPUTS) -> Graph:
    return parse_graph(f"graph main({inputs}) {{\n{body}\n}}")


@pytest.mark.parametrize("why", STAYS)
def test_where_it_stays(why: str) -> None:
    graph, report = graph_of(STAYS[why]), PassReport()
    assert hoisted(graph, report) is graph
    assert not report.fired
    assert bool(report.near) == ("index" in why)


@pytest.mark.parametrize("how", MOVES)
def test_how_it_moves(how: str) -> None:
    body, choices = MOVES[how]
    graph = graph_of(body)
    after = hoisted(graph, report := PassReport())
    assert report.fired["hoist"] >= 1
    assert [n.op for n in after.nodes].count(SELECT) == choices
    assert all(n.op != SELECT or n["x"].name in ("x", "a") for n in after.nodes)
    inputs = list(sample_inputs(graph, {"B": 2, "S": 5, "L": 3}, seed=1).values())
    for found, wanted in zip(run_graph(after, inputs), run_graph(graph, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_new_token_has_one_row() -> None:
    graph = graph_of(
        "%a = neg %x\n %y = select_rows %a, %at\n return %y", "%x: f32[B,1,4], %at: i64[B,1]"
    )
    assert hoisted(graph, PassReport()) is graph


def test_weights_that_look_like_rows_are_read_whole() -> None:
    """As many experts as sequences, as many rows in each as tokens, and all tokens are wanted."""
    graph = graph_of(
        "%y = experts %x, %i, %w, %g, %d\n %z = select_rows %y, %at\n return %z",
        "%x: f32[3,4,4], %at: i64[3,4], %i: i64[3,4,1], %w: f32[3,4,1], %g: f32[3,4,4],"
        " %d: f32[3,4,2]",
    )
    after = hoisted(graph, PassReport())
    assert [n["x"].name for n in after.nodes if n.op == SELECT] == ["x", "i", "w"]
    inputs = list(sample_inputs(graph, {}, seed=1).values())
    assert not torch.equal(inputs[1], torch.arange(4).expand(3, 4))
    for found, wanted in zip(run_graph(after, inputs), run_graph(graph, inputs), strict=True):
        torch.testing.assert_close(found, wanted)
