"""The checker accepts what the planner makes and rejects whatever is corrupted."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from dsc.errors import VerificationError
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.lanes import COLLECTIVE, COMPUTE, LANES, LaneOf, lane_of
from dsc.ir.memory import MemoryPlan, Place
from dsc.ir.parser import parse_graph
from dsc.passes.plan_memory import _own_outputs, plan
from dsc.runtime.check_plan import check_plan
from tests.passes.test_structure import chain

RANGES = {"N": Range(1, 8)}
Corruption = Callable[[Graph, MemoryPlan, random.Random], MemoryPlan | None]


def dealt(node: Node) -> str:
    """One of three lanes, by the name of what a node makes."""
    return LANES[zlib.crc32(node.output.name.encode()) % len(LANES)]


def planned(seed: int, lanes: LaneOf = lane_of) -> tuple[Graph, MemoryPlan]:
    graph = _own_outputs(chain(seed, 60))
    return graph, plan(graph, RANGES, lanes=lanes)


@pytest.mark.parametrize("seed", range(40))
def test_accepts_what_is_planned(seed: int) -> None:
    check_plan(*planned(seed), RANGES)
    check_plan(*planned(seed, dealt), RANGES, dealt)


def test_one_lane_waits_for_nothing_and_lanes_cost_memory() -> None:
    for seed in range(20):
        (_, one), (_, three) = planned(seed), planned(seed, dealt)
        assert not one.waits
        assert three.waits
        assert one.size <= three.size
        assert one.lower_bound == three.lower_bound


def test_bytes_that_are_used_again_too_early_are_seen() -> None:
    """Places for one lane are wrong where lanes run at the same time, whatever they wait for."""
    rejected = 0
    for seed in range(20):
        (graph, one), (_, three) = planned(seed), planned(seed, dealt)
        try:
            check_plan(graph, replace(one, waits=three.waits), RANGES, dealt)
        except VerificationError:
            rejected += 1
    assert rejected == 20


def moved(found: MemoryPlan, name: str, place: Place | None) -> MemoryPlan:
    places = {k: v for k, v in found.places.items() if k != name}
    return replace(found, places=places if place is None else {**places, name: place})


def in_arena(graph: Graph, found: MemoryPlan) -> list[Value]:
    """Arena values that are read later than by the node after them, in order."""
    return [v for v in graph.values() if found.places[v.name].region == "arena"]


def drop(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    return moved(found, chooser.choice(list(graph.values())).name, None)


def misalign(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    value = chooser.choice(in_arena(graph, found))
    place = found.places[value.name]
    return moved(found, value.name, replace(place, offset=place.offset + chooser.randint(1, 63)))


def shrink_arena(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    tops = [
        found.places[v.name].offset + bounds(v.type.nbytes, RANGES).hi
        for v in in_arena(graph, found)
    ]
    return replace(found, size=chooser.randrange(0, max(tops)))


def outside(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    value = chooser.choice(in_arena(graph, found))
    offset = chooser.choice([-64, found.size, found.size + 64])
    return moved(found, value.name, Place("arena", "", offset))


def into_an_input(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    value = chooser.choice([n.output for n in graph.nodes if n.op != "reshape"])
    return moved(found, value.name, Place("input", "x"))


def over_an_operand(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    """A result over what its own node reads."""
    pairs = [
        (n.output, x)
        for n in graph.nodes
        for x in n.operands
        if n.op != "reshape" and found.places[x.name].region == "arena"
    ]
    value, operand = chooser.choice(pairs)
    return moved(found, value.name, found.places[operand.name])


def over_a_live_value(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    """A result over a value that is written before it and read after it."""
    at = {v.name: i for i, n in enumerate(graph.nodes) for v in n.outputs}
    reads: dict[str, list[int]] = {}
    for i, n in enumerate(graph.nodes):
        for x in n.operands:
            reads.setdefault(x.name, []).append(i)
    pairs = [
        (n.output, v)
        for i, n in enumerate(graph.nodes)
        if n.op != "reshape" and found.places[n.output.name].region == "arena"
        for v in in_arena(graph, found)
        if at[v.name] < i and any(r > i for r in reads.get(v.name, []))
    ]
    if not pairs:
        return None
    value, victim = chooser.choice(pairs)
    return moved(found, value.name, found.places[victim.name])


def drop_a_wait(graph: Graph, found: MemoryPlan, chooser: random.Random) -> MemoryPlan | None:
    """A step that starts without one of those that it waits for."""
    if not found.waits:
        return None
    position = chooser.choice(sorted(found.waits))
    others = list(found.waits[position])
    others.remove(chooser.choice(others))
    return replace(found, waits={**found.waits, position: tuple(others)})


def wait_for_the_future(
    graph: Graph, found: MemoryPlan, chooser: random.Random
) -> MemoryPlan | None:
    """A step that waits for a later one, or for itself: nothing would ever run."""
    position = chooser.choice([i for i, n in enumerate(graph.nodes) if n.op != "reshape"])
    later = chooser.randrange(position, len(graph.nodes) + 1)
    return replace(found, waits={**found.waits, position: (later,)})


CORRUPTIONS: list[Corruption] = [
    drop, misalign, shrink_arena, outside, into_an_input, over_an_operand, over_a_live_value,
    drop_a_wait, wait_for_the_future,
]  # fmt: skip


def test_rejects_a_thousand_corrupted_plans() -> None:
    chooser = random.Random(0)
    rejected = tried = 0
    for seed in range(50):
        lanes = dealt if seed % 2 else lane_of
        graph, found = planned(seed, lanes)
        for _ in range(3):
            for corrupt in CORRUPTIONS:
                wrong = corrupt(graph, found, chooser)
                if wrong is None or wrong == found:
                    continue
                tried += 1
                try:
                    check_plan(graph, wrong, RANGES, lanes)
                except VerificationError:
                    rejected += 1
                else:
                    pytest.fail(f"{corrupt.__name__} of seed {seed} was accepted")
    assert rejected == tried >= 1000


IN_FLIGHT = """graph main(%x: f32[8], %w: f32[8]) {
  %a = exp %x : f32[8]
  %s = all_reduce %a {ranks=1} : f32[8]
  %b = exp %w : f32[8]
  %c = neg %b : f32[8]
  %d = neg %c : f32[8]
  %e = add %d, %s : f32[8]
  return %e
}"""


def test_what_a_collective_reads_is_not_written_over_while_it_is_in_flight() -> None:
    graph = parse_graph(IN_FLIGHT)
    found = plan(graph, {})
    assert dict(found.waits) == {1: (0,), 5: (1,)}
    check_plan(graph, found, {})
    for busy in ("a", "s"):
        for value in ("b", "c", "d"):
            assert found.places[value].offset != found.places[busy].offset
            wrong = moved(found, value, found.places[busy])
            with pytest.raises(VerificationError, match=r"in use|overwritten|nothing says"):
                check_plan(graph, wrong, {})
    alone = plan(graph, {}, lanes=lambda node: COMPUTE)
    assert alone.size == alone.lower_bound < found.size


def test_storage_that_is_updated_in_place_waits_for_its_readers() -> None:
    text = """graph main(%past: f32[1,4,2], %new: f32[1,1,2], %n: i64[1]) {
      %s = all_reduce %past {ranks=1} : f32[1,4,2]
      %c = cache_write %past, %new, %n : f32[1,4,2]
      %t = all_reduce %c {ranks=1} : f32[1,4,2]
      %y = add %s, %t : f32[1,4,2]
      return %y, %c as "present" updates %past
    }"""
    graph = parse_graph(text)
    found = plan(graph, {})
    assert dict(found.waits) == {1: (0,), 2: (1,), 3: (2,)}
    check_plan(graph, found, {})
    assert lane_of(graph.nodes[0]) == COLLECTIVE
    for position in found.waits:
        wrong = replace(found, waits={k: w for k, w in found.waits.items() if k != position})
        with pytest.raises(VerificationError, match=r"still be in use|nothing says"):
            check_plan(graph, wrong, {})
