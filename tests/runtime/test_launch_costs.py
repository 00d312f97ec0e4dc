"""What a plan says that launches move and compute, held against the IR's cost functions."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from bench.plans import plan_of
from dsc import pipeline
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.program import lower_program
from dsc.ir.op import traits_of
from dsc.ir.program import Program
from dsc.ir.traits import Role
from dsc.pipeline import PipelineOptions
from dsc.runtime.launch_costs import LaunchCost, step_costs
from dsc.runtime.limit import step_work, working_set
from dsc.runtime.plan import Plan
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.backends.test_triton import SM_90

STEPS = {"decode": (2, 1, 40), "extend": (1, 4, 60), "prefill": (1, 48, 150)}


@cache
def lowered() -> tuple[Program, Plan]:
    model = canonical_lm(Sizes(layers=2, dense=1), max_batch=4, max_context=256)
    return plan_of(model, "triton")


def launched(step: str) -> tuple[Program, list[LaunchCost]]:
    program, plan = lowered()
    return program, step_costs(program, plan, *STEPS[step])


@pytest.mark.parametrize("step", STEPS)
def test_launches_compute_what_their_nodes_do(step: str) -> None:
    """Products alone, which norms and activations add a few flops to."""
    program, costs = launched(step)
    batch, new, context = STEPS[step]
    graph = program.entries[program.choose_entry(new, batch, context + new)]
    told = Counter[str]()
    for cost in costs:
        told[cost.node] += cost.flops
    products = {Role.PRODUCT, Role.ATTENTION, Role.EXPERTS}
    seen = 0
    for node, work in zip(graph.nodes, step_work(program, *STEPS[step]), strict=True):
        inside = node.body.nodes if node.body is not None else (node,)
        if any(traits_of(each.op).role in products for each in inside):
            seen += 1
            assert told[node.outputs[0].name] == pytest.approx(work.flops, rel=0.1), node
    assert seen >= 8


@pytest.mark.parametrize("step", STEPS)
def test_launches_read_the_weights_and_caches_of_the_floor(step: str) -> None:
    program, costs = launched(step)
    stored = sum(cost.weights + cost.caches for cost in costs)
    floor = working_set(step_work(program, *STEPS[step]))
    assert floor <= stored <= 1.15 * floor


@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_launches_move_of_pages_what_sequences_hold(kept: str) -> None:
    """As much as of caches in order, however many pages there are: a step up to whole pages."""
    moved = []
    for layout in ("contiguous", "paged"):
        model = canonical_lm(Sizes(layers=1, dense=0), max_batch=64, max_context=256)
        asked = PipelineOptions(cache=layout, cache_format=kept)
        program, _ = pipeline.run(model, TritonBackend(), SM_90, asked)
        plan = lower_program(program, str(SM_90))[0].plan()
        moved.append(sum(c.caches for c in step_costs(program, plan, 2, 1, 127)))
    assert moved[1] == pytest.approx(moved[0], rel=0.01)
