"""What an artifact's kernels are and what steps of them come to, read off its files.

No GPU is asked: registers, spills and shared memory are the compilers' own, matrix instructions
stand in the assembly, bytes and flops are the plan's, and times those of `modelled`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dsc.backends.triton.blocks import tile_json
from dsc.backends.triton.devices import ARCHS, CARDS, LAUNCH_SECONDS
from dsc.backends.triton.launch import runnable
from dsc.backends.triton.modelled import (
    CONTEXT,
    LARGE_BATCH,
    by_kernel,
    modelled_step,
    occupancy,
)
from dsc.ir.program import Program
from dsc.runtime.launch_costs import step_costs
from dsc.runtime.plan import Plan


def kernel_report(folder: Path, program: Program) -> dict[str, Any]:
    """The report of the backend's folder in an artifact, as JSON values.

    `kernels` and `choices` of tiles are by target, `steps` by card: of each target that was
    compiled for, at sizes that the artifact takes, as `decode` and `prefill` run them: no token is
    chosen on the device.
    """
    kernels: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    points = _points(program)
    for path in sorted(folder.glob("*/kernels.json")):
        arch = path.parent.name
        records = json.loads(path.read_text())
        launches = runnable(Plan.from_json((path.parent / "plan.json").read_bytes()))
        plan = launches.plan()
        choices += [
            {"target": arch, "choice": choice.key, "tile": tile_json(choice.taken),
             "rule": choice.taken == choice.tiles[0], "others": list(map(tile_json, choice.others))}
            for choice in launches.choices.values()
        ]  # fmt: skip
        found = [by_kernel(step_costs(program, plan, *point)) for point in points.values()]
        for key, record in records.items():
            sums = {
                name: dict(zip(("launches", "bytes", "stored", "flops"), each[key], strict=True))
                for name, each in zip(points, found, strict=True)
                if key in each
            }
            kernels.append({"target": arch, "kernel": key, **_static(record, arch), "in": sums})
        steps += [
            {"card": name, "step": step, "batch": b, "new": n, "context": c}
            | asdict(modelled_step(program, plan, records, card, b, n, c))
            for name, card in CARDS.items()
            if card.arch == arch
            for step, (b, n, c) in points.items()
        ]
    report = {"kernels": kernels, "choices": choices, "steps": steps}
    weights = sum(cast(int, expr.type.nbytes) for expr in program.weights.values())
    return {**report, "assumptions": assumptions({each["card"] for each in steps}, weights)}


def assumptions(cards: Collection[str], weights: int) -> list[str]:
    """What the times of steps on these cards stand on, of weights of so many bytes, a line each."""
    own = {name: card for name, card in CARDS.items() if name in cards}
    return [
        *(
            f"{name}: {weights / 1e9:.1f} GB of weights do not fit in {card.capacity / 1e9:.0f};"
            " its times are those of one that held them"
            for name, card in own.items()
            if weights > card.capacity
        ),
        f"a launch takes {LAUNCH_SECONDS * 1e6:.1f} us and the longer of bytes at a copy's speed"
        " and flops at the peak of its matrix instructions",
        "so does a kernel that begins before the former one ends (sm_90 and later): what that"
        " saves was measured on no card",
        "what several programs of a launch read comes from memory once; experts are chosen"
        " uniformly",
        "kernels of steps that were measured on an H100 and an H200 took 0.94 to 1.01 times as long"
        " in decode, and 1.2 to 1.4 times in prefill",
        *(
            f"{name} ({card.arch}, {card.units} units): copy {card.bandwidth / 1e12:.2f} TB/s, "
            + ", ".join(f"{k} {card.peak(k) / 1e12:.0f} T/s" for k in card.matrix)
            + ("; measured" if card.copy else "; shares of the data sheet's")
            for name, card in own.items()
        ),
    ]


def _static(record: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the binary says of a kernel."""
    found = occupancy(record, ARCHS[arch])
    return {
        "warps": record["warps"],
        "registers": record.get("registers"),
        "spill_bytes": record.get("spill_bytes"),
        "shared": record["shared"],
        "programs": found.programs,
        "occupancy": found.share,
        "bound": found.bound,
        "matrix": record.get("matrix", {}),
    }


def _points(program: Program) -> dict[str, tuple[int, int, int]]:
    """Batch, new tokens and context of the steps that are modelled, where the artifact has them."""
    limits = program.limits
    if not program.is_causal_lm:
        return {}
    rows = min(CONTEXT, max(1, limits.max_context - 1))
    batch = min(LARGE_BATCH, limits.max_batch)
    chunk = min(limits.prefill_chunk, limits.max_context)
    points = {"decode": (1, 1, rows)}
    if batch > 1:
        points[f"decode of {batch}"] = (batch, 1, rows)
    return points | {"prefill chunk": (1, chunk, 0)}
