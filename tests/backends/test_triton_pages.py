"""Caches in pages on triton: sequences that join, leave and share, in the interpreter."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

import dsc
from dsc.backends.base import No, Yes
from dsc.backends.triton import TritonBackend
from dsc.ir.choosing import Choice, key_of
from dsc.ir.graph import GraphBuilder
from dsc.ir.types import DType, TensorType
from dsc.runtime.session import Session
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("triton")

CONTEXT, CHUNK = 150, 40


@cache
def compiled(backend: str, kept: str) -> dsc.CompiledModel:
    """One layer of experts, for three sequences of up to three pages."""
    more = {"compile": False} if backend == "triton" else {}
    return dsc.compile(
        canonical_lm(Sizes(layers=1, dense=0), 3, CONTEXT + CHUNK), backend=backend, cache="paged",
        cache_format=kept, max_batch=3, max_context=CONTEXT, prefill_chunk=CHUNK,
        backend_options=more,
    )  # fmt: skip


def life(session: Session, seed: int) -> list[torch.Tensor]:
    """Logits of sequences that start apart, are cut, share a beginning, leave and join."""
    assert session._pool is not None
    random.Random(seed).shuffle(session._pool._free)
    ids = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(0))
    found = [session.prefill(ids[:2], lengths=[70, 35])]
    found.append(session.decode([1, 2]))
    session.truncate(0, 66)
    third = session.fork(0)
    found.append(session.decode([3, 4, 5]))
    session.remove(1)
    found += [session.decode({third: 6})[third], session.decode([7, 8])]
    session.add(ids[2, :9])
    found.append(session.decode([9, 10, 11]))
    return found


@pytest.mark.parametrize(
    ("kept", "seed"),
    [("bf16", 1), ("fp8", 2), pytest.param("int8", 3, marks=pytest.mark.exhaustive)],
)
def test_sequences_in_any_pages_say_what_the_reference_says(kept: str, seed: int) -> None:
    found = life(compiled("triton", kept).session(), seed)
    wanted = life(compiled("reference", kept).session(), seed + 1)
    bound = 1e-3 if kept == "bf16" else 2e-2
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < bound


@pytest.mark.parametrize(
    "cache", ["paged", pytest.param("contiguous", marks=pytest.mark.exhaustive)]
)
def test_steps_of_few_and_of_many_sequences_share_their_caches(cache: str) -> None:
    """Decode of up to 4 sequences is an entry of its own; who joins and leaves moves between."""
    found = []
    for backend, more in (("triton", {"compile": False}), ("reference", {})):
        made = dsc.compile(
            canonical_lm(Sizes(layers=1, dense=0), 6, 32), backend=backend, cache=cache,
            max_batch=6, max_context=32, prefill_chunk=8, backend_options=more,
        )  # fmt: skip
        few = "decode_few" if backend == "triton" else "decode"
        assert [made.program.choose_entry(1, n, 9) for n in (4, 5)] == [few, "decode"]
        session = made.session(6)
        rows = [session.prefill([[1, 2, 3], [4, 5, 6], [7, 8, 9]])]
        rows.append(session.decode([3, 2, 1]))
        session.add([5, 6])
        session.add([9, 1, 4, 7])
        rows.append(session.decode([5, 6, 7, 8, 9]))
        for sequence in session.sequences[:3]:
            session.remove(sequence)
        rows.append(session.decode([1, 3]))
        found.append(torch.cat([torch.as_tensor(row) for row in rows]))
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_sequences_continue_with_the_same_tokens_on_a_device_and_on_the_host() -> None:
    """Drawn and the likeliest, over the border of a page; then as if `decode` had been called."""
    ids = torch.randint(0, 50, (2, 62), generator=torch.Generator().manual_seed(2))
    warm, keys = Choice(1.5, 20, 0.95), [key_of(1, 0), key_of(1, 1)]
    found = []
    for backend in ("triton", "reference"):
        session = compiled(backend, "bf16").session(2)
        session.prefill(ids, lengths=[62, 5])
        found.append([session.generate(4, warm, keys), session.generate(1), session.logits(1)])
        assert session.lengths == [67, 10]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert found[0][0].unique().numel() > 4


@pytest.mark.parametrize("page", [4, 16, 48, 64])
def test_a_page_is_a_whole_number_of_tiles(page: int) -> None:
    b, f32 = GraphBuilder("main"), DType.f32
    shapes = [(1, 1, 4, 64), (1, 1, 4, 16), (9, page, 64), (9, page, 16)]
    operands = [b.input(f"x{i}", TensorType(f32, s)) for i, s in enumerate(shapes)]
    lengths = b.input("lengths", TensorType(DType.i64, (1,)))
    table = b.input("block_table", TensorType(DType.i64, (1, 3)))
    b.latent_attention(*operands, lengths, table, scale=0.1)
    why = f"pages of {page} rows; a power of two from 16 on is taken"
    wanted = Yes() if page in (16, 64) else No(why)
    assert TritonBackend().supports(b.nodes[0]) == wanted
