"""Regions: any graph cut into them computes the same, and inlining puts it together again."""

from __future__ import annotations

import random
from itertools import permutations, product

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dsc.ir.analyses import aliases_of
from dsc.ir.dims import Range
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Node, Value, Weight
from dsc.ir.lanes import moves_nothing
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.ir.regions import Kind, RegionLimits, classify, name_of
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify_graph
from dsc.passes.fuse import Fuse
from dsc.rewrite.base import PassReport
from dsc.rewrite.regions import FAR, Grouping, inline_graph, outline, region_of
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


# --- groups ---------------------------------------------------------------------------------------


def check_order(grouping: Grouping) -> None:
    """Every node lies in one group, and groups stand where they can run."""
    assert [grouping.rank[g] for g in grouping.order] == list(range(len(grouping.order)))
    assert sorted(grouping.order) == sorted(grouping.members)
    held = {i: g for g, members in grouping.members.items() for i in members}
    assert held == dict(enumerate(grouping.owner))
    assert all(members == sorted(members) for members in grouping.members.values())
    for i, before in enumerate(grouping.before):
        assert all(i in grouping.after[p] for p in before)
        for p in before:
            assert held[p] == held[i] or grouping.rank[held[p]] < grouping.rank[held[i]]


def free_of_cycles(grouping: Grouping, a: int, b: int) -> bool:
    """Whether the graph of groups stays free of cycles when two become one."""
    owner = {g: b if g == a else g for g in grouping.members}
    found = nx.DiGraph()
    for i, after in enumerate(grouping.after):
        found.add_edges_from((owner[grouping.owner[i]], owner[grouping.owner[s]]) for s in after)
    found.remove_edges_from(list(nx.selfloop_edges(found)))
    return bool(nx.is_directed_acyclic_graph(found))


@pytest.mark.parametrize("seed", range(100, 112))
def test_groups_join_exactly_where_no_path_leaves_and_comes_back(seed: int) -> None:
    graph = tangle(seed, 12)
    choose = random.Random(seed)
    grouping = Grouping(graph)
    while True:
        check_order(grouping)
        fit = []
        for a, b in permutations(grouping.order, 2):
            why = grouping.obstacle(a, b)
            one, other = grouping.members[a], grouping.members[b]
            pairs = {tuple(sorted(p)) for p in product(one, other)}
            if pairs & {tuple(sorted(p)) for p in grouping.apart}:
                assert why == "one writes in place what the other reads"
            else:
                assert bool(why) != free_of_cycles(grouping, a, b), why
                fit += [] if why else [(a, b)]
        if not fit:
            break
        a, b = choose.choice(fit)
        members = grouping.members[a] + grouping.members[b]
        joined = grouping.join(a, b)
        assert grouping.members[joined] == sorted(members)
    verify_graph(outline(grouping))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_node_at_the_edge_of_its_group_is_released(ahead: bool, which: int) -> None:
    text = "%a = neg %x\n%b = exp %x\n%p = abs %x\n%d = silu %x\n%y = tanh %x"
    grouping = Grouping(graph_of(text, "a", "b", "p", "d", "y"))
    joined = grouping.join(grouping.join(1, 2), 3)
    member = 1 + which
    grouping.release(member, ahead=ahead)
    check_order(grouping)
    (rest,) = (m for m in grouping.members.values() if len(m) == 2)
    assert rest == [m for m in (1, 2, 3) if m != member]
    own = grouping.owner[rest[0]]
    assert grouping.order == [0, *([member, own] if ahead else [own, member]), 4]
    assert joined == 1


def graph_of(lines: str, *results: str) -> Graph:
    named = ", ".join(f"%{r}" for r in results)
    return parse_graph(
        "graph main(%x: f32[B,S,8], %c: f32[B,S,8], %n: i64[B], @w: f32[8,8]) {\n"
        f"{lines}\nreturn {named}\n}}"
    )


def test_a_group_knows_what_runs_before_and_after_it_and_what_is_kept() -> None:
    text = "%a = neg %x\n%b = exp %a\n%c1 = abs %a\n%d = add %b, %c1\n%e = silu %d\n%f = tanh %b"
    grouping = Grouping(graph_of(text, "d", "e"))
    assert grouping.producers(3) == [1, 2]
    assert grouping.consumers(0) == [1, 2]
    assert grouping.readers("a") == {1, 2}
    assert grouping.readers("d") == {4, None}
    assert grouping.readers("f") == set()
    assert grouping.obstacle(0, 3) == grouping.obstacle(3, 0)
    assert grouping.obstacle(0, 3) == (
        "what lies between them depends on one and is needed by the other"
    )
    assert grouping.kept(0, 1, 2) == {"b", "c1"}, "b is read by f, c1 by d, a by none outside"
    assert grouping.kept(3, 4) == {"d", "e"}
    assert grouping.kept(5) == {"f"}, "a group has a result, though nobody reads it"
    joined = grouping.join(1, 0)
    assert (joined, grouping.owner[:2]) == (0, [0, 0])
    assert grouping.readers("a") == {0, 2}
    assert grouping.producers(3) == [0, 2]
    assert grouping.consumers(0) == [2, 3, 5]
    assert [n.op for n in grouping.nodes(3, 0)] == ["neg", "exp", "add"]


def test_groups_that_are_far_apart_stay_apart() -> None:
    lines = "\n".join(f"%v{i} = neg %x" for i in range(FAR + 2))
    grouping = Grouping(graph_of(lines, *(f"v{i}" for i in range(FAR + 2))))
    assert grouping.obstacle(0, FAR) == ""
    assert grouping.obstacle(FAR + 1, 0) == "they are too far apart"


def test_what_is_written_in_place_is_apart_from_who_reads_it() -> None:
    text = (
        "%a = neg %c\n%v = reshape %c {shape=[B,S,2,4]}\n%d = cache_write %c, %x, %n\n"
        "%e = exp %d\n%f = abs %x\n%g = tanh %e"
    )
    grouping = Grouping(graph_of(text, "a", "v", "d", "e", "f", "g"))
    assert grouping.apart == {(0, 2), (1, 2), (2, 3)}
    assert grouping.before[2] == {0, 1}
    assert grouping.obstacle(2, 4) == "", "both read x, which nobody writes"
    unread = Grouping(graph_of("%d = cache_write %c, %x, %n", "d"))
    assert unread.apart == set()


def test_what_ranks_tell_each_other_keeps_its_order() -> None:
    text = "%a = all_reduce %x {ranks=2}\n%b = neg %x\n%d = all_reduce %c {ranks=2}"
    grouping = Grouping(graph_of(text, "a", "b", "d"))
    assert grouping.after == [{2}, set(), set()]


LOCS = {
    "one module": (["m.a", "m.a"], "m.a"),
    "two of one": (["m.a.x", "m.a.y", "m.a.x"], "m.a"),
    "one in the other": (["m.a.x", "m.a"], "m.a"),
    "nothing shared": (["m.a", "n.a"], ""),
    "some without": (["m.a", ""], ""),
    "names that begin alike": (["m.ab", "m.a"], "m"),
}


@pytest.mark.parametrize("name", LOCS)
def test_a_region_lies_in_the_module_around_its_nodes(name: str) -> None:
    locs, wanted = LOCS[name]
    x = Value("x", TensorType(DType.f32, (2,)))
    nodes = [
        Node("neg", (x,), Attrs({}), (Value(f"v{i}", x.type),), loc) for i, loc in enumerate(locs)
    ]
    assert region_of(nodes, {"v0"}, {}).loc == wanted


def test_a_region_with_a_product_lies_where_the_product_does() -> None:
    lines = '%a = neg %x loc "m.a"\n%y = linear %a, @w loc "m.b"\n%z = neg %y loc "n.c"'
    graph = graph_of(lines, "z")
    region = region_of(graph.nodes, {"z"}, {})
    assert region.loc == "m.b"
    assert [str(x) for x in region.operands] == ["%x", "@w"]


def test_a_region_has_names_of_its_own_for_weights_and_literals_inside() -> None:
    text = (
        "graph main(%w1: f32[2,2], @v: f32[2,2], @u: f32[2,2]) {\n"
        "%k = full {shape=[], value=2.0, dtype=f32}\n%l = full {shape=[], value=3.0, dtype=f32}\n"
        "%a = add %w1, @v\n%w2 = add %a, @u\n%b = mul %w2, %k\n%y = add %b, @v\n"
        "%z = mul %y, %l\nreturn %z, %w2, %l\n}"
    )
    graph = parse_graph(text)
    literals = {n.output.name: n for n in graph.nodes[:2]}
    region = region_of(graph.nodes[2:6], {"y", "w2"}, literals)
    assert region.body is not None
    assert [str(x) for x in region.operands] == ["%w1", "@v", "@u"]
    assert [v.name for v in region.body.inputs] == ["w1", "w1_", "w2_"]
    assert [n.op for n in region.body.nodes] == ["full", "add", "add", "mul", "add"]
    assert [v.name for v in region.outputs] == ["w2", "y"]
    assert region.body.outputs == region.outputs
    grouping = Grouping(graph)
    for i in (3, 4, 5):
        grouping.join(2, i)
    after = outline(grouping)
    verify_graph(after, {n: TensorType(DType.f32, (2, 2)) for n in "uv"})
    assert [n.op for n in after.nodes] == ["full", "fused", "mul"], "k is read in the region alone"


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


def test_inlining_keeps_names_apart_and_literals_once() -> None:
    text = """graph main(%x: f32[2]) {
      %a = neg %x
      %k = full {shape=[], value=2.0, dtype=f32}
      %h = full {shape=[1], value=2.0, dtype=f32}
      %p, %q = fused %a, %x {body=graph b(%s: f32[2], %t: f32[2]) {
        %k = full {shape=[], value=2.0, dtype=f32}
        %a = mul %s, %k
        %m = full {shape=[], value=3.0, dtype=f32}
        %u = mul %a, %m
        %v = add %u, %t
        return %v, %a
      }}
      %y = mul %p, %k
      %z = add %q, %h
      %r = fused %y, %z {body=graph b(%s: f32[2], %t: f32[2]) {
        %u = add %t, %s
        return %u
      }}
      return %y, %z, %r
    }"""
    graph = parse_graph(text)
    assert print_graph(inline_graph(graph)) == print_graph(
        parse_graph("""graph main(%x: f32[2]) {
      %a = neg %x
      %k = full {shape=[], value=2.0, dtype=f32}
      %h = full {shape=[1], value=2.0, dtype=f32}
      %q = mul %a, %k
      %m = full {shape=[], value=3.0, dtype=f32}
      %u = mul %q, %m
      %p = add %u, %x
      %y = mul %p, %k
      %z = add %q, %h
      %r = add %z, %y
      return %y, %z, %r
    }""")
    )
    second = inline_graph(graph, lambda n: len(n.outputs) == 2)
    assert [n.op for n in second.nodes] == ["neg", "full", "full", "fused", "mul", "add", "add"]
    assert inline_graph(graph, lambda n: True) is graph


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
