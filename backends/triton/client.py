"""An executable whose kernels run in the interpreter, in a child process that this module owns."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from dsc.backends.triton.compile import kernel_environment
from dsc.backends.triton.launch import runnable, sampled
from dsc.backends.triton.timed import timed_run
from dsc.backends.triton.worker import INTERPRETED, read_frame, write_frame
from dsc.errors import ArtifactError, DeviceError
from dsc.ir.arrays import Array, empty
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.sampled import IDS, LOGITS, SAMPLING, SEEDS
from dsc.ir.types import DType
from dsc.runtime.admission import Admitted, moved_on
from dsc.runtime.plan import Plan
from dsc.runtime.profiler import active, lengths_of

AGAIN = "load the artifact again; a machine out of memory ends processes that take much of it"


class InterpretedExecutable(Admitted):
    """Runs an artifact's launches through `worker.py`. Exact to the kernels, and slow."""

    stand_in = (
        "no GPU here runs these kernels: Triton's interpreter stands in for it on the CPU, for"
        " tests; even a tiny model takes seconds for each token"
    )
    computes = True
    process = "worker"
    """The module of this package whose `main` is the process."""

    def __init__(
        self, folder: Path, weights: Path, program: Program, plan: str = INTERPRETED
    ) -> None:
        self._launches = runnable(Plan.from_json((folder / plan).read_bytes()))
        super().__init__(program)
        self._lock = threading.Lock()
        environment = {"OMP_NUM_THREADS": "1", **kernel_environment(), "TRITON_INTERPRET": "1"}
        start = f"from dsc.backends.triton.{self.process} import main; main()"
        command = [sys.executable, "-c", start, str(folder), str(weights), plan]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        if read_frame(self._stdout) is None:
            raise ArtifactError("the interpreting process did not start", where=str(folder))

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None, "the process was started with pipes"
        return self._process.stdout

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run an entry in the child process; updated caches are written back into the inputs."""
        plan = self._launches.entries[graph.name]
        wanted = {p.name: inputs[p.name] for p in plan.inputs}
        outputs, times = self._interpret(graph.name, env, wanted)
        for name, source in plan.in_place.items():
            inputs[source][...] = outputs[name]
            outputs[name] = inputs[source]
        profiler = active()
        if profiler is not None:
            every = zip(plan.launches, pairwise(times), strict=True)
            spans = [(start, end - start) for launch, (start, end) in every if launch.runs(env)]
            profiler.ran(timed_run(graph, plan, env, lengths_of(inputs), spans))
        return outputs

    def continued(
        self,
        entry: str,
        inputs: Mapping[str, Array],
        sampling: Array,
        seeds: Array,
        steps: int,
    ) -> tuple[Array, Array]:
        """See `dsc.runtime.executable.Continues`: a run in the child process for each step."""
        env = self.admissions[entry].along(inputs, steps)
        plan = self._launches.entries[sampled(entry)]
        given = {**inputs, SAMPLING: sampling, SEEDS: seeds}
        ids = empty((len(sampling), steps), DType.i64)
        logits = empty((), DType.f32)
        for step in range(steps):
            outputs, _ = self._interpret(sampled(entry), env, given)
            for name, source in plan.in_place.items():
                inputs[source][...] = outputs[name]
            ids[:, step], logits = outputs[IDS][:, 0], outputs[LOGITS]
            given = {**moved_on(given, 1), "input_ids": outputs[IDS]}
        return ids, logits

    def _interpret(
        self, entry: str, sizes: Mapping[str, int], inputs: Mapping[str, Array]
    ) -> tuple[dict[str, Array], list[float]]:
        """Run an entry in the child process: results, and when it began and each launch ended."""
        header = {"entry": entry, "sizes": dict(sizes)}
        assert self._process.stdin is not None, "the process was started with pipes"
        with self._lock:
            try:
                write_frame(self._process.stdin, header, inputs)
                answer = read_frame(self._stdout)
            except BrokenPipeError:
                answer = None
            except BaseException:  # its answer would be taken for that of the next call
                self._process.kill()
                self._process.wait()
                raise
        if answer is None:
            raise DeviceError(f"the process that interprets {entry} ended", hint=AGAIN)
        if "error" in answer[0]:
            raise RuntimeError(f"interpreting {entry} failed: {answer[0]['error']}")
        self._told(answer[0])
        return answer[1], answer[0]["times"]

    def _told(self, header: Mapping[str, Any]) -> None:
        """Hear what the process tells of a run beside its results."""

    def close(self) -> None:
        """End the child process."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:  # of what a process that ended never read
                pass
        self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None and self._process.poll() is None:
            self.close()
