"""What the backend emits: kernel specialisations, and launches of them (`dsc.runtime.plan`).

A launch names a kernel specialisation and gives it bytes of buffers, scalars and a grid. Numbers
that depend on the shape of a call stay expressions over the program's symbols; whoever runs the
launches evaluates them once per set of shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.backends.triton.blocks import Choice
from dsc.ir.dims import Dim, Sym
from dsc.ir.sampled import IDS, SAMPLE, SAMPLING, SEEDS
from dsc.ir.types import DType
from dsc.runtime.plan import EntryPlan, Plan

POINTER_TYPES = {
    DType.f32: "*fp32", DType.f64: "*fp64", DType.bf16: "*bf16", DType.f16: "*fp16",
    DType.f8e4m3: "*fp8e4nv", DType.f8e4m3fnuz: "*fp8e4b8", DType.f8e5m2: "*fp8e5",
    DType.i64: "*i64", DType.i32: "*i32", DType.i16: "*i16", DType.i8: "*i8", DType.u8: "*u8",
    DType.boolean: "*i1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel specialisation: the key under which compiled code is shared.

    `signature` maps every parameter to its Triton type ("constexpr" when it is in `constants`);
    `aligned` lists the pointers known to be 16-byte aligned and the integers that are multiples
    of 16.
    """

    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """A readable name that is unique per specialisation."""
        digest = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.function}_{digest[:12]}"

    def as_json(self) -> dict[str, Any]:
        """The record written to the plan."""
        return {
            "module": self.module,
            "function": self.function,
            "signature": dict(self.signature),
            "constants": {k: _constant(v) for k, v in self.constants.items()},
            "aligned": list(self.aligned),
            "warps": self.warps,
            "stages": self.stages,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Kernel:
        """Read back what `as_json` wrote."""
        constants = {k: _read_constant(v) for k, v in data["constants"].items()}
        return Kernel(
            data["module"], data["function"], data["signature"], constants,
            tuple(data["aligned"]), data["warps"], data["stages"],
        )  # fmt: skip


@dataclass(slots=True)
class LaunchProgram:
    """All entries of a program for one target, and the kernels and choices that they share."""

    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    entries: dict[str, EntryPlan] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The launch plan, with the kernels and the choices of tiles in its `meta`."""
        kernels = {key: kernel.as_json() for key, kernel in self.kernels.items()}
        choices = {key: choice.as_json() for key, choice in sorted(self.choices.items())}
        meta = {"backend": "triton", "target": self.target, "kernels": kernels, "choices": choices}
        return Plan(dict(self.entries), meta)

    @staticmethod
    def of(plan: Plan) -> LaunchProgram:
        """Read back what `plan` gave."""
        kernels = {k: Kernel.from_json(v) for k, v in plan.meta["kernels"].items()}
        choices = {k: Choice.from_json(k, v) for k, v in plan.meta["choices"].items()}
        return LaunchProgram(plan.meta["target"], kernels, dict(plan.entries), choices)


def runnable(plan: Plan) -> LaunchProgram:
    """Entries that choose tokens twice: without, and with it as `sampled` names them."""
    found = LaunchProgram.of(plan)
    for name, entry in list(found.entries.items()):
        if {SAMPLING, SEEDS} <= {p.name for p in entry.inputs}:
            found.entries |= {name: entry.without(SAMPLE), sampled(name): entry}
    return found


def sampled(entry: str) -> str:
    """What an entry is called whose tokens are chosen on the device."""
    return f"{entry}, {IDS}"


def _constant(value: Any) -> Any:
    return {"float": str(value)} if isinstance(value, float) else value


def _read_constant(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value


def is_multiple(dim: Dim, factor: int) -> bool:
    """Whether `dim` is a multiple of `factor` for every value of its symbols (as far as known)."""
    if isinstance(dim, Sym):
        return all(coefficient % factor == 0 for _, coefficient in dim.terms)
    return dim % factor == 0
