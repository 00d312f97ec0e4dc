"""The tvm backend's kernels at the shapes of a 6-layer Moonlight, beside the machine's own limits.

Each kernel runs alternately with a read of memory (bytes / time = bandwidth) and with torch's bf16
matrix product (flops / time = matrix peak), so that a busy machine slows all three. Printed are
medians: time, GB/s of operands touched once, GFLOP/s, and the share of the adjacent limit. Weights
rotate through more memory than the caches hold.

    python -m bench.tvm_kernels [--only REGEX] [--rounds 15] [--target cpu]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.ir.dims import evaluate
from dsc.ir.graph import GraphBuilder
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType
from dsc.runtime.executable import Executable
from dsc.targets import parse_target

SETTLE = 0.3
"""Seconds after which torch's threads have stopped spinning: they would take a core each."""
ROTATION = 384 << 20
"""Bytes that copies of a kernel's operands take together."""
EXPERTS = "bf16[{n},2048], i64[{n},6], f32[{n},6], bf16[64,2816,2048], bf16[64,2048,1408]"
LATENT = "bf16[1,1,{h},512], bf16[1,1,{h},64], bf16[1,{t},512], bf16[1,{t},64], i64[1]"
MLA = "bf16[1,{s},16,128], bf16[1,{s},16,64], bf16[1,{s},512], bf16[1,{s},64], bf16[4096,512]"


@dataclass(frozen=True)
class Bench:
    """A call to time: operands in text form, and what it must compute."""

    name: str
    op: str
    text: str
    flops: int


def benches() -> Iterator[Bench]:
    """Decode, small batches and prefill of every kernel that weighs."""
    shapes = {
        "qkv": (3648, 2048),
        "kv_a": (576, 2048),
        "down": (2048, 11264),
        "head": (32000, 2048),
    }
    for name, (m, k) in shapes.items():
        yield _linear(f"linear 1 {name}", 1, m, k)
    for rows in (4, 8, 16, 32, 512):
        yield _linear(f"linear {rows}", rows, 2816, 2048)
    yield _linear("linear 512 dense", 512, 11264, 2048)
    yield _linear("linear 512 down", 512, 2048, 11264)
    for n in (1, 8, 32, 512):
        flops = n * 6 * 6 * 2048 * 1408
        yield Bench(f"experts {n}", "experts", EXPERTS.format(n=n), flops)
    for h, t in ((16, 1024), (16, 4096), (128, 4096)):
        text = LATENT.format(h=h, t=t) + " {scale=0.05}"
        flops = 2 * h * t * (576 + 512)
        yield Bench(f"latent_attention {h}x{t}", "latent_attention", text, flops)
    for eq, a, b in (("bshd,hdc->bshc", 128, "16,128,512"), ("bshc,hvc->bshv", 512, "16,128,512")):
        text = f'bf16[1,1,16,{a}], bf16[{b}] {{eq="{eq}"}}'
        yield Bench(f"einsum {eq}", "einsum", text, 2 * 16 * 128 * 512)
    flops = 2 * 512 * 512 * 4096 + 512 * 512 * 16 * (192 + 128)
    yield Bench(
        "mla_attention 512", "mla_attention", f"{MLA.format(s=512)}, i64[1] {{scale=0.07}}", flops
    )


def _linear(name: str, rows: int, m: int, k: int) -> Bench:
    return Bench(name, "linear", f"bf16[{rows},{k}], bf16[{m},{k}]", 2 * rows * m * k)


def program_of(found: list[Bench]) -> Program:
    """One entry for each bench."""
    entries = {}
    for i, bench in enumerate(found):
        b = GraphBuilder(f"k{i}")
        plain, attrs = parse_operands(bench.text)
        inputs = [b.input(f"x{j}", t) for j, (t, _) in enumerate(plain)]
        entries[f"k{i}"] = b.finish(b.call(bench.op, *inputs, **attrs), ("y",))
    program = Program("bench", entries, stage=Stage.OPTIMIZED)
    return pipeline.apply(program, ["own_outputs"])


def load(program: Program, target: str, threads: int) -> Executable:
    """Compile and load."""
    backend = get("tvm")
    emission = backend.emit(program, EmitOptions((parse_target(target),), threads=threads))
    folder = Path(tempfile.mkdtemp(prefix="dsc-bench-"))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return backend.load(folder, {"meta": emission.meta, "weights": None}, program)


def operands(bench: Bench, program: Program, entry: str) -> list[dict[str, torch.Tensor]]:
    """Copies of the operands, enough of them to leave the caches before one comes again."""
    graph = program.entries[entry]

    def draw(shape: list[int], dtype: DType) -> torch.Tensor:
        if dtype is not DType.i64:
            return (torch.rand(shape, dtype=torch.float32) - 0.5).to(dtype.torch)
        if bench.op == "experts":
            return torch.stack([torch.randperm(64)[: shape[1]] for _ in range(shape[0])])
        new, rows = (evaluate(graph.inputs[i].type.shape[1], {}) for i in (0, 2))
        return torch.full(shape, rows - new)

    shapes = {v.name: [evaluate(d, {}) for d in v.type.shape] for v in graph.inputs}
    first = {v.name: draw(shapes[v.name], v.type.dtype) for v in graph.inputs}
    size = sum(t.nbytes for t in first.values())
    copies = max(1, min(64, ROTATION // size))
    return [first, *({k: t.clone() for k, t in first.items()} for _ in range(copies - 1))]


def read_probe(size: int, threads: int) -> Callable[[], Any]:
    """A function that reads `size` bytes of memory on all threads, one stream a thread."""
    from dsc.backends.tvm import library, tir
    from dsc.backends.tvm.build import build_object
    from dsc.backends.tvm.lean import load_library
    from dsc.backends.tvm.machine import machine_for

    block, words = 1 << 18, 16
    blocks = size // 4 // block

    def body(x: Any, y: Any) -> None:
        source = tir.Tensor(x, DType.i32, (blocks * block,))
        target = tir.Tensor(y, DType.i32, (blocks,))

        def read(i: Any) -> None:
            sums = [tir.Local(1, "int32", words) for _ in range(8)]
            for acc in sums:
                acc[0] = acc.zero
            with tir.loop(block // (8 * words)) as step:
                for a, acc in enumerate(sums):
                    at = i * block + step * (8 * words) + a * words
                    acc[0] = acc[0] + source.at(at, words)
            joined = tir.Local(words, "int32")
            joined.store(tir.integer(0), sum((acc[0] for acc in sums[1:]), sums[0][0]))
            target.put(i, joined[0])

        tir.for_each(blocks, tir.PARALLEL_WORK, read)

    machine = machine_for(parse_target("cpu"))
    objects = {"probe": build_object({"probe": tir.build(body)}, machine)}
    source = [library.PRELUDE, library.declared("probe", 2), library.packed("probe", "probe", 2)]
    path = Path(tempfile.mkdtemp(prefix="dsc-bench-")) / "probe.so"
    path.write_bytes(library.compile_library("\n".join(source), objects, machine))
    probe = load_library(path, objects, threads)["probe"]
    memory, out = torch.ones(size // 4, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)
    return lambda: (probe(memory.data_ptr(), out.data_ptr()), memory, out)


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Time of a call."""
    start = clock()
    run()
    return clock() - start


def bytes_touched(bench: Bench, given: dict[str, torch.Tensor]) -> int:
    """Bytes of the operands; of experts, those of the chosen ones."""
    if bench.op != "experts":
        return sum(t.nbytes for t in given.values())
    _, idx, _, gate_up, down = given.values()
    return len(idx.unique()) * (gate_up[0].nbytes + down[0].nbytes)


def run_all(model: Executable, entry: str, batch: list[dict[str, torch.Tensor]]) -> None:
    """Run an entry on each set of operands."""
    for given in batch:
        model.run(entry, given)


def main() -> None:
    """Print one line a kernel, and write them as JSON lines with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine, with 1 thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [b for b in benches() if re.search(options.only, b.name)]
    program = program_of(found)
    model = load(program, options.target, options.threads)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    size = 256 << 20
    probe = read_probe(size, options.threads)
    a, w = torch.rand(512, 2048).bfloat16(), torch.rand(4096, 2048).bfloat16()
    multiply = partial(torch.nn.functional.linear, a, w)
    read, product = size / 1e9, 2 * a.numel() * len(w) / 1e9
    print(f"{'kernel':32}{'ms':>9}{'GB/s':>8}{'GFLOP/s':>9}{'of read':>9}{'of gemm':>9}")
    for i, bench in enumerate(found):
        given = operands(bench, program, f"k{i}")
        touched = bytes_touched(bench, given[0])
        rounds = []
        for turn in range(options.rounds + 1):
            calls = max(1, min(len(given), int(2e8 / touched), int(5e9 / bench.flops)))
            batch = [given[(turn * calls + c) % len(given)] for c in range(calls)]
            time.sleep(SETTLE)
            before = seconds(probe, clock)
            taken = seconds(partial(run_all, model, f"k{i}", batch), clock) / calls
            bandwidth, peak = read / before, product / seconds(multiply, clock)
            gb, gf = touched / taken / 1e9, bench.flops / taken / 1e9
            rounds.append((taken * 1e3, gb, gf, gb / bandwidth, gf / peak, bandwidth, peak))
        ms, gb, gf, share, gemm, bandwidth, peak = map(median, zip(*rounds[1:], strict=True))
        print(f"{bench.name:32}{ms:9.3f}{gb:8.1f}{gf:9.1f}{share:9.2f}{gemm:9.2f}", flush=True)
        if options.json:
            line = {
                "kernel": bench.name,
                "ms": ms,
                "gb_s": gb,
                "gflop_s": gf,
                "of_read": share,
                "of_gemm": gemm,
                "bandwidth_gb_s": bandwidth,
                "gemm_gflop_s": peak,
            }
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
