"""Running an artifact on a GPU: binaries, device memory and launches, through its driver.

The arena is as large as was planned, outputs and small inputs are in buffers that grow as needed,
caches stay where they are (`held`). The host's copy of a cache is refreshed by `read_back` alone:
copying it after every token would cost more than the step.

What one step after another does again, on the same addresses, is queued as one graph: a decode step
has a hundred launches and more, and queueing them one by one takes longer than they run. So each
session has graphs of its own. Where steps choose their tokens themselves, those of the next are
copied from the last one's on the device, and the host waits once, at the end. Under a profiler
launches are queued one by one between events (`timer`).
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dsc.backends.triton.driver import (
    Argument,
    Driver,
    DriverError,
    Function,
    OutOfMemory,
    ReadyLaunch,
)
from dsc.backends.triton.held import Held, Key, Replay
from dsc.backends.triton.launch import Kernel, runnable, sampled
from dsc.backends.triton.memory import HINT
from dsc.backends.triton.nvtx import Ranges, path_of, wanted
from dsc.backends.triton.schedule import Address, Call, Schedule, resolve
from dsc.backends.triton.timed import timed_run
from dsc.backends.triton.weights import shared
from dsc.errors import BackendUnavailable, DeviceError, MemoryLimitError
from dsc.ir.arrays import Array, empty
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.sampled import IDS, LOGITS, SAMPLING, SEEDS
from dsc.ir.types import DType
from dsc.runtime.admission import Admitted, moved_on
from dsc.runtime.executable import ArrayType, IndexSpan
from dsc.runtime.plan import ARENA, WEIGHT, EntryPlan, Plan
from dsc.runtime.profiler import active, lengths_of

ALIGNMENT = 256
INPUTS, END = "inputs", ""
"""The buffer of all inputs but the states; where they end."""
WHOLE_ARENA = -1  # stands for the arena among addresses by buffer
AGAIN = "load the artifact again; what a kernel has done wrong stays until the process ends"


class DeviceExecutable(Admitted):
    """Runs an artifact's launches on the first device of a kind.

    `weights` are their file, or addresses by name of such as lie on the device already, which stay
    the caller's. Raises `BackendUnavailable` where there is no driver, or a device of another
    architecture.
    """

    def __init__(
        self,
        folder: Path,
        weights: Path | Mapping[str, int],
        program: Program,
        driver: Driver | None = None,
    ) -> None:
        self._driver = driver or driver_of("cuda")
        self._folder, self._held = folder, Held(self._driver, program.name)
        self._release = weakref.finalize(self, self._held.release)
        self._release.atexit = False  # the driver may be gone by then
        self._lock = threading.Lock()
        try:
            with _told(self._driver):
                self._open(weights, program)
        except BaseException:
            with suppress(DriverError):  # what went wrong first is told
                self._release()
            raise

    def _open(self, weights: Path | Mapping[str, int], program: Program) -> None:
        driver, folder = self._driver, self._folder
        if driver.arch != folder.name:
            target = f"{driver.kind}:{driver.arch}"
            hint = f'compile it with target="{target}" (--target {target})'
            found = f"the binaries are for {folder.name}, the device is {driver.arch}"
            raise BackendUnavailable(found, hint)
        self._launches = runnable(Plan.from_json((folder / "plan.json").read_bytes()))
        super().__init__(program)
        self._functions = _load_functions(driver, folder)
        if isinstance(weights, Path) and weights.is_file():
            self._held.weights = shared(weights, driver, program.name)
            weights = self._held.weights.upload(weights)
        self._weights = {} if isinstance(weights, Path) else weights
        self._ranges = Ranges(driver.kind) if wanted() else None

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run an entry on the host's arrays; caches stay on the device (see `read_back`)."""
        with self._working():
            return self._run(graph, inputs, env)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The device for one call at a time. Raises `MemoryLimitError` and `DeviceError`."""
        with self._lock, _told(self._driver):
            self._driver.begin()
            yield

    @property
    def device(self) -> str:
        """The device, as a target has it."""
        return f"{self._driver.kind}:{self._driver.arch}"

    def copy_speed(self) -> float:
        """Bytes a second that the device copies, read and written."""
        with self._working():
            return self._held.timer.copy_speed()

    def product_speed(self, kind: str) -> float:
        """Operations a second of the device's matrix units: `bf16`, `fp8`, `int8`."""
        with self._working():
            return self._held.timer.product_speed(self._folder, kind)

    def continued(
        self,
        entry: str,
        inputs: Mapping[str, Array],
        sampling: Array,
        seeds: Array,
        steps: int,
    ) -> tuple[Array, Array]:
        """See `dsc.runtime.executable.Continues`: nothing comes to the host between steps."""
        env = self.admissions[entry].along(inputs, steps)
        with self._working():
            given = {**inputs, SAMPLING: sampling, SEEDS: seeds}
            return self._continue(sampled(entry), given, env, steps)

    def sizes(
        self, entry: str, types: Mapping[str, ArrayType]
    ) -> tuple[Mapping[str, int], dict[str, ArrayType]]:
        """See `dsc.runtime.executable.Queues`."""
        one = {name: np.empty((), dtype.numpy) for name, (_, dtype) in types.items()}
        given = {name: np.broadcast_to(x, types[name][0]) for name, x in one.items()}
        env = self.admissions[entry].sizes(given)
        with self._lock:
            lowered = self._launches.entries[entry]
            shapes = self._schedule((entry, *env.items()), lowered, env).output_shapes
        ports = zip(lowered.outputs, shapes, strict=True)
        return env, {port.name: (shape, port.type.dtype) for port, shape in ports}

    def indices(self, entry: str, sizes: Mapping[str, int]) -> list[IndexSpan]:
        """See `dsc.runtime.executable.Queues`."""
        return self.admissions[entry].spans(sizes)

    def queue(
        self, entry: str, sizes: Mapping[str, int], addresses: Mapping[str, int], stream: int
    ) -> None:
        """See `dsc.runtime.executable.Queues`: each stream has an arena of its own."""
        with self._working():
            lowered, key = self._launches.entries[entry], (entry, *sizes.items())
            places = {p.buffer: addresses[p.name] for p in (*lowered.inputs, *lowered.outputs)}
            places[WHOLE_ARENA] = self._held.pool(f"arena of stream {stream}", lowered.arena_bytes)

            def ready() -> Replay:
                schedule = self._schedule(key, lowered, sizes)
                return Replay(self._prepare(lowered, schedule, places))

            replay = self._held.replay((*key, *places.items()), ready)
            for launch in replay.launches:
                self._driver.launch(launch, stream)

    def _run(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        entry, start, profiler = graph.name, time.perf_counter(), active()
        lowered = self._launches.entries[entry]
        content, places = _packed(lowered, inputs)
        addresses, results = self._addresses(entry, lowered, inputs, places, env)
        self._driver.upload(self._held.pools[INPUTS][0], content.ctypes.data, content.nbytes)
        spans = None
        if profiler is not None:
            schedule = self._schedule((entry, *env.items()), lowered, env)
            spans = self._held.timer.spans(self._prepare(lowered, schedule, addresses))
        elif self._ranges is not None:
            schedule = self._schedule((entry, *env.items()), lowered, env)
            ran = [launch for launch in lowered.launches if launch.runs(env)]
            ready = self._prepare(lowered, schedule, addresses)
            self._ranges.queue(self._driver.launch, ready, [path_of(entry, x) for x in ran])
        else:
            self._queue((entry, *env.items()), lowered, addresses, env)
        for port in lowered.outputs:
            if port.name not in lowered.in_place:
                made = results[port.name]
                self._driver.download(made.ctypes.data, addresses[port.buffer], made.nbytes)
        self._driver.synchronise()
        if profiler is not None and spans is not None:
            seconds = spans()
            begins = accumulate(seconds[:-1], initial=start)
            each = list(zip(begins, seconds, strict=True))
            profiler.ran(timed_run(graph, lowered, env, lengths_of(inputs), each))
        return results

    def _continue(
        self, entry: str, inputs: Mapping[str, Array], env: Mapping[str, int], steps: int
    ) -> tuple[Array, Array]:
        driver, lowered = self._driver, self._launches.entries[entry]
        content, places = _packed(lowered, inputs)
        rows = np.tile(content, (steps, 1))
        for step in range(1, steps):
            rows[step] = _packed(lowered, moved_on(inputs, step))[0]
        addresses, results = self._addresses(entry, lowered, inputs, places, env)
        given, ahead = self._held.pools[INPUTS][0], self._held.pool("ahead", rows.nbytes)
        driver.upload(ahead, rows.ctypes.data, rows.nbytes)
        ids = np.empty((steps, *results[IDS].shape), np.int64)
        log, size = self._held.pool("log", ids.nbytes), results[IDS].nbytes
        buffers = {p.name: p.buffer for p in (*lowered.inputs, *lowered.outputs)}
        chosen, tokens = (addresses[buffers[name]] for name in (IDS, "input_ids"))
        for step in range(steps):
            driver.copy(given, ahead + step * content.nbytes, content.nbytes)
            if step:
                driver.copy(tokens, chosen, size)
            self._queue((entry, *env.items()), lowered, addresses, env)
            driver.copy(log + step * size, chosen, size)
        logits = results[LOGITS]
        driver.download(ids.ctypes.data, log, ids.nbytes)
        driver.download(logits.ctypes.data, addresses[buffers[LOGITS]], logits.nbytes)
        driver.synchronise()
        return ids[:, :, 0].T, logits

    def _addresses(
        self,
        entry: str,
        lowered: EntryPlan,
        inputs: Mapping[str, Array],
        places: Mapping[str, int],
        env: Mapping[str, int],
    ) -> tuple[dict[int, int], dict[str, Array]]:
        """Where what an entry reads and writes lies, by buffer, and arrays for its outputs."""
        given = self._held.pool(INPUTS, places[END])
        addresses = {p.buffer: given + places[p.name] for p in lowered.inputs if p.name in places}
        state = set(lowered.in_place.values())
        for port in lowered.inputs:
            if port.name in state:
                addresses[port.buffer] = self._held.resident(inputs[port.name])
        addresses[WHOLE_ARENA] = self._held.pool("arena", lowered.arena_bytes)
        results: dict[str, Array] = {}
        schedule = self._schedule((entry, *env.items()), lowered, env)
        for port, shape in zip(lowered.outputs, schedule.output_shapes, strict=True):
            if port.name in lowered.in_place:
                results[port.name] = inputs[lowered.in_place[port.name]]
                continue
            made = results[port.name] = empty(shape, port.type.dtype)
            addresses[port.buffer] = self._held.pool(f"output {port.name}", made.nbytes)
        return addresses, results

    def read_back(self, cache: Array) -> None:
        """Copy what the device holds of a cache, or of a view of one, into the host's array."""
        with self._working():
            place = self._held.fresh(cache)
            if place is None:
                return
            self._driver.download(cache.ctypes.data, place, cache.nbytes)
            self._driver.synchronise()

    def new_cache(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """An array that stands for zeros on the device, by its address; nobody reads its memory."""
        with self._working():
            made = empty(shape, dtype)
            self._held.cleared(made)
        return made

    def rows(self, batch: int) -> int:
        """How many sequences a step runs over that has so many: each number has its own graphs.

        Up to 4 as many as there are, then a multiple of 4, and of 16 from 32 on.
        """
        step = 1 if batch <= 4 else 4 if batch <= 32 else 16
        return -(-batch // step) * step

    def copy(self, source: Array, target: Array) -> None:
        """Copy a dense view of a cache to another, on the device."""
        with self._working():
            into = self._held.resident(target)
            self._driver.copy(into, self._held.resident(source), source.nbytes)

    def changed(self, cache: Array) -> None:
        """Upload the memory that a cache lies in anew, when it is next given."""
        with self._lock:
            self._held.changed(cache)

    def close(self) -> None:
        """Give all device memory back; nothing runs after this."""
        with _told(self._driver):
            self._release()

    def _schedule(self, key: Key, lowered: EntryPlan, env: Mapping[str, int]) -> Schedule:
        """The schedule for an entry's sizes."""
        return self._held.schedule(key, lambda: resolve(lowered, env))

    def _queue(
        self, key: Key, lowered: EntryPlan, addresses: Mapping[int, int], env: Mapping[str, int]
    ) -> None:
        """Queue an entry's launches: one by one at first, as one graph when they come again."""
        driver = self._driver
        fresh = False

        def ready() -> Replay:
            nonlocal fresh
            fresh = True
            schedule = self._schedule(key, lowered, env)
            return Replay(self._prepare(lowered, schedule, addresses))

        replay = self._held.replay((*key, *addresses.items()), ready)
        if fresh:
            for launch in replay.launches:
                driver.launch(launch)
            return
        if replay.graph is None:
            replay.graph = driver.capture(replay.launches)
        driver.replay(replay.graph)

    def _prepare(
        self, lowered: EntryPlan, schedule: Schedule, addresses: Mapping[int, int]
    ) -> list[ReadyLaunch]:
        places = dict(addresses)
        for number, buffer in enumerate(lowered.buffers):
            if buffer.region == WEIGHT:
                places[number] = self._weights[buffer.name]
            elif buffer.region == ARENA:
                places[number] = addresses[WHOLE_ARENA] + buffer.offset
        launches = []
        for call in schedule.calls:
            if 0 not in call.grid:
                arguments = pack_arguments(self._launches.kernels[call.kernel], call, places)
                function = self._functions[call.kernel]
                launches.append(self._driver.prepare(function, call.grid, arguments))
        return launches


def _packed(lowered: EntryPlan, inputs: Mapping[str, Array]) -> tuple[Array, dict[str, int]]:
    """All inputs but the states as bytes that lie side by side, and where each begins."""
    state = set(lowered.in_place.values())
    arrays = {p.name: inputs[p.name] for p in lowered.inputs if p.name not in state}
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = end
        end = -(-(end + array.nbytes) // ALIGNMENT) * ALIGNMENT
    content = np.zeros(end, np.uint8)
    for name, array in arrays.items():
        start = places[name]
        content[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return content, {**places, END: end}


def driver_of(kind: str) -> Driver:
    """The driver of a kind of device. Raises `BackendUnavailable` where there is none."""
    from dsc.backends.triton.hip import HipDriver

    try:
        return HipDriver() if kind == "hip" else Driver()
    except DriverError as missing:
        hint = "run it on a machine with a GPU and its driver, or in the interpreter"
        raise BackendUnavailable(str(missing), hint) from None


@contextmanager
def _told(driver: Driver) -> Iterator[None]:
    """Work whose refusals by the driver are told: `MemoryLimitError` and `DeviceError`.

    Kernels and graphs may need more room on the device than is told beforehand.
    """
    try:
        yield
    except OutOfMemory as full:
        free, total = driver.memory()
        told = f"the GPU has {free / 1e6:.1f} MB free of {total / 1e6:.1f}, and no room ({full})"
        raise MemoryLimitError(told, hint=HINT) from None
    except DriverError as failed:
        raise DeviceError(str(failed), hint=AGAIN if driver.over else None) from None


def pack_arguments(kernel: Kernel, call: Call, addresses: Mapping[int, int]) -> list[Argument]:
    """A call's run-time arguments as C values, in the order of the compiled entry."""
    kinds = [kind for kind in kernel.signature.values() if kind != "constexpr"]
    packed: list[Argument] = []
    for kind, value in zip(kinds, call.arguments, strict=True):
        if isinstance(value, Address):
            packed.append(ctypes.c_uint64(addresses[value.buffer] + value.offset))
        else:
            packed.append((ctypes.c_int64 if kind == "i64" else ctypes.c_int32)(int(value)))
    return packed


def _load_functions(driver: Driver, folder: Path) -> dict[str, Function]:
    records: dict[str, dict[str, Any]] = json.loads((folder / "kernels.json").read_text())
    functions: dict[str, Function] = {}
    for key, record in records.items():
        if record["global_scratch"] or record["profile_scratch"]:
            raise BackendUnavailable(f"{key} wants scratch memory", "recompile without profiling")
        image = (folder / record["file"]).read_bytes()
        try:
            functions[key] = driver.load(
                image,
                record["symbol"],
                record["warps"],
                record["shared"],
                record["parameters"],
                record.get("dependent", False),
            )
        except OutOfMemory:
            raise
        except DriverError as refused:
            raise BackendUnavailable(
                f"the GPU's driver does not take {record['file']}: {refused}",
                "install a newer driver, or compile the model again with this machine's Triton",
                where=str(folder),
            ) from None
    return functions
