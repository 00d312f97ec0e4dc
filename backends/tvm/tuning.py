"""How bf16 products are cut for the CPU at hand: a few candidates, timed once on the host.

A candidate says how products are multiplied (`WAYS`, of those that the CPU has) and how many
columns a task takes. Each is timed on two representative products, one row (bound by
bandwidth) and 64 rows (bound by arithmetic), on fixed data, in turns; a shape's time is the least
of its rounds. The default stays unless another choice is a tenth faster in each of two measurements
on their own, so that noise does not turn a choice over. The way to multiply is one for all shapes:
a token's sums must not depend on how many rows share its batch.

Timing takes seconds, and is done only where the target is the host and the program multiplies bf16.
What was found is kept (`dsc.kept`) by everything that it depends on. `DSC_TUNE=0`, `--no-tune` or
another target take the defaults: results are the same but for rounding.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc import kept
from dsc.backends.tvm import workers
from dsc.backends.tvm.machine import Machine, cpu_of, machine_for
from dsc.errors import DscError, InternalError
from dsc.hardware import processor
from dsc.ir.dims import symbol
from dsc.ir.graph import GraphBuilder
from dsc.ir.types import DType, TensorType
from dsc.settings import switched
from dsc.targets import Target

if TYPE_CHECKING:
    from dsc.backends.tvm.objects import Kernel

COLUMNS = (16, 32, 64)
"""Columns that a task may take."""
MARGIN = 0.9
"""A choice replaces the default when it takes at most this share of its time."""
ROUNDS = 10
"""Of each measurement."""
M, K = 3072, 2048
"""The weight of the products that are timed: 12 MiB, more than second-level caches hold."""
FEW, MANY = 1, 64
"""Their numbers of rows."""
WAYS = ("tiles", "widened", "pairs")
"""Ways to multiply: tile registers (`amx`), fp32 FMAs on widened lanes, vdpbf16ps (`bf16`)."""
Times = Mapping[tuple[str, int], Mapping[int, float]]
"""Seconds by candidate, which is a way to multiply and the columns of a task, and by number of
rows."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What may be chosen: a way to multiply, and the columns of a task (see `Machine`)."""

    way: str
    narrow: int
    wide: int

    @staticmethod
    def of(machine: Machine) -> Tiling:
        """What a machine has by rule."""
        way = "tiles" if machine.tiles else "pairs" if machine.pairs else "widened"
        return Tiling(way, machine.narrow, machine.wide)

    def on(self, machine: Machine) -> Machine:
        """A machine with this choice; beside tiles it keeps its way to multiply vectors."""
        tiles, pairs = self.way == "tiles", self.way == "pairs"
        pairs = machine.pairs if tiles else pairs
        return replace(machine, tiles=tiles, pairs=pairs, narrow=self.narrow, wide=self.wide)


def ways(machine: Machine) -> list[str]:
    """How a machine can multiply; what it does by rule comes first."""
    able = {"tiles": machine.tiles, "widened": True, "pairs": machine.narrows}
    found = [way for way in WAYS if able[way]]
    return sorted(found, key=lambda way: way != Tiling.of(machine).way)


def tuned(
    machine: Machine, target: Target, threads: int | None, asked: bool
) -> tuple[Machine, str]:
    """The machine with what is fastest on it, and whether that is by `rule` or by `timing`."""
    if not asked or _is_off() or not machine.bf16 or target.arch not in ("", cpu_of("").host):
        return machine, "rule"
    threads = threads or len(os.sched_getaffinity(0))
    key = key_of(machine, threads)
    found = load(key)
    if found is None:
        workers.warm(2 * len(COLUMNS))  # they build candidates, and then the kernels of a model
        found = agreed(time_candidates(machine, threads), Tiling.of(machine))
        store(key, found)
    return found.on(machine), "timing"


def begin() -> None:
    """Build the candidates beside what the caller does, if nothing is kept that they would tell.

    It is no error if that fails: they are built when they are timed.
    """
    global _ahead
    if _ahead is None and not _is_off() and len(os.sched_getaffinity(0)) > 1:
        _ahead = threading.Thread(target=_build_ahead, daemon=True)
        _ahead.start()


_ahead: threading.Thread | None = None


def _build_ahead() -> None:
    from dsc.backends.tvm.objects import objects_of

    with suppress(DscError, InternalError, OSError):
        machine = machine_for(Target("cpu"))
        if machine.bf16 and load(key_of(machine, len(os.sched_getaffinity(0)))) is None:
            objects_of(list(_kernels(machine).values()))


def _is_off() -> bool:
    return not switched("DSC_TUNE", on="1", off="0")


def agreed(measurements: Sequence[Times], default: Tiling) -> Tiling:
    """What all measurements choose, or the default."""
    found = {choose(times, default) for times in measurements}
    return found.pop() if len(found) == 1 else default


def choose(times: Times, default: Tiling) -> Tiling:
    """The way to multiply by many rows, then columns by shape; the default where little is gained.

    A way that makes many rows faster must not make one row slower by as much.
    """
    way, best = default.way, MARGIN
    for other in dict.fromkeys(way for way, _ in times if way != default.way):
        few = times[other, default.narrow][FEW] / times[default.way, default.narrow][FEW]
        many = times[other, default.wide][MANY] / times[default.way, default.wide][MANY]
        if many <= best and few * MARGIN <= 1:
            way, best = other, many

    def columns(default: int, rows: int) -> int:
        seconds = {n: found[rows] for (each, n), found in times.items() if each == way}
        fastest = min(seconds, key=lambda n: seconds[n])
        return fastest if seconds[fastest] <= MARGIN * seconds[default] else default

    return Tiling(way, columns(default.narrow, FEW), columns(default.wide, MANY))


def time_candidates(machine: Machine, threads: int) -> list[Times]:
    """Two measurements: seconds by candidate and shape, the least of rounds in turns.

    The rounds of both alternate.
    """
    import numpy as np

    from dsc.backends.tvm.kernels.panels import panel_bytes

    draw = np.random.default_rng(0).integers
    # bf16 from 2^-15 to 2: no product is subnormal.
    x, w = (draw(0x3800, 0x3FFF, n, dtype=np.uint16) for n in (MANY * K, M * K))
    y = np.zeros(MANY * M, dtype=np.uint16)
    panels = np.zeros(panel_bytes(MANY, K), dtype=np.uint8)
    addresses = [array.ctypes.data for array in (x, w, y, panels)]
    with tempfile.TemporaryDirectory(prefix="dsc-tuning-") as folder:
        runs = build(machine, Path(folder), threads)
        both = [{c: dict.fromkeys((FEW, MANY), float("inf")) for c in runs} for _ in range(2)]
        for number, rows in itertools.product(range(2 * ROUNDS), (FEW, MANY)):
            times = both[number // 2 % 2]
            turns = list(runs)[:: 1 if number % 2 else -1]
            for each in (turns[-1], *turns):  # what comes first pays for what was before
                start = time.perf_counter()
                runs[each](*addresses, rows)
                seconds = time.perf_counter() - start
                times[each][rows] = min(times[each][rows], seconds)
    return list(both)


def build(
    machine: Machine, folder: Path, threads: int, m: int = M, k: int = K
) -> dict[tuple[str, int], Callable[..., Any]]:
    """`linear` with a weight [m, k] by each candidate, ready to run.

    They take the addresses of x, weight, y and panels, and the number of rows.
    """
    from dsc.backends.tvm import lean, library
    from dsc.backends.tvm.objects import objects_of

    if _ahead is not None:
        _ahead.join()
    kernels, parts = _kernels(machine, m, k), [library.PRELUDE]
    for (way, columns), kernel in kernels.items():
        arity = 5 + (way == "tiles")
        parts.append(library.declared(kernel.symbol, arity))
        parts.append(library.packed(f"{way}_{columns}", kernel.symbol, arity))
    objects = objects_of(list(kernels.values()))
    path = folder / "linear.so"
    path.write_bytes(library.compile_library("\n".join(parts), objects, machine))
    loaded = lean.load_library(path, [f"{way}_{columns}" for way, columns in kernels], threads)
    lean.Threads(threads).apply()

    def candidate(way: str, columns: int) -> Callable[..., Any]:
        run, tiles = loaded[f"{way}_{columns}"], way == "tiles"
        return lambda x, w, y, panels, rows: run(x, w, y, *[panels] * tiles, rows, k)

    return {each: candidate(*each) for each in kernels}


def _kernels(machine: Machine, m: int = M, k: int = K) -> dict[tuple[str, int], Kernel]:
    """`linear` with a weight [m, k] by each candidate, the machine's own way first."""
    from dsc.backends.tvm.kernels.region import lower
    from dsc.backends.tvm.objects import Kernel

    builder = GraphBuilder("linear")
    x = builder.input("x", TensorType(DType.bf16, (symbol("N"), k)))
    weight = builder.input("weight", TensorType(DType.bf16, (m, k)))
    (node,) = builder.finish(builder.call("linear", x, weight)).nodes
    kernels = {}
    for way, columns in itertools.product(ways(machine), COLUMNS):
        cut = Tiling(way, columns, columns).on(machine)
        kernels[way, columns] = Kernel.of(f"{way}_{columns}", lower(node, cut), cut)
    return kernels


def key_of(machine: Machine, threads: int) -> dict[str, Any]:
    """Everything that the fastest choice depends on, in full."""
    from dsc.backends.tvm.objects import surroundings

    return {
        "kernel": "linear",
        "rows": [FEW, MANY],
        "weight": [M, K],
        "machine": asdict(machine),
        "processor": processor(),
        "threads": threads,
        **surroundings(machine),
    }


def load(key: Mapping[str, Any]) -> Tiling | None:
    """What was chosen under a key, or `None`."""
    data = kept.get("tuning", key)
    if data is None:
        return None
    found = Tiling(**json.loads(data))
    cut = found.narrow in COLUMNS and found.wide in COLUMNS and found.way in WAYS
    return found if cut else None


def store(key: Mapping[str, Any], found: Tiling) -> None:
    """Keep a choice."""
    kept.put("tuning", key, json.dumps(asdict(found)).encode())
