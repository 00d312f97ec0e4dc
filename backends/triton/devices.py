"""What is known of GPUs: architectures that code is made for, and cards that run it.

Limits of an architecture decide what compiles and how many programs a multiprocessor holds: they
are of NVIDIA's CUDA programming guide (compute capabilities 8.0 to 12.0), and of AMD's documents of
the instruction sets CDNA3 and CDNA4.
Figures of a card are those of the vendors' data sheets, dense (without sparsity); what dsc measured
itself stands beside them, of docs/decisions/triton-on-a-gpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KIB = 1024


@dataclass(frozen=True, slots=True)
class Arch:
    """An architecture. `unit` is a multiprocessor, or a compute unit.

    `program_shared` and `unit_shared` are bytes of shared memory that a program may use, and that a
    unit has; `reserved` what each program costs beside. A unit has four parts with `REGISTERS` each
    for every lane of a warp, given to warps in steps of `STEP`; `warps` and `programs` are the most
    that it holds. `fp8` is the kind of e4m3 that it converts and multiplies, if any.
    """

    program_shared: int
    unit_shared: int
    warps: int
    programs: int
    fp8: str = ""
    lanes: int = 32
    reserved: int = KIB


ARCHS: Mapping[str, Arch] = {
    "sm_80": Arch(163 * KIB, 164 * KIB, 64, 32),
    "sm_86": Arch(99 * KIB, 100 * KIB, 48, 16),
    "sm_89": Arch(99 * KIB, 100 * KIB, 48, 24, "e4m3fn"),
    "sm_90": Arch(227 * KIB, 228 * KIB, 64, 32, "e4m3fn"),
    "sm_100": Arch(227 * KIB, 228 * KIB, 64, 32, "e4m3fn"),
    "sm_120": Arch(99 * KIB, 100 * KIB, 48, 24, "e4m3fn"),
    "gfx942": Arch(64 * KIB, 64 * KIB, 32, 32, "e4m3fnuz", 64, reserved=0),
    "gfx950": Arch(160 * KIB, 160 * KIB, 32, 32, "e4m3fn", 64, reserved=0),
}
"""By name, as a target has it."""
PARTS, REGISTERS, STEP = 4, 512, 8
LAUNCH_SECONDS = 2.6e-6
"""From the end of a kernel to the full speed of the next, within a graph: what was left of the
measured decode steps (docs/decisions/triton-on-a-gpu.md) beside their bytes at the copy's speed.
Those waited for the former kernel to end; what one saves that begins early was not measured."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card: its memory in bytes and bytes a second, operations a second by type, and its units.

    `copy` and `products` are what was measured of them: bytes a second of a copy, read and written,
    and operations a second of a large product; where nothing was, the shares of the table.
    """

    arch: str
    units: int
    capacity: float
    memory: float
    matrix: Mapping[str, float]
    copy: float | None = None
    products: Mapping[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a copy moves: measured, or a share of the data sheet's."""
        return self.copy or COPIED * self.memory

    def peak(self, kind: str) -> float:
        """Operations a second of products in a type; of one that it has no units for, in bf16."""
        known = kind if kind in self.matrix else "bf16"
        return self.products.get(known) or MULTIPLIED * self.matrix[known]


COPIED, MULTIPLIED = 0.88, 0.8
"""Shares of the data sheet that a copy and a large product reach: of an H100 and an H200 0.88 to
0.89, and 0.79 to 0.8."""
CARDS: Mapping[str, Card] = {
    "A100": Card("sm_80", 108, 80e9, 2.039e12, {"bf16": 312e12, "int8": 624e12}),
    "H100": Card("sm_90", 132, 80e9, 3.35e12, {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
                 2.96e12, {"bf16": 795e12}),
    "H200": Card("sm_90", 132, 141e9, 4.8e12, {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
                 4.25e12, {"bf16": 785e12}),
    "B200": Card("sm_100", 148, 180e9, 8.0e12, {"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12}),
    "MI300X": Card("gfx942", 304, 192e9, 5.3e12,
                   {"bf16": 1307e12, "fp8": 2615e12, "int8": 2615e12}),
    "MI355X": Card("gfx950", 256, 288e9, 8.0e12,
                   {"bf16": 2500e12, "fp8": 5000e12, "int8": 5000e12}),
}  # fmt: skip
"""SXM and OAM cards of the largest memory: A100 80GB, H100 80GB HBM3."""
