"""Sessions whose latent caches are codes: as sessions over numbers, with fewer bytes.

A number at the middle between two codes may fall to either where sums are taken in another order,
so backends are compared with a tolerance that a lost row would pass by far, and one backend with
itself bit by bit where its sums have an order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import dsc
from dsc.ir.interface import Storage
from dsc.ir.ranks import run_ranks
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.run_module import run_module
from tests.runtime.test_joining import Alone, random_life
from tests.runtime.test_ranks import _Loaded

VOCABULARY, CONTEXT, BATCH, CHUNK = 50, 160, 3, 32
SIZES = Sizes(layers=1, dense=1, kv_lora=130)
FORMS = [(b, c) for b in ("reference", "tvm") for c in ("contiguous", "paged")]
ROW = {"bf16": 4 * 130 + 4 * 8, "fp8": 132 + 2 * 4 + 4 * 8, "int8": 132 + 2 * 4 + 4 * 8}
"""Bytes of a token: 130 latents and 8 rope keys."""
NEAR = 2e-2
"""A code more or less of a few among 130, on logits of size 1."""


@cache
def compiled(backend: str, cache: str, kind: str) -> dsc.CompiledModel:
    """One MLA layer whose rows are no whole groups."""
    if backend == "tvm":
        pytest.importorskip("tvm")
    return dsc.compile(
        canonical_lm(SIZES, BATCH, CONTEXT), backend=backend, cache=cache, cache_format=kind,
        max_batch=BATCH, max_context=CONTEXT, prefill_chunk=CHUNK,
    )  # fmt: skip


def logits(model: dsc.CompiledModel, threads: int | None = None) -> torch.Tensor:
    """Of a ragged batch: a prompt in chunks, one decoded token each, more than fit a chunk."""
    session = model.session(BATCH, threads=threads)
    ids = torch.randint(VOCABULARY, (BATCH, 70), generator=torch.Generator().manual_seed(1))
    found = [session.prefill(ids, lengths=[70, 3, 41])]
    found += [session.decode(torch.tensor([t, t + 1, t + 2])) for t in range(4)]
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_all_forms_give_nearly_what_numbers_give(kind: str) -> None:
    plain = logits(compiled("reference", "contiguous", "bf16"))
    wanted = logits(compiled("reference", "contiguous", kind))
    assert 1e-5 < float((wanted - plain).abs().max()) < 0.5
    for form in FORMS:
        model = compiled(*form, kind)
        assert float((logits(model) - wanted).abs().max()) < NEAR
        assert model.report["cache_bytes_per_token"] == ROW[kind]
        assert sum(s.nbytes for s in model.program.states) == ROW[kind]
    storage = {s.storage for s in compiled("tvm", "paged", kind).program.states}
    assert storage == {Storage.PAGED}


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_threads_and_neighbours_change_no_bit(cache: str) -> None:
    model = compiled("tvm", cache, "fp8")
    assert torch.equal(logits(model, threads=1), logits(model, threads=2))
    alone = Alone(model)
    assert random_life(model.session(), alone, 1, 30, 70, VOCABULARY) > 3
    assert alone.worst == 0.0


@pytest.mark.parametrize(("backend", "cache"), FORMS)
def test_a_sequence_is_cut_and_set_back(backend: str, cache: str) -> None:
    """What was cut off leaves nothing behind."""
    session = compiled(backend, cache, "int8").session()
    session.add([3, 1, 4])
    mine = session.add(list(range(40)))
    snapshot = session.snapshot(mine)
    first = session.decode({mine: 7})[mine]
    session.restore(snapshot)
    assert torch.allclose(session.decode({mine: 7})[mine], first, atol=1e-6, rtol=0)
    session.truncate(mine, 40)
    session.remove(0)
    assert torch.allclose(session.decode({mine: 7})[mine], first, atol=1e-5, rtol=0)


def test_ranks_keep_the_same_codes() -> None:
    """Every rank holds all latents: they agree bit for bit, and nearly with one rank."""
    program = canonical_lm(replace(SIZES, heads=4), BATCH, CONTEXT)

    def made(ranks: int) -> dsc.CompiledModel:
        return dsc.compile(
            program, backend="reference", cache_format="fp8", ranks=ranks, max_batch=BATCH,
            max_context=CONTEXT, prefill_chunk=CHUNK,
        )  # fmt: skip

    def steps(model: dsc.CompiledModel | _Loaded) -> torch.Tensor:
        session = model.session(1, CONTEXT)
        return torch.stack([session.prefill([list(range(40))]), session.decode([7])])

    shared, wanted = made(2), steps(made(1))
    first, second = run_ranks(2, lambda rank: steps(_Loaded(shared, rank)))
    assert torch.equal(first, second)
    assert float((first - wanted).abs().max()) < NEAR


def test_an_artifact_with_codes_runs_without_dsc(tmp_path: Path) -> None:
    """run.py keeps the caches as bytes."""
    model = compiled("tvm", "contiguous", "fp8")
    out = model.save(tmp_path / "out")
    runner = run_module(out).Model(out)
    assert runner.caches["past.0.latent"].dtype == np.uint8
    ids = np.arange(20, dtype=np.int64)[None]
    got = runner.step(ids, ids, ids[:, 0], ids[:, -1:])
    session = dsc.load(out).session(1)
    assert np.array_equal(got[0], session.prefill(ids))
    one = np.array([[20]])
    assert np.array_equal(runner.step(one, one, one[0], 0 * one)[0], session.decode(one[0]))
