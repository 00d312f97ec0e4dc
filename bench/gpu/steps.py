"""Speeds of the card, and steps of models on it: seconds, bytes, and shares of what could be.

Bytes and flops are the plan's (`dsc.runtime.launch_costs`), what a step must read and compute is
`dsc.runtime.limit`'s. A step's `ms` are those of the work of a user: of decode the host's clock for
a token that is chosen on the device, of a prompt's chunk the host's for the step with its logits.
`ways` are the same launches queued otherwise, by the device's clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dsc
from bench.gpu.device import driver_for, opened
from dsc.backends.triton.device import DeviceExecutable, _packed
from dsc.backends.triton.driver import ReadyLaunch
from dsc.backends.triton.memory import Memory
from dsc.backends.triton.timer import Timer
from dsc.backends.triton.tuner import step_inputs
from dsc.backends.triton.tuning import Step
from dsc.hardware import gpus
from dsc.ir.choosing import Choice
from dsc.ir.program import Program
from dsc.runtime.costs import multiplies_fp8
from dsc.runtime.limit import limit_seconds, step_work, working_set
from dsc.runtime.profiler import Event

POINTS = {
    "decode at 512": (1, 1, 512), "decode at 4096": (1, 1, 4096), "decode at 8000": (1, 1, 8000),
    "64 at 4096": (64, 1, 4096), "prefill of 4096": (1, 4096, 0),
}  # fmt: skip
"""Batch, new tokens and context of the steps."""
KINDS = ("bf16", "fp8", "int8")
WARM_S = 0.3
"""Of work before speeds are read: an idle card's clock is a fifth of a busy one's."""
ROUNDS, QUEUED, TOKENS = 5, 8, (8, 40)
"""Times of which the median is taken; steps queued for each; tokens of a short and a long run."""
DRAWN = Choice(temperature=0.8, top_k=50, top_p=0.95)
Tell = Callable[[str, Any], None]
Figures = dict[str, Any]


def speeds(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """Bytes a second of a copy, and operations a second of the matrix units, by our own probes."""
    models = [path for path in sorted(folder.iterdir()) if (path / "dsc.json").is_file()]
    driver = driver_for(models[0])
    names = [gpu.name for gpu in gpus() if gpu.target.startswith(driver.kind)]
    tell("card", names[0] if names else driver.arch)
    tell("arch", driver.arch)
    memory = Memory(driver, "bench", lambda: None)
    timer = Timer(memory)
    place = models[0] / "triton" / driver.arch
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        with suppress(RuntimeError):  # it is told below
            timer.product_speed(place, "bf16")
    read: dict[str, Callable[[], float]] = {"copy": timer.copy_speed}
    read |= {kind: partial(timer.product_speed, place, kind) for kind in KINDS}
    for kind, probe in read.items():
        try:
            tell(kind, float(f"{probe():.4g}"))
        except Exception as problem:
            tell(f"no {kind}", f"{type(problem).__name__}: {str(problem)[:300]}")
    timer.close()
    memory.release()
    driver.close()


def speed(found: Mapping[str, Any], kind: str) -> float:
    """What was read of the card, the better of our own probe and torch's; NaN where neither was."""
    peer = found.get("torch's speeds", {}).get(kind, {})
    read: list[float] = [found.get("speeds", {}).get(kind, 0.0), peer.get("a second", 0.0)]
    return max(read) or math.nan


def measure(name: str, folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """Steps of a model, each with its figures or with why there are none."""
    copy, bf16, fp8 = (speed(found, kind) for kind in ("copy", "bf16", "fp8"))
    began = time.perf_counter()
    with opened(folder / name) as (executable, program):
        tell("ready_s", round(time.perf_counter() - began, 2))
        for step, point in POINTS.items():
            if not fits(program, point):
                continue
            try:
                peak = fp8 if multiplies_fp8(program) else bf16
                tell(step, measured(executable, program, point, copy, peak))
            except Exception as problem:
                tell(step, {"error": f"{type(problem).__name__}: {str(problem)[:300]}"})


def fits(program: Program, point: tuple[int, int, int]) -> bool:
    """Whether a program holds a step."""
    batch, new, context = point
    limits = program.limits
    longest = context + max(new, TOKENS[1])
    few = batch <= limits.max_batch and new <= limits.prefill_chunk
    return few and longest <= limits.max_context


def measured(
    executable: DeviceExecutable,
    program: Program,
    point: tuple[int, int, int],
    copy: float,
    peak: float,
) -> Figures:
    """One step again and again; shares are of a copy's bytes a second and of a matrix peak."""
    batch, new, context = point
    step = Step.of(program, batch, new, context)
    room = program.limits.max_context - context
    entry, inputs = step.entry, step_inputs(executable, program, step, room=room)
    call = executable.bind(entry, inputs)
    logits = call()["logits"].astype(np.float32)
    host = seconds(call)
    tokens = chosen(executable, entry, inputs) if new == 1 else {}
    queued = ways(executable, prepared(executable, entry, inputs), QUEUED if new == 1 else 2)
    found = described(profiled(call), program, point, copy, peak, tokens.get("likeliest", host))
    return found | {
        "finite": bool(np.isfinite(logits).all()),
        "ways": {name: ms(x) for name, x in queued.items()},
        "a call": ms(host),
        "tokens": {name: ms(x) for name, x in tokens.items()},
    }


def described(
    events: Sequence[Event],
    program: Program,
    point: tuple[int, int, int],
    copy: float,
    peak: float,
    taken: float,
) -> Figures:
    """The launches of a step that took so many seconds, and what it had to take at least."""
    batch, new, context = point
    kernels, products, attention = by_kernel(events), Row(), 0.0
    for each in events:
        attention += each.seconds if "attn" in each.loc else 0.0
        if is_dense(each) and each.flops / peak > each.bytes / copy:
            products.add(each)
    work = step_work(program, batch, new, context)
    needed, limit = working_set(work), limit_seconds(work, copy, peak)
    return {
        "batch": batch,
        "new": new,
        "context": context,
        "launches": len(events),
        "ms": ms(taken),
        "kernels_ms": ms(sum(row.seconds for row in kernels.values())),
        "attention_ms": ms(attention),
        "bytes": sum(row.bytes for row in kernels.values()),
        "flops": sum(row.flops for row in kernels.values()),
        "floor_bytes": needed,
        "limit_ms": ms(limit),
        "of copy speed": share(needed / copy, taken),
        "of limit": share(limit, taken),
        "products": products.figures(copy, peak),
        "kernels": {
            key: row.figures(copy, peak)
            for key, row in sorted(kernels.items(), key=lambda item: -item[1].seconds)
        },
    }


def seconds(step: Callable[[], object]) -> float:
    """The median of a step by the host's clock."""
    times = []
    for _ in range(ROUNDS + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def chosen(executable: DeviceExecutable, entry: str, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a token that is chosen on the device: the likeliest, and one that is drawn.

    A long run less a short one: how it begins and ends, once for many tokens, is in neither.
    """
    batch = len(inputs["input_ids"])
    seeds = np.stack([np.arange(batch), np.zeros(batch, np.int64)], 1)
    found = {}
    for name, choice in (("likeliest", Choice()), ("drawn", DRAWN)):
        options = np.tile(np.array(choice.row, np.float32), (batch, 1))
        runs = [
            seconds(partial(executable.continued, entry, inputs, options, seeds, n)) for n in TOKENS
        ]
        found[name] = (runs[1] - runs[0]) / (TOKENS[1] - TOKENS[0])
    return found


def prepared(
    executable: DeviceExecutable, entry: str, inputs: Mapping[str, Any]
) -> Sequence[ReadyLaunch]:
    """The launches of a step that has run, on the memory that it ran over."""
    lowered, env = executable._launches.entries[entry], executable.admissions[entry].check(inputs)
    places = _packed(lowered, inputs)[1]
    addresses, _ = executable._addresses(entry, lowered, inputs, places, env)
    schedule = executable._schedule((entry, *env.items()), lowered, env)
    return executable._prepare(lowered, schedule, addresses)


def ways(
    executable: DeviceExecutable, launches: Sequence[ReadyLaunch], queued: int
) -> dict[str, float]:
    """Seconds of a step by the device's clock: launches one by one, and as a graph.

    As a graph of launches that begin when the former is done, too.
    """
    driver, timer = executable._driver, executable._held.timer
    driver.activate()

    def one_by_one() -> None:
        for launch in launches:
            driver.launch(launch)

    found = {"one by one": _each(timer, one_by_one, queued)}
    late = [replace(x, function=replace(x.function, dependent=False)) for x in launches]
    for name, some in (("a graph", launches), ("a graph, none begins early", late)):
        graph = driver.capture(some)
        found[name] = _each(timer, partial(driver.replay, graph), queued)
        driver.forget(graph)
    return found


def _each(timer: Timer, queue: Callable[[], None], times: int) -> float:
    def several() -> None:
        for _ in range(times):
            queue()

    return statistics.median([timer.seconds(several) for _ in range(ROUNDS + 1)][1:]) / times


def profiled(call: Callable[[], object]) -> list[Event]:
    """The launches of a step by events, each with the median of its seconds."""
    with dsc.Profiler() as profiler:
        for _ in range(ROUNDS):
            call()
    steps = [event for event in profiler.events if event.category == "step"]
    count = len(steps) // ROUNDS
    return [
        replace(steps[at], seconds=statistics.median(e.seconds for e in steps[at::count]))
        for at in range(count)
    ]


def is_dense(event: Event) -> bool:
    """Whether a launch is, or ends, the product of rows with one weight."""
    return "linear" in event.name.split("+")


@dataclass(slots=True)
class Row:
    """Some launches of a step, summed."""

    launches: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0

    def add(self, event: Event) -> None:
        """Count a launch."""
        self.launches += 1
        self.seconds += event.seconds
        self.bytes += event.bytes
        self.flops += event.flops

    def figures(self, copy: float, peak: float) -> Figures:
        """As JSON, with shares of a copy's bytes a second and of a matrix peak."""
        told = asdict(self)
        told["us"] = round(told.pop("seconds") * 1e6, 1)
        shares = (self.bytes / copy, self.flops / peak)
        names = ("of copy speed", "of matrix peak")
        return told | {n: share(x, self.seconds) for n, x in zip(names, shares, strict=True)}


def by_kernel(events: Sequence[Event]) -> dict[str, Row]:
    """The launches of each kernel."""
    found: dict[str, Row] = {}
    for event in events:
        found.setdefault(event.kernel, Row()).add(event)
    return found


def ms(taken: float) -> float | None:
    """Milliseconds, to a tenth of a microsecond; `None` of NaN."""
    return round(taken * 1e3, 4) if math.isfinite(taken) else None


def share(least: float, taken: float) -> float | None:
    """How much of the time that something took it had to take; `None` where nobody can say."""
    return round(least / taken, 3) if taken > 0 and math.isfinite(least) else None
