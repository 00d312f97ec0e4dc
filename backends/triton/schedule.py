"""An entry's launches with every expression evaluated: what an executor walks, once per shapes.

`resolve` binds the symbols from the shapes of the inputs, sizes every buffer, packs the temporaries
into one arena by their lifetimes, and evaluates grids and scalars. Executors keep the result and
reuse it while the shapes stay the same, as they do over the steps of a generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.backends.triton.launch import Buffer, EntryLaunches, Pointer
from dsc.errors import UsageError
from dsc.ir.dims import evaluate

ARENA_ALIGNMENT = 256

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Address:
    """`offset` bytes into a buffer."""

    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel call: run-time arguments in signature order and the grid, three numbers."""

    kernel: str
    arguments: tuple[Address | int | float, ...]
    grid: tuple[int, int, int]
    loc: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """The calls of an entry for one set of input shapes.

    `places` maps temporaries to arena offsets; `outputs` gives name, buffer and shape.
    """

    calls: tuple[Call, ...]
    places: Mapping[int, int]
    arena_bytes: int
    output_shapes: tuple[tuple[int, ...], ...]


def resolve(entry: EntryLaunches, shapes: Shapes) -> Schedule:
    """Evaluate an entry for the shapes of its inputs. Raises `UsageError` when they do not fit."""
    env = bind(entry, shapes)
    calls = []
    for launch in entry.launches:
        grid = tuple(evaluate(d, env) for d in launch.grid)
        arguments: list[Address | int | float] = []
        for a in launch.arguments:
            if isinstance(a, Pointer):
                arguments.append(Address(a.buffer, evaluate(a.offset, env) * a.dtype.itemsize))
            else:
                arguments.append(a if isinstance(a, float) else evaluate(a, env))
        x, y, z = (*grid, 1, 1)[:3]
        calls.append(Call(launch.kernel, tuple(arguments), (x, y, z), launch.loc))
    places, total = pack_temporaries(entry, env)
    outputs = tuple(tuple(evaluate(d, env) for d in p.shape) for p in entry.outputs)
    return Schedule(tuple(calls), places, total, outputs)


def bind(entry: EntryLaunches, shapes: Shapes) -> dict[str, int]:
    """The values of the symbols, read off the input shapes and checked against them."""
    env: dict[str, int] = {}
    for port in entry.inputs:
        given = shapes.get(port.name)
        if given is None or len(given) != len(port.shape):
            wanted = ", ".join(map(str, port.shape))
            raise UsageError(f"input {port.name} is {given}, [{wanted}] expected")
        for dim, size in zip(port.shape, given, strict=True):
            if str(dim).isidentifier():
                env.setdefault(str(dim), size)
    for port in entry.inputs:
        wanted_shape = tuple(evaluate(d, env) for d in port.shape)
        if wanted_shape != tuple(shapes[port.name]):
            raise UsageError(f"input {port.name} is {shapes[port.name]}, {wanted_shape} expected")
    return env


def lifetimes(entry: EntryLaunches) -> dict[int, tuple[int, int]]:
    """The first and the last launch that touch each temporary."""
    spans: dict[int, tuple[int, int]] = {}
    for at, launch in enumerate(entry.launches):
        for buffer in launch.reads_or_writes():
            if entry.buffers[buffer].kind == "temp":
                first, _ = spans.get(buffer, (at, at))
                spans[buffer] = (first, at)
    return spans


def pack_temporaries(entry: EntryLaunches, env: Mapping[str, int]) -> tuple[dict[int, int], int]:
    """Arena offsets of an entry's temporaries for these values of the symbols, and the total."""
    sizes = {
        i: evaluate(b.numel, env) * b.dtype.itemsize
        for i, b in enumerate(entry.buffers)
        if b.kind == "temp"
    }
    return pack(sizes, lifetimes(entry))


def pack(
    sizes: Mapping[int, int], spans: Mapping[int, tuple[int, int]]
) -> tuple[dict[int, int], int]:
    """Arena offsets of temporaries, in order of birth, each in the lowest gap; and the total."""
    places: dict[int, int] = {}
    living: list[tuple[int, int, int]] = []  # offset, end, last use
    total = 0
    for buffer, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        living = sorted(x for x in living if x[2] >= first)
        need = -(-max(sizes[buffer], 1) // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
        offset = 0
        for begin, end, _ in living:
            if begin - offset >= need:
                break
            offset = max(offset, end)
        living.append((offset, offset + need, last))
        places[buffer] = offset
        total = max(total, offset + need)
    return places, total


def is_state(buffer: Buffer) -> bool:
    """Whether an output's buffer is an input's: a cache that is updated in place."""
    return buffer.kind == "input"
