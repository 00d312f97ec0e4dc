"""The checker accepts what the planner makes and rejects whatever is corrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from dsc.errors import VerificationError
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Graph, Value
from dsc.ir.memory import MemoryPlan, Place
from dsc.passes.plan_memory import _own_outputs, plan
from dsc.runtime.check_plan import check_plan
from tests.passes.test_structure import chain

RANGES = {"N": Range(1, 8)}
Corruption = Callable[[Graph, MemoryPlan, random.Random], MemoryPlan | None]


def planned(seed: int) -> tuple[Graph, MemoryPlan]:
    graph = _own_outputs(chain(seed, 60))
    return graph, plan(graph, RANGES)


@pytest.mark.parametrize("seed", range(40))
def test_accepts_what_is_planned(seed: int) -> None:
    check_plan(*planned(seed), RANGES)


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


CORRUPTIONS: list[Corruption] = [
    drop, misalign, shrink_arena, outside, into_an_input, over_an_operand, over_a_live_value,
]  # fmt: skip


def test_rejects_a_thousand_corrupted_plans() -> None:
    chooser = random.Random(0)
    rejected = tried = 0
    for seed in range(50):
        graph, found = planned(seed)
        for _ in range(3):
            for corrupt in CORRUPTIONS:
                wrong = corrupt(graph, found, chooser)
                if wrong is None or wrong == found:
                    continue
                tried += 1
                try:
                    check_plan(graph, wrong, RANGES)
                except VerificationError:
                    rejected += 1
                else:
                    pytest.fail(f"{corrupt.__name__} of seed {seed} was accepted")
    assert rejected == tried >= 1000
