"""How long the entries of a side take: measured here, or read from traces that were exported."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsc.diff.sides import Side
from dsc.errors import UsageError
from dsc.files import read_text
from dsc.ir.costs import step_sizes
from dsc.ir.layers import layer_of

if TYPE_CHECKING:
    from dsc.runtime.executable import Executable

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


@dataclass(frozen=True)
class Span:
    """One event of a profile, in milliseconds."""

    name: str
    category: str
    start: float
    length: float
    loc: str = ""


def measure(side: Side, context: int, trust: bool, repeats: int = REPEATS) -> dict[str, Timing]:
    """Run every entry of a side on seeded inputs under the profiler; a warm-up is not counted."""
    from dsc.ir.samples import sample_inputs
    from dsc.runtime.probes import seconds_of
    from dsc.runtime.profiler import Profiler

    executable = _executable(side, trust)
    timings = {}
    for name, graph in side.program.entries.items():
        sizes = step_sizes(graph, 1, CHUNK, context, side.program.symbols)
        runs = []
        for attempt in range(repeats + 1):
            inputs = sample_inputs(graph, sizes)
            with Profiler() as profiler:
                seconds = seconds_of(partial(executable.run, name, inputs))
            if attempt:
                events = profiler.events
                steps = [Span(e.name, e.category, e.start, 1e3 * e.seconds, e.loc) for e in events]
                runs.append((1e3 * seconds, _by_layer(steps)))
        timings[name] = _median(runs)
    return timings


def read_profile(path: Path, entries: Iterable[str]) -> dict[str, Timing]:
    """Timings by entry from a trace that `Profiler.export_chrome_trace` wrote.

    Steps belong to the run of the entry within which they lie. A trace without entries is one run
    of the only entry. Raises `UsageError`.
    """
    spans = _spans(path)
    names = list(entries)
    runs: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for outer in (s for s in spans if s.category == ENTRY):
        end = outer.start + outer.length
        inside = [s for s in spans if s.category == STEP and outer.start <= s.start < end]
        runs.setdefault(outer.name, []).append((outer.length, _by_layer(inside)))
    if not runs and len(names) == 1:
        steps = [s for s in spans if s.category == STEP]
        runs[names[0]] = [(sum(s.length for s in steps), _by_layer(steps))]
    found = {name: _median(runs[name]) for name in names if name in runs}
    if not found:
        raise UsageError(
            "the trace has no run of any entry",
            where=str(path),
            hint=f"profile a session that runs {', '.join(names)}",
        )
    return found


def _spans(path: Path) -> list[Span]:
    try:
        events = json.loads(read_text(path))["traceEvents"]
        return [
            Span(
                str(e["name"]), str(e["cat"]), float(e["ts"]) / 1e3, float(e["dur"]) / 1e3,
                str(e.get("args", {}).get("loc", "")),
            )
            for e in events
            if e.get("ph") == "X"  # names and counters lie beside the spans
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UsageError(
            f"no trace of ours: {type(problem).__name__}: {problem}",
            where=str(path),
            hint="export one with Profiler.export_chrome_trace",
        ) from None


def _executable(side: Side, trust: bool) -> Executable:
    """The code of an artifact, or the interpreter for a text."""
    from dsc import api
    from dsc.backends.reference import ReferenceExecutable
    from dsc.rewrite.verify import WIDEST, weight_elements
    from dsc.rewrite.widen import runnable

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


def _by_layer(steps: Sequence[Span]) -> dict[str, float]:
    found: dict[str, float] = {}
    for step in steps:
        if step.category == STEP:
            layer = layer_of(step.loc)
            found[layer] = found.get(layer, 0.0) + step.length
    return found


def _median(runs: Sequence[tuple[float, Mapping[str, float]]]) -> Timing:
    layers = dict.fromkeys(name for _, found in runs for name in found)
    medians = {n: statistics.median(found.get(n, 0.0) for _, found in runs) for n in layers}
    return Timing(statistics.median(total for total, _ in runs), medians)
