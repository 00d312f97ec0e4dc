"""Sequences that begin alike: what they share is computed once; none sees tokens of another."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import dsc
from dsc.errors import UsageError
from dsc.ir.arrays import Array
from dsc.ir.interface import State, Storage
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.types import DType, TensorType
from dsc.runtime.caches import Paged
from dsc.runtime.pages import PagePool
from dsc.runtime.session import Session
from tests.runtime.test_joining import FORMS, compiled
from tests.runtime.test_pages import compiled as four_pages
from tests.runtime.test_session import small_lm

PAGE = 4
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]


class Life:
    """Sequences over the pages of a pool, and beside them the tokens that each is to hold."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.pool = PagePool(20, PAGE)
        state = State("past", "present", TensorType(DType.f32, (1,)), Storage.PAGED, PAGE)
        self.kept = Paged([state], self.pool)
        self.tokens: list[list[int]] = []
        self.next = 1

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self.tokens))

    def step(self, rows: list[int], size: int) -> None:
        """Some sequences get new tokens, up to `size`; what is behind these is padding."""
        before = self.lengths
        for row in rows:
            count = self.draw.randint(0, size)
            self.tokens[row] += range(self.next, self.next + count)
            self.next += count
        given = self.kept.inputs(rows, before, self.lengths, size)
        pages, table = given["past"], given[BLOCK_TABLE]
        for at, row in enumerate(rows):
            for t in range(before[row], before[row] + size):
                if table[at, t // PAGE] >= 0:
                    new = self.tokens[row][t] if t < len(self.tokens[row]) else -7
                    pages[table[at, t // PAGE], t % PAGE] = new

    def fork(self) -> None:
        row = self.draw.randrange(len(self.tokens))
        self.tokens.append(self.tokens[row][: self.draw.randint(0, len(self.tokens[row]))])
        self.kept.fork(row, len(self.tokens) - 1, self.lengths)

    def truncate(self) -> None:
        row = self.draw.randrange(len(self.tokens))
        del self.tokens[row][self.draw.randint(0, len(self.tokens[row])) :]
        self.kept.truncate(self.lengths)

    def drop(self) -> None:
        row = self.draw.randrange(len(self.tokens))
        self.kept.drop(row, self.lengths)
        self.tokens[row] = self.tokens[-1]
        self.tokens.pop()

    def check(self, pages: Array) -> None:
        """Each sequence reads its own tokens, and the pool counts the pages that are in tables."""
        for row, tokens in enumerate(self.tokens):
            blocks = self.pool.blocks[row]
            found = [pages[blocks[t // PAGE], t % PAGE, 0] for t in range(len(tokens))]
            assert found == tokens
        held = {page for blocks in self.pool.blocks for page in blocks}
        assert self.pool.used == len(held)
        assert not held & set(self.pool._free)


@pytest.mark.parametrize("seed", range(20))
def test_who_writes_into_a_shared_page_writes_into_a_copy(seed: int) -> None:
    life = Life(seed)
    life.tokens = [[]]
    life.step([0], 9)
    (pages,) = life.kept._pages.values()
    for _ in range(60):
        action = life.draw.choice(["step", "step", "step", "fork", "fork", "truncate", "drop"])
        if action == "fork" and len(life.tokens) < 4:
            life.fork()
        elif action == "drop" and len(life.tokens) > 1:
            life.drop()
        elif action == "truncate":
            life.truncate()
        elif max(life.lengths) < 5 * PAGE - 3:
            rows = life.draw.sample(range(len(life.tokens)), life.draw.randint(1, len(life.tokens)))
            life.step(sorted(rows), 3)
        life.check(pages)


def test_pages_that_are_shared_are_counted_once_and_copied_when_written() -> None:
    pool = PagePool(4, PAGE)
    pool.grow([6])
    pool.share(1, 0, 6)
    pool.share(2, 0, 4)
    assert (pool.blocks, pool.used) == ([[0, 1], [0, 1], [0]], 2)
    assert pool.grow([6, 7, 5], {1: 6, 2: 4}) == [(1, 2)]
    assert (pool.blocks, pool.used) == ([[0, 1], [0, 2], [0, 3]], 4)
    assert pool.grow([7, 7, 5], {0: 6}) == [], "nobody else holds it any more"
    pool.drop(0)
    assert (pool.blocks, pool.used) == ([[0, 3], [0, 2]], 3)
    pool.shrink([4, 4])
    assert pool.used == 1


def test_a_copy_that_finds_no_page_changes_nothing() -> None:
    pool = PagePool(2, PAGE)
    pool.grow([6])
    pool.share(1, 0, 6)
    with pytest.raises(UsageError, match="1 more pages of 4 tokens are needed, 0 are free of 2"):
        pool.grow([6, 7], {1: 6})
    assert (pool.blocks, pool.used) == ([[0, 1], [0, 1]], 2)


def told(session: Session, alone: list[Session], tokens: list[list[int]]) -> float:
    """How far steps of a session are from those of sequences alone."""
    worst = 0.0
    for column in tokens:
        found = session.decode(column)
        for row, (each, token) in enumerate(zip(alone, column, strict=True)):
            worst = max(worst, float((found[row] - each.decode([token])[0]).abs().max()))
    return worst


@pytest.mark.parametrize("backend", FORMS)
def test_a_fork_is_a_sequence_with_the_same_beginning(backend: str) -> None:
    model = compiled(backend)
    session, alone = model.session(3), [model.session(1) for _ in range(3)]
    first = session.add(PROMPT)
    assert torch.equal(session.logits(session.fork(first)), session.logits(first))
    session.fork(first, 5)
    assert session.lengths == [11, 11, 5]
    with pytest.raises(UsageError, match="sequence 2 was cut"):
        session.logits(2)
    for each, length in zip(alone, session.lengths, strict=True):
        each.prefill(PROMPT[:length])
    assert told(session, alone, [[1, 2, 3], [4, 4, 4], [5, 6, 7]]) < 2e-5
    session.remove(first)
    assert session.sequences == [2, 1]
    assert told(session, [alone[2], alone[1]], [[3, 3], [1, 2]]) < 2e-5


@pytest.mark.parametrize("backend", ["reference", "tvm"])
def test_forks_share_pages(backend: str) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
    model = four_pages("hand", backend, "paged")
    session, alone = model.session(3), [model.session(1) for _ in range(3)]
    prompt = [n % 50 for n in range(150)]
    first = session.add(prompt)
    session.fork(first)
    session.fork(first, 128)
    pool = session._pool
    assert pool is not None
    assert pool.used == 3, "nothing was copied yet"
    for each, length in zip(alone, session.lengths, strict=True):
        each.prefill(prompt[:length])
    assert told(session, alone, [[1, 2, 3], [4, 4, 4]]) < 2e-5
    assert pool.used == 5, "the page that both wrote into, and one that the third began"
    session.remove(first)
    assert told(session, [alone[2], alone[1]], [[3, 3]]) < 2e-5
    session.reset()
    assert pool.used == 0


def test_a_fork_needs_room_and_a_length_that_is_there() -> None:
    session = dsc.compile(small_lm(), backend="null", max_context=16).session(2)
    first = session.add(np.array([1, 2, 3]))
    with pytest.raises(UsageError, match="a length of 4 for a sequence of 3 tokens"):
        session.fork(first, 4)
    with pytest.raises(UsageError, match="no sequence 7"):
        session.fork(7)
    session.fork(first)
    with pytest.raises(UsageError, match="holds 2 sequences already"):
        session.fork(first)
    assert session.lengths == [3, 3]
