"""Short steps: what a decode step of V3's widths launches, and how many bytes that moves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from dsc import pipeline
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.program import lower_program
from dsc.ir.costs import step_sizes
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.report import launches_by_layer
from dsc.runtime.launch_costs import step_costs
from dsc.runtime.limit import step_work, working_set
from dsc.runtime.plan import Plan
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

CONTEXT, CHUNK = 4096, 512
WIDE = Sizes(
    vocab=1024, hidden=7168, layers=2, heads=128, q_lora=1536, kv_lora=512, nope=128, rope=64,
    value=128, inner=18432, experts=256, expert_inner=2048, top_k=8, groups=8, keep=4,
    dtype=DType.bf16,
)  # fmt: skip


@cache
def planned(
    quant: str, most: int, layers: int = 3, widths: Sizes = WIDE, context: int = CONTEXT
) -> tuple[Program, Plan]:
    """A model of V3's widths, its first layer dense, for up to `most` sequences."""
    sizes, limits = replace(widths, layers=layers), Limits(most, context, CHUNK)
    whole = canonical_lm(sizes, most, context, values=False, chunk=CHUNK).limited(limits)
    options, target = pipeline.PipelineOptions(quant=quant), Target("cuda", "sm_90")
    program, _ = pipeline.run(whole, TritonBackend(), target, options)
    return program, lower_program(program, str(target))[0].plan()


def launched(quant: str, most: int, batch: int, new: int = 1) -> tuple[int, int, int]:
    """Launches of the dense layer, of an expert layer, and of the last, whose grid is not empty.

    The last one takes the rows whose logits are wanted.
    """
    program, plan = planned(quant, most)
    graph = program.entries[program.choose_entry(new, batch, CONTEXT)]
    sizes = step_sizes(graph, batch, new, CONTEXT)
    entry = plan.entries[graph.name]
    made = [x for x in entry.launches if x.runs(sizes)]
    found = launches_by_layer(graph, [replace(entry, launches=tuple(made))])
    dense, sparse, last = (found[f"model.layers.{i}"] for i in range(3))
    return dense, sparse, last


@pytest.mark.parametrize("quant", ["none", "fp8", "int4"])
@pytest.mark.parametrize("most", [4, 64])
def test_a_step_of_up_to_four_tokens_is_short(quant: str, most: int) -> None:
    for batch in (1, 4):
        dense, *sparse = launched(quant, most, batch)
        assert dense <= 9
        assert max(sparse) <= 11


@pytest.mark.parametrize("quant", ["none", "fp8", "int4"])
def test_experts_in_groups_take_four_launches_more(quant: str) -> None:
    for new in (30, 300):
        assert max(launched(quant, 4, 4, new)[1:]) <= 15
    for batch in (5, 8, 31, 32, 64):
        assert launched(quant, 64, batch)[1:] == (15 + (batch < 32),) * 2


@pytest.mark.parametrize("quant", ["none", "fp8"])
@pytest.mark.parametrize(("batch", "most"), [(1, 1.10), (64, 1.06)])
def test_a_step_moves_little_more_than_weights_and_caches(
    quant: str, batch: int, most: float
) -> None:
    """Of an expert layer: what a model of one more moves more, results of spans among it."""
    moved, needed = [], []
    for layers in (3, 4):
        program, plan = planned(quant, max(batch, 4), layers)
        costs = step_costs(program, plan, batch, 1, CONTEXT)
        moved.append(sum(cost.bytes for cost in costs))
        needed.append(working_set(step_work(program, batch, 1, CONTEXT)))
    assert 1 <= (moved[1] - moved[0]) / (needed[1] - needed[0]) <= most
