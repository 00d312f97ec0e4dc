"""What the backend emits: buffers, launches and their JSON form (`triton/<target>/launches.json`).

A launch names a kernel specialisation and gives it pointers (buffer + offset), scalars and a grid.
Numbers that depend on the shape of a call stay expressions over the program's symbols; whoever runs
the launches evaluates them once per set of shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dsc.ir.dims import Dim, Sym, parse_dim
from dsc.ir.types import DType

Kind: TypeAlias = Literal["input", "weight", "temp", "output"]

POINTER_TYPES = {
    DType.f32: "*fp32", DType.f64: "*fp64", DType.bf16: "*bf16", DType.f16: "*fp16",
    DType.f8e4m3: "*fp8e4nv", DType.f8e4m3fnuz: "*fp8e4b8", DType.f8e5m2: "*fp8e5",
    DType.i64: "*i64", DType.i32: "*i32", DType.i16: "*i16", DType.i8: "*i8", DType.u8: "*u8",
    DType.boolean: "*i1",
}  # fmt: skip


@dataclass(slots=True)
class Buffer:
    """A piece of memory: a graph input, a weight, a graph output, or a temporary."""

    kind: Kind
    name: str
    dtype: DType
    numel: Dim


@dataclass(frozen=True, slots=True)
class Pointer:
    """A pointer argument: `offset` elements into a buffer."""

    buffer: int
    offset: Dim
    dtype: DType


Argument: TypeAlias = Pointer | Dim | float | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel specialisation: the key under which compiled code is shared.

    `signature` maps every parameter to its Triton type ("constexpr" when it is in `constants`);
    `aligned` lists the pointers known to be 16-byte aligned and the integers that are multiples
    of 16.
    """

    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """A readable name that is unique per specialisation."""
        digest = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.function}_{digest[:12]}"

    def as_json(self) -> dict[str, Any]:
        """The record written to `launches.json`."""
        return {
            "module": self.module,
            "function": self.function,
            "signature": dict(self.signature),
            "constants": {k: _constant(v) for k, v in self.constants.items()},
            "aligned": list(self.aligned),
            "warps": self.warps,
            "stages": self.stages,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Kernel:
        """Read back what `as_json` wrote."""
        constants = {k: _read_constant(v) for k, v in data["constants"].items()}
        return Kernel(
            data["module"], data["function"], data["signature"], constants,
            tuple(data["aligned"]), data["warps"], data["stages"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One step: a kernel, its run-time arguments in signature order, its grid, its origin."""

    kernel: str
    arguments: tuple[Pointer | Dim | float, ...]
    grid: tuple[Dim, ...]
    loc: str

    def reads_or_writes(self) -> frozenset[int]:
        """The buffers that this launch touches."""
        return frozenset(a.buffer for a in self.arguments if isinstance(a, Pointer))


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of an entry: its name, type and buffer."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]
    buffer: int


@dataclass(slots=True)
class EntryLaunches:
    """The lowered form of one entry graph."""

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)


@dataclass(slots=True)
class LaunchProgram:
    """All entries of a program for one target, and the kernels that they share."""

    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    entries: dict[str, EntryLaunches] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `launches.json`."""
        data = {
            "format": 1,
            "target": self.target,
            "kernels": {k: v.as_json() for k, v in self.kernels.items()},
            "entries": {k: _entry_json(v) for k, v in self.entries.items()},
        }
        return json.dumps(data, indent=None, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LaunchProgram:
        """Read back what `to_json` wrote."""
        data = json.loads(text)
        kernels = {k: Kernel.from_json(v) for k, v in data["kernels"].items()}
        entries = {k: _read_entry(v) for k, v in data["entries"].items()}
        return LaunchProgram(data["target"], kernels, entries)


def _constant(value: Any) -> Any:
    return {"float": str(value)} if isinstance(value, float) else value


def _read_constant(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


def _argument(value: Pointer | Dim | float) -> Any:
    if isinstance(value, Pointer):
        return [value.buffer, str(value.offset), value.dtype.value]
    return {"float": str(value)} if isinstance(value, float) else str(value)


def _read_argument(value: Any) -> Pointer | Dim | float:
    if isinstance(value, list):
        return Pointer(value[0], parse_dim(value[1]), DType(value[2]))
    return float(value["float"]) if isinstance(value, dict) else parse_dim(value)


def _port_json(port: Port) -> list[Any]:
    return [port.name, port.dtype.value, [str(d) for d in port.shape], port.buffer]


def _read_port(data: list[Any]) -> Port:
    return Port(data[0], DType(data[1]), tuple(parse_dim(d) for d in data[2]), data[3])


def _entry_json(entry: EntryLaunches) -> dict[str, Any]:
    return {
        "inputs": [_port_json(p) for p in entry.inputs],
        "outputs": [_port_json(p) for p in entry.outputs],
        "buffers": [[b.kind, b.name, b.dtype.value, str(b.numel)] for b in entry.buffers],
        "launches": [
            [x.kernel, [_argument(a) for a in x.arguments], [str(d) for d in x.grid], x.loc]
            for x in entry.launches
        ],
    }


def _read_entry(data: Mapping[str, Any]) -> EntryLaunches:
    return EntryLaunches(
        [_read_port(p) for p in data["inputs"]],
        [_read_port(p) for p in data["outputs"]],
        [Buffer(k, n, DType(t), parse_dim(d)) for k, n, t, d in data["buffers"]],
        [
            Launch(k, tuple(_read_argument(a) for a in args), tuple(map(parse_dim, grid)), loc)
            for k, args, grid, loc in data["launches"]
        ],
    )


def is_multiple(dim: Dim, factor: int) -> bool:
    """Whether `dim` is a multiple of `factor` for every value of its symbols (as far as known)."""
    if isinstance(dim, Sym):
        return all(coefficient % factor == 0 for _, coefficient in dim.terms)
    return dim % factor == 0
