"""What a card makes of the kernels, beside what else runs on it: one command, one JSON.

    python -m bench.gpu prepare FOLDER [--target cuda:sm_90]    anywhere: cubins and plans
    python -m bench.gpu run FOLDER [SECTION ...] > gpu.json     on the card, under 8 minutes

The card's machine needs this checkout, numpy and a driver, and for what is compared torch with
CUDA, of any version: no Triton. The folder has at most 64 MiB: weights are made on the card, of
random blocks that are repeated. Times of launches are medians by events; bytes and flops beside
them are the plan's (`dsc.runtime.launch_costs`), and shares are of the copy speed and the matrix
peak that were read before. A section that fails says why, and one that would begin after the
deadline is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dsc
from dsc.backends.triton.cuda import CudaExecutable
from dsc.backends.triton.driver import Driver
from dsc.backends.triton.memory import Memory
from dsc.backends.triton.timer import Timer
from dsc.ir.costs import step_sizes
from dsc.ir.dims import evaluate
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.runtime.costs import multiplies_fp8
from dsc.runtime.limit import limit_seconds, step_work, working_set

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 64 << 20
DEADLINE_S, END_S = 420.0, 480.0
REPEATS, WARMUP = 20, 3
BLOCK_BYTES = 1 << 22
"""Of random numbers, of which weights are made by repeating."""
LIMITS: dict[str, Any] = {"max_context": 8192, "max_batch": 64, "prefill_chunk": 4096}
MODELS: Mapping[str, tuple[str, Mapping[str, int], Mapping[str, str]]] = {
    "moonlight-6l": ("moonlight", {"num_hidden_layers": 6}, {}),
    "671b-3l": ("671b", {"num_hidden_layers": 3, "first_k_dense_replace": 1}, {}),
    "671b-3l fp8": ("671b", {"num_hidden_layers": 3, "first_k_dense_replace": 1},
                    {"quant": "fp8"}),
}  # fmt: skip
"""By name a configuration, what of it is changed, and options of the compile."""
POINTS = {
    "decode at 512": (1, 1, 512), "decode at 8000": (1, 1, 8000), "64 at 4096": (64, 1, 4096),
    "prefill of 4096": (1, 4096, 0),
}  # fmt: skip
"""Batch, new tokens and context of the steps."""
Figures = dict[str, Any]


@dataclass(slots=True)
class Row:
    """A kernel's part in a step."""

    launches: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0

    def figures(self, copy: float, peak: float) -> Figures:
        """As JSON, with shares of a copy's bytes a second and of a matrix peak."""
        return {
            "launches": self.launches,
            "us": round(self.seconds * 1e6, 1),
            "bytes": self.bytes,
            "flops": self.flops,
            "of copy speed": round(self.bytes / self.seconds / copy, 3),
            "of matrix peak": round(self.flops / self.seconds / peak, 3),
        }


# --- before, anywhere -----------------------------------------------------------------------------


def prepare(folder: Path, target: str, models: Mapping[str, Any] = MODELS) -> int:
    """Write what the card's machine needs; how many bytes that are. Raises `ValueError`."""
    from dsc.models.configs import CONFIGS

    folder.mkdir(parents=True)
    for name, (known, changes, options) in models.items():
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / f"{known}.json"
            file.write_text(json.dumps(json.loads(CONFIGS[known].read_text()) | dict(changes)))
            compiled = dsc.compile(
                ROOT / "models" / "v3.py", config=str(file), weights="none", backend="triton",
                target=target, dtype="bf16", **LIMITS, **options,
            )  # fmt: skip
            compiled.save(folder / name)
        for extra in ("interpret", "kernels"):
            shutil.rmtree(folder / name / "triton" / extra)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    (folder / "about.json").write_text(json.dumps({"target": target, "commit": commit}))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{folder} has {size} bytes, and {MOST_BYTES} are the most")
    return size


# --- on the card ----------------------------------------------------------------------------------


def run(folder: Path, wanted: list[str]) -> Figures:
    """All sections, or some, each with its figures or with why there are none."""
    start = time.perf_counter()
    about = json.loads((folder / "about.json").read_text())
    names = [p.name for p in sorted(folder.iterdir()) if (p / "dsc.json").is_file()]
    speeds: Figures = {}
    sections: dict[str, Callable[[], Figures]] = {"speeds": partial(_speeds, folder, names, speeds)}
    sections |= {name: partial(_model, folder / name, speeds) for name in names}
    sections |= {"peers": _peers, "sanitizer": partial(_sanitizer, folder, names, start + END_S)}
    found: Figures = {**about, "deadline_s": DEADLINE_S}
    for name, section in sections.items():
        if wanted and name not in (*wanted, "speeds"):
            continue
        began = time.perf_counter()
        if began - start > DEADLINE_S:
            found[name] = {"left out": "after the deadline"}
            continue
        try:
            found[name] = section()
        except Exception as problem:
            found[name] = {"error": f"{type(problem).__name__}: {problem}"}
        found[name]["section_s"] = round(time.perf_counter() - began, 1)
    return found


def _speeds(folder: Path, names: list[str], speeds: Figures) -> Figures:
    """Bytes a second of a copy, and operations a second of the matrix units, by our own probes."""
    driver = Driver()
    memory = Memory(driver, "bench", lambda: None)
    timer = Timer(memory)
    place = folder / names[0] / "triton" / driver.arch
    speeds["copy"] = timer.copy_speed()
    for kind in ("bf16", "fp8", "int8"):
        speeds[kind] = timer.product_speed(place, kind)
    timer.close()
    memory.release()
    driver.close()
    return {"arch": place.name, **{name: float(f"{x:.4g}") for name, x in speeds.items()}}


def _model(folder: Path, speeds: Figures) -> Figures:
    """Steps of a model: milliseconds of kernels and of the host, bytes, and shares of the floor."""
    program = parse_program((folder / "program.dsc").read_text())
    driver = Driver()
    weights = Weights(driver, program)
    place = folder / "triton" / driver.arch
    executable = CudaExecutable(place, folder / "none", program, driver, weights.places)
    try:
        return {
            name: _step(executable, program, point, speeds)
            for name, point in POINTS.items()
            if _fits(program, point)
        }
    finally:
        weights.free()
        executable.close()


def _fits(program: Program, point: tuple[int, int, int]) -> bool:
    batch, new, context = point
    limits = program.limits
    return batch <= limits.max_batch and context + new <= limits.max_context


def _step(
    executable: CudaExecutable, program: Program, point: tuple[int, int, int], speeds: Figures
) -> Figures:
    """One step again and again."""
    batch, new, context = point
    entry, inputs = step_inputs(executable, program, *point)
    times = []
    for _ in range(WARMUP + REPEATS):
        began = time.perf_counter()
        executable.run(entry, inputs)
        times.append(time.perf_counter() - began)
    with dsc.Profiler() as profiler:
        for _ in range(REPEATS):
            executable.run(entry, inputs)
    steps = [event for event in profiler.events if event.category == "step"]
    each = [steps[at :: len(steps) // REPEATS] for at in range(len(steps) // REPEATS)]
    kernels: dict[str, Row] = {}
    for events in each:
        row = kernels.setdefault(events[0].kernel, Row())
        row.launches += 1
        row.seconds += statistics.median(e.seconds for e in events)
        row.bytes += events[0].bytes
        row.flops += events[0].flops
    busy = sum(row.seconds for row in kernels.values())
    attention = sum(
        statistics.median(e.seconds for e in events) for events in each if "attn" in events[0].loc
    )
    work = step_work(program, batch, new, context)
    peak = speeds["fp8" if multiplies_fp8(program) else "bf16"]
    floor = limit_seconds(work, speeds["copy"], peak)
    return {
        "batch": batch,
        "new": new,
        "context": context,
        "launches": len(each),
        "ms": round(statistics.median(times[WARMUP:]) * 1e3, 4),
        "kernels_ms": round(busy * 1e3, 4),
        "attention_ms": round(attention * 1e3, 4),
        "bytes": sum(row.bytes for row in kernels.values()),
        "floor_bytes": working_set(work),
        "of copy speed": round(working_set(work) / speeds["copy"] / busy, 3),
        "of floor": round(floor / busy, 3),
        "kernels": {
            key: row.figures(speeds["copy"], peak)
            for key, row in sorted(kernels.items(), key=lambda item: -item[1].seconds)
        },
    }


def step_inputs(
    executable: CudaExecutable, program: Program, batch: int, new: int, context: int
) -> tuple[str, dict[str, Any]]:
    """The entry of a step, and its inputs: random ids, caches of the device."""
    entry = program.choose_entry(new, batch, context + new)
    graph, limits = program.entries[entry], program.limits
    sizes = step_sizes(graph, batch, new, limits.max_context, program.symbols)
    states = {state.input for state in program.states}
    values = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    for value in graph.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.stored.shape)
        if value.name in states:
            inputs[value.name] = executable.new_cache(shape, value.type.stored.dtype)
        else:
            inputs[value.name] = np.zeros(shape, value.type.dtype.numpy)
    inputs["input_ids"] = values.integers(0, 1000, inputs["input_ids"].shape)
    inputs["positions"][...] = context + np.arange(new)
    inputs["lengths"][...] = context
    inputs["logits_at"][...] = new - 1
    return entry, inputs


class Weights:
    """A program's weights on the device, of random blocks that are repeated."""

    def __init__(self, driver: Driver, program: Program) -> None:
        self.driver, self.places = driver, dict[str, int]()
        driver.activate()
        self._made: dict[str, tuple[int, int]] = {}
        for name, type_ in program.weight_types().items():
            for suffix, part in type_.parts:
                self.places[name + suffix] = self._filled(name + suffix, part)
        driver.synchronise()

    def free(self) -> None:
        """Give all of it back."""
        self.driver.activate()
        self.driver.synchronise()
        for pointer in (*self.places.values(), *(at for at, _ in self._made.values())):
            self.driver.free(pointer)
        self.places, self._made = {}, {}

    def _filled(self, name: str, part: TensorType) -> int:
        size = evaluate(part.nbytes, {})
        target, (block, length) = self.driver.allocate(size), self._block(name, part.dtype)
        for at in range(0, size, length):
            self.driver.copy(target + at, block, min(length, size - at))
        return target

    def _block(self, name: str, dtype: DType) -> tuple[int, int]:
        """Where a block of numbers for such a weight lies, and its bytes."""
        kind = "ones" if "norm" in name else "rope" if "inv_freq" in name else str(dtype)
        if kind not in self._made:
            made = _numbers(kind, dtype)
            pointer = self.driver.allocate(made.nbytes)
            self.driver.upload(pointer, made.ctypes.data, made.nbytes)
            self.driver.synchronise()
            self._made[kind] = pointer, made.nbytes
        return self._made[kind]


def _numbers(kind: str, dtype: DType) -> Any:
    """Ones for norms, frequencies for rope, small numbers, and codes that are none of NaN."""
    count, values = BLOCK_BYTES // dtype.itemsize, np.random.default_rng(1)
    if kind == "ones":
        return np.ones(count).astype(dtype.numpy)
    if kind == "rope":
        return (1e4 ** -(np.arange(count) % 32 / 32)).astype(dtype.numpy)
    if not dtype.is_float or dtype.bits < 16:
        codes = values.integers(0, 120, count, dtype=np.uint8)
        return codes | (values.integers(0, 2, count, dtype=np.uint8) << 7)
    return (0.02 * values.standard_normal(count, np.float32)).astype(dtype.numpy)


def _peers() -> Figures:
    """The same products and attention by torch."""
    from bench import gpu_peers

    return gpu_peers.measure()


def _sanitizer(folder: Path, names: list[str], end: float) -> Figures:
    """What compute-sanitizer finds in steps of the smallest model before `end`, where it is."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"left out": "no compute-sanitizer on this machine"}
    found: Figures = {}
    place = min((folder / name for name in names), key=_weight_bytes)
    for kind in ("memcheck", "racecheck"):
        line = [tool, "--tool", kind, sys.executable, "-m", "bench.gpu", "once", str(place)]
        left = max(1.0, end - time.perf_counter())
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            found[kind] = {"left out": "it was not done in time"}
            continue
        last = [x for x in done.stdout.splitlines() if "SUMMARY" in x or "rror" in x][-3:]
        found[kind] = {"status": done.returncode, "told": last}
    return found


def _weight_bytes(folder: Path) -> int:
    program = parse_program((folder / "program.dsc").read_text())
    return sum(evaluate(t.nbytes, {}) for t in program.weight_types().values())


def once(folder: Path) -> None:
    """A decode step and a short prefill, for the sanitizer."""
    program = parse_program((folder / "program.dsc").read_text())
    driver = Driver()
    weights = Weights(driver, program)
    place = folder / "triton" / driver.arch
    executable = CudaExecutable(place, folder / "none", program, driver, weights.places)
    for point in ((1, 1, 100), (1, 65, 0)):
        executable.run(*step_inputs(executable, program, *point))
    weights.free()
    executable.close()


def main() -> None:
    """Prepare, or run and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("verb", choices=("prepare", "run", "once"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--target", default="cuda:sm_90")
    asked = parser.parse_args()
    if asked.verb == "prepare":
        print(f"{asked.folder}: {prepare(asked.folder, asked.target) / 1e6:.1f} MB")
    elif asked.verb == "once":
        once(asked.folder)
    else:
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        print(json.dumps(run(asked.folder, asked.sections), indent=1))


if __name__ == "__main__":
    main()
