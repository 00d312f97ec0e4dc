"""Steps with rows of nobody, as a device wants them: each sequence gets what it gets alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import dsc
from dsc import pipeline
from dsc.backends.reference import ReferenceExecutable
from dsc.backends.triton import TritonBackend
from dsc.ir.arrays import Array, array_of, zeros
from dsc.ir.program import Program
from dsc.ir.sampled import SEEDS
from dsc.ir.types import DType
from dsc.pipeline import PipelineOptions
from dsc.runtime.admission import moved_on
from dsc.runtime.session import Session
from tests.backends.test_triton import SM_90
from tests.runtime.test_joining import VOCABULARY, Alone, compiled, random_life
from tests.runtime.test_pages import compiled as four_pages
from tests.runtime.test_session import small_lm


class Threes(ReferenceExecutable):
    """Caches that only it may touch, and steps of 3 rows or 6."""

    steps: set[int]

    def new_cache(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Zeros."""
        return zeros(shape, dtype)

    def copy(self, source: Array, target: Array) -> None:
        """Copy a dense view."""
        assert source.flags.c_contiguous
        target[...] = source

    def rows(self, batch: int) -> int:
        """The next multiple of 3."""
        self.steps = {*getattr(self, "steps", ()), batch}
        return -(-batch // 3) * 3

    def read_back(self, cache: Array) -> None:
        """Nothing: tests look at no cache."""

    changed = read_back


class Choosing(Threes):
    """It also takes the likeliest tokens itself."""

    def continued(
        self, entry: str, inputs: Mapping[str, Array], sampling: Array, seeds: Array, steps: int
    ) -> tuple[Array, Array]:
        """See `dsc.runtime.executable.Continues`."""
        self.admissions[entry].along(inputs, steps)
        found, given = [], {**inputs, SEEDS: seeds}
        for _ in range(steps):
            step = {name: x for name, x in given.items() if name != SEEDS}
            logits = array_of(self.run(entry, step)["logits"])
            found.append(logits[:, 0].argmax(-1))
            given = {**moved_on(given, 1), "input_ids": found[-1][:, None]}
        return np.stack(found, 1), logits


def made(layout: str) -> tuple[dsc.CompiledModel, Program]:
    """A model, and its program with caches in place."""
    if layout == "paged":
        model = four_pages("hand", "reference", "paged")
        return model, model.program
    model = compiled("reference")
    limits, asked = model.program.limits, PipelineOptions(prefill_chunk=8)
    return model, pipeline.run(small_lm().limited(limits), TritonBackend(), SM_90, asked)[0]


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_rows_of_nobody_stay_where_they_are_as_a_device_generates(layout: str) -> None:
    model, program = made(layout)
    prompts = np.array([[1, 2, 3], [3, 4, 5]])
    found = []
    for executable, each in ((Choosing(program), program), (model.executable, model.program)):
        session = Session(executable, each, 4)
        session.prefill(prompts)
        found.append((session.generate(5), np.stack([session.logits(i) for i in (0, 1)])))
    assert found[0][0].tolist() == found[1][0].tolist()
    assert np.abs(found[0][1] - found[1][1]).max() < 2e-5


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_rows_of_nobody_change_nothing(layout: str) -> None:
    paged = layout == "paged"
    model, program = made(layout)
    executable = Threes(program)
    session, alone = Session(executable, program, 4), Alone(model)
    longest, vocabulary = (90, 50) if paged else (20, VOCABULARY)
    assert random_life(session, alone, 4, 24 if paged else 50, longest, vocabulary) > 3
    assert alone.worst < 2e-5
    assert executable.steps >= {1, 2, 3}
    session.reset()
    session.prefill(np.array([[1, 2], [3, 4]]))
    found = session.generate(2, keys=[0] * len(session.sequences))
    assert found.shape == (2, 2)
