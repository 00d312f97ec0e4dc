"""A loaded artifact of the tvm backend: runs entries on arrays where they are."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsc.backends.tvm.lean import KeptFile, MappedWeights, Threads, load_library, tiles_allowed
from dsc.backends.tvm.timed import TimedEntry, timed_entries
from dsc.errors import ArtifactError, BackendUnavailable, UsageError
from dsc.ir.arrays import ALIGNMENT, Array, address, empty
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph
from dsc.ir.types import DType
from dsc.runtime.admission import Admitted
from dsc.runtime.executable import Call
from dsc.runtime.profiler import active, lengths_of
from dsc.runtime.standalone import lacking

if TYPE_CHECKING:
    from dsc.ir.program import Program

    Words = np.ndarray[Any, np.dtype[np.int64]]


class TvmExecutable(Admitted):
    """Entries of a library over mapped weights and one arena that grows to the largest entry.

    An arena serves one step at a time: threads that run entries wait for each other.
    """

    looks = True

    def __init__(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> None:
        super().__init__(program)
        self.meta = manifest["meta"]
        self._plan = KeptFile(folder / "plan.json")
        self._timed: dict[str, TimedEntry] | None = None
        self._lock = threading.Lock()
        lacks = lacking(self.meta["cpu_needs"])
        if lacks:
            raise BackendUnavailable(
                f"this artifact was compiled for {self.meta['cpu']} and needs {', '.join(lacks)},"
                " which this CPU or operating system does not give",
                hint="compile it on this machine, or for a target such as cpu:x86-64-v3",
            )
        if self.meta["tiles"] and not tiles_allowed():
            raise BackendUnavailable(
                "this artifact multiplies by AMX, which this CPU or operating system does not give",
                hint="compile it on this machine, or for a target such as cpu:x86-64-v4",
            )
        library, names = folder / "tvm" / "kernels.so", self.meta["entries"]
        self.functions = load_library(library, names, self.meta["threads"])
        self._threads = Threads(self.meta["threads"])
        self.weights = self._map_weights(folder, manifest["weights"])
        addresses = self.weights.addresses(self.meta["weights"]) if self.weights else []
        self._arena = np.empty(0, dtype=np.uint8)
        self._steps = np.fromfile(folder / "tvm" / "steps.bin", dtype=np.int64)
        self._weights = np.array(addresses, dtype=np.int64)

    def _map_weights(self, folder: Path, path: str | None) -> MappedWeights | None:
        if path is not None:
            return MappedWeights(folder / path)
        if self.meta["weights"]:
            hint = "compile it with weights (--weights FOLDER)"
            raise ArtifactError("this artifact was compiled without weights", hint=hint)
        return None

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Run on this many threads from now on. Raises `UsageError` where the pool is too small."""
        wanted = Threads(threads or self.meta["threads"], pin, asked=threads is not None)
        wanted.apply()
        self._threads = wanted

    def prepare(self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]) -> Call:
        """A call over a table of values of its own, in which all but new memory stands already.

        The call raises `UsageError` where the library refuses what it is given.
        """
        facts = self.meta["entries"][graph.name]
        slots = {name: at for at, name in enumerate(facts["slots"])}
        table = np.zeros(len(slots) + facts["derived"] + len(self._weights), np.int64)
        table[len(slots) + facts["derived"] :] = self._weights
        for name, size in env.items():
            if name in slots:
                table[slots[name]] = size
        for port in graph.inputs:
            table[slots[f"input:{port.name}"]] = _address(inputs[port.name])
        updated = {name: inputs[source] for name, source in facts["in_place"].items()}
        made: list[tuple[str, int, list[int], DType]] = []
        for name, value in zip(graph.output_names, graph.outputs, strict=True):
            at = slots[f"output:{name}"]
            if name in updated:
                table[at] = _address(updated[name])
            else:
                shape = [evaluate(d, env) for d in value.type.shape]
                made.append((name, at, shape, value.type.dtype))

        def call() -> dict[str, Array]:
            results = dict(updated)
            with self._lock:  # one arena
                for name, at, shape, dtype in made:
                    results[name] = empty(shape, dtype)
                    table[at] = _address(results[name])
                table[slots["arena"]] = self._arena_address(facts["arena_bytes"])
                self._call(graph.name, table, env, inputs)
            return {name: results[name] for name in graph.output_names}

        return call

    def _call(
        self, entry: str, table: Words, env: Mapping[str, int], inputs: Mapping[str, Array]
    ) -> None:
        """Execute the entry's list of steps, or its timed form when somebody profiles."""
        profiler, timed = active(), None
        if profiler is not None:
            timed = self._timed.get(entry) if self._timed is not None else None
            if timed is None or timed.sizes != env:
                with profiler.aside():
                    timed = self._timed_entry(entry, env)
        if timed is None:
            steps = address(self._steps) + self.meta["entries"][entry]["steps_at"]
        else:
            steps = timed.address
        self._threads.apply()
        failed = self.functions[entry](address(table), steps)
        if failed:
            self.admissions[entry].values(inputs, env)
            raise UsageError(refusal(self.meta["entries"][entry]["checks"][failed - 1]))
        if profiler is not None and timed is not None:
            profiler.ran(timed.finished(lengths_of(inputs)))

    def _timed_entry(self, entry: str, env: Mapping[str, int]) -> TimedEntry | None:
        """The timed form of an entry for these sizes, where the artifact has one."""
        if self._timed is None:
            self._timed = timed_entries(self._plan.read(), self.program.entries, self._steps)
        timed = self._timed.get(entry)
        if timed is not None:
            timed.prepare(env)
        return timed

    def _arena_address(self, size: int) -> int:
        """The arena's address, on a 64-byte boundary."""
        if len(self._arena) < size + ALIGNMENT:
            self._arena = np.empty(size + ALIGNMENT, dtype=np.uint8)
        return -(-address(self._arena) // ALIGNMENT) * ALIGNMENT


def _address(x: Array) -> int:
    """Where an array lies; one without elements may be anywhere, but not at 0."""
    return address(x) or ALIGNMENT


def refusal(check: Sequence[str]) -> str:
    """A check that failed, in words."""
    kind, name, what = check
    return what if kind in ("address", "computed") else f"{name} {what}"
