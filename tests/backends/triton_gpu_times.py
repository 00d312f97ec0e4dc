"""Times of an artifact's steps on the NVIDIA GPU at hand, with random weights that are made there.

    dsc compile models/v3.py --config CONFIG --weights none --backend triton --dtype bf16 -o out
    python -m tests.backends.triton_gpu_times out --context 512 4096

A step's time is that of `run` on the host's clock, inputs up and logits down included. Times of
kernels are torch's profiler's; bytes and flops beside them are what a kernel must at least move and
do. The device's own speed is read first: a copy of 2 GiB, and a bf16 product of 8192 cubed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsc.backends.triton import cuda
from dsc.backends.triton.driver import Driver
from dsc.backends.triton.launch import Kernel
from dsc.backends.triton.schedule import Call, resolve
from dsc.ir.dims import evaluate
from dsc.ir.interpreter import bind_shapes
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.runtime.plan import EntryPlan
from dsc.runtime.session import Session

CONTEXT, PROMPT = 8192, 512
BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*i64": 8, "*i32": 4}
Inputs = dict[str, torch.Tensor]


@dataclass(slots=True)
class Row:
    """A kernel's share of a step: calls, microseconds, and the least bytes and flops."""

    calls: int = 0
    us: float = 0.0
    nbytes: int = 0
    flops: int = 0


def median_s(step: Callable[[], object], repeats: int) -> float:
    """Median of the wall time of a step that waits for the device."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def probes(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), flops a second of a matrix product."""
    x = torch.empty(1 << 30, dtype=torch.bfloat16, device=device).normal_()
    y = torch.empty_like(x)
    a, b = (torch.empty(8192, 8192, dtype=x.dtype, device=device).normal_() for _ in range(2))

    def waited(step: Callable[[], object]) -> float:
        def both() -> None:
            step()
            torch.cuda.synchronize()

        return median_s(both, 10)

    return 2 * x.nbytes / waited(lambda: y.copy_(x)), 2 * 8192**3 / waited(lambda: a @ b)


def random_weights(program: Program, device: torch.device) -> Inputs:
    """A value for each weight: ones for norms, frequencies for rope, small numbers otherwise."""
    made = {}
    for name, t in program.weight_types().items():
        shape = tuple(int(d) for d in t.shape)  # type: ignore[arg-type]
        empty = torch.empty(shape, dtype=t.dtype.torch, device=device)
        if "inv_freq" in name:
            made[name] = empty.copy_(1e4 ** -(torch.arange(shape[0]) / shape[0]))
        elif "norm" in name:
            made[name] = empty.fill_(1)
        else:
            made[name] = empty.normal_(0, 0.02)
    return made


def load(folder: Path, device: torch.device) -> tuple[Program, cuda.CudaExecutable, Inputs]:
    """An artifact without weights, over random ones, which the caller keeps."""
    program = parse_program((folder / "program.dsc").read_text())
    weights = random_weights(program, device)
    torch.cuda.synchronize()
    upload = cuda._upload_weights

    def there_already(driver: Driver, path: Path) -> tuple[int, dict[str, int]]:
        base = driver.allocate(1)
        return base, {name: w.data_ptr() - base for name, w in weights.items()}

    cuda._upload_weights = there_already
    try:
        place = folder / "triton" / Driver().arch
        return program, cuda.CudaExecutable(place, folder / "none", program), weights
    finally:
        cuda._upload_weights = upload


def cost(
    kernel: Kernel, call: Call, entry: EntryPlan, env: Mapping[str, int], seen: int
) -> tuple[int, int]:
    """Least bytes and flops of a call of a kernel that weighs, where `seen` tokens are cached."""
    names = [name for name, kind in kernel.signature.items() if kind != "constexpr"]
    a: dict[str, Any] = {**kernel.constants, **dict(zip(names, call.arguments, strict=True))}
    if kernel.function.startswith("gemm"):
        z, m, n, k = call.grid[1], a["M"], a["N"], a["K"]
        m = min(m, seen) if a["HAS_LIMIT"] else m
        size_a, size_b, size_c = (BYTES[kernel.signature[x]] for x in "abc")
        shared = 1 if a["b_batch"] == 0 else z
        return z * m * (k * size_a + n * size_c) + shared * n * k * size_b, 2 * z * m * n * k
    if kernel.function.startswith("grouped_gemm"):
        n, k = a["N"], a["K"]
        rows = evaluate(entry.buffers[a["c"].buffer].size, env) // BYTES[kernel.signature["c"]] // n
        return 2 * (min(a["EXPERTS"], rows) * n * k + rows * (k + n)), 2 * rows * n * k
    if kernel.function.startswith(("experts_hidden", "experts_output")):
        matrices = 1 if kernel.function.startswith("experts_hidden") else a["TOP_K"]
        weights = call.grid[0] * matrices * a["N"] * a["K"]
        return 2 * weights, 2 * weights
    if kernel.function == "latent_attention":
        c, r = a["C"], a["R"]
        return 2 * seen * (c + r), 2 * call.grid[0] * a["H"] * seen * (2 * c + r)
    if kernel.function == "flash_attention":
        pairs = a["S"] * (seen - a["S"]) + a["S"] * (a["S"] + 1) // 2
        return 0, 2 * pairs * call.grid[1] * (a["D"] + a["R"] + a["E"])
    return 0, 0


def profile(exe: cuda.CudaExecutable, name: str, inputs: Inputs, seen: int) -> dict[str, Row]:
    """Where a step's time goes, by kernel: the second of two steps, so that graphs are made."""
    entry = exe._launches.entries[name]
    env = bind_shapes(exe.program.entries[name], [inputs[p.name].shape for p in entry.inputs])
    calls = [call for call in resolve(entry, env).calls if 0 not in call.grid]
    symbols = {kernel.function for kernel in exe._launches.kernels.values()}
    for _ in range(2):
        exe.run(name, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        exe.run(name, inputs)
    events = [e for e in recorded.events() or [] if e.name in symbols]
    events.sort(key=lambda e: e.time_range.start)
    rows: dict[str, Row] = {}
    for call, event in zip(calls, events, strict=True):
        nbytes, flops = cost(exe._launches.kernels[call.kernel], call, entry, env, seen)
        row = rows.setdefault(call.kernel, Row())
        row.calls += 1
        row.us += event.time_range.end - event.time_range.start
        row.nbytes += nbytes
        row.flops += flops
    return rows


def show(title: str, seconds: float, rows: Mapping[str, Row]) -> None:
    """Print a step's time and its kernels, the longest first."""
    busy = sum(row.us for row in rows.values())
    count = sum(row.calls for row in rows.values())
    print(f"{title}: {seconds * 1e3:.3f} ms, {count} launches, kernels {busy / 1e3:.3f} ms")
    for key, row in sorted(rows.items(), key=lambda item: -item[1].us)[:16]:
        speed = f"{row.nbytes / row.us / 1e3:7.0f} GB/s {row.flops / row.us / 1e6:7.1f} TFLOP/s"
        rest = speed if row.flops else ""
        print(f"  {key:48} x{row.calls:4} {row.us:10.1f} us {row.us / busy:6.1%} {rest}")


def main() -> None:
    """Time a prefill of 512 tokens and decode steps at the contexts asked for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096])
    options = parser.parse_args()
    device = torch.device("cuda")
    copy, product = probes(device)
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    program, exe, _weights = load(options.artifact, device)
    session = Session(exe, program, 1, CONTEXT, PROMPT)
    given: dict[str, Inputs] = {}
    run = exe.run

    def noting(entry: str, inputs: Mapping[str, torch.Tensor]) -> Inputs:
        given[entry] = dict(inputs)
        return run(entry, inputs)

    exe.run = noting  # type: ignore[method-assign]
    session.prefill(torch.randint(0, 1000, (1, PROMPT)))
    session.decode([5])
    exe.run = run  # type: ignore[method-assign]
    wide = next(entry for entry, inputs in given.items() if entry != "decode")
    seconds = median_s(lambda: run(wide, given[wide]), 20)
    show(f"{wide} of {PROMPT}", seconds, profile(exe, wide, given[wide], PROMPT))
    step = given["decode"]
    for tensor in (x for key, x in step.items() if key.startswith("past.")):
        tensor.normal_()
    for context in options.context:
        step["lengths"], step["positions"] = (
            torch.tensor([context - 1]),
            torch.tensor([[context - 1]]),
        )
        seconds = median_s(lambda: run("decode", step), 200)
        show(f"decode at {context}", seconds, profile(exe, "decode", step, context))


if __name__ == "__main__":
    main()
