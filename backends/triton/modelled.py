"""What a card would take for a step, and what bounds a kernel on it: a model, not a measurement.

A launch takes `LAUNCH_SECONDS` and then the longer of its bytes at the speed of a copy and of its
flops at the peak of the matrix instructions that its binary has. Bytes are those of
`dsc.runtime.launch_costs`. The model knows no latency of few programs, no bank conflicts and no
waits within a kernel: it says what a step of these launches could take, and its distance from the
floor says what they move and wait for that they need not. That kernels begin early (`dependent`)
is left out: no card has told what it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc.backends.triton.assembly import peak_of
from dsc.backends.triton.devices import LAUNCH_SECONDS, PARTS, REGISTERS, STEP, Arch, Card
from dsc.ir.program import Program
from dsc.runtime.launch_costs import LaunchCost, step_costs
from dsc.runtime.limit import limit_seconds, step_work, working_set
from dsc.runtime.plan import Plan

Records = Mapping[str, Mapping[str, Any]]
"""kernels.json: what is known of each compiled kernel, by its key."""

CONTEXT, LARGE_BATCH = 4096, 64
"""Tokens in the cache, and sequences, of steps that are modelled and timed, at most."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many programs of a kernel a unit holds, the share of its warps, and what bounds them."""

    programs: int
    share: float
    bound: str


def occupancy(record: Mapping[str, Any], arch: Arch) -> Occupancy:
    """The bound on a kernel's programs on a unit, as the vendors' calculators have it.

    >>> from dsc.backends.triton.devices import ARCHS
    >>> occupancy({"warps": 8, "registers": 128, "shared": 100_000}, ARCHS["sm_90"])
    Occupancy(programs=2, share=0.25, bound='registers')
    """
    warps = record["warps"]
    registers = -(-max(record.get("registers", 1), 1) // STEP) * STEP
    most = {
        "registers": PARTS * (REGISTERS // registers) // warps,
        "shared memory": arch.unit_shared // max(record["shared"] + arch.reserved, 1),
        "warps": arch.warps // warps,
        "programs": arch.programs,
    }
    bound = min(most, key=most.__getitem__)
    return Occupancy(most[bound], most[bound] * warps / arch.warps, bound)


def launch_seconds(cost: LaunchCost, card: Card, records: Records) -> float:
    """What a launch takes on a card."""
    instructions = records.get(cost.kernel, {}).get("matrix", {})
    peak = card.peak(peak_of(instructions) or "bf16")
    return LAUNCH_SECONDS + max(cost.bytes / card.bandwidth, cost.flops / peak)


@dataclass(frozen=True, slots=True)
class Modelled:
    """A step on a card: launches, their bytes and flops, and seconds; beside what it needs.

    `floor_bytes` are weights and caches, read once; `floor_seconds` the sum over operators of the
    longer of these and of flops, at the card's speeds.
    """

    launches: int
    bytes: int
    flops: int
    seconds: float
    floor_bytes: int
    floor_seconds: float


def modelled_step(
    program: Program, plan: Plan, records: Records, card: Card, batch: int, new: int, context: int
) -> Modelled:
    """A step over `new` tokens of each of `batch` sequences, after `context` tokens."""
    costs = step_costs(program, plan, batch, new, context)
    work = step_work(program, batch, new, context)
    best = max((card.peak(k) for k in _types(records)), default=card.peak("bf16"))
    return Modelled(
        len(costs),
        sum(cost.bytes for cost in costs),
        sum(cost.flops for cost in costs),
        sum(launch_seconds(cost, card, records) for cost in costs),
        working_set(work),
        limit_seconds(work, card.bandwidth, best),
    )


def by_kernel(costs: Sequence[LaunchCost]) -> dict[str, tuple[int, int, int, int]]:
    """Launches, bytes, bytes of weights and caches, and flops of each kernel in a step."""
    sums: dict[str, tuple[int, int, int, int]] = {}
    for cost in costs:
        n, moved, stored, flops = sums.get(cost.kernel, (0, 0, 0, 0))
        mine = cost.stored
        sums[cost.kernel] = (n + 1, moved + cost.bytes, stored + mine, flops + cost.flops)
    return sums


def _types(records: Records) -> set[str]:
    return {t for r in records.values() if (t := peak_of(r.get("matrix", {})))}
