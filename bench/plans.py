"""What launch plans come to: launches a layer, and arenas. Nothing is compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsc.ir.program import Program
from dsc.runtime.plan import Plan
from dsc.targets import Target

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny-v3"
MOST = {"null": (11, 13), "tvm": (12, 14), "triton": (9, 11)}
"""Launches of a dense and of a MoE layer of a decode step at level 3, at most."""
LAST = 60
"""The last layer of the 671B: it takes the rows whose logits are wanted."""


def plan_of(model: Any, backend: str, level: int = 3, **options: Any) -> tuple[Program, Plan]:
    """A model as a backend runs it, by plans that the checker has seen; `options` of loading."""
    from dsc import backends, pipeline
    from dsc.frontends.load import load_program
    from dsc.runtime.check_plan import check_plan

    target = Target("cuda", "sm_90") if backend == "triton" else Target("cpu")
    loaded = load_program(model, **options).program
    asked = pipeline.PipelineOptions(
        fusion_level=level, prefill_chunk=min(512, loaded.limits.prefill_chunk)
    )
    done, _ = pipeline.run(loaded, backends.get(backend), target, asked)
    plan = LOWERED[backend](done, target)
    for name, entry in plan.entries.items():
        check_plan(entry, done.ranges(name), name)
    return done, plan


def launches_a_layer(model: Any, backend: str, level: int, **options: Any) -> dict[str, int]:
    """Launches of each layer of a decode step."""
    from dsc.report import entry_report

    program, plan = plan_of(model, backend, level, **options)
    layers = entry_report(program, "decode", plan)["layers"]
    return {layer["layer"]: layer["launches"] for layer in layers}


def _nodes(program: Program, target: Target) -> Plan:
    from dsc.runtime.nodes import plan_nodes

    return plan_nodes(program, {})


def _tvm(program: Program, target: Target) -> Plan:
    from dsc.backends.tvm.machine import machine_for
    from dsc.backends.tvm.schedule import plan_program

    return Plan(plan_program(program, machine_for(target))[0])


def _triton(program: Program, target: Target) -> Plan:
    from dsc.backends.triton.program import lower_program

    return lower_program(program, str(target))[0].plan()


LOWERED: dict[str, Callable[[Program, Target], Plan]] = {
    "null": _nodes,
    "tvm": _tvm,
    "triton": _triton,
}


def arenas() -> dict[str, Any]:
    """Arenas, scratch included, against the most live bytes over launches: at most 1.05."""
    from dsc.models import v3

    ratios = {}
    for config, backend in itertools.product(("tiny", "16b", "671b"), LOWERED):
        _, plan = plan_of(v3.__file__, backend, config=config, weights="none")
        for name, entry in plan.entries.items():
            ratio = entry.arena_bytes / entry.lower_bound
            ratios[f"{config} {name} {backend}"] = round(ratio, 4)
    return {"ok": max(ratios.values()) <= 1.05, **ratios}


def launches() -> dict[str, Any]:
    """Launches of a dense and a MoE layer of a decode step; what levels compute agrees.

    tiny-v3 at each level, the 671B at the highest.
    """
    from dsc.models import v3

    counts: dict[str, tuple[list[int], list[int]]] = {}
    wide: dict[str, tuple[int, int]] = {}
    for backend in LOWERED:
        levels = [launches_a_layer(TINY, backend, level) for level in range(4)]
        dense, moe = ([n[f"model.layers.{i}"] for n in levels] for i in (0, 1))
        counts[backend] = dense, moe
        large = launches_a_layer(v3.__file__, backend, 3, config="671b", weights="none")
        sparse = LAST if backend == "triton" else LAST - 1  # where rows are taken, elsewhere apart
        wide[backend] = large["model.layers.0"], large[f"model.layers.{sparse}"]
    kinds = [c for both in counts.values() for c in both]
    fewer = all(a >= b for kind in kinds for a, b in itertools.pairwise(kind))
    few = all(
        max(kind[3], w) <= n
        for backend, both in counts.items()
        for kind, w, n in zip(both, wide[backend], MOST[backend], strict=True)
    )
    difference = _difference()
    return {
        "ok": fewer and few and difference <= 1e-4,
        "dense": {backend: dense for backend, (dense, _) in counts.items()},
        "moe": {backend: moe for backend, (_, moe) in counts.items()},
        "671b": wide,
        "max_difference": difference,
    }


def _difference() -> float:
    """The largest difference of logits between fusion levels, by the interpreter."""
    import torch

    import dsc

    ids = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = []
    for level in range(4):
        run = dsc.compile(
            TINY, backend="reference", dtype="fp32", fusion_level=level, max_context=64
        ).session(max_batch=2)
        parts = [run.prefill(ids), *(run.decode(ids[:, i]) for i in range(4))]
        logits.append(torch.stack(parts))
    return max(float((x - logits[0]).abs().max()) for x in logits)
