"""How long the entries of a side take: measured here, or read from traces that were exported."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dsc.backends.reference import ReferenceExecutable
from dsc.diff.sides import Side
from dsc.errors import UsageError
from dsc.files import read_text
from dsc.ir.costs import step_sizes
from dsc.ir.layers import layer_of
from dsc.ir.samples import sample_inputs
from dsc.rewrite.verify import WIDEST, weight_elements
from dsc.rewrite.widen import runnable
from dsc.runtime.executable import Executable
from dsc.runtime.profiler import Event, Profiler

REPEATS = 5
CHUNK = 16
"""New tokens of a measured step of an entry that takes any number."""
STEP, ENTRY = "step", "entry"


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one run of an entry, and of each part of the model within it.

    `layers` is empty where the runtime reports whole entries alone.
    """

    milliseconds: float
    layers: Mapping[str, float] = field(default_factory=dict)


def measure(side: Side, context: int, trust: bool, repeats: int = REPEATS) -> dict[str, Timing]:
    """Run every entry of a side on seeded inputs under the profiler; a warm-up is not counted."""
    from dsc.runtime.probes import seconds_of

    executable = executable_of(side, trust)
    timings = {}
    for name, graph in side.program.entries.items():
        sizes = step_sizes(graph, 1, CHUNK, context, side.program.symbols)
        runs = []
        for attempt in range(repeats + 1):
            inputs = sample_inputs(graph, sizes)
            with Profiler() as profiler:
                seconds = seconds_of(partial(executable.run, name, inputs))
            if attempt:
                runs.append((seconds, _by_layer(profiler.events)))
        timings[name] = _median(runs)
    return timings


def read_profile(path: Path, entries: Iterable[str]) -> dict[str, Timing]:
    """Timings by entry from a trace that `Profiler.export_chrome_trace` wrote.

    Steps belong to the run of the entry within which they lie. A trace without entries is one run
    of the only entry. Raises `UsageError`.
    """
    events = _events(path)
    names = list(entries)
    runs: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for run in (e for e in events if e.category == ENTRY):
        inside = [e for e in events if run.start <= e.start < run.start + run.seconds]
        runs.setdefault(run.name, []).append((run.seconds, _by_layer(inside)))
    if not runs and len(names) == 1:
        layers = _by_layer(events)
        runs[names[0]] = [(sum(layers.values()), layers)]
    found = {name: _median(runs[name]) for name in names if name in runs}
    if not found:
        raise UsageError(
            "the trace has no run of any entry",
            where=str(path),
            hint=f"profile a session that runs {', '.join(names)}",
        )
    return found


def _events(path: Path) -> list[Event]:
    try:
        return [
            Event(
                str(e["name"]),
                str(e["cat"]),
                float(e["ts"]) / 1e6,
                float(e["dur"]) / 1e6,
                loc=str(e.get("args", {}).get("loc", "")),
            )
            for e in json.loads(read_text(path))["traceEvents"]
            if e.get("ph") == "X"  # names and counters lie beside them
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UsageError(
            f"no trace of ours: {type(problem).__name__}: {problem}",
            where=str(path),
            hint="export one with Profiler.export_chrome_trace",
        ) from None


def executable_of(side: Side, trust: bool) -> Executable:
    """The code of an artifact, or the interpreter for a text."""
    from dsc import api

    if side.folder is not None:
        if not side.has_values:
            raise UsageError(
                "an artifact without weights cannot be measured",
                where=str(side.folder),
                hint="compile it with its weights",
            )
        return api.load(side.folder, trust=trust).executable
    if weight_elements(side.program) > WIDEST:
        raise UsageError("this text is too wide to interpret", where=side.label)
    return ReferenceExecutable(runnable(side.program, False))


def _by_layer(events: Iterable[Event]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.category == STEP:
            seconds[layer_of(event.loc)] += event.seconds
    return dict(seconds)


def _median(runs: Sequence[tuple[float, Mapping[str, float]]]) -> Timing:
    layers = dict.fromkeys(name for _, layers in runs for name in layers)
    medians = {n: 1e3 * statistics.median(x.get(n, 0.0) for _, x in runs) for n in layers}
    return Timing(1e3 * statistics.median(total for total, _ in runs), medians)
