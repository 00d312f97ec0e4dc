"""Plans by hand: what a lowering drafts, where buffers are placed, and each rule of the checker."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import pytest

from dsc.errors import VerificationError
from dsc.ir.dims import Range, symbol
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.types import DType, TensorType
from dsc.runtime import placing
from dsc.runtime.check_plan import _Arena, check_plan
from dsc.runtime.nodes import Values, draft_nodes, plan_nodes, whole_entry
from dsc.runtime.placing import place
from dsc.runtime.plan import (
    ARENA,
    INPUT,
    OUTPUT,
    READ,
    SCRATCH,
    STATUS,
    UPDATE,
    WEIGHT,
    WRITE,
    Buffer,
    Draft,
    EntryPlan,
    Launch,
    Plan,
    Port,
    Ref,
    lifetimes,
    live_at,
)

N = symbol("N")
RANGES = {"N": Range(1, 4)}
ROW, ROWS = TensorType(DType.f32, (16,)), TensorType(DType.f32, (N, 16))


def launch(*refs: tuple[int, str], lane: str = "compute", waits: tuple[int, ...] = ()) -> Launch:
    """A launch over whole buffers of 64 bytes."""
    return Launch("k", tuple(Ref(b, a, 64) for b, a in refs), lane=lane, waits=waits)


# Buffers: 0 input x, 1 output y, 2 weight w, 3 and 4 in the arena, 5 status.
BUFFERS = (
    Buffer(INPUT, "x", 64), Buffer(OUTPUT, "y", 64), Buffer(WEIGHT, "w", 64),
    Buffer(ARENA, "a", 64, 0), Buffer(ARENA, "b", 64, 64), Buffer(STATUS, "status", 8),
)  # fmt: skip
LAUNCHES = (
    launch((0, READ), (2, READ), (3, WRITE)),
    launch((3, READ), (4, WRITE)),
    launch((4, READ), (1, WRITE)),
)
PLAN = EntryPlan((Port("x", ROW, 0),), (Port("y", ROW, 1),), BUFFERS, LAUNCHES, 128, 128)


def buffer(number: int, **changes: Any) -> EntryPlan:
    each = [replace(b, **changes) if n == number else b for n, b in enumerate(BUFFERS)]
    return replace(PLAN, buffers=tuple(each))


def launches(*each: Launch) -> EntryPlan:
    return replace(PLAN, launches=each)


def ref(position: int, number: int, **changes: Any) -> EntryPlan:
    refs = list(LAUNCHES[position].refs)
    refs[number] = replace(refs[number], **changes)
    each = list(LAUNCHES)
    each[position] = replace(each[position], arguments=tuple(refs))
    return launches(*each)


FIRST, SECOND, THIRD = LAUNCHES
OTHER = "collective"


def in_two_lanes(*waits: int) -> EntryPlan:
    return launches(FIRST, replace(SECOND, lane=OTHER, waits=waits), replace(THIRD, waits=(1,)))


ACCEPTED = {
    "as it is": PLAN,
    "a buffer at the end of the arena": replace(buffer(4, offset=192), arena_bytes=256),
    "a part of a buffer": ref(1, 0, offset=32, size=32),
    "its last byte": ref(1, 0, offset=63, size=1),
    "a buffer again, where its bytes are free": launches(
        launch((0, READ), (3, WRITE)), launch((3, READ), (1, WRITE)), launch((0, READ), (4, WRITE))
    ),
    "bytes of a dead buffer": replace(
        buffer(4, offset=0), launches=(FIRST, launch((3, READ), (1, WRITE)), launch((4, WRITE)))
    ),
    "an update of what was written": launches(FIRST, launch((3, UPDATE), (1, WRITE))),
    "an update of an input": launches(launch((0, UPDATE), (1, WRITE))),
    "scratch": launches(launch((0, READ), (1, WRITE), (3, SCRATCH), (4, SCRATCH))),
    "two results": launches(launch((0, READ), (1, WRITE), (3, WRITE))),
    "an output that is an input": replace(
        launches(launch((0, UPDATE), (1, WRITE))),
        outputs=(Port("y", ROW, 1), Port("z", ROW, 0)),
    ),
    "a status": replace(
        buffer(5),
        launches=(Launch("k", (Ref(5, WRITE, 8),)), Launch("k", (Ref(5, WRITE, 8),)), *LAUNCHES),
    ),
    "a lane that waits": in_two_lanes(0),
    "what was waited for by another": launches(
        FIRST,
        replace(SECOND, lane=OTHER, waits=(0,)),
        launch((4, READ), (1, WRITE), lane="copy", waits=(1,)),
        launch((3, WRITE), lane="copy"),
    ),
    "places of an allocator": replace(
        buffer(4, offset=7), allocator="torch", arena_bytes=0
    ),
    "nothing written of no bytes": replace(
        buffer(1, size=0), outputs=(Port("y", TensorType(DType.f32, (0,)), 1),),
        launches=LAUNCHES[:2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_right_is_accepted(name: str) -> None:
    check_plan(ACCEPTED[name], RANGES, "main")
    assert ACCEPTED[name].launches


WRONG = {
    "b is in the unknown region 'heap'": buffer(4, region="heap"),
    "status of 9 bytes is no status": buffer(5, size=9),
    "b lies at 65..129 of an arena of 128 bytes in steps of 64": buffer(4, offset=65),
    "b lies at 128..192 of an arena of 128 bytes in steps of 64": buffer(4, offset=128),
    "b lies at -64..0 of an arena of 128 bytes in steps of 64": buffer(4, offset=-64),
    "b lies at 64..129 of an arena of 128 bytes in steps of 64": buffer(4, size=65),
    "x is not in a buffer of its own": replace(PLAN, inputs=(Port("x", ROW, 1),)),
    "y is not in a buffer of its own": replace(PLAN, outputs=(Port("y", ROW, 3),)),
    "z is not in a buffer of its own": replace(PLAN, outputs=(Port("z", ROW, 6),)),
    "v is not in a buffer of its own": replace(PLAN, outputs=(Port("v", ROW, -1),)),
    "x is not all of its buffer": buffer(0, size=60),
    "y is not all of its buffer": buffer(1, size=68),
    "two inputs or outputs are one buffer": replace(
        PLAN, outputs=(Port("y", ROW, 1), Port("z", ROW, 1))
    ),
    "input x is none of the entry's": replace(PLAN, inputs=()),
    "output y is none of the entry's": replace(PLAN, outputs=()),
    "the unknown lane 'fast'": launches(replace(FIRST, lane="fast"), SECOND, THIRD),
    "launch 1 waits for 1, which does not come before it": in_two_lanes(1),
    "launch 1 waits for -1, which does not come before it": in_two_lanes(-1),
    "nobody writes the output y": launches(FIRST, SECOND),
    "a launch does 'x' to buffer 3": ref(0, 2, access="x"),
    "a launch does 'r' to buffer 6": ref(0, 0, buffer=6),
    "a launch does 'r' to buffer -1": ref(0, 0, buffer=-1),
    "bytes 1..65 of a, which has 64": ref(1, 0, offset=1),
    "bytes -1..63 of a, which has 64": ref(1, 0, offset=-1),
    "bytes 0..65 of a, which has 64": ref(1, 0, size=65),
    "scratch in input x": ref(0, 0, access=SCRATCH),
    "w is a weight, and written": ref(0, 1, access=WRITE),
    "a is read before it is written": launches(SECOND, THIRD),
    "b is read before it is written": ref(1, 0, buffer=4, access=UPDATE),
    "x is written and read by one launch": launches(launch((0, READ), (0, WRITE)), *LAUNCHES),
    "b lies over what one launch touches": replace(
        buffer(4, offset=0),
        launches=(launch((0, READ), (4, SCRATCH), (3, WRITE)), launch((3, READ), (1, WRITE))),
    ),
    "a lies over what one launch touches": replace(
        buffer(4, offset=0), launches=(FIRST, SECOND, THIRD)
    ),
    "a is overwritten before it is read": replace(
        buffer(4, offset=0),
        launches=(FIRST, launch((0, READ), (4, WRITE)), launch((3, READ), (1, WRITE))),
    ),
    "a has lost bytes before its last write": replace(
        buffer(4, offset=0),
        launches=(FIRST, launch((4, WRITE)), launch((3, WRITE)), launch((0, READ), (1, WRITE))),
    ),
    "nothing says that a is written by then": in_two_lanes(),
    "a is written over bytes that may be in use": launches(
        FIRST, replace(SECOND, lane=OTHER, waits=(0,)), launch((3, WRITE))
    ),
    "b is written over bytes that may be in use": replace(
        buffer(4, offset=0),
        launches=(FIRST, launch((3, READ), (1, WRITE)), launch((4, WRITE), lane=OTHER, waits=(0,))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told(words: str) -> None:
    with pytest.raises(VerificationError) as told:
        check_plan(WRONG[words], RANGES, "main")
    assert told.value.what == f"the launch plan is wrong: {words}"
    assert told.value.where in ("entry main", "k")


def test_a_launch_is_told_by_its_place_in_the_model_and_a_buffer_without_name_by_its_number() -> (
    None
):
    wrong = replace(buffer(3, name=""), launches=(replace(SECOND, loc="model.norm"),))
    with pytest.raises(VerificationError) as told:
        check_plan(wrong, {})
    assert told.value.what == "the launch plan is wrong: buffer 3 is read before it is written"
    assert told.value.where == "model.norm"


def test_sizes_hold_over_the_whole_range_of_symbols() -> None:
    """The largest end of a reference and its smallest beginning count."""
    port = Port("x", ROWS, 0)
    whole = EntryPlan(
        (port,), (Port("y", ROWS, 1),),
        (Buffer(INPUT, "x", 64 * N), Buffer(OUTPUT, "y", 64 * N)),
        (Launch("k", (Ref(0, READ, 64, 64 * N - 64), Ref(1, WRITE, 64 * N))),), 0, 0,
    )  # fmt: skip
    check_plan(whole, RANGES)
    for reference, words in (
        (Ref(0, READ, 65, 64 * N - 64), "bytes 64*N-64..64*N+1 of x, which has 64*N"),
        (Ref(0, READ, 64, 64 * N - 128), "bytes 64*N-128..64*N-64 of x, which has 64*N"),
    ):
        wrong = replace(whole, launches=(Launch("k", (reference, Ref(1, WRITE, 64 * N))),))
        with pytest.raises(VerificationError) as told:
            check_plan(wrong, RANGES)
        assert told.value.what == f"the launch plan is wrong: {words}"
    with pytest.raises(VerificationError, match="nothing says how large 'N' may be") as told:
        check_plan(whole, {}, "main")
    assert told.value.where == "entry main"


@pytest.mark.parametrize("seed", range(8))
def test_an_arena_remembers_who_last_took_each_byte(seed: int) -> None:
    """Against a list of bytes."""
    draw = random.Random(seed)
    arena, bytes_of = _Arena(), [-1] * 24
    for owner in range(60):
        start = draw.randrange(24)
        end = draw.randint(start + 1, 24)
        if draw.random() < 0.6:
            arena.write(start, end, owner)
            bytes_of[start:end] = [owner] * (end - start)
        held = bytes_of[start:end]
        assert arena.owners(start, end) == set(held) - {-1}
        for asked in {owner, *held[:2]} - {-1}:
            assert arena.owns(start, end, asked) == all(b == asked for b in held)
    spans = arena.spans
    assert all(a[0] < a[1] <= b[0] for a, b in pairwise(spans))


# --- placing --------------------------------------------------------------------------------------


def draft(*blocks: tuple[int, int, int], lanes: str = "") -> Draft:
    """Buffers of a size that a launch writes and a later one reads last; `lanes` are launches'."""
    found = Draft()
    count = max(last for _, _, last in blocks) + 1
    arguments: list[list[Ref]] = [[] for _ in range(count)]
    for size, first, last in blocks:
        number = found.add(ARENA, f"b{len(found.buffers)}", size)
        arguments[first].append(Ref(number, WRITE if last > first else SCRATCH, size))
        if last > first:
            arguments[last].append(Ref(number, READ, size))
    names = {"c": "compute", "o": OTHER, "p": "copy"}
    for at, each in enumerate(arguments):
        lane = names[lanes[at]] if lanes else "compute"
        found.launches.append(Launch("k", tuple(each), lane=lane))
    return found


@pytest.mark.parametrize(
    ("blocks", "offsets", "total"),
    [
        ([(64, 0, 1)], [0], 64),
        ([(1, 0, 1)], [0], 64),
        ([(65, 0, 1), (64, 0, 1)], [0, 128], 192),
        ([(64, 0, 1), (128, 1, 2)], [128, 0], 192),
        ([(64, 0, 1), (128, 2, 3)], [0, 0], 128),
        ([(64, 0, 1), (64, 1, 2), (64, 2, 3)], [0, 64, 0], 128),
        ([(256, 0, 0), (64, 0, 1), (192, 1, 1)], [0, 256, 0], 320),
        ([(0, 0, 1), (64, 1, 2)], [0, 0], 64),
    ],
)
def test_a_buffer_lies_at_the_lowest_gap_among_what_lives_with_it(
    blocks: list[tuple[int, int, int]], offsets: list[int], total: int
) -> None:
    plan = place(draft(*blocks), {})
    assert ([b.offset for b in plan.buffers], plan.arena_bytes) == (offsets, total)


def least(blocks: list[tuple[int, int, int]]) -> int:
    """The smallest arena that any order of placing gives."""
    made = [placing._Block(n, size, a, b) for n, (size, a, b) in enumerate(blocks)]
    return min(placing._assign(order, [], True)[1] for order in permutations(made))


@pytest.mark.parametrize("seed", range(12))
def test_few_buffers_are_placed_as_well_as_any_order_places_them(seed: int) -> None:
    draw = random.Random(seed)
    blocks = []
    for _ in range(6):
        first = draw.randrange(6)
        blocks.append((64 * draw.randint(1, 6), first, draw.randint(first, 6)))
    assert place(draft(*blocks), {}).arena_bytes == least(blocks)


@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 1, 2), (4, 1, 2), (4, 4, 6), (6, 0, 4), (3, 4, 5), (6, 3, 3), (3, 1, 4)],
        [(5, 4, 6), (4, 3, 4), (4, 0, 3), (5, 1, 4), (6, 2, 2), (6, 5, 5), (2, 5, 5)],
        [(6, 1, 6), (3, 4, 4), (4, 0, 4), (4, 3, 6), (6, 5, 6), (6, 4, 6), (2, 5, 5)],
    ],
)
def test_what_lay_too_high_is_placed_first_in_other_tries(
    sizes: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the orders alone none reaches the bound here, and one more try is not enough."""
    blocks = draft(*((64 * size, first, last) for size, first, last in sizes))
    plan = place(blocks, {})
    assert plan.arena_bytes == plan.lower_bound
    monkeypatch.setattr(placing, "ROUNDS", 1)
    assert place(blocks, {}).arena_bytes > plan.lower_bound


def test_sizes_are_those_at_the_upper_bounds_rounded_up() -> None:
    found = Draft()
    one, two = found.add(ARENA, "one", 20 * N), found.add(ARENA, "two", 8)
    found.launches += [
        Launch("k", (Ref(one, WRITE, 20 * N), Ref(two, WRITE, 8))),
        Launch("k", (Ref(one, READ, 20 * N), Ref(two, READ, 8))),
    ]
    plan = place(found, RANGES)
    assert (plan.arena_bytes, plan.lower_bound, plan.buffers[two].offset) == (192, 192, 128)


def test_without_reuse_everything_has_its_own_place() -> None:
    blocks = [(64, 0, 0), (128, 1, 1), (64, 2, 2)]
    plan = place(draft(*blocks), {}, reuse=False)
    assert [b.offset for b in plan.buffers] == [128, 0, 192]
    assert (plan.arena_bytes, plan.lower_bound) == (256, 128)


def waits(lanes: str, *refs: list[tuple[int, str]]) -> list[tuple[int, ...]]:
    found = Draft()
    regions = [ARENA, ARENA, INPUT, WEIGHT, STATUS]
    for region in regions:
        found.add(region, region, 64)
    names = {"c": "compute", "o": OTHER, "p": "copy"}
    found.launches += [
        launch(*each, lane=names[lane]) for lane, each in zip(lanes, refs, strict=True)
    ]
    return [x.waits for x in place(found, {}).launches]


W, R, U, X = (0, WRITE), (0, READ), (0, UPDATE), (0, SCRATCH)


@pytest.mark.parametrize(
    ("lanes", "refs", "wanted"),
    [
        ("cc", [[W], [R]], [(), ()]),
        ("co", [[W], [R]], [(), (0,)]),
        ("co", [[R], [R]], [(), ()]),
        ("co", [[R], [W]], [(), (0,)]),
        ("co", [[W], [W]], [(), (0,)]),
        ("co", [[W], [U]], [(), (0,)]),
        ("co", [[U], [R]], [(), (0,)]),
        ("co", [[R], [U]], [(), (0,)]),
        ("co", [[W], [(1, READ)]], [(), ()]),
        ("co", [[X], [X]], [(), ()]),
        ("co", [[(2, READ)], [(2, UPDATE)]], [(), (0,)]),
        ("co", [[(3, READ)], [(3, READ)]], [(), ()]),
        ("co", [[(4, WRITE)], [(4, WRITE)]], [(), ()]),
        ("coo", [[W], [R], [R]], [(), (0,), ()]),
        ("coc", [[W], [R], [R]], [(), (0,), ()]),
        ("coc", [[W], [R], [W]], [(), (0,), (1,)]),
        ("cop", [[W], [U], [R]], [(), (0,), (1,)]),
        ("cop", [[W], [R], [W]], [(), (0,), (1,)]),
        ("cocop", [[W], [(1, WRITE)], [R], [(1, READ)], [W, (1, WRITE)]], [(), (), (), (), (2, 3)]),
        ("ccoo", [[W], [(1, WRITE)], [(1, READ)], [R]], [(), (), (1,), ()]),
    ],
)
def test_a_launch_waits_for_the_last_of_what_it_depends_on_in_each_other_lane(
    lanes: str, refs: list[list[tuple[int, str]]], wanted: list[tuple[int, ...]]
) -> None:
    assert waits(lanes, *refs) == wanted


def test_bytes_are_shared_between_lanes_only_where_their_users_have_ended() -> None:
    """The second buffer is written in the other lane: nothing says that the first is dead."""
    blocks = [(64, 0, 1), (64, 2, 3)]
    assert place(draft(*blocks, lanes="cccc"), {}).arena_bytes == 64
    assert place(draft(*blocks, lanes="ccoo"), {}).arena_bytes == 128
    beside = draft((64, 0, 0), (64, 1, 2), (64, 3, 4), lanes="occcc")
    assert place(beside, {}).arena_bytes == 128, "a launch that may still run uses its own alone"
    waiting = draft(*blocks, (64, 1, 2), lanes="ccoo")  # whose bytes make it wait for launch 1
    assert place(waiting, {}).arena_bytes == 128
    assert place(waiting, {}).lower_bound == 128


# --- lowering -------------------------------------------------------------------------------------


def test_values_lie_in_inputs_outputs_weights_and_the_arena() -> None:
    """A view lies where its source does, an update in its input, a result twice in one buffer."""
    text = """graph main(%x: f32[2,8], %past: f32[1,4,8], %n: i64[1], %w: f32[3,8]) {
      %a = silu %x
      %b = reshape %a {shape=[1,2,8]}
      %c = cache_write %past, %b, %n
      %y = linear %a, %w loc "model.head"
      return %y, %c updates %past, %y as "again"
    }"""
    found = draft_nodes(parse_graph(text))
    assert [(b.region, b.name, b.size) for b in found.buffers] == [
        (INPUT, "x", 64), (INPUT, "past", 128), (INPUT, "n", 8), (INPUT, "w", 96),
        (ARENA, "a", 64), (OUTPUT, "y", 24),
    ]  # fmt: skip
    ops = [(x.op, x.kernel, x.node, x.loc) for x in found.launches]
    assert ("cache_write", "cache_write", "c", "") in ops
    assert ("linear", "linear", "y", "model.head") in ops
    assert "reshape" not in {op for op, *_ in ops}
    write = next(x for x in found.launches if x.op == "cache_write")
    assert [(r.buffer, r.access, r.size) for r in write.refs] == [
        (1, READ, 128), (4, READ, 64), (2, READ, 8), (1, UPDATE, 128),
    ]  # fmt: skip
    assert [(p.name, p.buffer) for p in found.outputs] == [
        ("y", 5), ("c", 1), ("again", 5),
    ]  # fmt: skip


def test_a_node_may_have_bytes_for_itself() -> None:
    graph = parse_graph("graph main(%x: f32[4]) { %y = silu %x return %y }")
    values = Values(graph)
    (node,) = graph.nodes
    plain = values.arguments(node)
    assert plain == [Ref(0, READ, 16), Ref(1, WRITE, 16)]
    assert len(values.draft.buffers) == 2
    assert values.arguments(node, 24) == [*plain, Ref(2, SCRATCH, 24)]
    assert values.draft.buffers[2] == Buffer(ARENA, "scratch of y", 24)


CHAIN = "graph main(%x: f32[16]) { %a = silu %x %b = exp %a %c = silu %b return %c }"


def test_an_allocator_gives_what_would_lie_in_the_arena() -> None:
    program = parse_program(CHAIN)
    ours = plan_nodes(program, {"device": "cpu"})
    theirs = plan_nodes(program, {}, allocator="torch")
    apart = plan_nodes(program, {}, reuse=False)
    (one,), (other,) = ours.entries.values(), theirs.entries.values()
    assert (one.arena_bytes, one.lower_bound, one.allocator) == (128, 128, "")
    assert (other.arena_bytes, other.lower_bound, other.allocator) == (0, 128, "torch")
    assert (one.needed_bytes, other.needed_bytes) == (128, 128)
    assert apart.needed_bytes == ours.needed_bytes == 128
    assert dict(ours.meta) == {"device": "cpu"}
    assert Plan({}).needed_bytes == 0


def test_a_graph_that_runs_whole_is_one_launch_that_needs_what_its_nodes_do() -> None:
    graph = parse_graph(CHAIN)
    plan = whole_entry(graph, {}, "all", "theirs")
    (only,) = plan.launches
    assert (only.kernel, [(r.buffer, r.access) for r in only.refs]) == (
        "all", [(0, READ), (plan.outputs[0].buffer, WRITE)],
    )  # fmt: skip
    assert (plan.arena_bytes, plan.lower_bound, plan.allocator) == (0, 128, "theirs")


def test_outputs_that_are_inputs_are_updated_in_place() -> None:
    ports = (Port("present", ROW, 0), Port("y", ROW, 1))
    assert replace(PLAN, outputs=ports).in_place == {"present": "x"}


def test_lifetimes_are_from_the_first_launch_to_the_last_that_touches_a_buffer() -> None:
    assert lifetimes(BUFFERS, LAUNCHES) == {3: (0, 1), 4: (1, 2)}
    assert live_at(4, [(0, 1, 5), (1, 1, 2), (2, 3, 1)]) == [5, 7, 1, 1]
    assert live_at(0, []) == []
