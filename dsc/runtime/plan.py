"""The launch plan: what runs when an entry runs, of every backend, as plain data (`plan.json`).

A backend's lowering ends in launches over buffers: which kernel, on which bytes of which buffers,
with which numbers, in which lane, after which other launches. Sizes, offsets and numbers are
expressions over the symbols, so that one plan serves every batch and length. Where the buffers of
the arena lie is decided once (`dsc.runtime.placing`), for the largest sizes; what an executable
allocates is `arena_bytes`. Reports, memory limits, profiles and pictures read the same plan.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeAlias

from dsc.errors import ArtifactError
from dsc.ir.dims import Dim, evaluate, from_json, to_json
from dsc.ir.formats import Format
from dsc.ir.graph import Graph
from dsc.ir.segments import Segment, steps
from dsc.ir.types import DType, TensorType

PLAN = "plan.json"
FORMAT = 8
"""Of dsc.json and plan.json: one schema. An artifact of another has to be compiled again."""
ALIGNMENT = 64
"""Every buffer of an arena begins at a multiple of so many bytes."""
ARENA, INPUT, OUTPUT, WEIGHT, STATUS = REGIONS = ("arena", "input", "output", "weight", "status")
STATUS_BYTES = 8
READ, WRITE, UPDATE, SCRATCH = ACCESSES = ("r", "w", "u", "s")
"""What a launch does to bytes: reads them, writes them, changes in place what it reads, or uses
them for itself alone."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """`size` bytes of memory: an input, output or weight by its name, or `offset` in the arena.

    `status` is the number that tells which check of a run has failed. A name in the arena is for
    people.
    """

    region: str
    name: str
    size: Dim
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Ref:
    """`size` bytes of a buffer from `offset` on, and what a launch does to them.

    `touched` is how many of them it moves at most, where those are fewer: of a strided view, of a
    table that rows are taken of.
    """

    buffer: int
    access: str
    size: Dim
    offset: Dim = 0
    touched: Dim | None = None


Argument: TypeAlias = Ref | Dim


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel. `arguments` are in the order of its parameters; `grid` is a GPU's.

    `waits` are launches of other lanes. `node` is the first result of the graph's node that the
    launch is part of. `flops` are the operations of its products, where the backend tells; what it
    moves are its bytes (`dsc.runtime.launch_costs`). `choices` are the backend's keys of what could
    have been chosen otherwise.
    """

    kernel: str
    arguments: tuple[Argument, ...]
    grid: tuple[Dim, ...] = ()
    lane: str = "compute"
    waits: tuple[int, ...] = ()
    loc: str = ""
    op: str = ""
    node: str = ""
    flops: Dim = 0
    choices: tuple[str, ...] = ()

    @property
    def refs(self) -> Iterator[Ref]:
        """The bytes that it touches."""
        return (a for a in self.arguments if isinstance(a, Ref))

    def runs(self, sizes: Mapping[str, int]) -> bool:
        """Whether its grid has any program at these sizes of the symbols."""
        return all(evaluate(d, sizes) for d in self.grid)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of an entry, and the buffer that holds it."""

    name: str
    type: TensorType
    buffer: int


@dataclass(slots=True)
class Draft:
    """An entry whose buffers have no place yet: what a lowering fills."""

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def add(self, region: str, name: str, size: Dim) -> int:
        """The number of a new buffer."""
        self.buffers.append(Buffer(region, name, size))
        return len(self.buffers) - 1


@dataclass(frozen=True)
class EntryPlan:
    """An entry's launches, and the bytes of arena that they need at the symbols' upper bounds.

    No arena can be smaller than `lower_bound`, the most bytes that are alive at once. Where
    `allocator` is named, it is that which allocates what lies in no buffer, as it sees fit:
    `arena_bytes` is 0, and `lower_bound` what it needs at least.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    arena_bytes: int
    lower_bound: int
    allocator: str = ""

    @property
    def needed_bytes(self) -> int:
        """Memory for what is computed on the way: the arena, or what an allocator needs."""
        return max(self.arena_bytes, self.lower_bound)

    def without_arena(self, allocator: str) -> EntryPlan:
        """The same, where it is `allocator` that gives memory to what would lie in the arena."""
        return replace(self, arena_bytes=0, allocator=allocator)

    def without(self, op: str) -> EntryPlan:
        """The same without the launches of an operator, and without what only these touch."""
        kept = tuple(launch for launch in self.launches if launch.op != op)
        if len(kept) == len(self.launches):
            return self
        lost = {r.buffer for launch in self.launches if launch.op == op for r in launch.refs}
        lost -= {r.buffer for launch in kept for r in launch.refs}
        inputs, outputs = (
            tuple(p for p in ports if p.buffer not in lost) for ports in (self.inputs, self.outputs)
        )
        return replace(self, inputs=inputs, outputs=outputs, launches=kept)

    @property
    def in_place(self) -> dict[str, str]:
        """Outputs that are inputs, updated in place: the input's name by the output's."""
        held = ((p.name, self.buffers[p.buffer]) for p in self.outputs)
        return {name: buffer.name for name, buffer in held if buffer.region == INPUT}


@dataclass(frozen=True)
class Plan:
    """All entries' plans; `meta` says for which device, and what its kernels are."""

    entries: Mapping[str, EntryPlan]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def of(self, entry: Graph) -> list[EntryPlan]:
        """The plans that a program's entry runs by: its own, or those of its segments in order."""
        if entry.name in self.entries:
            return [self.entries[entry.name]]
        return [self.entries[s.graph.name] for s in steps(entry) if isinstance(s, Segment)]

    @property
    def needed_bytes(self) -> int:
        """Memory for what is computed on the way: entries run one at a time."""
        return max((entry.needed_bytes for entry in self.entries.values()), default=0)

    def to_json(self) -> bytes:
        """The plan as plan.json."""
        entries = {name: _entry_json(entry) for name, entry in self.entries.items()}
        found = {"format": FORMAT, "meta": dict(self.meta), "entries": entries}
        return json.dumps(found, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """Read a plan.json. Raises `ArtifactError`."""
        try:
            raw = json.loads(data)
            check_format(raw["format"], PLAN)
            return Plan({k: _entry(v) for k, v in raw["entries"].items()}, raw["meta"])
        except (
            LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
        ) as problem:  # fmt: skip
            raise ArtifactError(f"plan.json is damaged: {problem}") from None


def check_format(found: object, where: str) -> None:
    """Raise `ArtifactError` unless this dsc reads the format."""
    if found != FORMAT:
        raise ArtifactError(
            f"format {found}, this dsc reads {FORMAT}",
            where=where,
            hint="compile it again with this version",
        )


def live_bytes(plan: EntryPlan, env: Mapping[str, int]) -> list[int]:
    """Bytes of the arena that hold something needed, during each launch, at the symbols' sizes."""
    held = lifetimes(plan.buffers, plan.launches).items()
    blocks = ((first, last, evaluate(plan.buffers[n].size, env)) for n, (first, last) in held)
    return live_at(len(plan.launches), blocks)


def live_at(launches: int, blocks: Iterable[tuple[int, int, int]]) -> list[int]:
    """What blocks `(first launch, last launch, size)` add up to at each launch."""
    change: Counter[int] = Counter()
    for first, last, size in blocks:
        change[first] += size
        change[last + 1] -= size
    return list(accumulate(change[at] for at in range(launches)))


def lifetimes(buffers: Sequence[Buffer], launches: Sequence[Launch]) -> dict[int, tuple[int, int]]:
    """The first and the last launch that touch each buffer of the arena, by its number."""
    spans: dict[int, tuple[int, int]] = {}
    for position, launch in enumerate(launches):
        for ref in launch.refs:
            if buffers[ref.buffer].region == ARENA:
                first, _ = spans.get(ref.buffer, (position, position))
                spans[ref.buffer] = (first, position)
    return spans


def _entry_json(entry: EntryPlan) -> dict[str, Any]:
    return {
        "arena_bytes": entry.arena_bytes,
        "lower_bound": entry.lower_bound,
        "allocator": entry.allocator,
        "inputs": [_port_json(p) for p in entry.inputs],
        "outputs": [_port_json(p) for p in entry.outputs],
        "buffers": [[b.region, b.name, to_json(b.size), b.offset] for b in entry.buffers],
        "launches": [
            {
                "kernel": x.kernel,
                "arguments": [_argument_json(a) for a in x.arguments],
                "grid": [to_json(d) for d in x.grid],
                "lane": x.lane,
                "waits": list(x.waits),
                "loc": x.loc,
                "op": x.op,
                "node": x.node,
                "flops": to_json(x.flops),
                "choices": list(x.choices),
            }
            for x in entry.launches
        ],
    }


def _entry(raw: Mapping[str, Any]) -> EntryPlan:
    launches = (
        Launch(
            x["kernel"], tuple(map(_argument, x["arguments"])), tuple(map(from_json, x["grid"])),
            x["lane"], tuple(map(int, x["waits"])), x["loc"], x["op"], x["node"],
            from_json(x["flops"]), tuple(map(str, x["choices"])),
        )
        for x in raw["launches"]
    )  # fmt: skip
    return EntryPlan(
        tuple(_port(p) for p in raw["inputs"]),
        tuple(_port(p) for p in raw["outputs"]),
        tuple(Buffer(r, n, from_json(size), int(at)) for r, n, size, at in raw["buffers"]),
        tuple(launches),
        int(raw["arena_bytes"]),
        int(raw["lower_bound"]),
        str(raw["allocator"]),
    )


def _argument_json(argument: Argument) -> Any:
    """Bytes are a list that begins with a buffer's number; what else there is, is a number."""
    if not isinstance(argument, Ref):
        return to_json(argument)
    some = [] if argument.touched is None else [to_json(argument.touched)]
    place = [to_json(argument.size), to_json(argument.offset)]
    return [argument.buffer, argument.access, *place, *some]


def _argument(raw: Any) -> Argument:
    if isinstance(raw, list) and isinstance(raw[0], int):
        buffer, access, *numbers = raw
        size, offset, *touched = map(from_json, numbers)
        return Ref(int(buffer), access, size, offset, *touched)
    return from_json(raw)


def _port_json(port: Port) -> list[Any]:
    """Behind the buffer there are rows, columns, scales and zero points of a stored format."""
    t, stored = port.type, []
    if t.format is not None:
        kinds = (t.format.scales, t.format.zeros)
        stored = [*t.format.block, *(kind.value for kind in kinds if kind is not None)]
    return [port.name, t.dtype.value, [to_json(d) for d in t.shape], port.buffer, *stored]


def _port(raw: list[Any]) -> Port:
    name, dtype, shape, buffer, *stored = raw
    format = None
    if stored:
        rows, columns, scales, *zeros = stored
        zero = DType(zeros[0]) if zeros else None
        format = Format((int(rows), int(columns)), DType(scales), zero)
    return Port(name, TensorType(DType(dtype), tuple(map(from_json, shape)), format), int(buffer))
