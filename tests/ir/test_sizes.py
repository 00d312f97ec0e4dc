"""Sizes: what limits allow, what pages hold, what nodes cost at them, and which form pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsc.ir.analyses import Cost
from dsc.ir.costs import node_costs, step_sizes, total, weights_read
from dsc.ir.dims import Dim, Range, symbol
from dsc.ir.expert_forms import TIE, ExpertKernels, ExpertLayer, direct_pays, regrets
from dsc.ir.graph import Value
from dsc.ir.interface import Guard, Interface, Mesh, State, Storage, updates
from dsc.ir.lanes import COLLECTIVE, COMPUTE, lane_of
from dsc.ir.layers import by_layer, home, layer_number, runs
from dsc.ir.limits import OPEN, Limits, cache_sizes
from dsc.ir.paging import cached_rows, gathered, page_rows, reads_pages, rows_of_page, scattered
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType

B, C, N, P = (symbol(n) for n in "BCNP")

# --- limits and pages -----------------------------------------------------------------------------


def test_caches_have_room_for_all_rows_in_whole_pages() -> None:
    assert cache_sizes(3, 10, 1) == {"C": 10, "M": 10, "N": 30}
    assert cache_sizes(3, 128, 64) == {"C": 128, "M": 2, "N": 6}
    assert cache_sizes(3, 129, 64) == {"C": 129, "M": 3, "N": 9}
    assert cache_sizes(3, 128, 64, spare=2) == {"C": 130, "M": 3, "N": 11}


def test_limits_are_ranges_and_the_ranges_are_the_limits() -> None:
    limits = Limits(4, 96, 16)
    assert limits.symbols == {
        "B": Range(1, 4), "S": Range(1, 16), "P": Range(0, 96), "L": Range(1, 16),
    }  # fmt: skip
    assert Limits.of(limits.symbols, 1) == limits
    room = {"B": Range(1, 4), "S": Range(1, 16)}
    assert Limits.of({**room, "C": Range(1, 100)}, 8) == Limits(4, 84, 16)
    assert Limits.of({**room, "M": Range(1, 10)}, 8) == Limits(4, 64, 16)
    assert Limits.of({**room, "M": Range(1, 1)}, 8) == Limits(4, 0, 16)
    assert Limits.of({**room, "C": Range(1, 100), "P": Range(0, 60)}, 8) == Limits(4, 60, 16)
    assert Limits.of({}, 1) == Limits(OPEN, OPEN, OPEN)
    assert OPEN == 2**31 - 1
    assert Limits(4, 96, 16).within(Limits(8, 64, 16)) == Limits(4, 64, 16)


PAGED = parse_graph("""graph g(%c: f32[N,4,3], %n: f32[B,S,3], %l: i64[B], %t: i64[B,M]) {
  %d = cache_write %c, %n, %l, %t
  %e = neg %n
  %f = fused %c, %n, %l, %t {body=graph b(%c: f32[N,4,3], %n: f32[B,S,3], %l: i64[B],
    %t: i64[B,M]) { %d = cache_write %c, %n, %l, %t return %d }}
  return %d, %e, %f
}""")
WHOLE = parse_graph("""graph g(%c: f32[B,9,3], %n: f32[B,S,3], %l: i64[B]) {
  %d = cache_write %c, %n, %l return %d
}""")


def test_pages_are_read_by_a_block_table_alone() -> None:
    write, neg, region = PAGED.nodes
    assert [reads_pages(n) for n in (write, neg, region)] == [True, False, True]
    assert [rows_of_page(n) for n in (write, neg, region)] == [4, None, None]
    assert page_rows(PAGED) == 4
    assert not reads_pages(WHOLE.nodes[0])
    assert page_rows(WHOLE) is None
    assert cached_rows(write, "cache") == symbol("M")
    assert cached_rows(WHOLE.nodes[0], "cache") == 9


def test_rows_in_pages_are_those_of_a_cache_in_one_piece() -> None:
    table = torch.tensor([[2, -1, 0], [3, 1, -1]])
    rows = torch.arange(2 * 5 * 2.0).reshape(2, 5, 2) + 1
    start = torch.tensor([1, 3])
    whole = torch.zeros(2, 6, 2)
    for b in range(2):
        for i in range(min(5, 6 - int(start[b]))):
            whole[b, int(start[b]) + i] = rows[b, i]
    whole[table.repeat_interleave(2, 1) < 0] = 0
    pages = torch.zeros(4, 2, 2)
    short = rows[:, :3]
    whole[0, 4:] = 0  # the third new row is the last
    scattered(pages, table, short, start)
    assert torch.equal(gathered(pages, table), whole)
    assert pages[2, 0].sum() == 0, "the row before the first new one"
    assert pages[0].sum() == 0


# --- costs ----------------------------------------------------------------------------------------

LM = parse_graph(
    """graph g(%i: i64[B,S], %past: f32[B,P,4], %l: i64[B], @e: f32[100,4],
    @w: bf16[6,4]) {
  %x = embedding %i, @e
  %y = linear %x, @w
  %z = linear %x, @w
  %f = fused %x {body=graph b(%a: f32[B,S,4]) { %n = linear %a, @w return %n }}
  %k = fused %x, @w {body=graph b(%a: f32[B,S,4], %v: bf16[6,4]) { %m = linear %a, %v return %m }}
  return %y, %z, %f, %k
}""".replace("bf16", "f32")
)


def test_costs_are_summed_over_nodes_and_weights_counted_once() -> None:
    costs = node_costs(LM)
    assert costs["y"] is costs["z"]
    at = {"B": 2, "S": 3, "P": 9}
    assert total(LM.nodes[1:3], costs, at) == {
        "read_bytes": 2 * 6 * 4 * 4, "written_bytes": 2 * 6 * 6 * 4, "weight_bytes": 2 * 24 * 4,
        "flops": 2 * 2 * 6 * 4 * 6, "parameters": 24,
    }  # fmt: skip
    table = total(LM.nodes[:1], costs, at)
    assert (table["parameters"], table["weight_bytes"]) == (6 * 4, 6 * 4 * 4)
    assert total(LM.nodes[:1], costs, {"B": 2, "S": 60})["parameters"] == 400, "all rows at most"
    twice = total([LM.nodes[0]] * 2, costs, {"B": 1, "S": 60})
    assert (twice["parameters"], twice["weight_bytes"]) == (400, 2 * 240 * 4)
    for region in LM.nodes[3:]:
        assert [(w.name, share) for w, share in weights_read(region, at)] == [("w", 1.0)]
    assert list(weights_read(parse_graph("graph g(%x: f32[2]) { %y = neg %x return %y }").nodes[0],
                             at)) == []  # fmt: skip


def test_costs_add_up_by_kind() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)
    assert Cost() == Cost(0, 0, 0, 0)


def test_a_step_gives_every_symbol_a_size_inside_of_its_range() -> None:
    assert step_sizes(LM, 2, 3, 9) == {"B": 2, "P": 9, "S": 3}
    assert step_sizes(LM, 2, 3, 9, {"P": Range(0, 7), "Q": Range(1, 1)}) == {"B": 2, "P": 7, "S": 3}
    assert step_sizes(PAGED, 2, 3, 9) == {"B": 2, "M": 3, "N": 6, "S": 3}
    wide = parse_graph("graph g(%x: f32[B,C,L,Q]) { return %x }")
    assert step_sizes(wide, 2, 3, 9) == {"B": 2, "C": 12, "L": 1, "Q": 1}


# --- forms of a layer of experts ------------------------------------------------------------------

LAYER = ExpertLayer(experts=4, top_k=2, width=10, inner=6, itemsize=2, weights=1000)
FAST = ExpertKernels(rereads=True, tile=3, balance=1e9, launch=50)
SLOW = ExpertKernels(rereads=False, tile=3, balance=0.1, launch=50, kernels=2)


def test_both_forms_of_a_layer_of_experts_cost_what_their_kernels_move() -> None:
    assert LAYER.used(1) == 2
    assert LAYER.used(2) == 3
    assert LAYER.direct(2, FAST) == 4 * 1000 + 2 * 4 * 6 * 2
    assert LAYER.direct(2, ExpertKernels(False, 3, 1e9, 50)) == 3 * 1000 + 2 * 4 * 6 * 2
    assert LAYER.direct(2, SLOW) == 6 * 4 * 10 * 6 / 0.1
    moved = 3 * 1000 + 4 * (6 * 6 + 4 * 10) * 2
    assert LAYER.grouped(2, FAST) == moved + 4 * 50
    rows = max(4 + 3 * 2 / 2, 3 * 3)
    assert LAYER.grouped(2, SLOW) == max(moved, 6 * rows * 60 / 0.1) + 2 * 50
    assert LAYER.grouped(32, SLOW) == pytest.approx(6 * (64 + 4) * 60 / 0.1 + 100, rel=1e-4)


class Told(ExpertLayer):
    """Costs as a table: the direct form costs 5 for 6 tokens, the grouped one 3 for 12, else 1."""

    def direct(self, tokens: int, kernels: ExpertKernels) -> float:
        """By the table."""
        return 5.0 if tokens == 6 else 1.0

    def grouped(self, tokens: int, kernels: ExpertKernels) -> float:
        """By the table."""
        return 3.0 if tokens == 12 else 1.0


@pytest.mark.parametrize(
    ("low", "high", "worst"),
    [
        (3, 3, (1, 1)),
        (3, 5, (1, 1)),
        (3, 6, (5, 1)),
        (3, 7, (5, 1)),
        (3, 12, (5, 3)),
        (3, 90, (5, 3)),
        (0, 12, (1, 3)),
        (4, 6, (5, 1)),
        (4, 90, (1, 1)),
        (7, 6, (1, 1)),
    ],
)
def test_a_regret_is_the_worst_of_the_bounds_and_of_all_doublings_between(
    low: int, high: int, worst: tuple[float, float]
) -> None:
    assert regrets(Told(4, 2, 10, 6, 2, 1000), FAST, low, high) == worst


def test_the_form_of_the_smaller_regret_is_taken_and_of_a_tie_the_grouped_where_experts_are_shared(
) -> None:  # fmt: skip
    few, found = direct_pays(LAYER, FAST, 1, 1)
    assert found == regrets(LAYER, FAST, 1, 1)
    assert few is True
    assert found[0] == 1 < found[1]
    assert direct_pays(LAYER, FAST, 32, 32)[0] is False
    tied = ExpertKernels(rereads=False, tile=1, balance=1e-6, launch=0)
    assert max(regrets(LAYER, tied, 1, 3)) <= TIE
    assert [direct_pays(LAYER, tied, 1, high)[0] for high in (1, 2, 3)] == [True, True, False]


# --- parts of a model -----------------------------------------------------------------------------


def test_nodes_count_under_the_layer_that_they_or_their_first_part_lie_in() -> None:
    graph = parse_graph("""graph g(%x: f32[4]) {
      %a = neg %x loc "model.embed"
      %b = neg %a loc "model.layers.11.mlp"
      %c = fused %b {body=graph f(%x: f32[4]) {
        %p = neg %x loc "model.norm"
        %q = neg %p loc "model.layers.2.a"
        %r = neg %q loc "model.layers.3.a"
        return %r }} loc "model"
      %d = fused %c {body=graph f(%x: f32[4]) {
        %p = neg %x loc "model.layers.5"
        return %p }} loc "layers.4.mlp"
      %e = fused %d {body=graph f(%x: f32[4]) { %p = neg %x loc "model.norm" return %p }} loc "m"
      return %e
    }""")
    assert [home(n) for n in graph.nodes] == [
        "model.embed", "model.layers.11.mlp", "model.layers.2.a", "layers.4.mlp", "m",
    ]  # fmt: skip
    assert list(by_layer(graph)) == [
        "model.embed", "model.layers.11", "model.layers.2", "layers.4", "m",
    ]  # fmt: skip
    assert [layer_number(p) for p in ("layers.4", "a.layers.12.b", "layers.x", "xlayers.4")] == [
        4, 12, None, None,
    ]  # fmt: skip


def test_neighbouring_layers_of_one_key_are_one_run() -> None:
    parts = [("embed", 0), ("layers.0", 0), ("layers.1", 0), ("layers.2", 1), ("norm", 1),
             ("head", 1)]  # fmt: skip
    found = runs(parts, lambda p: p[0], lambda p: p[1])
    assert [[name for name, _ in run] for run in found] == [
        ["embed"], ["layers.0", "layers.1"], ["layers.2"], ["norm"], ["head"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "lane"),
    [
        ("%y = neg %x", COMPUTE),
        ("%y = all_gather %x {axis=0, ranks=2}", COLLECTIVE),
        ("%y = fused %x {body=graph b(%x: f32[4]) { %a = neg %x"
         " %b = all_gather %a {axis=0, ranks=2} return %b }}", COLLECTIVE),
        ("%y = fused %x {body=graph b(%x: f32[4]) { %a = neg %x return %a }}", COMPUTE),
    ],
)  # fmt: skip
def test_a_region_is_in_the_lane_of_its_collective(line: str, lane: str) -> None:
    assert lane_of(parse_graph(f"graph g(%x: f32[4]) {{ {line} return %y }}").nodes[0]) == lane


# --- the interface --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "shape", "row", "rows"),
    [
        (Storage.GROWN, (B, P, 5), (5,), 0),
        (Storage.CONTIGUOUS, (B, C), (), 0),
        (Storage.PAGED, (N, 64, 5), (5,), 64),
        (Storage.RING, (B, 12, 5), (5,), 12),
        (Storage.FIXED, (B, 3, 5), (3, 5), 0),
        (Storage.FIXED, (B,), (), 0),
        (Storage.GROWN, (B,), None, 0),
        (Storage.PAGED, (N,), None, 0),
        (Storage.PAGED, (N, P, 5), None, 0),
        (Storage.FIXED, (), None, 0),
    ],
)
def test_a_state_is_rows_of_its_input(
    storage: Storage, shape: tuple[Dim, ...], row: tuple[Dim, ...] | None, rows: int
) -> None:
    value = Value("s", TensorType(DType.bf16, shape))
    if row is None:
        with pytest.raises(ValueError, match=f"no {storage} state"):
            State.of(value, "t", storage)
        return
    state = State.of(value, "t", storage)
    assert state == State("s", "t", TensorType(DType.bf16, row), storage, rows)
    assert state.nbytes == 2 * torch.Size(row).numel()  # type: ignore[arg-type]
    assert storage.of_tokens == (storage not in (Storage.RING, Storage.FIXED))


def test_a_guard_admits_up_to_each_of_its_bounds_and_the_first_that_admits_is_taken() -> None:
    guard = Guard("decode", step=1, batch=4, context=100)
    assert guard.admits(1, 4, 100)
    assert not any(guard.admits(*s) for s in ((2, 4, 100), (1, 5, 100), (1, 4, 101)))
    assert Guard("prefill").admits(999, 999, 999)
    graph = parse_graph("graph g(%x: f32[4]) { return %x }")
    guards = (Guard("gone"), guard, Guard("extend", step=8))
    entries = {name: graph for name in ("decode", "extend", "prefill")}
    program = Program("p", entries, interface=Interface(guards=guards))
    assert program.choose_entry(1, 4, 100) == "decode"
    assert program.choose_entry(1, 5, 100) == "extend"
    assert program.choose_entry(9, 1, 1) == "prefill"
    assert program.interface.to_json() == {
        "mesh": {"ranks": 1, "parallel": ""},
        "guards": [["gone", {}], ["decode", {"step": 1, "batch": 4, "context": 100}],
                   ["extend", {"step": 8}]],
        "states": [],
    }  # fmt: skip
    assert (program.mesh, program.page) == (Mesh(1, ""), None)


def test_updates_are_states_of_the_storage_that_their_shapes_can_only_be() -> None:
    def found(graph: Any) -> list[tuple[str, str, Storage, int]]:
        return [(s.input, s.output, s.storage, s.rows) for s in updates(graph)]

    grown = "graph g(%p: f32[B,P,3], %n: f32[B,S,3], %l: i64[B]) { %d = append %p, %n, %l"
    grown += ' return %n as "n", %d as "now" updates %p }'
    assert found(parse_graph(grown)) == [("p", "now", Storage.GROWN, 0)]
    write = "graph g(%p: f32[ROWS,3], %n: f32[B,S,3], %l: i64[B]TABLE) { %d = cache_write %p, %n,"
    write += ' %l ARG return %d as "now" updates %p }'
    for rows, table, arg, states in (
        ("B,C", "", "", [("p", "now", Storage.CONTIGUOUS, 0)]),
        ("B,9", "", "", []),
        ("N,4", ", %t: i64[B,M]", ", %t", [("p", "now", Storage.PAGED, 4)]),
    ):
        text = write.replace("ROWS", rows).replace("TABLE", table).replace("ARG", arg)
        assert found(parse_graph(text)) == states
    both = parse_graph(
        "graph g(%p: f32[N,4,3], %n: f32[B,S,3], %l: i64[B], %t: i64[B,M], %q: f32[B,7,3])"
        " { %d = cache_write %p, %n, %l, %t %e = cache_write %q, %n, %l"
        ' return %e as "other" updates %q, %d as "now" updates %p }'
    )
    assert found(both) == [("p", "now", Storage.PAGED, 4)]


def test_an_interface_is_fitted_to_the_inputs_that_entries_have_now() -> None:
    row = TensorType(DType.f32, (3,))
    states = (State("p", "now", row, Storage.GROWN), State("gone", "x", row, Storage.GROWN),
              State("f", "y", row, Storage.FIXED))  # fmt: skip
    graph = parse_graph("graph g(%p: f32[B,9,5], %f: f32[B,7]) { return %p, %f }")
    fitted = Interface(states=states).fitted([graph], Storage.RING)
    assert fitted.states == (
        State("p", "now", TensorType(DType.f32, (5,)), Storage.RING, 9),
        State("f", "y", TensorType(DType.f32, (7,)), Storage.FIXED),
    )
    assert Interface(states=states[:1]).fitted([graph]).states[0].storage is Storage.GROWN
