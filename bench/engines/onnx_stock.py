"""An exported folder in stock ONNX Runtime, as its example.py calls it: no dsc in the process.

The folder is exported once into the cache folder, by the command, with caches in place unless
`cache` is grown. Past and present are bound to one memory, of one sequence to as many rows of it as
a step sees, in whole `ROWS`, so that the steps of so many tokens share a binding and ONNX Runtime
lays its memory out once for all of them; grown caches are `OrtValue`s that go from step to step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = {"stock": ("onnxruntime",)}
CHUNK, ROWS = 512, 64
TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of element types."""


def exported(options: Mapping[str, Any]) -> Path:
    """The folder of an export, made where it is not there yet."""
    folder, quant = Path(options["folder"]), options["quant"]
    ops, rows = options.get("ops", "ort"), options.get("rows", "in-place")
    group = options.get("group") if quant != "none" else None
    ending = f"-{group}" if group else ""
    ending += "" if rows == "in-place" else f"-{rows}"
    place = Path(options["cache"]) / f"{folder.name}-{ops}-{quant}-{options['commit']}{ending}"
    if not place.is_dir():
        command = [sys.executable, "-m", "dsc", "export", str(folder), "--dtype", "fp32"]
        command += ["--quant", quant, "--onnx-ops", ops, "--prefill-chunk", str(CHUNK)]
        command += ["--cache", rows, "-o", str(place)]
        command += ["--group-size", str(group)] if group else []
        subprocess.run(command, check=True, capture_output=True)
    return place


class Engine:
    """Sessions of the folder's models, and the caches between steps."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        self.folder = exported(options)
        self.compile_seconds = time.perf_counter() - start
        self.runtime: Any = import_module("onnxruntime")
        self.threads, self.vocabulary = options["threads"], int(options["vocabulary"])
        manifest = json.loads((self.folder / "dsc.json").read_text())
        self.meta = manifest["meta"]
        prepack = options.get("prepack")
        self.prepack = self.meta["prepack"] if prepack is None else prepack
        self.units = ", ".join([self.runtime.__version__, "CPUExecutionProvider"])
        self.sessions: dict[str, Any] = {}
        start = time.perf_counter()
        decode = self.session("decode")
        self.load_seconds = time.perf_counter() - start
        self.names = [x.name for x in decode.get_outputs()]
        self.caches = [x for x in decode.get_inputs() if x.name.startswith("past.")]
        self.in_place = self.caches[0].shape[1] == "C"
        self.random = np.random.default_rng(0)

    def session(self, entry: str, profile: str = "") -> Any:
        """The session of an entry's model; one with a `profile` is another each time."""
        path = self.meta["models"][entry]
        if path in self.sessions and not profile:
            return self.sessions[path]
        made = self.opened(self.folder / path, profile)
        if not profile:
            self.sessions[path] = made
        return made

    def opened(self, path: Path, profile: str = "") -> Any:
        """A session of a model by its path, in the engine's threads."""
        options = self.runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        off = "0" if self.prepack else "1"
        options.add_session_config_entry("session.disable_prepacking", off)
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        providers = ["CPUExecutionProvider"]
        return self.runtime.InferenceSession(str(path), options, providers=providers)

    def forget(self, batch: int, rows: int) -> None:
        """Begin with empty caches, of so many rows where they have room."""
        empty = self.runtime.OrtValue.ortvalue_from_shape_and_type
        self.held = 0
        self.bindings: dict[tuple[Any, ...], Any] = {}
        shapes = {x.name: (batch, rows, x.shape[2]) for x in self.caches}
        self.rooms = {n: np.zeros(s, np.float32) for n, s in shapes.items() if self.in_place}
        self.past = {x.name: empty([batch, 0, x.shape[2]], TYPES[x.type]) for x in self.caches}

    def forward(self, session: Any, ids: Any) -> float:
        """Seconds of a step over new tokens [batch, count]; the caches grow."""
        start = time.perf_counter()
        if self.in_place:
            self._written(session, ids)
            self.held += ids.shape[1]
            return time.perf_counter() - start
        results = session.run_with_ort_values(self.names, self.values(ids) | self.past)
        found = dict(zip(self.names, results, strict=True))
        found["logits"].numpy()
        self.past = {name: found[name.replace("past", "present")] for name in self.past}
        self.held += ids.shape[1]
        return time.perf_counter() - start

    def _written(self, session: Any, ids: Any) -> None:
        """Run a step over caches in place, by the binding of the step before where that fits."""
        key = (session, ids.shape, self.rows(ids))
        if key not in self.bindings:
            self.bindings = {key: self._bound(session, ids)}
        binding, given = self.bindings[key]
        for name, value in self.step(ids).items():
            given[name].update_inplace(value)
        session.run_with_iobinding(binding)

    def _bound(self, session: Any, ids: Any) -> Any:
        """A binding of a step's inputs, of caches in place and of logits; and the inputs."""
        binding, step = session.io_binding(), self.values(ids)
        for name, value in step.items():
            binding.bind_ortvalue_input(name, value)
        for name, room in self.views(ids).items():
            memory = ("cpu", 0, room.dtype, room.shape, room.ctypes.data)
            binding.bind_input(name, *memory)
            binding.bind_output(name.replace("past", "present"), *memory)
        binding.bind_output("logits")
        return binding, step

    def rows(self, ids: Any) -> int:
        """Rows of caches that a step is given, in whole `ROWS`."""
        return int(-(-(self.held + ids.shape[1]) // ROWS) * ROWS)

    def views(self, ids: Any) -> dict[str, Any]:
        """The rows of caches that a step is given: of one sequence those that it sees."""
        rows = self.rows(ids)
        return {n: x[:, :rows] if len(x) == 1 else x for n, x in self.rooms.items()}

    def step(self, ids: Any) -> dict[str, Any]:
        """What goes into a step beside the caches."""
        batch, count = ids.shape
        step = {"input_ids": ids, "positions": np.tile(self.held + np.arange(count), (batch, 1))}
        return step | {
            "lengths": np.full(batch, self.held), "logits_at": np.full((batch, 1), count - 1),
        }  # fmt: skip

    def values(self, ids: Any) -> dict[str, Any]:
        """The same as `OrtValue`s."""
        value = self.runtime.OrtValue.ortvalue_from_numpy
        return {name: value(x) for name, x in self.step(ids).items()}

    def ids(self, batch: int, count: int) -> Any:
        """Random tokens."""
        return self.random.integers(3, self.vocabulary, (batch, count), dtype=np.int64)

    def prefill(self, batch: int, tokens: int, room: int = 0) -> float:
        """Seconds of a prompt into empty caches, in chunks."""
        self.forget(batch, tokens + room)
        session = self.session("prefill")
        chunks = (min(CHUNK, tokens - at) for at in range(0, tokens, CHUNK))
        return sum(self.forward(session, self.ids(batch, count)) for count in chunks)

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the caches."""
        self.batch = batch
        self.prefill(batch, context, room)

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        session = self.session("decode")
        return [self.forward(session, self.ids(self.batch, 1)) for _ in range(count)]

    def memory(self) -> dict[str, float]:
        """Gigabytes that this process allocated, and what it has of mapped files in memory."""
        lines = (x.split() for x in open("/proc/self/status") if x.startswith("Rss"))
        return {name.rstrip(":"): int(kb) / 1e6 for name, kb, _ in lines}

    def kernels(self, context: int, rounds: int) -> dict[str, Any]:
        """The products of a decode step alone, beside the step (`bench.onnx_kernels`)."""
        from bench.onnx_kernels import beside_step

        return beside_step(self, context, rounds)
