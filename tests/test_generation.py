"""Generation ends where it should, streams what is whole, and takes no step that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import dsc
from dsc.errors import ArtifactError, UsageError
from dsc.generation import BROKEN, Answer, Clock, TextStream, continue_all, generate
from dsc.runtime.session import Session
from dsc.sampling import Sampling
from tests.runtime.test_session import small_lm

LIKELIEST = Sampling().picker()


class Countdown:
    """After token t the likeliest token is t - 1; counts its steps."""

    def __init__(self, max_batch: int = 1, max_context: int = 64) -> None:
        self.max_batch, self.max_context = max_batch, max_context
        self.steps: list[int] = []
        self.last: dict[int, int] = {}

    def add(self, ids: Any) -> int:
        """Start a sequence."""
        assert len(self.last) < self.max_batch
        self.steps.append(len(ids))
        sequence = len(self.steps)
        self.last[sequence] = int(ids[-1])
        return sequence

    def logits(self, sequence: int) -> Any:
        """Return logits [10]."""
        return np.eye(10, dtype=np.float32)[(self.last[sequence] - 1) % 10]

    def decode(self, next_ids: Mapping[int, int]) -> Mapping[int, Any]:
        """Return logits [10] by sequence."""
        assert next_ids.keys() == self.last.keys()
        self.steps.append(len(next_ids))
        self.last |= next_ids
        return {sequence: self.logits(sequence) for sequence in next_ids}

    def remove(self, sequence: int) -> None:
        """End a sequence."""
        del self.last[sequence]


def test_greedy_counts_down_and_stops() -> None:
    assert list(generate(Countdown(), [5, 4], 10, stop={0})) == [3, 2, 1]


def test_the_last_token_costs_no_step() -> None:
    session = Countdown()
    assert list(generate(session, [5], 3)) == [4, 3, 2]
    assert len(session.steps) == 3  # one prefill, two decodes
    assert list(generate(session, [5], 0)) == []


def test_the_context_ends_the_text_and_a_prompt_that_fills_it_is_refused() -> None:
    session = Countdown(max_context=6)
    assert list(generate(session, [5, 4], 10)) == [3, 2, 1, 0]
    assert sum(session.steps) <= session.max_context
    with pytest.raises(UsageError, match="max_context"):
        list(generate(session, [5] * 6, 10))


def test_a_seed_repeats_and_another_differs() -> None:
    warm = Sampling(sample=True, temperature=2.0)
    runs = [list(generate(Countdown(), [5], 20, sampling=warm, seed=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("max_batch", [1, 2, 5])
def test_prompts_run_together_and_answers_are_those_of_each_alone(max_batch: int) -> None:
    prompts = [[9], [3], [8, 7], [2], [6]]
    session = Countdown(max_batch)
    answers = [Answer(p, 4, LIKELIEST, stop={0}) for p in prompts]
    clock = Clock()
    tokens = [i for i, _ in continue_all(session, answers, clock) if not answers[i].text]
    assert [a.ids for a in answers] == [
        list(generate(Countdown(), p, 4, stop={0})) for p in prompts
    ]
    assert [a.finish_reason for a in answers] == ["length", "stop", "length", "stop", "length"]
    assert not session.last
    assert len(tokens) == sum(len(a.ids) + (a.finish_reason == "stop") for a in answers)
    assert clock.prompt_tokens == 6
    assert clock.decoded == len(tokens) - len(prompts)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_the_run_and_name_the_check(bad: float) -> None:
    logits = np.full(10, -np.inf, np.float32)
    for _ in range(2):  # of which none is a number, and one is wrong
        with pytest.raises(ArtifactError, match=r"verify OUT --hashes"):
            Answer([1, 2], 5, LIKELIEST).take(logits)
        logits[:] = 0
        logits[3] = bad


def test_minus_infinity_is_a_token_that_is_left_out() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[3] = -5.0
    for sampling in (Sampling(), Sampling(sample=True), Sampling(True, 0.5, 2, 0.9, 0.1)):
        answer = Answer([1, 2], 5, sampling.picker(0))
        answer.take(logits)
        assert answer.ids == [3]


def test_a_clock_keeps_prompts_and_decoding_apart() -> None:
    clock = Clock()
    session = Countdown()
    list(continue_all(session, [Answer([5, 4, 3], 1, LIKELIEST)], clock))
    alone = clock.summary()
    assert alone["prompt_tokens"] == 3
    assert "decode_tokens_per_s" not in alone
    list(continue_all(session, [Answer([5], 4, LIKELIEST)], clock))
    both = clock.summary()
    assert both["prefill_tokens_per_s"] == pytest.approx(4 / both["prefill_s"])
    assert both["decode_tokens_per_s"] == pytest.approx(3 / both["decode_s"])
    assert clock.last_token_s == pytest.approx(both["decode_s"] + both["prefill_s"])


# --- text -----------------------------------------------------------------------------------------


class Bytes:
    """A token is a byte; a broken character is spelled as byte-level tokenizers do."""

    def decode(self, ids: Sequence[int]) -> str:
        """Spell bytes."""
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """A decoder that drops the space before a text, as those of sentencepiece do."""

    names = ("", " the", " end", ".", "x")

    def decode(self, ids: Sequence[int]) -> str:
        """Spell words; token 0 is special and not shown."""
        return "".join(self.names[i] for i in ids).removeprefix(" ")


def spelled(tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The pieces that come of tokens, up to the end, and whether a stop text ended them."""
    stream = TextStream(Bytes(), [], stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


@given(st.text(alphabet="aé語😀 \n", max_size=12))
def test_characters_come_when_their_last_byte_does(text: str) -> None:
    stream, shown = TextStream(Bytes()), ""
    data = text.encode()
    for count, token in enumerate(data, 1):
        shown += stream.push(token)
        assert shown == data[:count].decode("utf-8", "ignore")
    assert stream.finish() == ""


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_come_out_as_the_decoder_spells_them(data: bytes) -> None:
    pieces, _ = spelled(list(data))
    assert "".join(pieces) == data.decode("utf-8", "replace")


class Together:
    """Bytes as decoders with byte fallback spell them: all that follow each other are one text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Spell bytes."""
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return BROKEN * len(ids)


def test_what_was_shown_does_not_come_again_when_its_spelling_changes() -> None:
    stream, data = TextStream(Together()), "語".encode() + b"\xe4"
    text = "".join(stream.push(byte) for byte in data)
    assert text == "語"
    assert text + stream.finish() == "語" + BROKEN * 3


def test_the_space_before_a_word_is_kept_after_a_prompt_and_a_special_token() -> None:
    stream = TextStream(Words(), [1, 4])
    assert [stream.push(t) for t in (2, 0, 1, 3)] == [" end", "", " the", "."]


@given(
    st.text(alphabet="abé", max_size=16),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_a_stop_text_ends_the_text_before_it_and_nothing_of_it_comes(
    text: str, stop: list[str]
) -> None:
    pieces, stopped = spelled(list(text.encode()), stop)
    # The end that is whole first: the others could not be known when it was.
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    assert stopped == bool(ends)
    if ends:
        part = text[: ends[0]]
        text = part[: min(part.find(s) for s in stop if s in part)]
    assert "".join(pieces) == text
    held = max([len(s) - 1 for s in stop], default=0)
    before = "".join(pieces[:-1])
    assert stopped or len(text) - len(before) <= held


def test_tokens_of_the_trained_tokenizer_come_as_the_whole_text(root: Path) -> None:
    tokenizer = Tokenizer.from_file(str(root / "models" / "tiny-v3" / "tokenizer.json"))
    text = "In the beginning — naïve 語 and 😀 God created"
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer, ids[:3])
    pieces = [stream.push(token) for token in ids[3:]]
    assert tokenizer.decode(ids[:3]) + "".join(pieces) + stream.finish() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


class Ahead(Session):
    """A session that chooses tokens itself."""

    chooses = True
    steps = 0

    def generate(self, steps: int, *rest: Any) -> Any:
        """Count the tokens that are chosen ahead."""
        self.steps += steps
        return super().generate(steps, *rest)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(sample=True, temperature=1.5, top_k=5)])
def test_tokens_that_a_session_chooses_ahead_are_those_that_are_picked(sampling: Sampling) -> None:
    """Prompts that join and end at different times, by a stop id or their length."""
    model = dsc.compile(small_lm(), backend="reference", max_batch=2, max_context=40)
    told = []
    for kind in (Session, Ahead):
        session = kind(model.executable, model.program, 2)
        answers = [
            Answer(prompt, most, sampling.picker(3, number), {4})
            for number, (prompt, most) in enumerate([([1, 2], 19), ([3], 1), ([5, 6, 7], 9)])
        ]
        clock = Clock()
        order = list(continue_all(session, answers, clock))
        assert session.sequences == []
        told.append([(a.ids, a.finish_reason) for a in answers])
        assert len(order) == sum(len(a.ids) + (a.finish_reason == "stop") for a in answers)
        if isinstance(session, Ahead):
            assert session.steps > 0
    assert told[0] == told[1]
    penalised = Sampling(repetition_penalty=1.3).picker(1)
    session = Ahead(model.executable, model.program, 2)
    answers = [Answer([1, 2], 3, penalised), Answer([3], 3, sampling.picker(1))]
    assert len(list(continue_all(session, answers))) == 6
    assert session.steps == 0, "what depends on the tokens so far is chosen here"


def test_a_first_token_waits_for_none_behind_it() -> None:
    """It comes with its prompt's logits, and what a session chooses ahead begins behind it."""
    model = dsc.compile(small_lm(), backend="reference", max_batch=1, max_context=40)
    session = Ahead(model.executable, model.program, 1)
    answer = Answer([1, 2], 9, Sampling().picker(3))
    tokens = continue_all(session, [answer])
    next(tokens)
    assert (len(answer.ids), session.steps, session.lengths) == (1, 0, [2])
    assert len(list(tokens)) == 8
    assert session.steps == 8
