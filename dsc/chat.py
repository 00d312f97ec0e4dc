"""A conversation with a compiled model: turns in, answers out as they come.

Each turn the model's template writes the whole conversation anew, and what of its tokens the
session holds already is not run again: the sequence is cut to what both have in common. So a
template may change what it wrote before, as those do that drop the thinking of former answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dsc.chat_template import ChatTemplate, Message
from dsc.errors import UsageError
from dsc.generation import Answer, Clock, TextStream, continue_all, held_back, room
from dsc.runtime.session import Session
from dsc.sampling import Sampling

MARKS = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
"""How models set thinking apart; a template or a tokenizer tells which of these a model has."""
UNTHOUGHT = "<|channel|>final<|message|>"
"""How an answer begins that was not thought about, where that has a mark of its own."""
Kind = Literal["thinking", "text"]
Piece = tuple[Kind, str]


class Interrupted(Exception):
    """The user ended an answer before its first token."""


class GrowingSequence:
    """One sequence of a session, as `continue_all` takes it: a prompt is what it shall hold.

    Tokens that it holds already are kept. `interrupted` is asked between chunks of a prompt.
    """

    max_batch = 1

    def __init__(self, session: Session, interrupted: Callable[[], bool] = lambda: False) -> None:
        self.session, self.max_context = session, session.max_context
        self.tokens: list[int] = []
        self.reused = 0
        self._id: int | None = None
        self._interrupted = interrupted

    def add(self, ids: Any) -> int:
        """Make the sequence these tokens [S], running those that it does not hold."""
        wanted = [int(i) for i in ids]
        same = next(
            (
                n
                for n, pair in enumerate(zip(self.tokens, wanted, strict=False))
                if len({*pair}) > 1
            ),
            min(len(self.tokens), len(wanted)),
        )
        self._cut(min(same, len(wanted) - 1))  # the last one's logits are wanted
        self.reused = len(self.tokens)
        chunk = self.session.prefill_chunk
        for start in range(self.reused, len(wanted), chunk):
            if self._interrupted():
                raise Interrupted
            part = wanted[start : start + chunk]
            if self._id is None:
                self._id = self.session.add(np.asarray(part, np.int64))
            else:
                self.session.prefill(np.asarray(part, np.int64))
            self.tokens += part
        assert self._id is not None, "a prompt has a token"
        return self._id

    def _cut(self, length: int) -> None:
        """Keep the first tokens; none, where the model has states that cannot be cut."""
        if length == len(self.tokens) or self._id is None:
            return
        try:
            self.session.truncate(self._id, length)
        except UsageError:
            length = 0
        if length == 0:
            self.forget()
        self.tokens = self.tokens[:length]

    def forget(self) -> None:
        """Hold nothing any more."""
        if self._id is not None:
            self.session.remove(self._id)
        self._id, self.tokens = None, []

    def logits(self, sequence: int) -> Any:
        """Logits [vocab] after the last token."""
        return self.session.logits(sequence)

    def decode(self, next_ids: Mapping[int, int]) -> Mapping[int, Any]:
        """Process one more token."""
        found: Mapping[int, Any] = self.session.decode(next_ids)
        self.tokens += next_ids.values()
        return found

    def remove(self, sequence: int) -> None:
        """An answer has ended; its tokens stay for the next turn."""


class Thinking:
    """Sets thinking apart in a text that comes in pieces.

    It is what stands between the marks at the start of an answer; the first may stand at the end of
    the prompt already. Marks are left out, and line ends that follow the second.
    """

    def __init__(self, marks: tuple[str, str] | None, prompt: str) -> None:
        self._marks = marks or ("", "")
        opened = marks is not None and prompt.rstrip().endswith(marks[0])
        self._place: Literal["start", "inside", "after"] = "inside" if opened else "start"
        self._held, self._began = "", marks is None
        if marks is None:
            self._place = "after"

    def push(self, text: str) -> list[Piece]:
        """What is settled with one more piece of text."""
        self._held += text
        found: list[Piece] = []
        if self._place == "start":
            begin, seen = self._marks[0], self._held.lstrip()
            if seen.startswith(begin):
                self._place, self._held = "inside", seen[len(begin) :]
            elif not (begin.startswith(seen) or UNTHOUGHT.startswith(seen)):
                self._place, self._began = "after", True
                self._held = self._held.removeprefix(UNTHOUGHT)
        if self._place == "inside":
            thought, end, rest = self._held.partition(self._marks[1])
            keep = 0 if end else held_back(thought, self._marks[1:])
            found.append(("thinking", thought[: len(thought) - keep]))
            self._held = rest if end else thought[len(thought) - keep :]
            self._place = "after" if end else "inside"
            self._began = not end
        if self._place == "after":
            text = self._held if self._began else self._held.lstrip("\r\n")
            self._began = self._began or bool(text)
            self._held = ""
            found.append(("text", text))
        return [(kind, text) for kind, text in found if text]

    def finish(self) -> list[Piece]:
        """What was held back: no more text comes."""
        kind: Kind = "thinking" if self._place == "inside" else "text"
        rest, self._held = self._held, ""
        return [(kind, rest)] if rest else []


@dataclass
class Conversation:
    """Messages, and the model that answers them.

    `options` are variables of the template; without a template texts simply follow each other.
    `interrupt` ends the answer that is coming; what has come of it stays.
    """

    session: Session
    tokenizer: Any
    template: ChatTemplate | None
    sampling: Sampling
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    max_new_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    last: Clock = field(default_factory=Clock)
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self._ended = False
        self.sequence = GrowingSequence(self.session, lambda: self._ended)
        self._hidden = _hidden(self.tokenizer)
        self._marks = marks_of(self.template, self.tokenizer)

    def interrupt(self) -> None:
        """End the answer that is coming after its next token."""
        self._ended = True

    def reset(self) -> None:
        """Begin anew; what the user set for the whole conversation (`system`) stays."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.sequence.forget()

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """The text of a conversation up to the answer, and its tokens. Raises `UsageError`."""
        if self.template is None:
            text = "".join(str(message["content"]) for message in messages)
        else:
            text = self.template.render(messages, **self.options)
        check_whole(text)
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=self.template is None
        ).ids  # a template writes special tokens itself
        if not ids:
            raise UsageError("the conversation holds no token", hint="say something")
        return text, ids

    def ask(self, text: str) -> Iterator[Piece]:
        """Say something; yield the answer as it comes, and keep both.

        Raises `UsageError` where the template refuses or the context is full; then nothing is kept.
        """
        asked: Message = {"role": "user", "content": text}
        prompt, ids = self.prompt([*self.messages, asked])
        left = self._room(len(ids))
        most = left if self.max_new_tokens is None else min(left, self.max_new_tokens)
        stream = TextStream(_Spelled(self.tokenizer), ids, self.stop)
        pick = self.sampling.picker(self.seed, len(self.messages))
        answer = Answer(ids, most, pick, self.stop_ids, stream)
        apart, said = Thinking(self._marks, prompt), {"thinking": "", "text": ""}
        self._ended, self.last, self.finish_reason = False, Clock(), "interrupted"
        try:
            for _, new in continue_all(self.sequence, [answer], self.last):
                pieces = apart.push(self._hidden.sub("", new))
                for kind, piece in [*pieces, *(apart.finish() if answer.finish_reason else [])]:
                    said[kind] += piece
                    yield kind, piece
                if self._ended:
                    break
            else:
                self.finish_reason = answer.finish_reason
        except Interrupted:
            pass
        self.last.prompt_tokens -= self.sequence.reused
        if answer.ids or self.finish_reason != "interrupted":
            self.messages += [asked, _answered(said["text"], said["thinking"])]

    def _room(self, tokens: int) -> int:
        try:
            return room(tokens, self.session.max_context)
        except UsageError:
            raise UsageError(
                f"the conversation has {tokens} tokens, and the model was compiled for"
                f" {self.session.max_context} (max_context)",
                hint="begin anew (/reset), say less, or compile with a larger max_context",
            ) from None


class _Spelled:
    """Spells special tokens too: marks may be among them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Spell tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def check_whole(text: str) -> None:
    """Raise `UsageError` for halves of characters: JSON and templates spell them, tokens do not."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise UsageError(
            f"the conversation holds half a character, U+{ord(text[problem.start]):04X}",
            hint="correct the messages, or give a template of your own: --chat-template FILE",
        ) from None


def marks_of(template: ChatTemplate | None, tokenizer: Any) -> tuple[str, str] | None:
    """How a model sets its thinking apart, by what its template writes and its tokenizer knows."""
    written = "" if template is None else template.text
    for begin, end in MARKS:
        if begin in written or end in written or tokenizer.token_to_id(end) is not None:
            return begin, end
    return None


def _hidden(tokenizer: Any) -> re.Pattern[str]:
    """The special tokens that are not shown: all but those that are marks or parts of them."""
    marks = "".join(mark for pair in MARKS for mark in pair)
    added = tokenizer.get_added_tokens_decoder().values()
    texts = [t.content for t in added if t.special and t.content and t.content not in marks]
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _answered(text: str, thinking: str) -> Message:
    """An answer as templates read it."""
    kept = {"reasoning_content": thinking} if thinking.strip() else {}
    return {"role": "assistant", "content": text, **kept}
