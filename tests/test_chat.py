"""A conversation runs no token twice, sets thinking apart, and is ended without being lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from dsc.chat import MARKS, Conversation, Thinking, marks_of
from dsc.chat_template import ChatTemplate
from dsc.errors import UsageError
from dsc.sampling import Sampling

LETTERS = "abcdefghijklmnopqrstuvwxyz \n<>/"
SPECIAL = ["<s>", "</s>", "<|u|>", "<|a|>"]
OPENED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{{ m.content }}
{{- eos_token }}{% else %}<|u|>{{ m.content }}{% endif %}{% endfor %}<|a|><think>"""


class Template(ChatTemplate):
    """A template that is rendered in this process: how it is otherwise is tested apart."""

    def _asked(self, request: bytes) -> dict[str, Any]:
        from dsc.template_process import answer

        return dict(answer(request))


def letters() -> Tokenizer:
    """A letter is a token, and so is each special one; marks are letters."""
    names = [*SPECIAL, *LETTERS]
    made = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="z"))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = Fuse()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return made


class Scripted:
    """A session that says what it was given to say; each answer after another prompt."""

    max_batch, max_context, prefill_chunk = 1, 120, 16

    def __init__(self, tokenizer: Tokenizer, *answers: str, cuts: bool = True) -> None:
        self._tokenizer, self._cuts = tokenizer, cuts
        self._answers = [tokenizer.encode(a, add_special_tokens=False).ids for a in answers]
        self._now: list[int] = []
        self.held: list[int] | None = None
        self.ran: list[int] = []

    def _run(self, ids: Sequence[int]) -> None:
        self.ran.append(len(ids))
        self.held = [*(self.held or []), *map(int, ids)]
        assert len(self.held) <= self.max_context

    def add(self, ids: Any) -> int:
        assert self.held is None
        self._run(ids)
        return 7

    def prefill(self, ids: Any) -> None:
        assert self.held is not None
        self._run(ids)

    def truncate(self, sequence: int, length: int) -> None:
        assert self.held is not None
        if not self._cuts:
            raise UsageError("a ring cannot be cut")
        self.held = self.held[:length]

    def remove(self, sequence: int) -> None:
        self.held = None

    def logits(self, sequence: int) -> Any:
        if not self._now:
            self._now = [*self._answers.pop(0), SPECIAL.index("</s>")]
        row = np.zeros(self._tokenizer.get_vocab_size(), np.float32)
        row[self._now.pop(0)] = 1
        return row

    def decode(self, next_ids: Mapping[int, int]) -> Mapping[int, Any]:
        self._run([*next_ids.values()])
        return {sequence: self.logits(sequence) for sequence in next_ids}


def talk(*answers: str, text: str | None = OPENED, cuts: bool = True, **more: Any) -> Conversation:
    """A conversation with a model that gives these answers."""
    tokenizer = letters()
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    template = None if text is None else Template(text, tokens)
    session: Any = Scripted(tokenizer, *answers, cuts=cuts)
    ends = {SPECIAL.index("</s>")}
    return Conversation(session, tokenizer, template, Sampling(), stop_ids=ends, **more)


def said(conversation: Conversation, text: str) -> tuple[str, str]:
    """The thinking and the answer to a text."""
    found = {"thinking": "", "text": ""}
    for kind, piece in conversation.ask(text):
        found[kind] += piece
    return found["thinking"], found["text"]


def test_thinking_is_apart_and_what_a_template_drops_is_not_run_again() -> None:
    conversation = talk("hm\n</think>\n\nyes", "so</think>no")
    assert said(conversation, "one") == ("hm\n", "yes")
    session: Any = conversation.session
    assert conversation.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm\n"},
    ]
    assert session.ran[0] == len(conversation.prompt([conversation.messages[0]])[1])
    session.ran.clear()
    assert said(conversation, "two") == ("so", "no")
    begin = len("suoneA")  # bos, the user's mark, "one", and the assistant's
    assert conversation.sequence.reused == begin
    assert session.ran[0] == len("yesEutwoA<think>")
    _, ids = conversation.prompt([*conversation.messages[:2], {"role": "user", "content": "two"}])
    assert session.held[: len(ids)] == ids
    assert conversation.last.prompt_tokens == len(ids) - begin
    assert conversation.finish_reason == "stop"


def test_without_a_template_texts_follow_each_other_and_only_new_ones_run() -> None:
    conversation = talk("bc", "ef", text=None)
    assert said(conversation, "a") == ("", "bc")
    session: Any = conversation.session
    session.ran.clear()
    assert said(conversation, "d") == ("", "ef")
    assert session.ran == [1, 1, 1]  # d, e and f
    assert session.held == conversation.tokenizer.encode("abcdef").ids


def test_states_that_cannot_be_cut_are_made_anew() -> None:
    conversation = talk("hm</think>yes", "so</think>no", cuts=False)
    assert said(conversation, "one") == ("hm", "yes")
    assert said(conversation, "two") == ("so", "no")
    assert conversation.sequence.reused == 0


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    conversation = talk("hm</think>yes and more", "ok</think>no")
    for kind, piece in conversation.ask("one"):
        if kind == "text" and piece.endswith("s"):
            conversation.interrupt()
    assert conversation.finish_reason == "interrupted"
    assert conversation.messages[-1]["content"] == "yes"
    session: Any = conversation.session
    session._now = []
    assert said(conversation, "two") == ("ok", "no")
    assert conversation.messages[-1]["content"] == "no"


def test_an_interrupt_in_a_long_prompt_ends_it_between_chunks_and_takes_the_turn_back() -> None:
    conversation = talk("x</think>y")
    session: Any = conversation.session
    before = session._run

    def run(ids: Sequence[int]) -> None:
        before(ids)
        conversation.interrupt()

    session._run = run
    assert said(conversation, "a" * 40) == ("", "")
    assert session.ran == [16]
    assert conversation.messages == []
    session._run = before
    assert said(conversation, "a" * 40) == ("x", "y")
    assert conversation.sequence.reused == 16


def test_a_full_context_is_said_and_nothing_is_kept_of_the_turn() -> None:
    conversation = talk("x</think>y")
    with pytest.raises(UsageError, match=r"has 215 tokens, .* compiled for 120 \(max_context\)"):
        said(conversation, "a" * 205)
    assert conversation.messages == []
    assert said(conversation, "a") == ("x", "y")


def test_limits_stop_texts_and_options() -> None:
    shout = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' if thinking else 'b' }}"
    conversation = talk("abcdef", "uvwxyz", text=shout, options={"thinking": True}, stop=["de"])
    assert conversation.prompt([{"role": "user", "content": "q"}])[0] == "qa"
    assert said(conversation, "q") == ("", "abc")
    session: Any = conversation.session
    session._now = []
    conversation.max_new_tokens = 2
    assert said(conversation, "q") == ("", "uv")
    assert conversation.finish_reason == "length"


def test_half_a_character_is_refused() -> None:
    """JSON and Jinja can spell one, and a tokenizer takes none."""
    for asked, text in (("\ud800", None), ("a", "{{ '\\udfff' }}")):
        conversation = talk("x", text=text or "{{ messages[0].content }}")
        with pytest.raises(UsageError, match=r"half a character, U\+D"):
            said(conversation, asked)
        assert conversation.messages == []


def test_a_new_conversation_keeps_what_the_model_was_told_first() -> None:
    told = {"role": "system", "content": "s"}
    conversation = talk("a</think>b", "c</think>d", messages=[told])
    said(conversation, "one")
    conversation.reset()
    assert conversation.messages == [told]
    assert conversation.sequence.tokens == []
    assert said(conversation, "one") == ("c", "d")


def test_special_tokens_are_not_shown_and_marks_may_be_such() -> None:
    tokenizer = letters()
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in ("[THINK]", "[/THINK]")])
    assert marks_of(None, tokenizer) == ("[THINK]", "[/THINK]")
    assert marks_of(None, letters()) is None
    session: Any = Scripted(tokenizer, "[THINK]hm[/THINK]y<|u|>es")
    ends = {SPECIAL.index("</s>")}
    conversation = Conversation(session, tokenizer, None, Sampling(), stop_ids=ends)
    assert said(conversation, "a") == ("hm", "yes")


@given(
    st.sampled_from(MARKS),
    st.text("ab<k\n", max_size=9),
    st.text("ab<t\n", max_size=9),
    st.booleans(),
    st.lists(st.integers(1, 5)),
)
def test_thinking_is_told_apart_however_the_text_is_cut(
    marks: tuple[str, str], thought: str, rest: str, opened: bool, sizes: list[int]
) -> None:
    begin, end = marks
    text = ("" if opened else "\n" + begin) + thought + end + rest
    apart, found = Thinking(marks, "…" + begin + "\n" if opened else "…"), []
    while text:
        size = sizes.pop() if sizes else 3
        found += apart.push(text[:size])
        text = text[size:]
    found += apart.finish()
    assert "".join(t for kind, t in found if kind == "thinking") == thought
    assert "".join(t for kind, t in found if kind == "text") == rest.lstrip("\n")


def test_an_answer_without_thinking_may_have_a_mark_too() -> None:
    apart = Thinking(MARKS[-1], "")
    text = "<|channel|>final<|message|>yes"
    found = [piece for letter in text for piece in apart.push(letter)] + apart.finish()
    assert "".join(piece for _, piece in found) == "yes"


@pytest.mark.parametrize("text", ["<thin air", " <", "a<think>b</think>", "</think>", "<b>"])
def test_what_only_looks_like_thinking_is_text(text: str) -> None:
    apart = Thinking(MARKS[0], "")
    found = [piece for letter in text for piece in apart.push(letter)] + apart.finish()
    assert {kind for kind, _ in found} == {"text"}
    assert "".join(piece for _, piece in found) == text
