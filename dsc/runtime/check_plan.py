"""Check a memory plan against its graph, sharing no code with the planner.

The planner reasons with lifetimes and roots; the checker replays the graph over the planned bytes.
Every byte range remembers which value last wrote it. A value that is read must still own all of its
bytes, in a place that may hold it. What the replay accepts cannot overwrite a live value, whatever
the planner believed.

Lanes run at the same time (`dsc.ir.lanes`), so the replay also keeps a vector clock: for each lane
the last step that has surely ended. Whoever reads bytes must know that they are written, whoever
writes bytes that all former writers and readers of them have ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

from dsc.errors import VerificationError
from dsc.ir.analyses import aliases_of
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.lanes import LaneOf, lane_of
from dsc.ir.memory import ALIGNMENT, MemoryPlan, Place


class _Arena:
    """Which value owns which bytes: disjoint `(start, end, owner)` intervals in order."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, str]] = []

    def write(self, start: int, end: int, owner: str) -> None:
        """Give bytes start..end-1 to an owner; former owners lose what they had of them."""
        first = max(0, bisect_left(self.spans, (start, 0, "")) - 1)
        kept = []
        last = first
        while last < len(self.spans) and self.spans[last][0] < end:
            lo, hi, name = self.spans[last]
            if lo < start:
                kept.append((lo, min(hi, start), name))
            if hi > end:
                kept.append((max(lo, end), hi, name))
            last += 1
        self.spans[first:last] = [s for s in kept if s[0] < s[1]]
        if start < end:
            insort(self.spans, (start, end, owner))

    def owners(self, start: int, end: int) -> set[str]:
        """All that have some of the bytes start..end-1."""
        at = max(0, bisect_left(self.spans, (start, 0, "")) - 1)
        found = set()
        while at < len(self.spans) and self.spans[at][0] < end:
            if self.spans[at][1] > start:
                found.add(self.spans[at][2])
            at += 1
        return found

    def owns(self, start: int, end: int, owner: str) -> bool:
        """Whether an owner holds all bytes start..end-1."""
        at = max(0, bisect_left(self.spans, (start, 0, "")) - 1)
        while start < end and at < len(self.spans):
            lo, hi, name = self.spans[at]
            if lo <= start < hi:
                if name != owner:
                    return False
                start = hi
            elif lo > start:
                return False
            at += 1
        return start >= end


class _Clocks:
    """What each step knows to have ended, by the waits of a plan."""

    def __init__(self, waits: Mapping[int, tuple[int, ...]]) -> None:
        self.waits = waits
        self.ended: dict[int, dict[str, int]] = {}
        self.tips: dict[str, dict[str, int]] = {}
        self.now: dict[str, int] | None = None
        self.here: tuple[str, int] = ("", -1)
        self.writer: dict[str, tuple[str, int]] = {}
        self.readers: dict[str, list[tuple[str, int]]] = {}

    def start(self, position: int, lane: str) -> str:
        """Begin a step; what is wrong with its waits, or nothing."""
        now = dict(self.tips.get(lane, {}))
        for other in self.waits.get(position, ()):
            if other not in self.ended:
                return f"step {position} waits for step {other}, which does not come before it"
            for name, last in self.ended[other].items():
                now[name] = max(last, now.get(name, -1))
        self.now, self.here = now, (lane, position)
        self.tips[lane] = self.ended[position] = {**now, lane: position}
        return ""

    def idle(self) -> None:
        """What follows touches no bytes, or comes when all lanes have ended."""
        self.now = None

    def read(self, content: str) -> bool:
        """Note that this step reads; whether it knows that the writer has ended."""
        if self.now is None:
            return True
        self.readers.setdefault(content, []).append(self.here)
        return self._knows(self.writer.get(content))

    def write(self, content: str, former: set[str]) -> bool:
        """Note that this step writes over `former`; whether all that touched those have ended."""
        if self.now is None:
            return True
        touched = [u for f in former for u in (self.writer.get(f), *self.readers.get(f, ()))]
        self.writer[content] = self.here
        return all(map(self._knows, touched))

    def _knows(self, step: tuple[str, int] | None) -> bool:
        if step is None or step == self.here or self.now is None:
            return True
        lane, position = step
        return self.now.get(lane, -1) >= position


class _Replay:
    """One run over a graph with the places of a plan."""

    def __init__(
        self, graph: Graph, plan: MemoryPlan, ranges: Mapping[str, Range], lanes: LaneOf
    ) -> None:
        self.lanes = lanes
        self.clocks = _Clocks(plan.waits)
        self.graph = graph
        self.plan = plan
        self.ranges = ranges
        self.sizes: dict[str, int] = {}
        self.arena = _Arena()
        self.outside: dict[tuple[str, str], str] = {}
        self.content: dict[str, str] = {}
        self.values = {v.name: v for v in graph.values()}
        self.updates = {graph.outputs[o].name: graph.inputs[i].name for o, i in graph.aliases}

    def run(self) -> None:
        for value in self.graph.inputs:
            if self._place(value) != Place("input", value.name):
                raise self._error(f"input {value} is not in its own storage")
            self._write(value, value.name)
        for position, node in enumerate(self.graph.nodes):
            self._start(position, node)
            self._step(node)
        self.clocks.idle()
        for operand, name in zip(self.graph.outputs, self.graph.output_names, strict=True):
            self._output(operand, name)

    def _start(self, position: int, node: Node) -> None:
        """Move the clock to a node; a view that stays where it is takes no time."""
        if node.op == "reshape" and self._same_storage(node.output, node.operands[0]):
            self.clocks.idle()
            return
        wrong = self.clocks.start(position, self.lanes(node))
        if wrong:
            raise self._error(wrong, node)

    def _step(self, node: Node) -> None:
        for operand in node.operands:
            if isinstance(operand, Value):
                self._read(operand, node)
        moved_in_place = aliases_of(node)
        reads = {x.name for x in node.operands if isinstance(x, Value)}
        for index, value in enumerate(node.outputs):
            source = node.inputs[moved_in_place[index]] if index in moved_in_place else None
            if source is None and node.op == "reshape":
                source = node.inputs[0]
            if source is not None and self._same_storage(value, source):
                renewed = index in moved_in_place
                self.content[value.name] = value.name if renewed else self._content(source)
                if renewed:
                    self._write(value, value.name)
                continue
            if index in moved_in_place:
                raise self._error(f"{value} updates {source} but lies elsewhere", node)
            self._refuse_overlap(value, node, reads)
            self.content[value.name] = value.name
            self._write(value, value.name)

    def _output(self, operand: Operand, name: str) -> None:
        if isinstance(operand, Weight):
            raise self._error(f"output {name} is a weight")
        self._read(operand, None)
        place = self._place(operand)
        updated = self.updates.get(operand.name)
        held = updated is not None and place == Place("input", updated)
        if not held and place != Place("output", name):
            raise self._error(f"output {name} lies in {place.region} {place.key}")

    def _refuse_overlap(self, value: Value, node: Node, reads: set[str]) -> None:
        """A result must not lie over an operand of its own node: kernels read as they write."""
        place = self._place(value)
        if place.region in ("input", "weight"):
            raise self._error(f"{value} is written into {place.region} {place.key}", node)
        for name in reads:
            other = self.plan.places[name]
            if other.region != place.region:
                continue
            size = self._size(value), self._size(self.values[name])
            apart = (
                place.key != other.key
                if place.region != "arena"
                else place.offset + size[0] <= other.offset
                or other.offset + size[1] <= place.offset
            )
            if not apart and min(size) > 0:
                raise self._error(f"{value} lies over %{name}, which the same node reads", node)

    def _same_storage(self, value: Value, source: Operand) -> bool:
        if isinstance(source, Weight):
            return self._place(value) == Place("weight", source.name)
        return self._place(value) == self._place(source)

    def _read(self, value: Value, node: Node | None) -> None:
        place = self._place(value)
        content = self.content.get(value.name)
        if content is None:
            raise self._error(f"{value} is read before it is written", node)
        if place.region == "weight":
            return
        if place.region == "arena":
            whole = self.arena.owns(place.offset, place.offset + self._size(value), content)
        else:
            whole = self.outside.get((place.region, place.key)) == content
        if not whole:
            raise self._error(f"{value} is overwritten before it is read", node)
        if not self.clocks.read(content):
            raise self._error(f"nothing says that {value} is written before it is read", node)

    def _write(self, value: Value, content: str) -> None:
        place = self._place(value)
        self.content[value.name] = content
        if place.region == "arena":
            start, end = place.offset, place.offset + self._size(value)
            former = self.arena.owners(start, end)
            self.arena.write(start, end, content)
        else:
            former = {self.outside.get((place.region, place.key), content)}
            self.outside[place.region, place.key] = content
        if not self.clocks.write(content, former):
            raise self._error(f"{value} is written over bytes that may still be in use")

    def _content(self, source: Operand) -> str:
        return source.name if isinstance(source, Weight) else self.content[source.name]

    def _place(self, value: Value) -> Place:
        place = self.plan.places.get(value.name)
        if place is None:
            raise self._error(f"{value} has no place")
        if place.region not in ("arena", "input", "output", "weight"):
            raise self._error(f"{value} is in the unknown region {place.region!r}")
        if place.region == "arena":
            end = place.offset + self._size(value)
            if place.offset < 0 or place.offset % ALIGNMENT or end > self.plan.size:
                raise self._error(
                    f"{value} lies at {place.offset}..{end} of an arena of {self.plan.size} bytes"
                    f" in steps of {ALIGNMENT}"
                )
        return place

    def _size(self, value: Value) -> int:
        if value.name not in self.sizes:
            self.sizes[value.name] = bounds(value.type.nbytes, self.ranges).hi
        return self.sizes[value.name]

    def _error(self, what: str, node: Node | None = None) -> VerificationError:
        where = f"graph {self.graph.name}" if node is None else node.loc or f"{node.op}"
        return VerificationError(f"the memory plan is wrong: {what}", where=where)


def check_plan(
    graph: Graph, plan: MemoryPlan, ranges: Mapping[str, Range], lanes: LaneOf = lane_of
) -> None:
    """Raise `VerificationError` unless the plan keeps every value whole until its last read.

    Lanes may run as far apart as the plan's waits allow.
    """
    _Replay(graph, plan, ranges, lanes).run()
