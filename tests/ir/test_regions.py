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
from dsc.ir.regions import (
    Kind,
    RegionLimits,
    anchor_of,
    classify,
    is_anchor,
    is_free,
    name_of,
    role,
)
from dsc.ir.traits import Role


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
        "sum %x {axes=[1,2]}",
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
    assert (len(body.nodes) == 1) == (not any(x in call for x in ("axis=1", "[0")))
    assert Rows(body).rows * math.prod(step.over) == 24


def test_a_pointwise_operator_alone_is_itself() -> None:
    graph = parse_graph("graph main(%x: f32[2,3], %z: f32[3]) { %y = sub %x, %z return %y }")
    body = alone(graph.nodes[0])
    assert [n.op for n in body.nodes] == ["sub"]
    assert [v.type for v in body.inputs] == [v.type for v in graph.inputs]


CALLS = {
    Kind.POINTWISE: "%a = neg %x %b = reshape %a {shape=[8]} return %b",
    Kind.MOVEMENT: "%b = reshape %x {shape=[8]} return %b",
    Kind.GEMM: "%a = neg %x %b = linear %a, %w return %b",
    Kind.ROWWISE: "%a = neg %x %b = softmax %a {axis=1} return %b",
    Kind.SINGLE: "%b = softmax %x {axis=0} return %b",
    Kind.MIXED: "%a = neg %x %b = softmax %a {axis=0} return %b",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_body_is_of_the_kind_of_its_operators(kind: Kind) -> None:
    graph = parse_graph(f"graph main(%x: f32[2,4], %w: f32[4,4]) {{ {CALLS[kind]} }}")
    assert classify(graph) is kind
    anchor = anchor_of(graph.nodes)
    assert (anchor is not None) == (kind is Kind.GEMM)
    assert [is_anchor(n) for n in graph.nodes] == [n is anchor for n in graph.nodes]


@pytest.mark.parametrize(
    ("line", "part", "free"),
    [
        ("%y = full {shape=[1,1], value=2.0, dtype=f32}", Role.CONSTANT, True),
        ("%y = full {shape=[2], value=2.0, dtype=f32}", Role.OTHER, False),
        ("%y = reshape %x {shape=[8]}", Role.VIEW, True),
        ("%y = permute %x {dims=[1,0]}", Role.VIEW, False),
        ("%y = sum %x {axes=[1]}", Role.REDUCTION, False),
        ("%y = sum %x {axes=[-1]}", Role.REDUCTION, False),
        ("%y = sum %x {axes=[0]}", Role.OTHER, False),
        ("%y = sum %x {axes=[0,1]}", Role.OTHER, False),
        ("%y = softmax %s {axis=0}", Role.OTHER, False),
        ("%y = rms_norm %x, %g {eps=1e-05}", Role.REDUCTION, False),
        ('%y = rope %q, %p, %f {layout="half"}', Role.ROTATION, False),
        ("%y = cache_write %c, %q, %l", Role.WRITE, False),
        ("%y = append %c, %q, %l", Role.OTHER, False),
        ("%y = linear %x, %x", Role.PRODUCT, False),
        ("%y, %z = topk %x {k=2}", Role.OTHER, False),
    ],
)
def test_the_part_of_an_operator_in_a_region_and_whether_it_is_free(
    line: str, part: Role, free: bool
) -> None:
    inputs = """%x: f32[2,4], %g: f32[4], %s: f32[], %q: f32[2,1,4], %p: i64[2,1], %f: f32[2],
        %c: f32[2,3,4], %l: i64[2]"""
    if "%s" in line:
        line = line.replace("%s", "%g")
        inputs = inputs.replace("%g: f32[4]", "%g: f32[4,2]")
    (node,) = parse_graph(f"graph main({inputs}) {{ {line} return %y }}").nodes
    assert role(node) is part
    assert is_free(node, RegionLimits()) == free


def test_a_region_is_called_by_what_it_does_and_how_often() -> None:
    text = """graph main(%x: f32[2,4], @q_proj.weight: f32[4,4], @v.weight: f32[4,4]) {
      %y = fused %x, @q_proj.weight {body=graph f(%x: f32[2,4], %w: f32[4,4]) {
        %a = neg %x %b = reshape %a {shape=[2,4]} %c = neg %b %d = linear %c, %w
        %e = linear %d, @v.weight return %e
      }}
      return %y
    }"""
    assert name_of(parse_graph(text).nodes[0]) == "2 neg + q_proj + v"


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
    text = """graph body(%x: f32[N,8]) {
      %s = sum %x {axes=[1], keepdims=true}
      %t = neg %s
      %h = silu %t
      %c = mul %x, %h
      %d = tanh %c
      return %d
    }"""
    assert {s.op for s in Rows(parse_graph(text)).steps if s.kept} == {"sum", "silu"}


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
