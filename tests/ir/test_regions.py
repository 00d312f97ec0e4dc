"""What regions are called, which views cost nothing, and what an operator alone is a region of."""

from __future__ import annotations

import math

import pytest
import torch

from dsc.ir.interpreter import run_graph
from dsc.ir.lanes import moves_nothing
from dsc.ir.parser import parse_graph
from dsc.ir.region_columns import Columns
from dsc.ir.region_steps import NoKernel, Rows, alone
from dsc.ir.regions import name_of


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "o_proj"),
        ("model.layers.3.mlp.w.weight", "mlp.w"),
        ("weight", "linear"),
    ],
)
def test_a_product_is_called_by_its_weight_and_by_one_letter_with_its_module(
    weight: str, name: str
) -> None:
    text = (
        f"graph main(%x: f32[2,8], @{weight}: f32[8,8]) {{ %y = linear %x, @{weight} return %y }}"
    )
    assert name_of(parse_graph(text).nodes[0]) == name


@pytest.mark.parametrize(
    ("view", "still"),
    [
        ("reshape %x {shape=[N*4]}", True),
        ("permute %x {dims=[1,0,2]}", True),
        ("permute %x {dims=[2,1,0]}", False),
        ("expand %x {shape=[N,1,4]}", True),
        ("expand %x {shape=[N,3,4]}", False),
        ("slice %x {axis=0, start=0, end=N, step=1}", True),
        ("slice %x {axis=2, start=0, end=4, step=2}", False),
        ("silu %x", False),
    ],
)
def test_views_of_all_elements_in_order_move_nothing(view: str, still: bool) -> None:
    (node,) = parse_graph(f"graph main(%x: f32[N,1,4]) {{ %y = {view} return %y }}").nodes
    assert moves_nothing(node) == still


def test_a_split_moves_what_it_gives() -> None:
    text = "graph main(%x: f32[3,4]) { %y, %z = split %x {axis=1, sizes=[1,3]} return %y, %z }"
    assert not moves_nothing(parse_graph(text).nodes[0])


@pytest.mark.parametrize(
    "call",
    [
        "softmax %x {axis=1}",
        "softmax %x {axis=-1}",
        "sum %x {axes=[0,2]}",
        "mean %x {axes=[0], keepdims=true}",
        "amax %x {axes=[2,1], keepdims=true}",
    ],
)
def test_an_operator_alone_is_a_region_along_its_last_axes(call: str) -> None:
    graph = parse_graph(f"graph main(%x: f32[2,3,4]) {{ %y = {call} return %y }}")
    body = alone(graph.nodes[0])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run_graph(body, [x]), run_graph(graph, [x]))
    (step,) = Rows(body).steps
    assert Rows(body).rows * math.prod(step.over) == 24


def test_steps_are_kept_for_what_does_not_run_beside_them() -> None:
    text = """graph body(%x: f32[N,8], %g: f32[8]) {
      %a = mul %x, %x
      %b = silu %a
      %n = rms_norm %b, %g {eps=1e-06}
      %c = add %n, %a
      return %c
    }"""
    kept = {s.op for s in Rows(parse_graph(text)).steps if s.kept}
    assert kept == {"mul", "silu", "rms_norm"}


def test_rows_that_differ_are_no_region() -> None:
    text = """graph body(%x: f32[N,8], %y: f32[4]) {
      %a = silu %x
      %b = silu %y
      return %a, %b
    }"""
    with pytest.raises(NoKernel, match="different rows"):
        Rows(parse_graph(text))


@pytest.mark.parametrize(
    ("weight", "rest", "walk"),
    [
        ("f32[6,8]", "%s = silu %y return %s", ((6, 1),)),
        ("f32[1,8]", "%z = reshape %y {shape=[N]} %s = silu %z return %s", ((1, 1),)),
        (
            "f32[6,8]",
            "%z = reshape %y {shape=[N,3,2]} %a, %b = split %z {sizes=[1,1]}"
            " %s = silu %a return %s",
            ((3, 2), (1, 1)),
        ),
    ],
)
def test_columns_of_a_product_are_walked_to_the_last_one_of_stride_one(
    weight: str, rest: str, walk: tuple[tuple[int, int], ...]
) -> None:
    graph = parse_graph(f"graph main(%x: f32[N,8], %w: {weight}) {{ %y = linear %x, %w {rest} }}")
    (family,) = Columns(graph, graph.nodes[0]).families()
    assert family.walk == walk
