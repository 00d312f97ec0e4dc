"""The shared expert among the routed ones: same results, no more weights, one stack for all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dsc.ir.dims import evaluate
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.formats import WHOLE, Format
from dsc.ir.graph import Weight
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import apply, leaf
from dsc.passes.lower_moe_dispatch import LowerMoeDispatch
from dsc.passes.merge_shared_expert import MergeSharedExpert
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import Manager
from dsc.rewrite.verify import compare_programs
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.passes.test_raise_models import raised, stored


def stored_elements(program: Program) -> int:
    shapes = [w.type.shape for w in program.weights.values()]
    return sum(math.prod(evaluate(d, {}) for d in shape) for shape in shapes)


@pytest.mark.parametrize(("name", "layers"), [("v3_ragged", 1), ("v2_bf16", 1), ("own", 1)])
def test_models_compute_the_same_from_as_many_weights(name: str, layers: int) -> None:
    before, report = raised(stored(name)), PassReport()
    after = MergeSharedExpert().run(before, report)
    verify(after)
    assert report.fired == {"SharedExpert": layers}
    assert stored_elements(after) == stored_elements(before)
    found = compare_programs(before, after, MergeSharedExpert.tolerance)
    assert found.ok, found


def test_all_entries_read_one_stack() -> None:
    """Decode in the direct form, prefill in the grouped one: the same packed weights."""
    kernels = ExpertKernels(rereads=True, tile=16, balance=100.0, launch=200_000)
    passes = [MergeSharedExpert(), SpecialiseEntries(), LowerMoeDispatch(kernels)]
    program = Manager().run(canonical_lm(Sizes()), passes)
    forms = {"decode": "experts", "prefill": "grouped_linear"}
    read = {}
    for entry, op in forms.items():
        nodes = [n for n in program.entries[entry].nodes if n.op == op]
        read[entry] = {x.name for n in nodes for x in n.operands if isinstance(x, Weight)}
    name = "model.layers.1.mlp.experts"
    stacks = {f"{name}.gate_up_proj.with_shared", f"{name}.down_proj.with_shared"}
    assert read == dict.fromkeys(forms, stacks)
    assert not any("shared_experts" in w for w in program.pruned().weights)


def test_experts_in_a_format_and_a_shared_one_in_none_stay_apart() -> None:
    """One stack of both would lose the codes of the routed experts."""
    before, report = raised(stored("v3_ragged")), PassReport()
    in_codes = {
        name: apply(
            "dequantize",
            leaf(name, TensorType(DType.i8, expr.type.shape, Format((1, WHOLE), DType.f32))),
            dtype=expr.type.dtype,
        )
        for name, expr in before.weights.items()
        if ".mlp.experts." in name
    }
    program = replace(before, weights={**before.weights, **in_codes})
    assert MergeSharedExpert().run(program, report) is program
    ((_, _, why),) = report.missed
    assert why.startswith("the weights are kept as f32, i8{1x*,f32} (@")
