"""Times of nodes from ONNX Runtime's own profiler, told as times of the program's nodes.

Names of ONNX nodes end with that of the value that they work for; what ONNX Runtime fused or made
itself is listed under its own operator's name. Nodes inside a branch or a loop count as part of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsc.backends.onnxruntime.forms import absorbed
from dsc.backends.onnxruntime.graph import ORIGIN
from dsc.ir.graph import Graph
from dsc.ir.interpreter import bind_shapes
from dsc.runtime.costs import step_events
from dsc.runtime.profiler import EntryRun, Event, StepTime, lengths_of

KERNEL = "_kernel_time"
"""What ONNX Runtime calls the time of a node, behind its name."""
SLIVER, LEAST = 1e-3, 2e-3
"""What keeps the nodes apart that one event is told as: a share of it, and microseconds."""


@dataclass(frozen=True, slots=True)
class _Run:
    graph: Graph
    sizes: Mapping[str, int]
    lengths: list[int] | None
    start: float


@dataclass
class TimedSession:
    """A session that profiles, and when its runs began by our clock; `owner` is its graph.

    Attention that the model has as one node with two forms is told as the attention over latents of
    an entry that is absorbed; the products around it are listed, and their time is in its own.
    """

    session: Any
    owner: Graph
    runs: list[_Run] = field(default_factory=list)

    def starts(self, graph: Graph, inputs: Mapping[str, Any]) -> None:
        """Note that a run of `graph` on these tensors begins now."""
        sizes = bind_shapes(graph, [inputs[v.name].shape for v in graph.inputs])
        self.runs.append(_Run(graph, sizes, lengths_of(inputs), time.perf_counter()))

    def finish(self, folder: str) -> Callable[[], Iterable[Event]]:
        """Stop profiling; gives what makes the events. `folder` held the profile and goes."""
        text = Path(self.session.end_profiling()).read_text("utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        return lambda: self._events(json.loads(text))

    def _events(self, found: list[dict[str, Any]]) -> Iterable[Event]:
        whole = [e for e in found if e.get("name") == "model_run"]
        kernels = [e for e in found if str(e.get("name", "")).endswith(KERNEL)]
        for run, outer in zip(self.runs, whole, strict=False):
            start, end = outer["ts"], outer["ts"] + outer["dur"]
            inside = [e for e in kernels if start <= e["ts"] <= end]
            steps = _steps(run.graph, self._renamed(run.graph, inside), run.start - start * 1e-6)
            yield from step_events(
                EntryRun(run.graph, run.sizes, run.lengths, lambda steps=steps: steps)  # type: ignore[misc]
            )

    def _renamed(self, graph: Graph, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Events that lie in no other, by the names of an entry's own nodes."""
        whole = {n.outputs[0].name for n in self.owner.nodes if n.op == "mla_attention"}
        own = {last.output.name: (first, middle) for first, middle, last in absorbed(graph)}
        for event in _outermost(events):
            origin = _origin(event)
            if origin not in whole or origin not in own:
                yield event
                continue
            first, middle = (f"{ORIGIN}{node.output.name}" for node in own[origin])
            if event["args"].get("op_name") != "If":
                yield {**event, "name": first}
                continue
            start, length = event["ts"], event["dur"]
            edge = max(SLIVER * length, LEAST)
            yield {**event, "name": first, "ts": start + edge, "dur": 0}
            yield {**event, "name": middle, "ts": start + 2 * edge, "dur": length - 4 * edge}
            yield {**event, "ts": start + length - edge, "dur": 0}


def _steps(graph: Graph, events: Iterable[dict[str, Any]], shift: float) -> list[StepTime]:
    """Consecutive ONNX nodes of one node of the program are one step."""
    known = {node.outputs[0].name: node.op for node in graph.nodes}
    steps: list[StepTime] = []
    seen: set[str] = set()
    for event in events:
        origin = _origin(event)
        node = origin if origin in known else ""
        kernel = known[node] if node else str(event["args"].get("op_name", event["name"]))
        start, seconds = event["ts"] * 1e-6 + shift, event["dur"] * 1e-6
        again = node in seen
        seen.update({node} if node else ())
        if node and steps and steps[-1].node == node:
            first = steps.pop()
            start, seconds, again = first.start, start + seconds - first.start, first.again
        steps.append(StepTime(node, kernel, start, seconds, again=again))
    return steps


def _origin(event: Mapping[str, Any]) -> str:
    """The value that a node works for; empty where its name has none.

    ONNX Runtime appends what it made of a node behind a slash.
    """
    name = str(event["name"]).removesuffix(KERNEL).partition(ORIGIN)[2]
    return name.partition("/")[0]


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that lie in no other."""
    kept: list[dict[str, Any]] = []
    end = -1
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] + event["dur"] > end:
            kept.append(event)
            end = event["ts"] + event["dur"]
    return kept
