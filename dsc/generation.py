"""Autoregressive generation over a session: prompts in, texts out as they come.

NumPy only, so that an artifact whose backend needs no torch generates without importing it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from dsc.errors import ArtifactError, NoNumbers, UsageError
from dsc.ir.choosing import Choice, gives_token
from dsc.sampling import Pick, Picker, Sampling

BROKEN = "\N{REPLACEMENT CHARACTER}"
PENDING = 3
"""Bytes of a character that may wait for its last one."""
GREEDY = Sampling()
AHEAD = 8
"""Tokens that a session chooses before anybody looks at them."""


class Steps(Protocol):
    """What generation asks of a session; arrays go in and come back."""

    max_batch: int
    max_context: int

    def add(self, ids: Any) -> int:
        """Start a sequence with the prompt `ids` [S]; return its id."""
        ...

    def logits(self, sequence: int) -> Any:
        """The logits [vocab] after a sequence's last token."""
        ...

    def decode(self, next_ids: Mapping[int, int]) -> Mapping[int, Any]:
        """Process one more token of each sequence named; return their logits [vocab]."""
        ...

    def remove(self, sequence: int) -> None:
        """End a sequence."""
        ...


@runtime_checkable
class Chooses(Steps, Protocol):
    """A session that may choose tokens where the logits are; `chooses` says whether it does."""

    chooses: bool
    sequences: list[int]

    def generate(
        self, steps: int, choice: Choice, keys: Sequence[int], drawn: Sequence[int]
    ) -> Any:
        """Continue all sequences by so many tokens; ids [B, steps]. Raises `NoNumbers`."""
        ...


class Tokenizer(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Spell tokens."""
        ...


class TextStream:
    """The text of tokens as it becomes whole, up to the first of some texts that end it.

    A character may take several tokens, and so may a text that ends: what could still turn out to
    be either is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._decode = tokenizer.decode
        self._ids = list(prompt)  # spelled with what follows: a text's start is a special place
        self._spelled = len(self._ids)
        self._shown = self._decode(self._ids)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is whole now and cannot be the beginning of an end."""
        self._ids.append(token)
        text = self._decode(self._ids)
        waiting = min(PENDING, len(text) - len(text.rstrip(BROKEN)))
        whole = text[: len(text) - waiting]
        if not whole.startswith(self._shown):
            return ""
        new, self._shown = whole[len(self._shown) :], whole
        if not waiting:
            self._forget()
        return self._released(new)

    def finish(self) -> str:
        """Return what was held back: no more tokens come."""
        if self.stopped:
            return ""
        text = self._released(self._decode(self._ids)[len(self._shown) :])
        rest, self._held = self._held, ""
        return text + rest

    def _forget(self) -> None:
        """Let go of the tokens before the last ones, which suffice to spell the next."""
        last = self._ids[self._spelled :]
        spelled = self._decode(last)
        if spelled:  # a token that is not shown is no context
            self._ids, self._shown = last, spelled
        self._spelled = len(self._ids)

    def _released(self, text: str) -> str:
        """The part of the held and the new text that may be shown."""
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = held_back(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def held_back(text: str, ends: Sequence[str]) -> int:
    """How long the end of `text` is that could be the beginning of one of some texts.

    >>> held_back("so the E", ["END", "EN."]), held_back("so", [])
    (1, 0)
    """
    return max((_overlap(text, end) for end in ends), default=0)


def _overlap(text: str, stop: str) -> int:
    """How long the end of `text` is with which `stop` begins.

    >>> _overlap("so the E", "END"), _overlap("EN", "END"), _overlap("so", "END")
    (1, 2, 0)
    """
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


@dataclass
class Answer:
    """What comes of one prompt: ids, and with a stream their text, until `finish_reason` says why.

    "stop": a stop id or a stop text. "length": `most` new tokens.
    """

    prompt: Sequence[int]
    most: int
    pick: Pick
    stop: Collection[int] = ()
    stream: TextStream | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["", "stop", "length"] = ""

    def __post_init__(self) -> None:
        self._tokens = list(self.prompt)

    def take(self, logits: Any) -> str:
        """Choose the next token; return the text that became whole by it.

        Raises `ArtifactError` where the largest logit is no number.
        """
        scores = np.asarray(logits, dtype=np.float32)
        if not gives_token(scores):
            raise _no_numbers(len(self._tokens))
        return self.given(self.pick(scores, self._tokens, self.ids))

    def given(self, token: int) -> str:
        """Take the next token; return the text that became whole by it."""
        if token in self.stop:
            return self._ended("stop")
        self.ids.append(token)
        self._tokens.append(token)
        text = "" if self.stream is None else self.stream.push(token)
        self.text += text
        if self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.most:
            text += self._ended("length")
        return text

    def _ended(self, reason: Literal["stop", "length"]) -> str:
        rest = "" if self.stream is None else self.stream.finish()
        self.text += rest
        self.finish_reason = "stop" if self.stream is not None and self.stream.stopped else reason
        return rest


@dataclass
class Clock:
    """Tokens and seconds: loading, prompts, and all that came after them."""

    load_s: float = 0.0
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decoded: int = 0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def prefill(self, tokens: int) -> Iterator[None]:
        """Time the processing of a prompt."""
        start = time.perf_counter()
        yield
        self.prefill_s += time.perf_counter() - start
        self.prompt_tokens += tokens

    def saw_token(self, decoded: bool) -> None:
        """Note when a token was chosen, and whether a decode step led to it, not a prompt."""
        self.last_token_s = time.perf_counter() - self.start
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.decoded += decoded

    def summary(self) -> dict[str, float | int]:
        """Counts, seconds and rates; what did not happen is left out."""
        found: dict[str, float | int] = {"load_s": self.load_s} if self.load_s else {}
        found["prompt_tokens"] = self.prompt_tokens
        if self.first_token_s is None:
            return found
        found["first_token_s"] = self.first_token_s
        found["prefill_s"] = self.prefill_s
        found["prefill_tokens_per_s"] = self.prompt_tokens / self.prefill_s
        if self.decoded:
            found["decode_s"] = self.last_token_s - self.prefill_s
            found["decode_tokens_per_s"] = self.decoded / found["decode_s"]
        return found


def continue_all(
    session: Steps, answers: Sequence[Answer], clock: Clock | None = None
) -> Iterator[tuple[int, str]]:
    """Continue all prompts; yield the index of an answer and the text that became whole, or "".

    As many as the session takes run together, and the next begins when one ends. One item comes
    for each token, and one for an end without a token. The last token of an answer takes no step:
    nobody would read its logits. Where the session chooses tokens itself, it does so some ahead.
    """
    clock = clock or Clock()
    waiting = deque(range(len(answers)))
    running: dict[int, int] = {}  # sequence to the index of its answer
    scores: dict[int, Any] = {}
    while waiting or running:
        while waiting and len(running) < session.max_batch:
            index = waiting.popleft()
            prompt = np.asarray(answers[index].prompt, dtype=np.int64)
            with clock.prefill(len(prompt)):
                sequence = session.add(prompt)
                scores[sequence] = session.logits(sequence)
            running[sequence] = index
        if isinstance(session, Chooses) and (choice := _same_choice(session, answers, running)):
            yield from _continued(session, choice, answers, running, clock)
            scores.clear()
            continue
        for sequence, index in list(running.items()):
            decoded = bool(answers[index].ids)
            known = sequence in scores
            text = answers[index].take(scores[sequence] if known else session.logits(sequence))
            clock.saw_token(decoded)
            if answers[index].finish_reason:
                session.remove(sequence)
                del running[sequence]
            yield index, text
        if running:
            scores = dict(session.decode({s: answers[i].ids[-1] for s, i in running.items()}))


def _same_choice(
    session: Chooses, answers: Sequence[Answer], running: Mapping[int, int]
) -> Choice | None:
    """How all running answers choose, where the session does it and logits alone decide.

    The first token of an answer is taken here, so that nobody waits for those behind it. Where
    the largest is no number it is nothing for a session: who takes them says so.
    """
    if not all(answers[index].ids for index in running.values()):
        return None
    picks = [answers[index].pick for index in running.values()]
    choices = {pick.choice if isinstance(pick, Picker) else None for pick in picks}
    alike = session.chooses and len(choices) == 1 and running.keys() == {*session.sequences}
    return choices.pop() if alike and all(map(_gives_token, map(session.logits, running))) else None


def _continued(
    session: Chooses,
    choice: Choice,
    answers: Sequence[Answer],
    running: dict[int, int],
    clock: Clock,
) -> Iterator[tuple[int, str]]:
    """Continue all running answers by some tokens that the session chooses.

    What comes behind an end is dropped with its sequence. Where a step gives no numbers those
    before it are taken, and its logits are left to whom they concern.
    """
    mine = [answers[running[sequence]] for sequence in session.sequences]
    picks = [each.pick for each in mine if isinstance(each.pick, Picker)]
    steps = min(AHEAD, *(each.most - len(each.ids) for each in mine))
    keys, drawn = [pick.key for pick in picks], [pick.drawn for pick in picks]
    try:
        ids = np.asarray(session.generate(steps, choice, keys, drawn))
    except NoNumbers as found:
        ids = np.asarray(found.ids)
    order = list(session.sequences)
    for column in ids.T.tolist():
        for sequence, token in zip(order, column, strict=True):
            if sequence not in running:
                continue
            index = running[sequence]
            answer, decoded = answers[index], bool(answers[index].ids)
            text = answer.given(token)
            clock.saw_token(decoded)
            if answer.finish_reason:
                session.remove(sequence)
                del running[sequence]
            yield index, text
    for pick in picks:
        pick.drawn += ids.shape[1]


def _gives_token(logits: Any) -> bool:
    return gives_token(np.asarray(logits, np.float32))


def _no_numbers(tokens: int) -> ArtifactError:
    return ArtifactError(
        f"the largest of the logits after {tokens} tokens is no number (NaN, infinity)",
        hint="see whether the files are whole: dsc verify OUT --hashes; if they are,"
        " compile again with --dtype fp32 and compare",
    )


def generate(
    session: Steps,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt`, ending early at (and without) a `stop` id.

    The context of the session ends the text too.
    """
    most = min(max_new_tokens, room(len(prompt), session.max_context))
    if most < 1:
        return
    answer = Answer(prompt, most, sampling.picker(seed, 0), stop)
    for _ in continue_all(session, [answer]):
        if answer.finish_reason != "stop":
            yield answer.ids[-1]


def room(prompt_tokens: int, max_context: int) -> int:
    """How many tokens a text may still grow by. Raises `UsageError` for a prompt that fills it."""
    if prompt_tokens < max_context:
        return max_context - prompt_tokens
    raise UsageError(
        f"the prompt has {prompt_tokens} tokens, and the text may have {max_context} with the"
        " answer: that is max_context, for which the model was compiled",
        hint="shorten the prompt, or compile with a larger max_context; rope scaling goes beyond"
        " the model's own limit",
    )
