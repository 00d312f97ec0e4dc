"""Tokens chosen by triton's kernels, in the interpreter: those that the host would choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import dsc
from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.errors import UsageError
from dsc.ir.choosing import Choice, chosen, key_of, left
from dsc.ir.graph import GraphBuilder
from dsc.ir.program import Program
from dsc.ir.sampled import giving_ids
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("triton")

ROWS, VOCAB = 24, 70
CHOICES = [
    Choice(1.0), Choice(0.6, 5), Choice(1.3, 0, 0.7), Choice(2.0, 40, 0.9, 0.05), Choice(),
    Choice(1.0, 0, 1.0, 0.2), Choice(0.9, 1), Choice(1.0, 0, 0.0), Choice(3.0, 200, 0.5),
    Choice(1e-6, 3), Choice(0.8, 0, 0.999999), Choice(1.0, 3, 0.5, 1.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    b = GraphBuilder("main")
    shapes = ((DType.f32, (ROWS, 1, VOCAB)), (DType.f32, (ROWS, 4)), (DType.i64, (ROWS, 2)))
    operands = [b.input(f"x{i}", TensorType(t, s)) for i, (t, s) in enumerate(shapes)]
    (ids,) = b.call("sample", *operands)
    program = Program("p", {"main": b.finish([ids])}, stage=Stage.LOWERED)
    folder, backend = tmp_path_factory.mktemp("sample"), TritonBackend()
    for name, data in backend.emit(program, EmitOptions(extra={"compile": False})).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    executable: Any = backend.load(folder, {}, program)
    yield executable
    executable.close()


@pytest.mark.parametrize("step", [0.0, 2.0])
def test_the_kernels_draw_what_the_host_draws(kernel: Any, step: float) -> None:
    """Scores apart, and in steps, so that many are equal."""
    logits = np.random.default_rng(3).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    logits = (logits / step).round() * np.float32(step) if step else logits
    logits[7, 3:] = -np.inf
    choices = [CHOICES[i % len(CHOICES)] for i in range(ROWS)]
    seeds = [(key_of(5, i), i * 1000**2) for i in range(ROWS)]
    wanted = [
        chosen(row, choice, *seed) for row, choice, seed in zip(logits, choices, seeds, strict=True)
    ]
    given = {
        "x0": torch.tensor(logits)[:, None], "x1": torch.tensor([c.row for c in choices]),
        "x2": torch.tensor(seeds),
    }  # fmt: skip
    (found,) = kernel.run("main", given).values()
    assert found[:, 0].tolist() == wanted
    for token, row, choice in zip(wanted, logits, choices, strict=True):
        if choice.temperature >= 1e-5:
            assert left(row, choice)[token] > -np.inf


def test_ids_are_given_beside_logits_and_never_twice() -> None:
    model = canonical_lm(Sizes(layers=1, dense=0), 2, 100)
    once = giving_ids(model)
    for name, graph in once.entries.items():
        assert graph.output_names[-1] == "ids"
        assert graph.aliases == model.entries[name].aliases
    assert giving_ids(once) == once


def test_a_session_generates_as_far_as_its_context_goes() -> None:
    session = dsc.compile(
        canonical_lm(Sizes(layers=1, dense=0), 2, 40), backend="reference", max_context=20
    ).session(1)
    with pytest.raises(UsageError, match="generate before prefill"):
        session.generate(1)
    session.prefill([1, 2, 3])
    for steps, words in ((0, "steps is 0"), (18, "a sequence of 21 tokens"), (True, "steps is")):
        with pytest.raises(UsageError, match=words):
            session.generate(steps)
    with pytest.raises(UsageError, match="2 keys for 1 sequences"):
        session.generate(1, keys=[1, 2])
    assert session.generate(17).shape == (1, 17)


def test_a_later_call_repeats_no_draws() -> None:
    """Two calls draw what one call for all tokens does; a number of draws that is given counts."""
    model = dsc.compile(
        canonical_lm(Sizes(layers=1, dense=0), 2, 40), backend="reference", max_context=30
    )
    sessions = [model.session(2) for _ in range(3)]
    for session in sessions:
        session.prefill([[1, 2, 3], [4, 5, 6]])
    warm, (whole, parts, others) = Choice(3.0), sessions
    found = whole.generate(8, warm)
    assert np.array_equal(np.hstack([parts.generate(n, warm) for n in (3, 5)]), found)
    assert not np.array_equal(others.generate(8, warm, drawn=99), found)
