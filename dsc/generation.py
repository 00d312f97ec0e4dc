"""Autoregressive generation over a session: one prompt in, token ids out as they come.

NumPy only, so that an artifact whose backend needs no torch generates without importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pick = Callable[[NDArray[np.float32]], int]


class Steps(Protocol):
    """The two calls of a session that generation makes; arrays go in and come back."""

    def prefill(self, ids: Any) -> Any:
        """Process the prompt `ids` [1, S]; return logits [1, vocab] of its last position."""
        ...

    def decode(self, next_ids: Any) -> Any:
        """Process one more token, `next_ids` [1]; return its logits [1, vocab]."""
        ...


def generate(
    session: Steps,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt`, ending early at (and without) a `stop` id.

    Temperature 0 is greedy; above it ids are drawn from softmax(logits / temperature) with a
    generator seeded by `seed`. The last id is yielded without a step that nobody would read.
    """
    import numpy as np

    if max_new_tokens < 1:
        return
    pick = sampler(temperature, seed)
    logits = session.prefill(np.asarray([prompt], dtype=np.int64))
    for remaining in range(max_new_tokens - 1, -1, -1):
        token = pick(np.asarray(logits, dtype=np.float32)[0])
        if token in stop:
            return
        yield token
        if remaining:
            logits = session.decode(np.asarray([token], dtype=np.int64))


def sampler(temperature: float, seed: int) -> Pick:
    """Return the choice of one id from logits [vocab]: the largest, or a seeded draw."""
    import numpy as np

    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative")
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    draws = np.random.default_rng(seed)

    def draw(logits: NDArray[np.float32]) -> int:
        scaled = logits.astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max())
        return int(draws.choice(len(weights), p=weights / weights.sum()))

    return draw
