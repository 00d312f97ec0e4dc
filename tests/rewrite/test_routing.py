"""Routers of two runs: margins, weights and what counts as a wrong decision, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsc.ir.parser import parse_graph
from dsc.rewrite.routing import Routing, decide, weigh

ROUTE = parse_graph(
    "graph main(%x: f32[N,N], %g: f32[3,N], %b: f32[3]) { %i, %w = route %x, %g, %b"
    ' {score="sigmoid", top_k=1, normalise=false, shared=1} return %i, %w }'
).nodes[0]


def scored(*rows: list[float], bias: list[float] | None = None) -> list[Any]:
    """Operands of a router whose sigmoid scores are `rows`, one a token."""
    operands = [torch.eye(len(rows)), torch.logit(torch.tensor(rows)).T.contiguous()]
    return operands if bias is None else [*operands, torch.tensor(bias)]


@pytest.mark.parametrize(
    ("scores", "bias", "attrs", "margin"),
    [
        ([0.9, 0.5, 0.4, 0.1], None, {"top_k": 2}, 0.1),
        ([0.9, 0.5, 0.4, 0.1], None, {"top_k": 3}, 0.3),
        ([0.9, 0.5, 0.4, 0.1], None, {"top_k": 4}, float("inf")),
        ([0.9, 0.5, 0.4, 0.1], [0.0, 0.0, 0.3, 0.0], {"top_k": 2}, 0.2),
        ([0.9, 0.1, 0.6, 0.5], None, {"groups": 2, "keep": 1, "group_score": "max"}, 0.3),
        ([0.9, 0.3, 0.6, 0.55], None, {"groups": 2, "keep": 1}, 0.05),
        ([0.9, 0.1, 0.6, 0.53], None, {"groups": 2, "keep": 1}, 0.07),
        ([0.9, 0.3, 0.1, 0.05], None, {"groups": 2, "keep": 1, "top_k": 2, "fill": 0.0}, 0.3),
        ([0.9, 0.3, 0.1, 0.05], None, {"groups": 2, "keep": 2, "top_k": 2}, 0.2),
        ([0.9, 0.6, 0.52, 0.1], None, {"groups": 4, "keep": 2, "group_score": "max"}, 0.08),
    ],
)
def test_the_margin_is_the_smallest_of_groups_and_experts(
    scores: list[float], bias: list[float] | None, attrs: dict[str, Any], margin: float
) -> None:
    known = {"score": "sigmoid", "groups": 1, "keep": 1, "group_score": "top2", "top_k": 1}
    operands = scored(scores, bias=bias)
    got = decide(operands, {**known, "fill": float("-inf"), **attrs}, torch.tensor([[[0, 1]]]))
    assert got.margins.tolist() == pytest.approx([margin], abs=1e-6)
    assert got.scores[0].tolist() == pytest.approx(scores), "without the bias"
    assert got.experts.tolist() == [[0, 1]]


@pytest.mark.parametrize(("normalise", "wanted"), [(False, [1.8, 0.9]), (True, [4 / 3, 2 / 3])])
def test_weights_of_chosen_experts(normalise: bool, wanted: list[float]) -> None:
    attrs = {"score": "sigmoid", "normalise": normalise, "scale": 2.0}
    operands = scored([0.9, 0.45, 0.2], bias=[5.0, 6.0, 7.0])
    assert weigh(operands, attrs, torch.tensor([[0, 1]]))[0].tolist() == pytest.approx(wanted)


def test_wrong_is_what_differs_by_more_than_ten_times_the_noise() -> None:
    rows = [[0.9, 0.1, 0.1], [0.9, 0.5, 0.2], [0.9, 0.895, 0.2], [0.9, 0.5, 0.2]]
    first = scored(*rows, bias=[0.0, 0.0, 0.0])
    rows[0][2] = 0.101
    second = scored(*rows, bias=[0.0, 0.5, 0.0])
    oracle = Routing()
    for _ in range(2):
        oracle(ROUTE, first)
    assert (oracle.wrong, oracle.forced, oracle.decisions) == (0, 0, 8)
    imposed = Routing(oracle.seen)
    for times in (1, 2):
        answer = imposed(ROUTE, second)
        assert answer is not None
        index, weights = answer
        assert index.tolist() == [[0, 3]] * 4, "the first run's, and the shared expert"
        assert weights.flatten().tolist() == pytest.approx([0.9, 1.0] * 4)
        assert (imposed.wrong, imposed.forced) == (2 * times, 3 * times)
    beyond = imposed(ROUTE, second)
    assert beyond is not None
    assert beyond[0].tolist() == [[0, 3], [1, 3], [1, 3], [1, 3]], "no decision is known"
    assert (imposed.wrong, imposed.forced, imposed.decisions) == (4, 6, 12)


def test_a_tie_without_noise_is_decided_either_way() -> None:
    first = scored([0.5, 0.5, 0.2], bias=[0.1, 0.0, 0.0])
    oracle = Routing()
    oracle(ROUTE, first)
    oracle.seen[0].margins.zero_()
    imposed = Routing(oracle.seen)
    imposed(ROUTE, scored([0.5, 0.5, 0.2], bias=[0.0, 0.1, 0.0]))
    assert (imposed.wrong, imposed.forced) == (0, 1)


def test_decisions_of_other_shapes_and_other_operators_are_left_alone() -> None:
    oracle = Routing()
    oracle(ROUTE, scored([0.9, 0.5, 0.2], bias=[0.0, 0.0, 0.0]))
    imposed = Routing(oracle.seen)
    answer = imposed(ROUTE, scored([0.1, 0.5, 0.2], [0.1, 0.2, 0.5], bias=[0.0, 0.0, 0.0]))
    assert answer is not None
    assert answer[0].tolist() == [[1, 3], [2, 3]]
    assert (imposed.wrong, imposed.forced, imposed.decisions) == (0, 0, 2)
    (other,) = parse_graph("graph main(%x: f32[2]) { %y = neg %x return %y }").nodes
    assert imposed(other, [torch.ones(2)]) is None
