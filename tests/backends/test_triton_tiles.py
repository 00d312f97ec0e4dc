"""Every other tile of every choice gives what the rule's gives: GPUs' own plans, interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsc import pipeline
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.client import InterpretedExecutable
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.tuning import errors_of, rounds
from dsc.backends.triton.worker import INTERPRETED
from dsc.ir.costs import step_sizes
from dsc.ir.dims import evaluate
from dsc.ir.formats import Packed
from dsc.ir.limits import Limits
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.ir.weights import evaluate as weight_of
from dsc.targets import parse_target
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("triton")

CONTEXT, CHUNK, BATCH = 32, 16, 2
CASES = {
    "bf16 sm_90": ("cuda:sm_90", {}),
    "fp8 gfx942": ("hip:gfx942", {"quant": "fp8", "cache_format": "fp8", "cache": "paged"}),
}
"""By name the target, and how the model is made for it."""


def made(target: str, options: Mapping[str, Any]) -> Program:
    """A layer with experts, its decode and its prefill."""
    limits = Limits(max_batch=BATCH, max_context=CONTEXT, prefill_chunk=CHUNK)
    sizes = Sizes(layers=1, dense=0, dtype=DType.bf16)
    whole = canonical_lm(sizes, max_context=CONTEXT, max_batch=BATCH).limited(limits)
    asked = pipeline.PipelineOptions(prefill_chunk=CHUNK, **options)
    done = pipeline.run(whole, TritonBackend(), parse_target(target), asked)[0]
    return replace(done, entries={name: done.entries[name] for name in ("decode", "prefill")})


class Rounds:
    """The rounds of a program's tuning, as entries of one plan in one interpreting process."""

    def __init__(self, program: Program, target: str, folder: Path) -> None:
        self.program = program
        base = lower_program(program, target)[0]
        self.tiles = [{}, *rounds(base)]
        plan = LaunchProgram(target)
        (folder / "kernels").mkdir()
        for at, tiles in enumerate(self.tiles):
            lowered, sources = lower_program(program, target, choices=tiles)
            assert all(lowered.choices[key].taken == tile for key, tile in tiles.items())
            plan.kernels |= lowered.kernels
            plan.entries |= {f"{at} {name}": entry for name, entry in lowered.entries.items()}
            for module, text in with_templates(lowered, sources).items():
                (folder / "kernels" / f"{module}.py").write_text(text)
        self.kernels = len(plan.kernels) - len(base.kernels)
        (folder / INTERPRETED).parent.mkdir()
        (folder / INTERPRETED).write_bytes(plan.plan().to_json())
        weights = {
            name + end: part.contiguous()
            for name, expression in program.weights.items()
            for (end, _), part in zip(
                expression.type.parts, _parts(weight_of(expression, program.source)), strict=True
            )
        }
        save_file(weights, folder / "weights")
        self.executable = InterpretedExecutable(folder, folder / "weights", program)

    def run(self, at: int, entry: str, new: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Results of an entry by a round's tiles; `given` stands in place of seeded inputs."""
        graph = self.program.entries[entry]
        sizes = step_sizes(graph, BATCH, new, CONTEXT, self.program.symbols)
        draw, inputs = np.random.default_rng(0), dict[str, Any]()
        for value in graph.inputs:
            shape = tuple(evaluate(d, sizes) for d in value.type.stored.shape)
            inputs[value.name] = np.zeros(shape, value.type.stored.dtype.numpy)
        inputs["input_ids"] = draw.integers(0, 50, inputs["input_ids"].shape)
        inputs["positions"][...] = np.arange(new)
        if BLOCK_TABLE in inputs:
            table = inputs[BLOCK_TABLE]
            table[...] = np.arange(table.size).reshape(table.shape)
        return self.executable._interpret(f"{at} {entry}", sizes, {**inputs, **given})[0]


def _parts(weight: Any) -> tuple[torch.Tensor, ...]:
    return weight.parts if isinstance(weight, Packed) else (weight,)


@pytest.mark.parametrize("name", CASES)
def test_other_tiles_give_the_results_of_the_rules(name: str, tmp_path: Path) -> None:
    target, options = CASES[name]
    tried = Rounds(made(target, options), target, tmp_path)
    try:
        assert tried.kernels > 40, "there is something to be tried"
        prompt = tried.run(0, "prefill", 9, {})
        states = {s.input: prompt[s.output] for s in tried.program.states}
        step = {**states, "lengths": np.array([9, 4]), "positions": np.array([[9], [4]])}
        expected = prompt["logits"], tried.run(0, "decode", 1, step)["logits"]
        assert all(np.isfinite(x.astype(np.float32)).all() for x in expected)
        for at in range(1, len(tried.tiles)):
            found = tried.run(at, "prefill", 9, {}), tried.run(at, "decode", 1, step)
            for each, right in zip(found, expected, strict=True):
                rows = (x.astype(np.float32).reshape(BATCH, -1) for x in (each["logits"], right))
                assert np.median(errors_of(*rows)) < 0.02, f"round {at}: {tried.tiles[at]}"
    finally:
        tried.executable.close()
