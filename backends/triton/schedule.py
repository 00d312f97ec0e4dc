"""An entry's launches with every expression evaluated: what an executor walks, once per sizes.

Executors keep the result and reuse it while the shapes stay the same, as they do over the steps of
a generation. Where buffers lie is the plan's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.errors import UsageError
from dsc.ir.dims import evaluate
from dsc.runtime.plan import EntryPlan, Ref

MOST = ((1 << 31) - 1, 65535, 65535)
"""Programs along each axis of a grid, of CUDA and HIP alike."""


@dataclass(frozen=True, slots=True)
class Address:
    """`offset` bytes into a buffer."""

    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel call: run-time arguments in signature order and the grid, three numbers."""

    kernel: str
    arguments: tuple[Address | int, ...]
    grid: tuple[int, int, int]
    loc: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """The calls of an entry at some sizes of the symbols, and the shapes of its outputs."""

    calls: tuple[Call, ...]
    output_shapes: tuple[tuple[int, ...], ...]


def resolve(entry: EntryPlan, env: Mapping[str, int]) -> Schedule:
    """Evaluate an entry at the sizes of its symbols. Raises `UsageError` for grids of no GPU."""
    calls = []
    for launch in entry.launches:
        arguments = tuple(
            Address(a.buffer, evaluate(a.offset, env)) if isinstance(a, Ref) else evaluate(a, env)
            for a in launch.arguments
        )
        x, y, z = (*(evaluate(d, env) for d in launch.grid), 1, 1)[:3]
        if any(n > most for n, most in zip((x, y, z), MOST, strict=True)):
            raise UsageError(
                f"{launch.op} at these sizes takes a grid of {x} x {y} x {z} programs; a GPU has"
                f" room for {' x '.join(map(str, MOST))}",
                where=launch.loc or None,
                hint="call it with fewer rows, matrices or sequences at once",
            )
        calls.append(Call(launch.kernel, arguments, (x, y, z), launch.loc))
    outputs = tuple(tuple(evaluate(d, env) for d in p.type.shape) for p in entry.outputs)
    return Schedule(tuple(calls), outputs)
