"""What goes into `dsc generate` and comes out: prompts, how tokens are chosen, printed answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError
from dsc.files import STANDARD_INPUT, read_text

if TYPE_CHECKING:
    from dsc.frontends.generation_config import GenerationSettings
    from dsc.generation import Answer
    from dsc.sampling import Sampling

Prompt = tuple[str, str]
"""Where it comes from, as the user wrote it, and its text."""


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[Prompt]:
    """The prompts of --prompt, then those of --file; one newline at the end of a file is left out.

    Raises `UsageError` and `FileError`.
    """
    if not texts and not files:
        raise UsageError("there is no prompt", hint='give --prompt "a text", or --file F')
    if [*texts, *map(str, files)].count(STANDARD_INPUT) > 1:
        raise UsageError("standard input can be read only once", hint="give '-' once")
    found = []
    for number, text in enumerate(texts, 1):
        if text == STANDARD_INPUT:
            found.append((f"--prompt {STANDARD_INPUT}", read_text(text).removesuffix("\n")))
        else:
            found.append(("--prompt" if len(texts) == 1 else f"--prompt, number {number}", text))
    return found + [(f"--file {path}", read_text(path).removesuffix("\n")) for path in files]


def encoded(tokenizer: Any, prompt: Prompt, max_context: int) -> list[int]:
    """The ids of a prompt. Raises `UsageError` where there is none, or no room for an answer."""
    from dsc.generation import room

    name, text = prompt
    ids: list[int] = tokenizer.encode(text).ids
    if not ids:
        raise UsageError("the prompt holds no token", where=name, hint="give a text to continue")
    try:
        room(len(ids), max_context)
    except UsageError as refused:
        refused.where = name
        raise
    return ids


def check_stops(texts: Sequence[str]) -> None:
    """Raise `UsageError` for an end that every text has."""
    if "" in texts:
        raise UsageError("--stop is empty", hint="give a text that ends an answer")


def check_sampling(asked: Mapping[str, float], greedy: bool) -> None:
    """Raise `UsageError` where drawing and not drawing are asked for at once."""
    from dsc.sampling import PENALTIES

    draws = sorted(asked.keys() - set(PENALTIES))
    if greedy and draws:
        raise UsageError(
            f"--greedy draws nothing, and --{draws[0].replace('_', '-')} says how to draw",
            hint="leave out one of them",
        )


def chosen_sampling(
    kept: GenerationSettings, asked: Mapping[str, float], greedy: bool = False
) -> Sampling:
    """How tokens are chosen: what was asked for, else what the model's own settings say.

    Naming any way to draw asks for drawing, whatever `do_sample` is.
    """
    from dataclasses import fields

    from dsc.frontends.generation_config import GenerationSettings
    from dsc.sampling import PENALTIES, Sampling

    names = {each.name for each in fields(Sampling)} & GenerationSettings.model_fields.keys()
    own = {name: getattr(kept, name) for name in names if getattr(kept, name) is not None}
    drawn = asked.keys() - set(PENALTIES) or kept.do_sample
    values: dict[str, Any] = {**own, **asked, "sample": bool(drawn) and not greedy}
    return Sampling(**values)


class Printer:
    """Prints answers one after the other, each as it comes; the later ones wait for their turn."""

    def __init__(self, answers: Sequence[Answer], prompts: Sequence[Prompt], quiet: bool) -> None:
        self._answers = answers
        self._labels = [label(n, prompts) for n in range(len(prompts))] if len(prompts) > 1 else []
        self._waiting = [""] * len(answers)
        self._turn = 0
        self._quiet = quiet
        self._write("".join(self._labels[:1]))

    def take(self, index: int, text: str) -> None:
        """Take what has come of an answer; print what is due."""
        self._waiting[index] += text
        while self._turn < len(self._answers):
            self._write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._answers[self._turn].finish_reason:
                return
            self._turn += 1
            self._write("\n" + "".join(self._labels[self._turn : self._turn + 1]))

    def _write(self, text: str) -> None:
        if text and not self._quiet:
            sys.stdout.write(text)
            sys.stdout.flush()


def label(number: int, prompts: Sequence[Prompt], width: int = 60) -> str:
    """The line over an answer.

    >>> print(label(1, [("", "first"), ("", "second")]), end="")
    == 2 of 2: second
    """
    words = " ".join(prompts[number][1].split())
    shown = words if len(words) <= width else words[: width - 1] + "…"
    return f"== {number + 1} of {len(prompts)}: {shown}\n"


def facts(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """An answer for --json."""
    return {
        "prompt": prompt[1],
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt),
        "new_tokens": len(answer.ids),
    }


def cut_off(answers: Sequence[Answer], max_new_tokens: int, max_context: int) -> str:
    """A remark on answers that ended early because the context is full; "" where none did."""
    short = [
        str(number)
        for number, answer in enumerate(answers, 1)
        if answer.finish_reason == "length" and len(answer.ids) < max_new_tokens
    ]
    if not short:
        return ""
    which = "the text" if len(answers) == 1 else f"answer {', '.join(short)}"
    return (
        f"{which} ended before --max-new-tokens: the model was compiled for texts of {max_context}"
        " tokens (--max-context)"
    )
