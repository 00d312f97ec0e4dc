"""Graphs cut into regions and eager parts, and the sizes that memory of a region is planned for."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dsc.frontends import regions
from dsc.frontends.options import Options
from dsc.frontends.partition import is_free, is_number, is_view, needed_by, parts
from dsc.frontends.regions import Region, planned_for
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import Graph
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType

ATEN = torch.ops.aten


class Drawn:
    """A functional graph under construction: nodes by name."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {"x": self.graph.placeholder("x")}
        self.eager: set[fx.Node] = set()

    def add(self, name: str, target: Any, *args: Any, eager: bool = False, val: Any = None) -> None:
        given = tuple(self.nodes.get(x, x) if isinstance(x, str) else x for x in args)
        self.nodes[name] = node = self.graph.call_function(target, given)
        if val is not None:
            node.meta["val"] = val
        if eager:
            self.eager.add(node)

    def cut(self) -> list[tuple[bool, str]]:
        """Its parts: whether each is compiled, and its nodes."""
        names = {node: name for name, node in self.nodes.items()}
        found = parts(self.graph, self.eager)
        return [(p.compiled, " ".join(names[n] for n in p.nodes)) for p in found]


def test_what_is_compiled_is_gathered_into_as_few_regions_as_the_order_allows() -> None:
    g = Drawn()
    g.add("a", ATEN.exp.default, "x")
    g.add("u", ATEN.svd.default, "a", eager=True)
    g.add("b", ATEN.neg.default, "a")
    g.add("u0", operator.getitem, "u", 0)
    g.add("c", ATEN.add.Tensor, "b", "u0")
    g.add("v", ATEN.svd.default, "c", eager=True)
    g.add("w", ATEN.svd.default, "x", eager=True)
    g.add("d", ATEN.neg.default, "c")
    g.add("t", ATEN.sort.default, "v", eager=True)
    g.graph.output(g.nodes["d"])
    assert g.cut() == [(True, "a b"), (False, "u u0 w"), (True, "c d"), (False, "v t")]
    first = Drawn()
    first.add("u", ATEN.svd.default, "x", eager=True)
    assert first.cut() == [(False, "u")]
    assert Drawn().cut() == []


def test_eager_nodes_that_draw_or_change_keep_their_order_and_no_others() -> None:
    g = Drawn()
    g.add("a", ATEN.svd.default, "x", eager=True)
    g.add("b", ATEN.neg.default, "a")
    g.add("r", ATEN.rand_like.default, "b", eager=True)
    g.add("s", ATEN.rand_like.default, "x", eager=True)
    g.add("t", ATEN.add_.Tensor, "x", 1, eager=True)
    g.add("u", ATEN.svd.default, "x", eager=True)
    assert g.cut() == [(False, "a u"), (True, "b"), (False, "r s t")]


def test_views_and_sizes_belong_to_no_part_and_are_made_where_they_are_read() -> None:
    g = Drawn()
    g.add("n", ATEN.sym_size.int, "x", 0, val=3)
    g.add("a", ATEN.exp.default, "x")
    g.add("v", ATEN.view.default, "a", "n")
    g.add("w", ATEN.view.default, "v", "n")
    g.add("p", ATEN.split.Tensor, "w", 2)
    g.add("p0", operator.getitem, "p", 0)
    g.add("b", ATEN.neg.default, "p0")
    g.add("e", ATEN.view.default, "a", "n", eager=True)
    g.add("c", ATEN.item.default, "b", val=1.5)
    nodes = g.nodes
    free = [name for name, node in nodes.items() if is_free(node, g.eager)]
    assert free == ["n", "v", "w", "p", "p0"]
    assert g.cut() == [(True, "a b c"), (False, "e")]
    needed = needed_by([nodes["b"]], g.eager)
    assert needed == {nodes[k] for k in ("p0", "p", "w", "v", "n")}
    assert needed_by([nodes["e"], nodes["c"]], g.eager) == {nodes["n"]}
    assert needed_by([nodes["a"]], g.eager) == set()
    assert [is_number(nodes[k]) for k in ("n", "c", "a", "x")] == [True, True, False, False]


def test_a_view_is_told_by_the_schema_of_its_operator() -> None:
    g = Drawn()
    for name, target, view in (
        ("view", ATEN.view.default, True), ("split", ATEN.split.Tensor, True),
        ("exp", ATEN.exp.default, False), ("add_", ATEN.add_.Tensor, False),
        ("python", operator.add, False),
    ):  # fmt: skip
        g.add(name, target, "x")
        assert is_view(g.nodes[name]) == view, name


# --- sizes of regions -----------------------------------------------------------------------------

NEG = parse_graph("graph g(%x: f32[S,4]) { %y = neg %x return %y }")
"""16 bytes a row."""
S = {"S": Range(1, 1 << 30)}


@pytest.mark.parametrize(
    ("size", "bound"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (1000, 1024)]
)
def test_memory_is_planned_for_the_next_power_of_two_and_for_8_at_least(
    size: int, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "ARENA", 0)
    assert planned_for(NEG, S, {"S": size}, {}) == {"S": Range(1, bound)}
    assert planned_for(NEG, S, {}, {}) == {"S": Range(1, 8)}


def test_memory_is_planned_for_doublings_that_fit_the_arena(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def high(graph: Graph, arena: int) -> int:
        monkeypatch.setattr(regions, "ARENA", arena)
        return planned_for(graph, S, {"S": 9}, {})["S"].hi

    two = parse_graph("graph g(%x: f32[S,4]) { %y = neg %x %z = exp %y return %z }")
    assert [high(NEG, 16 * 64 + more) for more in (-1, 0)] == [32, 64]
    assert [high(two, 2 * 16 * 64 + more) for more in (-1, 0)] == [32, 64]
    empty = parse_graph("graph g(%x: f32[S,4]) { return %x }")
    assert high(empty, 0) == 16 << 20


def test_planned_sizes_lie_within_what_is_known_and_never_below_what_was_outgrown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regions, "ARENA", 0)
    old = {"S": Range(1, 40), "GONE": Range(1, 99)}
    assert planned_for(NEG, S, {"S": 9}, old) == {"S": Range(1, 40)}
    assert planned_for(NEG, S, {"S": 50}, old) == {"S": Range(1, 64)}
    assert planned_for(NEG, {"S": Range(2, 11)}, {"S": 9}, {}) == {"S": Range(2, 11)}
    assert planned_for(NEG, {"S": Range(30, 90)}, {"S": 9}, {}) == {"S": Range(30, 30)}
    assert planned_for(NEG, {}, {}, {}) == {}


@pytest.mark.parametrize(
    ("view", "layout"),
    [
        (torch.empty(2, 3, 4), None),
        (torch.empty(2, 3, 4).permute(2, 0, 1), (1, 2, 0)),
        (torch.empty(2, 1, 3).permute(2, 1, 0), (2, 1, 0)),
        (torch.empty(1, 2, 3).permute(1, 0, 2), None),
        (torch.empty(2, 3).t(), (1, 0)),
        (torch.empty(()), None),
    ],
)
def test_a_layout_is_the_order_of_axes_in_memory_where_it_is_another(
    view: Tensor, layout: tuple[int, ...] | None
) -> None:
    assert regions._layout(view) == layout


class Counted(Options):
    """Compiles nothing, and notes for what sizes it would."""

    def compile(self, program: Program) -> Any:
        """Return what holds the program."""
        return SimpleNamespace(program=program)


def region(text: str, **ranges: Range) -> Region:
    graph = parse_graph(text)
    node = fx.Graph().placeholder("out")
    node.meta["val"] = torch.empty(2, 3)
    program = Program("g", {"g": graph}, symbols=ranges)
    hints = dict.fromkeys(ranges, 3)
    return Region(program, Counted(), (), {}, (node,) * len(graph.outputs), hints, {})


def test_a_region_is_compiled_again_for_a_size_beyond_its_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(regions, "ARENA", 0)
    monkeypatch.setattr(regions, "results", lambda *given: made)
    found = region("graph g(%k: f32[2], %x: f32[4,S]) { %y = neg %x return %y }", S=Range(0, 99))
    found.prepare()
    bounds = []
    for size in (3, 8, 9, 8, 16, 17):
        tensors = [torch.empty(2), torch.empty(4, size)]
        found.witness = [] if size == 9 else None
        assert found.run(tensors) is made
        if size == 9:
            assert found.witness == [(tensors, made)]
        executable: Any = found.executable
        bounds.append((executable.program.symbols["S"].hi, found.compilations))
    assert bounds == [(8, 1), (8, 1), (16, 2), (16, 2), (16, 2), (32, 3)]
    assert found.seconds > 0


def test_sizes_that_kernels_may_have_to_know_are_the_last_of_matrices() -> None:
    text = "graph g(%x: f32[A,B+C], %v: f32[D], %w: f32[B,E,4]) { return %v }"
    found = region(text, **{name: Range(1, 9) for name in "ABCDE"})
    assert found.features == {"B", "C"}
    fixed = found.with_sizes(["B", "D"])
    assert [v.type for v in fixed.graph.inputs] == [
        TensorType(DType.f32, (symbol("A"), symbol("C") + 3)), TensorType(DType.f32, (3,)),
        TensorType(DType.f32, (3, symbol("E"), 4)),
    ]  # fmt: skip
    assert list(fixed.program.symbols) == list(fixed.hints) == ["A", "C", "E"]
    assert fixed.executable is None
    assert found.features == {"B", "C"}
