"""The CPU that code is made for: TVM's target and the shape of register tiles."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from typing import cast

from dsc import kept
from dsc.backends.tvm import workers
from dsc.backends.tvm.byte_products import ADDS, HALF, SDOT, SIGNS, WIDE, WIDE_SIGNS, WORDS
from dsc.backends.tvm.lean import tiles_allowed
from dsc.hardware import processor
from dsc.targets import Target

LONGEST_RUN, SHORTEST_RUN = 128, 32
"""Columns of a task of a product by codes with few rows: of few threads, and of many."""
FULL_RATE = "znver"
"""CPUs by LLVM name that start vdpbf16ps as often as FMAs: AMD's. Intel's take twice as long."""

FLAGS = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt",
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2",
    "lzcnt": "abm", "movbe": "movbe", "gfni": "gfni",
    "avxvnni": "avx_vnni", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni", "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "neon": "asimd", "dotprod": "asimddp", "fullfp16": "asimdhp", "sve": "sve", "sve2": "sve2",
}  # fmt: skip
"""What kernels use, or LLVM makes of them, and what Linux calls it; tiles are asked for apart."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What kernels are specialised to.

    A tile of `rows` x `columns` dot products keeps that many vector accumulators in registers;
    `lanes` is the number of fp32 elements in a vector; `bf16` says that bf16 has kernels of its own
    (AVX-512), `narrows` that an instruction rounds to it (AVX512_BF16), and `pairs` that products
    are fastest by vdpbf16ps (see `bf16`); with `tiles` products of rows with weights go by AMX (see
    `amx`). `dots` is how bytes are multiplied (`byte_products`), and with `byte_tiles` those of
    many rows go by AMX too; `vbmi` says that FP8 codes are looked up in tables, `f16` that an
    instruction makes fp32 of fp16, `fma` that fp32 has fused products. `vectors` of 16 floats are
    what its registers hold. `triple` and `without` are those of its `Cpu`. With few rows a task of
    a bf16 product takes `narrow` columns, so that small matrices occupy all threads, with many
    `wide`: 16 to 64 (see `tuning`). Where weights are codes it is `run`.
    """

    cpu: str
    lanes: int
    rows: int
    columns: int
    bf16: bool = False
    narrows: bool = False
    pairs: bool = False
    tiles: bool = False
    byte_tiles: bool = False
    dots: str = WORDS
    vbmi: bool = False
    f16: bool = False
    fma: bool = False
    vectors: int = 8
    triple: str = ""
    without: tuple[str, ...] = ()
    narrow: int = 16
    wide: int = 64
    run: int = SHORTEST_RUN

    def shared_by(self, threads: int) -> Machine:
        """It, with so many threads: the fewer, the longer the runs of memory that a task reads."""
        run = 2 * LONGEST_RUN // threads // SHORTEST_RUN * SHORTEST_RUN
        return replace(self, run=min(max(run, SHORTEST_RUN), LONGEST_RUN))


@dataclass(frozen=True, slots=True)
class Cpu:
    """What LLVM knows of a CPU: its name there, the host's, its features, and LLVM's version.

    `triple` is of an architecture that is not the host's, `without` what the host's CPU has by its
    name and hides.
    """

    name: str
    host: str
    features: tuple[str, ...]
    llvm: int
    triple: str = ""
    without: tuple[str, ...] = ()

    def has(self, *features: str) -> bool:
        """Whether it has all of these."""
        return set(features) <= set(self.features)

    @property
    def needs(self) -> list[str]:
        """What code for it wants of a CPU: its architecture, and features by their Linux names."""
        machine = "aarch64" if self.has("neon") else "x86_64"
        return [machine, *(FLAGS[name] for name in self.features if name in FLAGS)]


@cache
def cpu_of(arch: str) -> Cpu:
    """The CPU of an LLVM name, the host for "". Raises `UsageError` for a name LLVM lacks."""
    told = [field.name for field in fields(Cpu)]
    key = {"arch": arch, "host": processor(), "tvm": version("apache-tvm"), "told": told}
    data = kept.get("cpus", key)
    if data is not None:
        found = json.loads(data)
        return Cpu(**found | {name: tuple(found[name]) for name in ("features", "without")})
    (cpu,) = workers.run([("dsc.backends.tvm.build:describe_cpu", (arch,))])
    for asked in {arch, cpu.name}:  # the host has a name too
        kept.put("cpus", key | {"arch": asked}, json.dumps(asdict(cpu)).encode())
    return cast(Cpu, cpu)


def machine_for(target: Target) -> Machine:
    """The machine of `cpu` (the host) or `cpu:<llvm name>`. Raises `UsageError` on a bad name."""
    cpu = cpu_of(target.arch)
    if cpu.has("avx512f"):
        # A virtual machine may hide what the CPU of its name has.
        amx = cpu.has("amx-tile") and (cpu.name != cpu.host or tiles_allowed())
        tiles = amx and cpu.has("amx-bf16", "avx512bf16")
        return Machine(
            cpu.name,
            lanes=16,
            rows=4,
            columns=4,
            bf16=cpu.has("avx512bw", "avx512vl"),
            narrows=cpu.has("avx512bf16"),
            pairs=cpu.name.startswith(FULL_RATE) and cpu.has("avx512bf16"),
            tiles=tiles,
            byte_tiles=amx and cpu.has("amx-int8"),
            dots=_dots(cpu),
            vbmi=cpu.has("avx512vbmi", "avx512bw", "avx512vl"),
            f16=True,
            fma=True,
            vectors=32,
            triple=cpu.triple,
            without=cpu.without,
            narrow=32 if tiles else 16,
        )
    wide = cpu.has("avx2")
    return Machine(
        cpu.name,
        lanes=8 if wide else 4,
        rows=3 if wide else 4,
        columns=4,
        dots=_dots(cpu),
        f16=cpu.has("f16c") or cpu.has("neon"),
        fma=cpu.has("fma") or cpu.has("neon"),
        triple=cpu.triple,
        without=cpu.without,
    )


def _dots(cpu: Cpu) -> str:
    """How a CPU multiplies bytes best."""
    forms = {
        WIDE: ("avx512vnni", "avx512bw", "avx512vl"),
        WIDE_SIGNS: ("avx512bw", "avx512vl"),
        HALF: ("avxvnni",),
        SIGNS: ("avx2",),
        SDOT: ("dotprod",),
        ADDS: ("neon",),
    }
    return next((form for form, needs in forms.items() if cpu.has(*needs)), WORDS)


GENERIC = Machine("x86-64", lanes=16, rows=4, columns=4)
"""A stand-in where only the existence of a kernel is asked."""
