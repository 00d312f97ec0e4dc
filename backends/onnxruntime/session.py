"""Runs an artifact's ONNX models through `InferenceSession`, on arrays where they are.

Weights are mapped from the packed file, and all sessions share the pages. Prepacking, which gives
each session a repacked copy of every matrix, is off unless it was asked for when compiling
(`backend_options={"prepack": True}`). It leaves one-token steps as they are, which read each weight
once either way; small batches and prefill gain some, for the memory of the whole model again and
seconds of loading for each session.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.contrib import PROVIDERS, providers_of
from dsc.backends.onnxruntime.graph import ONNX_TYPE
from dsc.backends.onnxruntime.interface import Interface, written
from dsc.backends.onnxruntime.model import result_names
from dsc.backends.onnxruntime.options import Form
from dsc.backends.onnxruntime.timed import TimedSession
from dsc.errors import BackendUnavailable, UsageError
from dsc.ir.arrays import ALIGNMENT, Array, empty
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph
from dsc.ir.index_ranges import giving_indices
from dsc.ir.program import Program
from dsc.runtime.admission import Admitted
from dsc.runtime.emission import check_unchanged
from dsc.runtime.profiler import Profiler, active

PACKAGES = {"cuda": "onnxruntime-gpu"}
"""Where a provider comes in a package of its own."""
FATAL = 4
"""What ONNX Runtime logs; errors come as exceptions."""


def open_session(
    path: Path,
    threads: int | None,
    prepack: bool = False,
    profile: str = "",
    pin: str = "",
    provider: str = "cpu",
    assigned: bool = False,
) -> Any:
    """An `onnxruntime.InferenceSession`. Raises what ONNX Runtime raises.

    `profile` is where its own profiler writes, `pin` the cores of its threads but the first;
    `assigned`: it can tell which provider runs what. Raises `BackendUnavailable` where the
    installed ONNX Runtime has no such provider, or that does not start.
    """
    import onnxruntime

    wanted, here = PROVIDERS[provider], onnxruntime.get_available_providers()
    if wanted not in here:
        raise BackendUnavailable(
            f"this model is made for {wanted}, and the onnxruntime here has {', '.join(here)}",
            f"pip install {PACKAGES.get(provider, 'onnxruntime')}, or export it again with"
            " --onnx-provider cpu",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if pin:
        options.add_session_config_entry("session.intra_op_thread_affinities", pin)
    if assigned:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    session = onnxruntime.InferenceSession(str(path), options, providers=providers_of(provider))
    if wanted not in session.get_providers():  # ONNX Runtime goes on without it
        raise BackendUnavailable(
            f"{wanted} did not start here: no device, or its libraries are missing",
            "see why in a script with onnxruntime.set_default_logger_severity(0), or export it"
            " again with --onnx-provider cpu",
        )
    return session


class OnnxExecutable(Admitted):
    """A loaded artifact: one session a model, all opened when an entry first runs.

    So whoever replaces the folder later changes nothing here. Sessions that open again, for other
    threads or for a profile, refuse a folder that is no longer the one that was loaded. Caches are
    taken as the program declares them or as the model has them, and come back as the model has
    them; all results are new tensors but caches that have room for new rows, which are written.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> None:
        super().__init__(program)
        self._folder, self._manifest = folder, manifest
        meta = manifest["meta"]
        self._models: dict[str, str] = dict(meta["models"])
        self._threads, self._prepack = meta["threads"], meta["prepack"]
        self._provider = meta.get("provider", "cpu")
        form = Form(meta["opset"], meta["wide_caches"])
        self._emitted = (giving_indices(program) if meta["indices"] else program).entries
        self._borders = {n: Interface.of(g, form) for n, g in self._emitted.items()}
        self._pin = ""
        self._sessions: dict[str, Any] = {}
        self._timed: dict[str, TimedSession] = {}

    def open(self, entry: str) -> None:
        """Open the session of an entry's model."""
        self._session(entry)

    def declared(self, graph: Graph, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """The inputs with stand-ins for caches in the model's own type: shapes, no values."""
        seen, border = dict(inputs), self._borders[graph.name]
        for value in graph.inputs:
            wide, array = border.inputs[value.name].numpy, inputs[value.name]
            own = value.type.dtype.numpy
            if array.dtype == wide != own:
                seen[value.name] = np.broadcast_to(np.zeros((), own), array.shape)
        return seen

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run an entry's model. Raises what ONNX Runtime raises."""
        graph = self._emitted[graph.name]
        border = self._borders[graph.name]
        types = (border.inputs[v.name].numpy for v in graph.inputs)
        given = [
            inputs[v.name].astype(t, copy=False) for v, t in zip(graph.inputs, types, strict=True)
        ]
        kept = {v.name: array for v, array in zip(graph.inputs, given, strict=True)}
        session = self._session(graph.name)
        profiler, timed = active(), None
        if profiler is not None:
            with profiler.aside():
                timed = self._timed_session(graph.name, profiler)
                session = timed.session
        binding = session.io_binding()
        for value, array in zip(graph.inputs, given, strict=True):
            _bind(binding.bind_input, value.name, ONNX_TYPE[border.inputs[value.name]], array)
        results, shared = {}, written(graph)
        named = zip(graph.output_names, result_names(graph), graph.outputs, strict=True)
        for name, theirs, output in named:
            if name in shared:
                results[name] = kept[shared[name]]
            else:
                shape = [evaluate(d, env) for d in output.type.shape]
                results[name] = empty(shape, border.outputs[name])
            _bind(binding.bind_output, theirs, ONNX_TYPE[border.outputs[name]], results[name])
        if timed is not None:
            timed.starts(graph, inputs)
        session.run_with_iobinding(binding)
        for source in shared.values():
            if kept[source] is not inputs[source]:  # in the model's own type
                inputs[source][...] = kept[source]
        declared = zip(graph.output_names, graph.outputs, strict=True)
        own = {name: x.type.dtype.numpy for name, x in declared if name not in border.caches}
        return results | {n: results[n].astype(dtype, copy=False) for n, dtype in own.items()}

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Use this many threads from the next run on; sessions open again."""
        self._threads = threads or self._threads
        cores = sorted(os.sched_getaffinity(0)) if pin else []
        if pin and len(cores) < (self._threads or 1):
            raise UsageError(
                f"{self._threads} threads cannot be pinned to {len(cores)} cores",
                hint="use fewer threads, or do not pin",
            )
        # The calling thread works as well and is not ONNX Runtime's to pin; cores count from 1.
        self._pin = ";".join(str(core + 1) for core in cores[1 : self._threads or len(cores)])
        self._sessions = {}

    def _timed_session(self, entry: str, profiler: Profiler) -> TimedSession:
        """A session of the entry's model with ONNX Runtime's profiler on, until ours ends."""
        path = self._models[entry]
        if path not in self._timed:
            place = tempfile.mkdtemp(prefix="dsc-profile-")
            prefix = str(Path(place) / "ort")
            check_unchanged(self._folder, self._manifest)
            session = open_session(
                self._folder / path,
                self._threads,
                self._prepack,
                prefix,
                self._pin,
                self._provider,
            )
            owner = self._emitted[Path(path).stem]
            timed = self._timed[path] = TimedSession(session, owner)

            def close() -> None:
                del self._timed[path]
                profiler.later(timed.finish(place))

            profiler.at_end(close)
        return self._timed[path]

    def _session(self, entry: str) -> Any:
        if not self._sessions:
            check_unchanged(self._folder, self._manifest)
            self._sessions = {
                path: open_session(
                    self._folder / path,
                    self._threads,
                    self._prepack,
                    pin=self._pin,
                    provider=self._provider,
                )
                for path in sorted(set(self._models.values()))
            }
        return self._sessions[self._models[entry]]


def _bind(bind: Any, name: str, element_type: int, array: Array) -> None:
    # ONNX Runtime takes no null pointer, which is what an empty tensor has.
    address = array.ctypes.data or ALIGNMENT
    bind(name, "cpu", 0, element_type, list(array.shape), address)
