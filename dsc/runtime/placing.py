"""Give every buffer an offset in one arena, so that dead buffers' bytes are used again.

Offsets are chosen greedily, each at the lowest gap among what is live with it, in several orders of
which the best is kept: the largest first, and those of the fullest launches first (Pisarchyk & Lee
2020, "greedy by size" and "by breadth"), and in the order in which they are born; what then lies
higher than the least that any arena needs comes first in another try. Scratch lives as long as its
launch. Where launches run in several lanes, as collectives do beside what computes, two buffers
share bytes only if all that touch the first have ended when the second is written; a launch waits
for the last of what it depends on in each other lane, unless that has ended anyway.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.ir.dims import Range, bounds
from dsc.runtime.plan import (
    ALIGNMENT,
    READ,
    SCRATCH,
    STATUS,
    UPDATE,
    WEIGHT,
    Buffer,
    Draft,
    EntryPlan,
    Launch,
    lifetimes,
    live_at,
)

ROUNDS = 12
"""Times that an order is tried again with what lay too high first."""


def place(draft: Draft, ranges: Mapping[str, Range], reuse: bool = True) -> EntryPlan:
    """The plan of an entry at the upper bounds of its symbols; without `reuse`, no two overlap."""
    buffers, (waits, before) = draft.buffers, _order(draft)
    blocks = [
        _Block(number, _aligned(bounds(buffers[number].size, ranges).hi), first, last)
        for number, (first, last) in lifetimes(buffers, draft.launches).items()
    ]
    if before:
        _note_users(blocks, draft.launches)
    offsets, total = _best(blocks, before, reuse)
    placed = list(buffers)
    for number, offset in offsets.items():
        placed[number] = replace(placed[number], offset=offset)
    launches = list(draft.launches)
    for position, others in waits.items():
        launches[position] = replace(launches[position], waits=others)
    return EntryPlan(
        tuple(draft.inputs),
        tuple(draft.outputs),
        tuple(placed),
        tuple(launches),
        total,
        max(_live(blocks), default=0),
    )


@dataclass(slots=True)
class _Block:
    """A buffer that is alive from its first launch to its last, both inclusive.

    `users` has bit i set where launch i touches its bytes.
    """

    number: int
    size: int
    first: int
    last: int
    users: int = 0


def _note_users(blocks: Sequence[_Block], launches: Sequence[Launch]) -> None:
    by_number = {block.number: block for block in blocks}
    for position, launch in enumerate(launches):
        for ref in launch.refs:
            if ref.buffer in by_number:
                by_number[ref.buffer].users |= 1 << position


def _order(draft: Draft) -> tuple[dict[int, tuple[int, ...]], list[int]]:
    """For which launches each waits, and which have ended when it starts, as bits.

    Both are empty where there is one lane: then all earlier launches have ended.
    """
    if len({launch.lane for launch in draft.launches}) < 2:
        return {}, []
    before: list[int] = []
    waits: dict[int, tuple[int, ...]] = {}
    tips: dict[str, int] = {}
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for position, launch in enumerate(draft.launches):
        tip = tips.get(launch.lane)
        ended = 0 if tip is None else before[tip] | 1 << tip
        reads, writes = _touched(launch, draft.buffers)
        needed = 0
        for buffer in reads | writes:
            needed |= written.get(buffer, 0)
        for buffer in writes:
            needed |= read.get(buffer, 0)
        missing, others = needed & ~ended, []
        while missing:
            last = missing.bit_length() - 1
            others.append(last)
            ended |= before[last] | 1 << last
            missing &= ~ended
        if others:
            waits[position] = tuple(sorted(others))
        before.append(ended)
        tips[launch.lane] = position
        for buffer in reads:
            read[buffer] = read.get(buffer, 0) | 1 << position
        for buffer in writes:
            written[buffer], read[buffer] = 1 << position, 0
    return waits, before


def _touched(launch: Launch, buffers: Sequence[Buffer]) -> tuple[set[int], set[int]]:
    """The buffers that a launch reads and those that it writes; nobody writes weights."""
    reads, writes = set(), set()
    for ref in launch.refs:
        if buffers[ref.buffer].region in (WEIGHT, STATUS) or ref.access == SCRATCH:
            continue
        if ref.access in (READ, UPDATE):
            reads.add(ref.buffer)
        if ref.access != READ:
            writes.add(ref.buffer)
    return reads, writes


def _best(
    blocks: Sequence[_Block], before: Sequence[int], reuse: bool
) -> tuple[dict[int, int], int]:
    """Offsets by the number of a buffer, and where the last one ends."""
    least = max(_live(blocks), default=0)
    best: tuple[dict[int, int], int] = {}, 0
    for number, order in enumerate(_orders(blocks)):
        found = _assign(order, before, reuse)
        if number == 0 or found[1] < best[1]:
            best = found
        for _ in range(ROUNDS):
            if best[1] <= least or not reuse:
                return best
            high = [b for b in order if found[0][b.number] + b.size > least]
            if not high or order[: len(high)] == high:
                break
            order = high + [b for b in order if b not in high]
            found = _assign(order, before, reuse)
            if found[1] < best[1]:
                best = found
    return best


def _orders(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    yield sorted(blocks, key=lambda b: (-b.size, b.first))
    live = _live(blocks)
    fullest = [max(live[b.first : b.last + 1]) for b in blocks]
    ranked = sorted(zip(fullest, blocks, strict=True), key=lambda x: (-x[0], -x[1].size))
    yield [block for _, block in ranked]
    yield sorted(blocks, key=lambda b: (b.first, -b.size))


def _assign(
    blocks: Sequence[_Block], before: Sequence[int], reuse: bool
) -> tuple[dict[int, int], int]:
    """Each block in turn at the lowest gap that holds it."""
    placed: list[tuple[int, int, _Block]] = []  # by offset: where a block begins and ends
    offsets: dict[int, int] = {}
    for block in blocks:
        offset = 0
        for begin, end, other in placed:
            if reuse and (_apart(block, other, before) or _apart(other, block, before)):
                continue
            if begin - offset >= block.size:
                break
            offset = max(offset, end)
        insort(placed, (offset, offset + block.size, block), key=lambda x: x[0])
        offsets[block.number] = offset
    return offsets, max((end for _, end, _ in placed), default=0)


def _apart(first: _Block, second: _Block, before: Sequence[int]) -> bool:
    """Whether all that touch the first block have ended when the second is written."""
    if first.last >= second.first:
        return False
    return not before or not first.users & ~before[second.first]


def _live(blocks: Sequence[_Block]) -> list[int]:
    """Bytes that are alive at each launch: no arena is smaller than the most."""
    launches = max((b.last + 1 for b in blocks), default=0)
    return live_at(launches, ((b.first, b.last, b.size) for b in blocks))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
