"""Steps with rows of nobody, as a device wants them: each sequence gets what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest

from dsc import pipeline
from dsc.backends.reference import ReferenceExecutable
from dsc.backends.triton import TritonBackend
from dsc.ir.arrays import Array, zeros
from dsc.ir.types import DType
from dsc.pipeline import PipelineOptions
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


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_rows_of_nobody_change_nothing(layout: str) -> None:
    paged = layout == "paged"
    model = four_pages("hand", "reference", "paged") if paged else compiled("reference")
    program = model.program
    if not paged:
        limits, asked = model.program.limits, PipelineOptions(prefill_chunk=8)
        program = pipeline.run(small_lm().limited(limits), TritonBackend(), SM_90, asked)[0]
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
