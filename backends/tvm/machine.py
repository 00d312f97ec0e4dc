"""The CPU that code is made for: TVM's target and the shape of register tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsc.errors import UsageError
from dsc.targets import Target

FULL_RATE = "znver"
"""CPUs by LLVM name that start vdpbf16ps as often as FMAs: AMD's. Intel's take twice as long."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What kernels are specialised to.

    A tile of `rows` x `columns` dot products keeps that many vector accumulators in registers;
    `lanes` is the number of fp32 elements in a vector; `bf16` says that bf16 has kernels of its own
    (AVX-512), `narrows` that an instruction rounds to it (AVX512_BF16), and `pairs` that products
    are fastest by vdpbf16ps (see `bf16`); with `tiles` products of rows with weights go by AMX (see
    `amx`). With few rows a task of a bf16 product takes `narrow` columns, so that small matrices
    occupy all threads, with many `wide`: 16 to 64 (see `tuning`).
    """

    cpu: str
    lanes: int
    rows: int
    columns: int
    bf16: bool = False
    narrows: bool = False
    pairs: bool = False
    tiles: bool = False
    narrow: int = 16
    wide: int = 64


def machine_for(target: Target) -> Machine:
    """The machine of `cpu` (the host) or `cpu:<llvm name>`. Raises `UsageError` on a bad name."""
    from tvm.target import codegen

    from dsc.backends.tvm.lean import tiles_allowed

    cpu = target.arch or codegen.llvm_get_system_cpu()
    if not codegen.llvm_is_valid_cpu(cpu, codegen.llvm_get_system_triple()):
        raise UsageError(
            f"LLVM knows no CPU called {cpu!r}", hint="a name such as cpu:znver4 or cpu:x86-64-v3"
        )
    features = tvm_target(cpu)
    if codegen.target_has_features("avx512f", features):
        tiles = codegen.target_has_features(["amx-tile", "amx-bf16", "avx512bf16"], features)
        # A virtual machine may hide what the CPU of its name has.
        tiles = tiles and (cpu != codegen.llvm_get_system_cpu() or tiles_allowed())
        return Machine(
            cpu,
            lanes=16,
            rows=4,
            columns=4,
            bf16=codegen.target_has_features(["avx512bw", "avx512vl"], features),
            narrows=codegen.target_has_features("avx512bf16", features),
            pairs=cpu.startswith(FULL_RATE) and codegen.target_has_features("avx512bf16", features),
            tiles=tiles,
            narrow=32 if tiles else 16,
        )
    if codegen.target_has_features("avx2", features):
        return Machine(cpu, lanes=8, rows=3, columns=4)
    return Machine(cpu, lanes=4, rows=4, columns=4)


def tvm_target(cpu: str) -> Any:
    """TVM's target for an LLVM CPU name."""
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": cpu})


GENERIC = Machine("x86-64", lanes=16, rows=4, columns=4)
"""A stand-in where only the existence of a kernel is asked."""
