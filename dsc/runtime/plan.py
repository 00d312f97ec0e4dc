"""The plan: how an artifact's kernels run. Every backend ends in one.

A plan lists, for each entry, the steps in order: which kernel, on which buffers, with which scalar
values. Buffers are references (region and offset), scalars are expressions over the symbols, so
that one plan serves every batch, length and device. The stepwise executor walks it in Python; a
backend may compile the same list into its library as one host function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.errors import ArtifactError
from dsc.ir.dims import Dim, evaluate, parse_dim, symbol_name
from dsc.ir.graph import Graph, Operand, Value
from dsc.ir.memory import MemoryPlan
from dsc.ir.types import DType, TensorType

FORMAT = 1


@dataclass(frozen=True, slots=True)
class BufferRef:
    """A tensor in `arena` (at `offset` bytes), or in an `input`, `output` or `weight` by key."""

    region: str
    key: str
    offset: int
    type: TensorType


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel call. `scalars` are values by name; `waits` are steps of other lanes.

    `node` names the first result of the graph's node that the step is part of.
    """

    kernel: str
    reads: tuple[BufferRef | None, ...]
    writes: tuple[BufferRef, ...]
    scalars: tuple[tuple[str, Dim], ...] = ()
    lane: str = "compute"
    waits: tuple[int, ...] = ()
    loc: str = ""
    op: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """The steps of one entry and the bytes of arena they need at the symbols' upper bounds."""

    steps: tuple[Step, ...]
    arena_bytes: int


@dataclass(frozen=True)
class Plan:
    """All entries' plans."""

    entries: Mapping[str, EntryPlan]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The plan as plan.json."""
        entries = {
            name: {"arena_bytes": e.arena_bytes, "steps": [_step_json(s) for s in e.steps]}
            for name, e in self.entries.items()
        }
        return json.dumps(
            {"format": FORMAT, "entries": entries, "meta": dict(self.meta)}, indent=1
        ).encode()

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """Read a plan.json. Raises `ArtifactError`."""
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise ArtifactError(
                    f"plan.json has format {raw['format']}, this dsc reads {FORMAT}"
                )
            entries = {
                name: EntryPlan(tuple(_step(s) for s in e["steps"]), int(e["arena_bytes"]))
                for name, e in raw["entries"].items()
            }
            return Plan(entries, raw["meta"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ArtifactError(f"plan.json is damaged: {problem}") from None


def buffer(operand: Operand, memory: MemoryPlan) -> BufferRef:
    """Where an operand lies."""
    if isinstance(operand, Value):
        place = memory.places[operand.name]
        return BufferRef(place.region, place.key, place.offset, operand.type)
    return BufferRef("weight", operand.name, 0, operand.type)


def symbols_of(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the symbols, from the shapes of an entry's inputs by name."""
    env: dict[str, int] = {}
    for value in graph.inputs:
        for dim, size in zip(value.type.shape, shapes[value.name], strict=True):
            name = symbol_name(dim)
            if name is not None:
                env[name] = size
    return env


def live_bytes(plan: EntryPlan, env: Mapping[str, int]) -> list[int]:
    """Bytes of the arena that hold something needed, during each step, at the symbols' sizes.

    A buffer lives from the step that writes it to the last that reads it before its first byte is
    written again.
    """
    change = [0] * (len(plan.steps) + 1)
    alive: dict[int, list[int]] = {}  # offset -> [size, first step, last step]

    def end(found: list[int]) -> None:
        size, first, last = found
        change[first] += size
        change[last + 1] -= size

    for position, step in enumerate(plan.steps):
        for ref in step.reads:
            if ref is not None and ref.region == "arena" and ref.offset in alive:
                alive[ref.offset][2] = position
        for ref in step.writes:
            if ref.region != "arena":
                continue
            if ref.offset in alive:
                end(alive[ref.offset])
            alive[ref.offset] = [evaluate(ref.type.nbytes, env), position, position]
    for found in alive.values():
        end(found)
    live, total = [], 0
    for position in range(len(plan.steps)):
        total += change[position]
        live.append(total)
    return live


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "kernel": step.kernel,
        "op": step.op,
        "node": step.node,
        "loc": step.loc,
        "reads": [None if r is None else _ref_json(r) for r in step.reads],
        "writes": [_ref_json(r) for r in step.writes],
        "scalars": {k: str(v) for k, v in step.scalars},
        "lane": step.lane,
        "waits": list(step.waits),
    }


def _step(raw: Mapping[str, Any]) -> Step:
    return Step(
        raw["kernel"],
        tuple(None if r is None else _ref(r) for r in raw["reads"]),
        tuple(_ref(r) for r in raw["writes"]),
        tuple((k, parse_dim(v)) for k, v in raw["scalars"].items()),
        raw["lane"],
        tuple(raw["waits"]),
        raw["loc"],
        raw["op"],
        raw.get("node", ""),
    )


def _ref_json(ref: BufferRef) -> list[Any]:
    return [ref.region, ref.key, ref.offset, ref.type.dtype.value, [str(d) for d in ref.type.shape]]


def _ref(raw: list[Any]) -> BufferRef:
    region, key, offset, dtype, shape = raw
    return BufferRef(
        region, key, int(offset), TensorType(DType(dtype), tuple(parse_dim(d) for d in shape))
    )
