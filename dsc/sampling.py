"""How the next token is chosen from logits: the likeliest, or a seeded draw from what is likely.

The steps and their order are those of transformers' logits processors (`generation/utils.py`,
`_get_logits_processor`): repetition penalty, then what a draw leaves out (`dsc.ir.choosing`).
Presence and frequency penalties, which transformers has not, are vLLM's (`model_executor/layers/
utils.py`, `apply_penalties`): they follow the repetition penalty and count what was generated.
NumPy only, so that an artifact whose backend needs no torch generates without importing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from dsc.errors import UsageError
from dsc.ir.choosing import (
    LEAST,
    Choice,
    Scores,
    drawn,
    gives_token,
    key_of,
    left,
    min_p,
    tempered,
    top_k,
    top_p,
)

__all__ = ["Pick", "Sampling", "lowered", "min_p", "penalised", "tempered", "top_k", "top_p"]
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""What holds without drawing too."""


class Pick(Protocol):
    """The choice of the next token."""

    def __call__(self, logits: Scores, ids: Sequence[int], new: Sequence[int] = (), /) -> int:
        """A token, by logits [vocab] and the tokens so far, of which the last are `new`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """What is done to logits before a token is chosen; the defaults do nothing.

    `sample`: draw, instead of taking the likeliest token. `temperature` 0 is the likeliest too.
    `top_k`: only so many of the likeliest (0: all). `top_p`: only the likeliest that together have
    this probability. `min_p`: only what has this share of the likeliest token's probability.
    `repetition_penalty`: above 1, tokens of the prompt and the text so far become less likely; it
    holds with and without drawing. `presence_penalty` and `frequency_penalty`: what is taken from
    the scores of tokens that were generated, once and for each time; so do these.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __str__(self) -> str:
        """Say it as options of the command line.

        >>> print(Sampling(temperature=0.6), "|", Sampling(True, 0.6, top_p=0.95))
        greedily | draws: --temperature 0.6, --top-p 0.95
        """
        heeded = [each.name for each in fields(self)[1:]] if self.draws else PENALTIES
        said = [
            f"--{each.name.replace('_', '-')} {value:g}"
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default and each.name in heeded
        ]
        how = "draws" if self.draws else "greedily"
        return f"{how}: {', '.join(said)}" if said else how

    @property
    def draws(self) -> bool:
        """Whether there is anything left to chance."""
        return self.sample and self.temperature >= LEAST

    @property
    def choice(self) -> Choice:
        """What a draw leaves out; where nothing is drawn, the likeliest token."""
        temperature = self.temperature if self.draws else 0.0
        return Choice(temperature, self.top_k, self.top_p, self.min_p)

    @property
    def by_logits(self) -> bool:
        """Whether logits alone decide, and not the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)

    def processed(self, logits: Scores, ids: Sequence[int], new: Sequence[int] = ()) -> Scores:
        """The logits [vocab] after all steps, minus infinity where a token is left out.

        `ids` are the tokens so far, those of the prompt included; `new` are those without it.
        """
        scores = logits
        if self.repetition_penalty != 1.0:
            scores = penalised(scores, ids, self.repetition_penalty)
        if (self.presence_penalty or self.frequency_penalty) and len(new):
            scores = lowered(scores, new, self.presence_penalty, self.frequency_penalty)
        return left(scores, self.choice) if self.draws else scores

    def picker(self, *seed: int) -> Picker:
        """The choice of a token from logits [vocab] and the tokens so far; `seed` repeats it."""
        return Picker(self, key_of(*seed))


@dataclass
class Picker:
    """Draws of one stream, of which `drawn` were made."""

    sampling: Sampling
    key: int
    drawn: int = 0

    @property
    def choice(self) -> Choice | None:
        """What a draw leaves out, where nothing but logits decides."""
        return self.sampling.choice if self.sampling.by_logits else None

    def __call__(self, logits: Scores, ids: Sequence[int], new: Sequence[int] = ()) -> int:
        """The next token. Raises `UsageError` where the largest logit is no number."""
        if not gives_token(logits):
            raise UsageError("the largest of the logits is no number (NaN, infinity)")
        scores = self.sampling.processed(logits, ids, new)
        if not self.sampling.draws:
            return int(scores.argmax())
        self.drawn += 1
        return drawn(scores, self.key, self.drawn - 1)


def penalised(scores: Scores, ids: Sequence[int], penalty: float) -> Scores:
    """Scores of tokens that were there before, made smaller by a penalty above 1.

    >>> import numpy as np
    >>> penalised(np.float32([2.0, -2.0, 2.0]), [0, 1, 0], 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    seen = np.unique(np.asarray(ids, dtype=np.int64))
    scores, wide = scores.copy(), scores[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        wide = np.where(wide < 0, wide * penalty, wide / penalty)
    most = np.finfo(scores.dtype).max  # what a penalty makes larger stays a number
    scores[seen] = wide.clip(-most, most)
    return scores


def lowered(scores: Scores, new: Sequence[int], presence: float, frequency: float) -> Scores:
    """Scores less a penalty for each generated token, and one for each time it was generated.

    >>> import numpy as np
    >>> lowered(np.float32([1.0, 1.0, 1.0]), [0, 2, 2], 0.5, 0.25).tolist()
    [0.25, 1.0, 0.0]
    """
    seen, times = np.unique(np.asarray(new, dtype=np.int64), return_counts=True)
    scores = scores.copy()
    scores[seen] -= (presence + frequency * times).astype(scores.dtype)
    return scores
