"""Regions: any graph cut into them computes the same, and inlining puts it together again."""

from __future__ import annotations

import random

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dsc.ir.analyses import aliases_of
from dsc.ir.dims import Range
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Node, Value, Weight
from dsc.ir.lanes import moves_nothing
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.regions import Kind, RegionLimits, classify, name_of
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify_graph
from dsc.passes.fuse import Fuse
from dsc.rewrite.base import PassReport
from dsc.rewrite.regions import inline_graph
from tests.ir.strategies import graphs
from tests.passes.test_fuse import CHAIN, RANGES, fused_graph, meaning, outputs

# --- any graph ------------------------------------------------------------------------------------


def check_partition(before: Graph, after: Graph) -> None:
    """Every node lies in one region or stands alone, and regions depend on each other one way."""
    owner: dict[str, int] = {}
    for i, node in enumerate(after.nodes):
        inner = node.body.nodes if node.body is not None else (node,)
        for value in (v for n in inner if n.op != "full" for v in n.outputs):
            assert value.name not in owner, f"{value} is computed twice"
            owner[value.name] = i
    assert owner.keys() >= {v.name for n in before.nodes if n.op != "full" for v in n.outputs}
    depends = nx.DiGraph()
    for node in before.nodes:
        for x in node.operands:
            if isinstance(x, Value) and x.name in owner and node.outputs[0].name in owner:
                depends.add_edge(owner[x.name], owner[node.outputs[0].name])
    depends.remove_edges_from(list(nx.selfloop_edges(depends)))
    assert nx.is_directed_acyclic_graph(depends)
    assert all(a < b for a, b in depends.edges)


def dear(view: Node) -> bool:
    """No view is free."""
    return False


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=graphs(steps=14, bodies=False))
def test_random_graphs_compute_the_same(graph: Graph) -> None:
    graph = inline_graph(graph)
    program = Program("p", {"main": graph}, symbols={**RANGES, "P": Range(0, 9)})
    wanted = outputs(program.entries["main"])
    for level in (1, 2, 3):
        free = dear if level == 3 else moves_nothing
        sweep = Fuse(level, RegionLimits(free=free))
        after = sweep.run(program, PassReport()).entries["main"]
        verify_graph(after)
        check_partition(graph, after)
        for a, b in zip(wanted, outputs(after), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for node in after.nodes:
            if node.body is not None:
                assert classify(node.body) not in (Kind.MIXED, Kind.SINGLE, Kind.MOVEMENT)
                assert set(aliases_of(node)) == set()
        assert meaning(inline_graph(after)) == meaning(graph)


def tangle(seed: int, length: int = 24) -> Graph:
    """A random graph with much fan-in: GEMMs, norms, writes into a cache and reads of it."""
    choose = random.Random(seed)
    lines: list[str] = []
    live, cache = ["x", "r"], "c"

    def pick() -> str:
        return choose.choice(live[-5:])

    for i in range(length):
        match choose.choice("++++slnpkwo"):
            case "+":
                line = f"add %{pick()}, %{choose.choice(live)}"
            case "s":
                line = f"sigmoid %{pick()}"
            case "l":
                line = f"linear %{pick()}, @w"
            case "n":
                line = f"rms_norm %{pick()}, @g {{eps=0.1}}"
            case "p":
                lines += [f"%a{i}, %b{i} = split %{pick()} {{sizes=[4,4]}}"]
                line = f"concat %b{i}, %a{i} {{axis=-1}}"
            case "k":
                line = f"sigmoid %{cache}"
            case "w":
                lines += [f"%c{i} = cache_write %{cache}, %{pick()}, %n"]
                cache = f"c{i}"
                continue
            case _:
                line = f"cumsum %{pick()} {{axis=1}}"
        lines.append(f"%v{i} = {line}")
        live.append(f"v{i}")
    results = ", ".join(f"%{v}" for v in dict.fromkeys([*live[-2:], choose.choice(live)]))
    body = "\n".join(lines)
    updates = f", %{cache} updates %c" if cache != "c" else ""
    return parse_graph(
        "graph main(%x: f32[B,S,8], %r: f32[B,S,8], %c: f32[B,S,8], %n: i64[B], @w: f32[8,8],"
        f" @g: f32[8]) {{\n{body}\nreturn {results}{updates}\n}}"
    )


@pytest.mark.parametrize("seed", range(60))
def test_tangles_compute_the_same(seed: int) -> None:
    graph = tangle(seed)
    verify_graph(graph)
    program = Program("p", {"main": graph}, symbols=RANGES, stage=Stage.OPTIMIZED)
    given = {"n": torch.zeros(2, dtype=torch.int64)}
    wanted = outputs(graph, given)
    for level in (1, 2, 3):
        limits = RegionLimits(reductions=1 + seed % 4)
        after = Fuse(level, limits).run(program, PassReport()).entries["main"]
        verify_graph(after)
        check_partition(graph, after)
        assert meaning(inline_graph(after)) == meaning(graph)
        for a, b in zip(wanted, outputs(after, given), strict=True):
            assert torch.equal(a, b)


# --- inlining and classifying by hand -------------------------------------------------------------


def test_regions_of_every_shape_can_be_inlined() -> None:
    t = TensorType(DType.f32, (2,))
    inner = GraphBuilder("inner")
    x, w = inner.input("x", t), inner.input("w", t)
    y = inner.neg(inner.add(x, w))
    twice = inner.finish([y, y, x, w])
    outer = GraphBuilder("main")
    a = outer.input("x", t)
    results = outer.call("fused", a, Weight("w", t), body=twice)
    nested = GraphBuilder("nested")
    b = nested.input("b", t)
    (c,) = nested.call("fused", b, body=_negated(t))
    (last,) = outer.call("fused", results[1], body=nested.finish([c]))
    graph = outer.finish([*results, last])
    flat = inline_graph(graph)
    verify_graph(flat)
    assert all(n.body is None for n in flat.nodes)
    assert [n.op for n in flat.nodes] == ["add", "neg", "neg"]
    for wanted, found in zip(outputs(graph), outputs(flat), strict=True):
        assert torch.equal(wanted, found)
    assert inline_graph(flat) is flat


def _negated(t: TensorType) -> Graph:
    b = GraphBuilder("body")
    return b.finish([b.neg(b.input("x", t))])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("%y = neg %x", Kind.POINTWISE),
        ("%a = softmax %x\n%y = neg %a", Kind.ROWWISE),
        ("%a = linear %x, %x\n%y = neg %a", Kind.GEMM),
        ("%y = permute %x {dims=[1,0]}", Kind.MOVEMENT),
        ("%y = cumsum %x {axis=0}", Kind.SINGLE),
        ("%a = neg %x\n%y = cumsum %a {axis=0}", Kind.MIXED),
        ("%a = linear %x, %x\n%y = linear %a, %x", Kind.MIXED),
    ],
)
def test_the_kind_is_read_off_the_body(text: str, kind: Kind) -> None:
    body = parse_graph(f"graph body(%x: f32[8,8]) {{\n{text}\nreturn %y\n}}")
    assert classify(body) is kind


def test_names_are_of_the_weights_that_a_region_reads() -> None:
    graph, _ = fused_graph(CHAIN)
    assert [name_of(n) for n in graph.nodes] == ["w + swiglu", "d + add", "rms_norm + silu"]
    one = Node("einsum", (Value("x", TensorType(DType.f32, (2,))),), Attrs({}), ())
    assert name_of(one) == "einsum"
