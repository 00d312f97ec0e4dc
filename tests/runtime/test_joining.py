"""Sequences that join and leave between steps: each gets the logits that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

import dsc
from dsc.errors import UsageError
from dsc.ir.arrays import Array
from dsc.runtime.executable import Call
from dsc.runtime.pages import PagePool
from dsc.runtime.session import Session
from tests.runtime.test_pages import compiled as four_pages
from tests.runtime.test_session import small_lm

VOCABULARY, CONTEXT, BATCH = 9, 32, 4
FORMS = ["reference", "tvm", "onnxruntime"]


@cache
def compiled(backend: str) -> dsc.CompiledModel:
    """One MLA layer over a vocabulary of 9."""
    if backend == "tvm":
        pytest.importorskip("tvm")
    return dsc.compile(
        small_lm(), backend=backend, max_batch=BATCH, max_context=CONTEXT, prefill_chunk=8
    )


class Alone:
    """What each sequence of a session should see: a session of one, fed the same tokens."""

    def __init__(self, model: dsc.CompiledModel) -> None:
        self.model = model
        self.alone: dict[int, Session] = {}
        self.lengths: dict[int, int] = {}
        self.worst = 0.0

    def added(self, session: Session, sequence: int, ids: torch.Tensor) -> None:
        """A sequence joined."""
        assert sequence not in self.lengths
        self.alone[sequence] = self.model.session(1)
        self.lengths[sequence] = len(ids)
        self.compare(session.logits(sequence), self.alone[sequence].prefill(ids)[0])

    def decoded(self, tokens: dict[int, int], logits: dict[int, torch.Tensor]) -> None:
        """Some sequences got a token."""
        assert list(logits) == list(tokens)
        for sequence, token in tokens.items():
            self.lengths[sequence] += 1
            self.compare(logits[sequence], self.alone[sequence].decode([token])[0])

    def compare(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Note how far two logits [vocab] are apart."""
        assert ours.shape == theirs.shape
        self.worst = max(self.worst, float((ours - theirs).abs().max()))


def random_life(
    session: Session, alone: Alone, seed: int, steps: int, longest: int, vocabulary: int
) -> int:
    """Let sequences join, leave, and decode all or in part; returns how many there were."""
    draw = random.Random(seed)
    for _ in range(steps):
        active = session.sequences
        room = [s for s in active if alone.lengths[s] < session.max_context]
        action = draw.choice(["add", "add", "decode", "decode", "some", "remove"])
        if action == "add" and len(active) < session.max_batch:
            ids = torch.tensor(
                [draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))]
            )
            alone.added(session, session.add(ids), ids)
        elif action == "remove" and active:
            session.remove(draw.choice(active))
        elif action in ("decode", "some") and room:
            chosen = room if action == "decode" else draw.sample(room, draw.randint(1, len(room)))
            tokens = {s: draw.randrange(vocabulary) for s in chosen}
            alone.decoded(tokens, session.decode(tokens))
        assert session.lengths == [alone.lengths[s] for s in session.sequences]
    return len(alone.lengths)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", FORMS)
def test_sequences_join_and_leave_in_any_order(backend: str, seed: int) -> None:
    model = compiled(backend)
    alone = Alone(model)
    assert random_life(model.session(), alone, seed, 60, 20, VOCABULARY) > 8
    assert alone.worst < 2e-5


@pytest.mark.parametrize("backend", ["reference", "tvm"])
def test_sequences_join_and_leave_over_pages(backend: str) -> None:
    """Prompts of up to three pages; pages that were given back are taken again."""
    if backend == "tvm":
        pytest.importorskip("tvm")
    model = four_pages("hand", backend, "paged")
    session, alone = model.session(3), Alone(model)
    assert random_life(session, alone, 1, 24, 150, 50) > 3
    assert alone.worst < 2e-5
    assert session._pool is not None
    assert session._pool.used == sum(-(-n // 64) for n in session.lengths)
    for sequence in session.sequences:
        session.remove(sequence)
    assert session._pool.used == 0


@pytest.mark.parametrize("backend", FORMS)
def test_a_slot_that_is_used_again_shows_nothing_of_the_past(backend: str) -> None:
    """Not one bit of a sequence depends on who had its slot before."""
    fresh, used = compiled(backend).session(2), compiled(backend).session(2)
    for prompt in ([8] * 25, [7] * 30):
        used.add(prompt)
    used.decode({1: 3})
    used.remove(0)
    used.remove(1)
    for session in (fresh, used):
        session.add([1, 2, 3])
        session.add([4])
    assert (fresh.sequences, used.sequences) == ([0, 1], [2, 3])
    for token in range(6):
        first, second = fresh.decode([token, 0]), used.decode([token, 0])
        assert torch.equal(first, second)


PREFIX, SUFFIX = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], [4, 5, 6, 7, 8, 1, 2, 3, 4, 5]


def truncated(session: Session, suffix: list[int]) -> torch.Tensor:
    """Logits of three steps after a prefix, of a sequence that had a suffix, or never had."""
    session.add([8, 7, 6])
    mine = session.add(PREFIX)
    if suffix:
        session.prefill([[0] * len(suffix), suffix], lengths=[1, len(suffix)])
        session.decode({mine: 2})
        session.truncate(mine, len(PREFIX))
    else:
        session.decode({0: 0})
    assert session.lengths == [4, len(PREFIX)]
    return torch.stack([session.decode([token, token]) for token in (5, 6, 7)])


@pytest.mark.parametrize("backend", FORMS)
def test_a_truncated_sequence_never_had_its_suffix(backend: str) -> None:
    model = compiled(backend)
    found = truncated(model.session(2), SUFFIX)
    wanted = truncated(model.session(2), [])
    assert torch.equal(found, wanted) if backend == "tvm" else (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "tvm"])
def test_a_truncated_sequence_gives_its_pages_back(backend: str) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
    model = four_pages("hand", backend, "paged")
    sessions = [model.session(2), model.session(2)]
    prompt = [n % 50 for n in range(70)]
    for session, more in zip(sessions, (100, 0), strict=True):
        session.add(prompt)
        if more:
            session.prefill([prompt[:50] * 2])
            session.truncate(0, len(prompt))
        assert session._pool is not None
        assert session._pool.used == 2
    for token in range(3):
        found, wanted = (session.decode([token]) for session in sessions)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", FORMS)
def test_a_sequence_cut_to_nothing_starts_again(backend: str) -> None:
    model = compiled(backend)
    session, fresh = model.session(1), model.session(1)
    session.prefill([4, 5, 6])
    session.truncate(0, 0)
    assert session.lengths == [0]
    found, wanted = session.prefill([1, 2]), fresh.prefill([1, 2])
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("backend", FORMS)
def test_what_a_cut_sequence_said_is_not_told(backend: str) -> None:
    session = compiled(backend).session(1)
    session.prefill([4, 5, 6])
    said = session.logits(0)
    session.truncate(0, 3)
    assert torch.equal(session.logits(0), said), "nothing was cut"
    session.truncate(0, 2)
    with pytest.raises(UsageError, match="sequence 0 was cut"):
        session.logits(0)
    assert (session.decode([6])[0] - said).abs().max() < 1e-5


@pytest.mark.parametrize("backend", FORMS)
def test_sequences_of_a_fixed_batch_leave_too(backend: str) -> None:
    model = compiled(backend)
    session = model.session()
    session.prefill([[1, 2, 3], [4, 5, 0], [6, 7, 8]], lengths=[3, 2, 3])
    assert session.sequences == [0, 1, 2]
    session.remove(0)
    assert (session.sequences, session.lengths) == ([2, 1], [3, 2])
    alone = model.session()
    alone.prefill([4, 5])
    wanted = alone.decode([1])
    torch.testing.assert_close(session.decode([2, 1])[1:], wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(session.logits(1), wanted[0], rtol=0, atol=2e-5)


def test_one_step_serves_all_and_only_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of three sequences is one run of the entry over three rows of the caches, uncopied."""
    session = compiled("tvm").session()
    for prompt in ([1, 2], [3], [4, 5, 6]):
        session.add(prompt)
    runs: list[tuple[str, dict[str, Array]]] = []
    bind = session.executable.bind

    def spy(entry: str, given: dict[str, Array]) -> Call:
        call = bind(entry, given)

        def counted() -> dict[str, Array]:
            runs.append((entry, given))
            return call()

        return counted

    monkeypatch.setattr(session.executable, "bind", spy)
    session.decode({0: 1, 1: 1, 2: 1})
    session.decode({1: 1})
    session.decode({0: 1, 2: 1})
    shapes = [given["past.0.latent"].shape[0] for _, given in runs]
    assert [entry for entry, _ in runs] == ["decode"] * 3
    assert shapes == [3, 1, 3]
    assert len({id(given["past.0.latent"].base) for _, given in runs}) == 1
    assert session.lengths == [4, 3, 5]


def test_logits_are_of_the_kind_that_went_in() -> None:
    session = compiled("reference").session()
    first, second = session.add(np.array([1, 2])), session.add(torch.tensor([3]))
    assert isinstance(session.logits(first), np.ndarray)
    found = session.decode({first: np.int64(1), second: torch.tensor(2)})
    assert isinstance(found[first], np.ndarray)
    assert isinstance(found[second], torch.Tensor)


def full(session: Session) -> None:
    for _ in range(3):
        session.add([1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (full, "holds 2 sequences already"),
        (lambda s: s.truncate(0, 0), "no sequence 0 in this session"),
        (lambda s: (s.add([1]), s.truncate(0, 2)), "a length of 2 for a sequence of 1 tokens"),
        (lambda s: (s.add([1]), s.truncate(0, -1)), "a length of -1"),
        (lambda s: (s.add([1]), s.truncate(0, True)), "a length of True"),
        (lambda s: (s.add([1]), s.truncate(0, 0.5)), "a length of 0.5"),
        (lambda s: s.remove(0), "no sequence 0 in this session"),
        (lambda s: s.logits(7), "no sequence 7"),
        (lambda s: (s.add([1]), s.decode({0: 1, 1: 1})), "no sequence 1"),
        (lambda s: (s.add([1]), s.remove(0), s.remove(0)), "no sequence 0"),
        (lambda s: (s.add([1]), s.decode({})), "no sequence to decode"),
        (lambda s: (s.add([1]), s.decode({0: 9})), "vocabulary of 9"),
        (lambda s: (s.add([1]), s.decode({0: 0.5})), "int64"),
        (lambda s: s.add([]), "an empty prompt"),
        (lambda s: s.add([[1], [2]]), r"int64 \[S\]; these have the shape \[2, 1\]"),
        (lambda s: s.add([[1, 2]]), r"int64 \[S\]; these have the shape \[1, 2\]"),
        (lambda s: (s.add([1]), s.decode({0: [1, 2]})), "2 tokens each"),
        (lambda s: (s.add([1]), s.decode({0: None})), "int64.*NoneType"),
        (lambda s: (s.add([1]), s.remove(np.zeros(2))), "no sequence array"),
        (lambda s: s.add([1] * 33), "max_context is 32"),
        (lambda s: (s.add([1] * 32), s.add([1]), s.decode({0: 1, 1: 1})), "max_context is 32"),
    ],
)
def test_mistakes_are_told_and_change_nothing(
    call: Callable[[Session], object], words: str
) -> None:
    session = dsc.compile(small_lm(), backend="null", max_context=CONTEXT).session(2)
    with pytest.raises(UsageError, match=words):
        call(session)
    assert sum(session.lengths) <= 33


def test_a_prompt_that_fails_half_way_leaves_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    session = compiled("reference").session(2)
    with monkeypatch.context() as patched:
        patched.setattr(session.executable, "bind", lambda entry, given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.prefill([[1, 2], [3, 4]])
    assert session.sequences == []
    first = session.add([1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(session.executable, "bind", lambda entry, given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.add([3])
    assert session.sequences == [first]
    assert session.decode([1]).shape == (1, VOCABULARY)


def test_a_pool_takes_the_pages_of_a_sequence_back() -> None:
    pool = PagePool(6, 64)
    pool.grow([64, 128, 65])
    assert pool.blocks == [[0], [1, 2], [3, 4]]
    pool.drop(0)
    assert (pool.blocks, pool.used) == ([[3, 4], [1, 2]], 4)
    pool.grow([128, 192])
    assert pool.blocks == [[3, 4], [1, 2, 0]]
    assert pool.table([0], 128).tolist() == [[3, 4]]
    pool.drop(1)
    pool.drop(0)
    assert (pool.blocks, pool.used) == ([], 0)
