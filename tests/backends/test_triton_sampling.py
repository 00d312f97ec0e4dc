"""Tokens chosen by triton's kernels, in the interpreter: those that the host would choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsc
from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.program import lower_program
from dsc.errors import ArtifactError, NoNumbers, UsageError
from dsc.generation import Answer, continue_all
from dsc.ir.choosing import NO_TOKEN, Choice, chosen, key_of, left
from dsc.ir.graph import GraphBuilder
from dsc.ir.program import Program
from dsc.ir.sampled import giving_ids
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource
from dsc.runtime.launch_costs import step_costs
from dsc.sampling import Sampling
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("triton")

ROWS, VOCABS = 36, (70, 9000)
CHOICES = [
    Choice(1.0), Choice(0.6, 5), Choice(1.3, 0, 0.7), Choice(2.0, 40, 0.9, 0.05), Choice(),
    Choice(1.0, 0, 1.0, 0.2), Choice(0.9, 1), Choice(1.0, 0, 0.0), Choice(3.0, 200, 0.5),
    Choice(1e-6, 3), Choice(0.8, 0, 0.999999), Choice(1.0, 3, 0.5, 1.0), Choice(1e-5),
    Choice(2e-5, 3, 0.9), Choice(1e-5, 0, 1.0, 0.3),
    Choice(90.0, 6000), Choice(90.0, 0, 0.5), Choice(90.0, 5000, 0.7),
]  # fmt: skip


@pytest.fixture(scope="module", params=VOCABS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An executable, and how many tokens its rows have."""
    with sampling(tmp_path_factory.mktemp("sample"), ROWS, request.param) as executable:
        yield executable, request.param


@contextmanager
def sampling(folder: Path, rows: int, vocab: int) -> Iterator[Any]:
    """An executable of the operator alone."""
    b = GraphBuilder("main")
    shapes = ((DType.f32, (rows, 1, vocab)), (DType.f32, (rows, 4)), (DType.i64, (rows, 2)))
    operands = [b.input(f"x{i}", TensorType(t, s)) for i, (t, s) in enumerate(shapes)]
    (ids,) = b.call("sample", *operands)
    program = Program("p", {"main": b.finish([ids])}, stage=Stage.LOWERED)
    backend = TritonBackend()
    for name, data in backend.emit(program, EmitOptions(extra={"compile": False})).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    executable: Any = backend.load(folder, {}, program)
    yield executable
    executable.close()


@pytest.mark.parametrize("step", [0.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e34])
def test_the_kernels_draw_what_the_host_draws(kernel: Any, step: float, scale: float) -> None:
    """Scores apart, and in steps, so that many are equal; some beyond what a float holds.

    Of the wide rows some have a shortlist and some, as those of many equals, are read as a whole.
    """
    executable, vocab = kernel
    logits = np.random.default_rng(3).normal(0, 3, (ROWS, vocab)).astype(np.float32)
    logits = (logits / step).round() * np.float32(step) if step else logits
    logits[7, 3:] = logits[::3, ::4] = -np.inf
    logits *= np.float32(scale)
    choices = [CHOICES[i % len(CHOICES)] for i in range(ROWS)]
    seeds = [(key_of(5, i), i * 1000**2) for i in range(ROWS)]
    wanted = [
        chosen(row, choice, *seed) for row, choice, seed in zip(logits, choices, seeds, strict=True)
    ]
    given = {
        "x0": torch.tensor(logits)[:, None], "x1": torch.tensor([c.row for c in choices]),
        "x2": torch.tensor(seeds),
    }  # fmt: skip
    (found,) = executable.run("main", given).values()
    assert found[:, 0].tolist() == wanted
    for token, row, choice in zip(wanted, logits, choices, strict=True):
        if choice.temperature >= 1e-5:
            assert left(row, choice)[token] > -np.inf


def test_logits_that_give_no_token_give_minus_one(tmp_path: Path) -> None:
    """In whichever part of a row NaN or infinity stands, and however tokens are chosen."""
    vocab, choices = 17_000, [Choice(0.7, 50, 0.9)]
    places = [(0, np.nan), (0, np.inf), *((at, np.nan) for at in (16_999, 16_383, 16_384))]
    count = len(places) + 4
    logits = np.random.default_rng(1).normal(0, 3, (count, vocab)).astype(np.float32)
    for row, (at, value) in enumerate(places):
        logits[row, at] = value
    logits[-4], logits[-3, 1:], logits[-2, :-1] = -np.inf, -np.inf, -np.inf
    choices += [(Choice(), Choice(1.0))[i % 2] for i in range(count - 1)]
    seeds = [(key_of(2, i), i) for i in range(count)]
    given = {
        "x0": torch.tensor(logits)[:, None], "x1": torch.tensor([c.row for c in choices]),
        "x2": torch.tensor(seeds),
    }  # fmt: skip
    with sampling(tmp_path, count, vocab) as executable:
        (found,) = executable.run("main", given).values()
    wanted = [
        chosen(row, choice, *seed) for row, choice, seed in zip(logits, choices, seeds, strict=True)
    ]
    assert found[:, 0].tolist() == wanted
    assert wanted[:-1] == [NO_TOKEN] * (len(places) + 1) + [0, vocab - 1]
    assert wanted[-1] >= 0


def test_a_choice_costs_what_it_reads_of_the_logits() -> None:
    """Thrice, as each kernel's first look does, however often one looks: the rest is a cache's."""
    rows, vocab = 3, 9000
    model = giving_ids(canonical_lm(Sizes(layers=1, dense=0, vocab=vocab), 4, 40))
    plan = lower_program(model, "cuda:sm_90")[0].plan()
    costs = step_costs(model, plan, rows, 1, 8)
    shortlist, limits, parts, best = [c for c in costs if c.node == "ids"]
    logits, each = 4 * rows * vocab, 8 * rows * -(-vocab // 1024)
    listed = rows * 4 * 4096
    assert [c.activations for c in (shortlist, limits, parts)] == [
        logits + listed + 28 * rows,
        logits + listed + 36 * rows,
        logits + 40 * rows + each,
    ]
    assert best.activations == each + 8 * rows
    assert not any(c.weights or c.caches or c.flops for c in (shortlist, limits, parts, best))


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


# --- a model with a token after which logits are no numbers ---------------------------------------

WARM = Sampling(sample=True, temperature=3.0)
PROMPTS = [[1, 2, 3], [4, 5, 6]]
SEED = 1
KEYS = [key_of(SEED, i) for i in range(2)]
GOOD = 4
"""Tokens of the first sequence with that one."""


@cache
def clean() -> np.ndarray[Any, Any]:
    """What a model says that has no such token."""
    session = compiled("reference", canonical_lm(Sizes(layers=1), 2, 60)).session(2)
    session.prefill(np.array(PROMPTS))
    return np.asarray(session.generate(8, WARM.choice, KEYS, 0))


@cache
def poisoned(backend: str) -> dsc.CompiledModel:
    """Of the token that the first sequence says fourth, the row in the table is NaN."""
    said, name = clean(), "model.embed_tokens.weight"
    token = said[0, GOOD - 1]
    assert token not in [*said[0, : GOOD - 1], *said[1], *PROMPTS[0], *PROMPTS[1]]
    model = canonical_lm(Sizes(layers=1), 2, 60)
    assert isinstance(model.source, DictSource)
    table = model.source.tensors[name].clone()
    table[token] = float("nan")
    source = DictSource({**model.source.tensors, name: table})
    return compiled(backend, replace(model, source=source))


def compiled(backend: str, model: Program) -> dsc.CompiledModel:
    more = {"compile": False} if backend == "triton" else {}
    return dsc.compile(model, backend=backend, max_batch=2, max_context=20, backend_options=more)


@pytest.mark.parametrize("steps", [GOOD, 8])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_step_without_numbers_ends_the_call_on_a_device_as_on_the_host(
    backend: str, steps: int
) -> None:
    """Tokens up to it are kept, its logits are there, and the other sequence goes on."""
    session = poisoned(backend).session(2)
    session.prefill(np.array(PROMPTS))
    if steps == GOOD:  # nobody asks for the token after it
        found = session.generate(steps, WARM.choice, KEYS, 0)
    else:
        with pytest.raises(NoNumbers, match="logits of sequence 0 after 7 tokens is no") as raised:
            session.generate(steps, WARM.choice, KEYS, 0)
        found = raised.value.ids
    assert np.array_equal(found, clean()[:, :GOOD])
    assert session.lengths == [7, 7]
    assert np.isnan(session.logits(0)).all()
    session.remove(0)
    rest = session.generate(4, WARM.choice, KEYS[1:], GOOD)
    assert np.array_equal(rest[0], clean()[1, GOOD:])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_text_ends_with_the_step_without_numbers(backend: str) -> None:
    """All tokens before it come; an answer that ends before it, or with it, knows nothing of it."""
    said = clean().tolist()

    def answers(most: int) -> list[Answer]:
        return [Answer(ids, most, WARM.picker(SEED, i)) for i, ids in enumerate(PROMPTS)]

    broken = answers(8)
    with pytest.raises(ArtifactError, match="of the logits after 7 tokens is no number"):
        list(continue_all(poisoned(backend).session(2), broken))
    assert [each.ids for each in broken] == [row[:GOOD] for row in said]
    whole = answers(GOOD)
    whole[1].most = 8
    list(continue_all(poisoned(backend).session(2), whole))
    assert [each.ids for each in whole] == [said[0][:GOOD], said[1]]
