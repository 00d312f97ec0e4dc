"""Check a launch plan by running through it over bytes, sharing no code with the planner.

The planner reasons with lifetimes; the checker replays the launches. Every byte of the arena
remembers which buffer last took it. What a launch reads must be written and still all its buffer's;
what it writes takes the buffer's bytes, and a buffer that has lost some of them is not written
again. All that one launch touches lies apart. What the replay accepts cannot overwrite a live
buffer, whatever the planner believed.

Lanes run at the same time (`dsc.ir.lanes`), so the replay also keeps a vector clock: for each lane
the last launch that has surely ended. Whoever reads bytes must know that they are written, whoever
writes bytes that all former writers and readers of them have ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

from dsc.errors import VerificationError
from dsc.ir.dims import Dim, Range, bounds, evaluate
from dsc.ir.lanes import LANES
from dsc.runtime.plan import (
    ACCESSES,
    ALIGNMENT,
    ARENA,
    INPUT,
    OUTPUT,
    READ,
    REGIONS,
    SCRATCH,
    STATUS,
    STATUS_BYTES,
    UPDATE,
    WEIGHT,
    WRITE,
    Buffer,
    EntryPlan,
    Launch,
    Ref,
)


def check_plan(plan: EntryPlan, ranges: Mapping[str, Range], name: str = "") -> None:
    """Raise `VerificationError` unless the plan keeps every buffer whole until its last read.

    Lanes may run as far apart as the plan's waits allow. `name` is the entry's.
    """
    try:
        _Replay(plan, ranges, name).run()
    except KeyError as unknown:
        what = f"the launch plan is wrong: nothing says how large {unknown} may be"
        raise VerificationError(what, where=f"entry {name}") from None


class _Arena:
    """Which buffer owns which bytes: disjoint `(start, end, owner)` intervals in order."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, int]] = []

    def write(self, start: int, end: int, owner: int) -> None:
        """Give bytes start..end-1 to an owner; former owners lose what they had of them."""
        first = max(0, bisect_left(self.spans, (start, 0, -1)) - 1)
        kept = []
        last = first
        while last < len(self.spans) and self.spans[last][0] < end:
            lo, hi, former = self.spans[last]
            if lo < start:
                kept.append((lo, min(hi, start), former))
            if hi > end:
                kept.append((max(lo, end), hi, former))
            last += 1
        self.spans[first:last] = [s for s in kept if s[0] < s[1]]
        if start < end:
            insort(self.spans, (start, end, owner))

    def owners(self, start: int, end: int) -> set[int]:
        """All that have some of the bytes start..end-1."""
        at = max(0, bisect_left(self.spans, (start, 0, -1)) - 1)
        found = set()
        while at < len(self.spans) and self.spans[at][0] < end:
            if self.spans[at][1] > start:
                found.add(self.spans[at][2])
            at += 1
        return found

    def owns(self, start: int, end: int, owner: int) -> bool:
        """Whether an owner holds all bytes start..end-1."""
        at = max(0, bisect_left(self.spans, (start, 0, -1)) - 1)
        while start < end and at < len(self.spans):
            lo, hi, holder = self.spans[at]
            if lo <= start < hi:
                if holder != owner:
                    return False
                start = hi
            elif lo > start:
                return False
            at += 1
        return start >= end


class _Clocks:
    """What each launch knows to have ended, by its waits."""

    def __init__(self) -> None:
        self.ended: dict[int, dict[str, int]] = {}
        self.tips: dict[str, dict[str, int]] = {}
        self.now: dict[str, int] = {}
        self.here: tuple[str, int] = ("", -1)
        self.writer: dict[int, tuple[str, int]] = {}
        self.readers: dict[int, list[tuple[str, int]]] = {}

    def start(self, position: int, launch: Launch) -> str:
        """Begin a launch; what is wrong with its waits, or nothing."""
        now = dict(self.tips.get(launch.lane, {}))
        for other in launch.waits:
            if other not in self.ended:
                return f"launch {position} waits for {other}, which does not come before it"
            for lane, last in self.ended[other].items():
                now[lane] = max(last, now.get(lane, -1))
        self.now, self.here = now, (launch.lane, position)
        self.tips[launch.lane] = self.ended[position] = {**now, launch.lane: position}
        return ""

    def read(self, buffer: int) -> bool:
        """Note that this launch reads; whether it knows that the writer has ended."""
        self.readers.setdefault(buffer, []).append(self.here)
        return self._knows(self.writer.get(buffer))

    def write(self, buffer: int, former: set[int]) -> bool:
        """Note that this launch writes over `former`; whether all that touched those have ended."""
        touched = [u for f in former for u in (self.writer.get(f), *self.readers.get(f, ()))]
        self.writer[buffer] = self.here
        return all(map(self._knows, touched))

    def _knows(self, launch: tuple[str, int] | None) -> bool:
        if launch is None or launch == self.here:
            return True
        lane, position = launch
        return self.now.get(lane, -1) >= position


class _Replay:
    """One run over the launches."""

    def __init__(self, plan: EntryPlan, ranges: Mapping[str, Range], name: str) -> None:
        self.plan, self.ranges, self.name = plan, ranges, name
        self.least = {symbol: found.lo for symbol, found in ranges.items()}
        self.most = {symbol: found.hi for symbol, found in ranges.items()}
        self.sizes = [self._most(b.size) for b in plan.buffers]
        self.clocks = _Clocks()
        self.arena = _Arena()
        self.written = {
            number
            for number, (buffer, size) in enumerate(zip(plan.buffers, self.sizes, strict=True))
            if buffer.region in (INPUT, WEIGHT) or size == 0
        }

    def run(self) -> None:
        for number, buffer in enumerate(self.plan.buffers):
            self._placed(buffer, self.sizes[number])
        self._ports()
        for position, launch in enumerate(self.plan.launches):
            self._launch(position, launch)
        for port in self.plan.outputs:
            if port.buffer not in self.written:
                raise self._error(f"nobody writes the output {port.name}")

    def _placed(self, buffer: Buffer, size: int) -> None:
        if buffer.region not in REGIONS:
            raise self._error(f"{buffer.name} is in the unknown region {buffer.region!r}")
        if buffer.region == STATUS and size != STATUS_BYTES:
            raise self._error(f"{buffer.name} of {size} bytes is no status")
        if buffer.region != ARENA or self.plan.allocator:
            return
        end = buffer.offset + size
        if buffer.offset < 0 or buffer.offset % ALIGNMENT or end > self.plan.arena_bytes:
            raise self._error(
                f"{buffer.name} lies at {buffer.offset}..{end} of an arena of"
                f" {self.plan.arena_bytes} bytes in steps of {ALIGNMENT}"
            )

    def _ports(self) -> None:
        """Inputs and outputs are whole buffers of their own."""
        taken: set[int] = set()
        for ports, regions in ((self.plan.inputs, (INPUT,)), (self.plan.outputs, (OUTPUT, INPUT))):
            for port in ports:
                known = 0 <= port.buffer < len(self.sizes)
                if not known or self.plan.buffers[port.buffer].region not in regions:
                    raise self._error(f"{port.name} is not in a buffer of its own")
                if self.sizes[port.buffer] != self._most(port.type.nbytes):
                    raise self._error(f"{port.name} is not all of its buffer")
            if len({p.buffer for p in ports}) != len(ports):
                raise self._error("two inputs or outputs are one buffer")
            taken |= {p.buffer for p in ports}
        outside = {i for i, b in enumerate(self.plan.buffers) if b.region in (INPUT, OUTPUT)}
        if outside - taken:
            lost = self.plan.buffers[min(outside - taken)]
            raise self._error(f"{lost.region} {lost.name} is none of the entry's")

    def _launch(self, position: int, launch: Launch) -> None:
        where = launch.loc or launch.kernel
        if launch.lane not in LANES:
            raise self._error(f"the unknown lane {launch.lane!r}", where)
        wrong = self.clocks.start(position, launch)
        if wrong:
            raise self._error(wrong, where)
        refs = list(launch.refs)
        reads = {r.buffer for r in refs if r.access == READ}
        for ref in refs:
            self._inside(ref, where)
            if ref.access == READ or ref.access == UPDATE:
                self._read(ref, where)
        for ref in refs:
            if ref.access == WRITE and ref.buffer in reads:
                raise self._error(f"{self._text(ref)} is written and read by one launch", where)
            if ref.access != READ:
                self._write(ref, where)
        for ref in refs:
            if not self._whole(ref.buffer):
                raise self._error(f"{self._text(ref)} lies over what one launch touches", where)

    def _inside(self, ref: Ref, where: str) -> None:
        if not 0 <= ref.buffer < len(self.sizes) or ref.access not in ACCESSES:
            raise self._error(f"a launch does {ref.access!r} to buffer {ref.buffer}", where)
        end = evaluate(ref.offset + ref.size, self.most)
        if evaluate(ref.offset, self.least) < 0 or end > self.sizes[ref.buffer]:
            raise self._error(
                f"bytes {ref.offset}..{ref.offset + ref.size} of {self._text(ref)}, which has"
                f" {self.plan.buffers[ref.buffer].size}",
                where,
            )
        region = self.plan.buffers[ref.buffer].region
        if ref.access == SCRATCH and region != ARENA:
            raise self._error(f"scratch in {region} {self._text(ref)}", where)
        if ref.access != READ and region == WEIGHT:
            raise self._error(f"{self._text(ref)} is a weight, and written", where)

    def _read(self, ref: Ref, where: str) -> None:
        if ref.buffer not in self.written:
            raise self._error(f"{self._text(ref)} is read before it is written", where)
        if not self._whole(ref.buffer):
            raise self._error(f"{self._text(ref)} is overwritten before it is read", where)
        if not self.clocks.read(ref.buffer):
            raise self._error(f"nothing says that {self._text(ref)} is written by then", where)

    def _write(self, ref: Ref, where: str) -> None:
        buffer = self.plan.buffers[ref.buffer]
        if buffer.region == STATUS:
            return
        former = {ref.buffer}
        if ref.buffer in self.written and not self._whole(ref.buffer):
            raise self._error(f"{self._text(ref)} has lost bytes before its last write", where)
        if buffer.region == ARENA and not self.plan.allocator:
            start, end = buffer.offset, buffer.offset + self.sizes[ref.buffer]
            former |= self.arena.owners(start, end)
            self.arena.write(start, end, ref.buffer)
        self.written.add(ref.buffer)
        if not self.clocks.write(ref.buffer, former):
            raise self._error(f"{self._text(ref)} is written over bytes that may be in use", where)

    def _whole(self, number: int) -> bool:
        buffer = self.plan.buffers[number]
        if buffer.region != ARENA or self.plan.allocator:
            return True
        return self.arena.owns(buffer.offset, buffer.offset + self.sizes[number], number)

    def _most(self, dim: Dim) -> int:
        return bounds(dim, self.ranges).hi

    def _text(self, ref: Ref) -> str:
        return self.plan.buffers[ref.buffer].name or f"buffer {ref.buffer}"

    def _error(self, what: str, where: str = "") -> VerificationError:
        return VerificationError(
            f"the launch plan is wrong: {what}", where=where or f"entry {self.name}"
        )
