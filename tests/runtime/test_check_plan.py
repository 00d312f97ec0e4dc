"""The checker accepts what the planner makes and rejects whatever is corrupted."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dsc.errors import VerificationError
from dsc.ir.dims import Range, bounds, symbol
from dsc.ir.graph import Graph, Node
from dsc.ir.lanes import COLLECTIVE, COMPUTE, LANES, LaneOf, lane_of
from dsc.ir.parser import parse_graph
from dsc.passes.own_outputs import own_outputs
from dsc.runtime.check_plan import check_plan
from dsc.runtime.nodes import draft_nodes
from dsc.runtime.placing import place
from dsc.runtime.plan import (
    ARENA,
    READ,
    SCRATCH,
    WRITE,
    Buffer,
    Draft,
    EntryPlan,
    Launch,
    Ref,
    lifetimes,
)
from tests.passes.test_structure import chain

RANGES = {"N": Range(1, 8)}
Corruption = Callable[[EntryPlan, random.Random], EntryPlan | None]


def dealt(node: Node) -> str:
    """One of three lanes, by the name of what a node makes."""
    return LANES[zlib.crc32(node.output.name.encode()) % len(LANES)]


def drafted(seed: int, lanes: LaneOf = lane_of) -> Draft:
    """A random graph's launches; some need scratch, of a size that grows with N."""
    chooser = random.Random(seed)
    graph = own_outputs(chain(seed, 60))
    draft = draft_nodes(graph, lanes)
    size = graph.inputs[0].type.nbytes
    for position, launch in enumerate(draft.launches):
        if chooser.random() < 0.2:
            needed = size * chooser.randint(1, 5)
            scratch = Ref(draft.add(ARENA, "scratch", needed), SCRATCH, needed)
            arguments = (*launch.arguments, scratch)
            draft.launches[position] = replace(launch, arguments=arguments)
    return draft


def planned(seed: int, lanes: LaneOf = lane_of) -> EntryPlan:
    return place(drafted(seed, lanes), RANGES)


def plan_of(graph: Graph, lanes: LaneOf = lane_of) -> EntryPlan:
    return place(draft_nodes(graph, lanes), {})


def span(plan: EntryPlan, number: int) -> tuple[int, int]:
    buffer = plan.buffers[number]
    return buffer.offset, buffer.offset + bounds(buffer.size, RANGES).hi


@pytest.mark.parametrize("seed", range(40))
def test_accepts_what_is_planned(seed: int) -> None:
    check_plan(planned(seed), RANGES)
    check_plan(planned(seed, dealt), RANGES)


@pytest.mark.parametrize("seed", range(40))
def test_no_two_live_buffers_overlap_and_no_arena_is_much_larger_than_it_must_be(seed: int) -> None:
    plan = planned(seed)
    lives = lifetimes(plan.buffers, plan.launches)
    assert any(plan.buffers[n].name == "scratch" for n in lives)
    live = [
        sum(span(plan, n)[1] - span(plan, n)[0] for n, (a, b) in lives.items() if a <= at <= b)
        for at in range(len(plan.launches))
    ]
    assert plan.lower_bound == max(live), "sizes here are whole multiples of the alignment"
    assert max(span(plan, n)[1] for n in lives) == plan.arena_bytes
    assert plan.arena_bytes <= 1.05 * plan.lower_bound
    for one, (first, last) in lives.items():
        for other, (start, end) in lives.items():
            if one < other and first <= end and start <= last:
                (a, b), (c, d) = span(plan, one), span(plan, other)
                assert b <= c or d <= a


def test_without_reuse_no_two_buffers_overlap() -> None:
    plan = place(drafted(3), RANGES, reuse=False)
    spans = sorted(span(plan, n) for n in lifetimes(plan.buffers, plan.launches))
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert plan.arena_bytes > 2 * planned(3).arena_bytes


def test_one_lane_waits_for_nothing_and_lanes_cost_memory() -> None:
    for seed in range(20):
        one, three = planned(seed), planned(seed, dealt)
        assert not any(x.waits for x in one.launches)
        assert any(x.waits for x in three.launches)
        assert one.arena_bytes <= three.arena_bytes
        assert one.lower_bound == three.lower_bound


def test_bytes_that_are_used_again_too_early_are_seen() -> None:
    """Places for one lane are wrong where lanes run at the same time, whatever they wait for."""
    rejected = 0
    for seed in range(20):
        one, three = planned(seed), planned(seed, dealt)
        try:
            check_plan(replace(three, buffers=one.buffers), RANGES)
        except VerificationError:
            rejected += 1
    assert rejected == 20


def with_buffer(plan: EntryPlan, number: int, **changes: Any) -> EntryPlan:
    buffers = list(plan.buffers)
    buffers[number] = replace(buffers[number], **changes)
    return replace(plan, buffers=tuple(buffers))


def with_launch(plan: EntryPlan, position: int, **changes: Any) -> EntryPlan:
    launches = list(plan.launches)
    launches[position] = replace(launches[position], **changes)
    return replace(plan, launches=tuple(launches))


def with_ref(plan: EntryPlan, chooser: random.Random, of: str, /, **changes: Any) -> EntryPlan:
    """One of the refs of this access, changed."""
    places = [
        (at, i)
        for at, launch in enumerate(plan.launches)
        for i, a in enumerate(launch.arguments)
        if isinstance(a, Ref) and a.access == of
    ]
    at, i = chooser.choice(places)
    arguments: list[Any] = list(plan.launches[at].arguments)
    arguments[i] = replace(arguments[i], **changes)
    return with_launch(plan, at, arguments=tuple(arguments))


def in_arena(plan: EntryPlan) -> list[int]:
    return list(lifetimes(plan.buffers, plan.launches))


def misalign(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    number = chooser.choice(in_arena(plan))
    return with_buffer(plan, number, offset=plan.buffers[number].offset + chooser.randint(1, 63))


def shrink_arena(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    return replace(plan, arena_bytes=chooser.randrange(0, plan.arena_bytes))


def outside(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    offset = chooser.choice([-64, plan.arena_bytes, plan.arena_bytes + 64])
    return with_buffer(plan, chooser.choice(in_arena(plan)), offset=offset)


def elsewhere(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    region = chooser.choice(["input", "weight", "output", "status", "heap"])
    return with_buffer(plan, chooser.choice(in_arena(plan)), region=region)


def smaller(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    """A buffer that is smaller than what launches touch of it."""
    number = chooser.choice(in_arena(plan))
    return with_buffer(plan, number, size=chooser.randrange(0, 16))


def over_a_live_buffer(plan: EntryPlan, chooser: random.Random) -> EntryPlan | None:
    """A buffer over one that is alive with it."""
    lives = lifetimes(plan.buffers, plan.launches)
    pairs = [
        (one, other)
        for one, (first, last) in lives.items()
        for other, (start, end) in lives.items()
        if one != other and first <= end and start <= last
    ]
    one, other = chooser.choice(pairs)
    return with_buffer(plan, one, offset=plan.buffers[other].offset)


def over_an_operand(plan: EntryPlan, chooser: random.Random) -> EntryPlan | None:
    """A result that one launch writes into what it reads."""
    reading = [
        (at, next(r.buffer for r in x.refs if r.access == READ))
        for at, x in enumerate(plan.launches)
    ]
    at, source = chooser.choice(reading)
    arguments = tuple(
        replace(a, buffer=source) if isinstance(a, Ref) and a.access == WRITE else a
        for a in plan.launches[at].arguments
    )
    return with_launch(plan, at, arguments=arguments)


def read_past_the_end(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    return with_ref(plan, chooser, READ, offset=chooser.choice([-4, 4, 256]))


def read_nothing_known(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    return with_ref(plan, chooser, READ, buffer=chooser.choice([-1, len(plan.buffers)]))


def unknown_access(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    return with_ref(plan, chooser, WRITE, access="x")


def scratch_elsewhere(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    return with_ref(plan, chooser, SCRATCH, buffer=plan.inputs[0].buffer)


def drop_a_writer(plan: EntryPlan, chooser: random.Random) -> EntryPlan | None:
    """A launch that makes what others read, gone."""
    read = {r.buffer for x in plan.launches for r in x.refs if r.access == READ}
    made = [
        at
        for at, x in enumerate(plan.launches)
        if any(r.access == WRITE and r.buffer in read for r in x.refs)
    ]
    at = chooser.choice(made)
    launches = [
        replace(x, waits=()) for i, x in enumerate(plan.launches) if i != at
    ]  # waits are positions
    return replace(plan, launches=tuple(launches))


def before_its_operands(plan: EntryPlan, chooser: random.Random) -> EntryPlan | None:
    """A launch that comes before the one that makes what it reads."""
    made = {r.buffer: at for at, x in enumerate(plan.launches) for r in x.refs if r.access == WRITE}
    late = [
        (made[r.buffer], at)
        for at, x in enumerate(plan.launches)
        for r in x.refs
        if r.access == READ and made.get(r.buffer, at) < at
    ]
    first, second = chooser.choice(late)
    launches = [replace(x, waits=()) for x in plan.launches]
    launches.insert(first, launches.pop(second))
    return replace(plan, launches=tuple(launches))


def no_output(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    port = chooser.choice(plan.outputs)
    wrong = replace(port, buffer=chooser.choice(in_arena(plan)))
    return replace(plan, outputs=tuple(wrong if p is port else p for p in plan.outputs))


def drop_a_wait(plan: EntryPlan, chooser: random.Random) -> EntryPlan | None:
    """A launch that starts without one of those that it waits for."""
    waiting = [at for at, x in enumerate(plan.launches) if x.waits]
    if not waiting:
        return None
    at = chooser.choice(waiting)
    others = list(plan.launches[at].waits)
    others.remove(chooser.choice(others))
    return with_launch(plan, at, waits=tuple(others))


def wait_for_the_future(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    """A launch that waits for a later one, or for itself: nothing would ever run."""
    at = chooser.randrange(len(plan.launches))
    return with_launch(plan, at, waits=(chooser.randrange(at, len(plan.launches) + 1),))


def of_unknown_size(plan: EntryPlan, chooser: random.Random) -> EntryPlan:
    """A buffer as large as a symbol that the program does not have."""
    at = chooser.randrange(len(plan.buffers))
    buffers = list(plan.buffers)
    buffers[at] = replace(buffers[at], size=symbol("nobody"))
    return replace(plan, buffers=tuple(buffers))


CORRUPTIONS: list[Corruption] = [
    misalign, shrink_arena, outside, elsewhere, smaller, over_a_live_buffer, over_an_operand,
    read_past_the_end, read_nothing_known, unknown_access, scratch_elsewhere, drop_a_writer,
    before_its_operands, no_output, drop_a_wait, wait_for_the_future,
    of_unknown_size,
]  # fmt: skip


def test_rejects_a_thousand_corrupted_plans() -> None:
    chooser = random.Random(0)
    rejected = tried = 0
    for seed in range(36):
        plan = planned(seed, dealt if seed % 2 else lane_of)
        for _ in range(2):
            for corrupt in CORRUPTIONS:
                wrong = corrupt(plan, chooser)
                if wrong is None or wrong == plan:
                    continue
                tried += 1
                try:
                    check_plan(wrong, RANGES)
                except VerificationError:
                    rejected += 1
                else:
                    pytest.fail(f"{corrupt.__name__} of seed {seed} was accepted")
    assert rejected == tried >= 1000


def test_a_buffer_that_lost_bytes_is_not_written_in_parts() -> None:
    """A kernel may fill a buffer piece by piece; between the pieces nothing else may lie there."""
    parts = [Ref(1, WRITE, 64), Ref(1, WRITE, 64, 64)]
    other = Ref(2, WRITE, 64)
    buffers = [Buffer("input", "x", 64), Buffer(ARENA, "a", 128, 0), Buffer(ARENA, "b", 64, 64)]
    launches = [Launch("k", (ref,)) for ref in (parts[0], other, parts[1])]
    plan = EntryPlan((), (), tuple(buffers[1:]), (), 192, 0)
    moved = [replace(a, buffer=a.buffer - 1) for x in launches for a in x.refs]
    made = tuple(Launch("k", (ref,)) for ref in moved)
    with pytest.raises(VerificationError, match="lost bytes"):
        check_plan(replace(plan, launches=made), {})
    apart = replace(plan.buffers[1], offset=128)
    check_plan(replace(plan, launches=made, buffers=(plan.buffers[0], apart)), {})


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
    plan = plan_of(parse_graph(IN_FLIGHT))
    assert {at: x.waits for at, x in enumerate(plan.launches) if x.waits} == {1: (0,), 5: (1,)}
    check_plan(plan, {})
    numbers = {buffer.name: n for n, buffer in enumerate(plan.buffers)}
    for busy in ("a", "s"):
        for value in ("b", "c", "d"):
            there = plan.buffers[numbers[busy]].offset
            assert plan.buffers[numbers[value]].offset != there
            with pytest.raises(VerificationError, match=r"in use|overwritten|written by then"):
                check_plan(with_buffer(plan, numbers[value], offset=there), {})
    alone = plan_of(parse_graph(IN_FLIGHT), lambda node: COMPUTE)
    assert alone.arena_bytes == alone.lower_bound < plan.arena_bytes


def test_storage_that_is_updated_in_place_waits_for_its_readers() -> None:
    text = """graph main(%past: f32[1,4,2], %new: f32[1,1,2], %n: i64[1]) {
      %s = all_reduce %past {ranks=1} : f32[1,4,2]
      %c = cache_write %past, %new, %n : f32[1,4,2]
      %t = all_reduce %c {ranks=1} : f32[1,4,2]
      %y = add %s, %t : f32[1,4,2]
      return %y, %c as "present" updates %past
    }"""
    graph = parse_graph(text)
    plan = plan_of(graph)
    assert [x.waits for x in plan.launches] == [(), (0,), (1,), (2,)]
    check_plan(plan, {})
    assert lane_of(graph.nodes[0]) == COLLECTIVE
    for at in (1, 2, 3):
        with pytest.raises(VerificationError, match=r"may be in use|written by then"):
            check_plan(with_launch(plan, at, waits=()), {})
