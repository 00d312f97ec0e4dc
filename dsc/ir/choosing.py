"""How a token is chosen from logits: what is left out of them, and the draw from what is left.

What is left out is what transformers' logits processors leave out (`generation/utils.py`,
`_get_logits_processor`): temperature, top-k, top-p, min-p, in this order, each on float32. The draw
adds to each score a Gumbel number and takes the largest (Maddison et al. 2014), so that no sum has
an order: number n of token v comes from Philox 4x32-10 (Salmon et al. 2011) by the key of the draw
and the counter (v // 4, n), of which token v has word v % 4. Whoever has key and n draws the same.

NumPy only: the reference of the operator `sample`, and what generation draws by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsc.errors import UsageError

Scores = NDArray[np.float32]
Words = NDArray[np.uint64]
LEAST = 1e-5
"""Below this temperature the likeliest token is taken."""
NO_TOKEN = -1
"""What stands for the token of logits whose largest is no finite number: NaN is the largest."""
_CHOICES = (
    ("temperature", float(np.finfo(np.float32).max), "a number from 0 on"),
    ("top_k", float(np.finfo(np.float32).max), "a whole number from 0 on"),
    ("top_p", 1.0, "a number from 0 to 1"),
    ("min_p", 1.0, "a number from 0 to 1"),
)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Choice:
    """What is left out of logits before a draw; the defaults take the likeliest token.

    Raises `UsageError` for what is no choice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Look at each number: what is outside would be another choice on a device."""
        for name, most, words in _CHOICES:
            given = getattr(self, name)
            whole = not isinstance(given, bool) and isinstance(given, int | np.integer)
            number = whole or (name != "top_k" and isinstance(given, float | np.floating))
            if not (number and 0 <= given <= most):
                raise UsageError(f"a choice of tokens with {name}={given!r}", hint=f"give {words}")

    @property
    def row(self) -> tuple[float, float, float, float]:
        """What the operator `sample` is given for a sequence."""
        return (self.temperature, float(self.top_k), self.top_p, self.min_p)


def key_of(*seed: int) -> int:
    """The key of a stream of draws, in 63 bits, by some whole numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))


def gives_token(logits: Scores) -> bool:
    """Whether the largest of logits is a finite number, which NaN is not: the one rule for all.

    Minus infinity beside it is a token that is left out.
    """
    return bool(np.isfinite(logits.max()))


def chosen(logits: Scores, choice: Choice, key: int, draw: int) -> int:
    """The token that draw number `draw` takes from logits [vocab], or `NO_TOKEN`."""
    if not gives_token(logits):
        return NO_TOKEN
    if choice.temperature < LEAST:
        return int(logits.argmax())
    return drawn(left(logits, choice), key, draw)


def left(logits: Scores, choice: Choice) -> Scores:
    """The scores that a draw is made from, minus infinity where a token is left out."""
    scores = logits
    if choice.temperature != 1.0:
        scores = tempered(scores, choice.temperature)
    if choice.top_k:
        scores = top_k(scores, choice.top_k)
    if choice.top_p < 1.0:
        scores = top_p(scores, choice.top_p)
    if choice.min_p:
        scores = min_p(scores, choice.min_p)
    return scores


def drawn(scores: Scores, key: int, draw: int) -> int:
    """A token with the probability that a softmax of scores gives it."""
    (tokens,) = np.nonzero(scores > -np.inf)
    if not tokens.size:
        return int(scores.argmax())
    reached = scores[tokens] + gumbel(tokens, key, draw)
    return int(tokens[reached.argmax()])


def gumbel(tokens: NDArray[np.int64], key: int, draw: int) -> Scores:
    """Numbers of tokens with the distribution function exp(-exp(-x)): -log of exponential ones."""
    blocks, place = np.unique(tokens // 4, return_inverse=True)
    words = np.stack(philox(blocks.astype(np.uint64), draw, key))[tokens % 4, place]
    one = np.float32(1)
    u = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    u = np.minimum(u, one - np.float32(2.0**-24))
    near = u * (one + u * (np.float32(0.5) + u * np.float32(1 / 3)))
    found: Scores = -np.log(np.where(u < np.float32(2.0**-10), near, -np.log(one - u)))
    return found


def philox(first: Words, draw: int, key: int) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 bits for each counter (first, draw's low half, its high half, 0)."""
    low, high = np.uint64(draw) & _LOW, np.uint64(draw) >> _HALF
    c0, c1, c2, c3 = first, np.full_like(first, low), np.full_like(first, high), first * 0
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HALF
    for _ in range(ROUNDS):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ k0, b & _LOW, (a >> _HALF) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3


def tempered(scores: Scores, temperature: float) -> Scores:
    """Scores divided by a temperature of `LEAST` or more, in their own type, as kernels divide.

    Where the largest would overflow it is far above all others: the first of its like is left.

    >>> import numpy as np
    >>> tempered(np.float32([1.0, 3.0, -np.inf]), 0.5).tolist()
    [2.0, 6.0, -inf]
    >>> tempered(np.float32([1e35, 3e35, 3e35, -np.inf]), 1e-5).tolist()
    [-inf, 0.0, -inf, -inf]
    """
    divisor = scores.dtype.type(temperature)
    with np.errstate(over="ignore"):
        made: Scores = scores / divisor
    if made.max() < np.inf:
        return made
    wide = scores.astype(np.float64) / divisor  # to a power of two these are what overflows
    near = np.ldexp(wide, -int(np.frexp(wide.max())[1])).astype(scores.dtype)
    made = np.full_like(scores, -np.inf)
    made[near.argmax()] = 0.0
    return made


def top_k(scores: Scores, count: int) -> Scores:
    """The `count` largest scores and all that equal the least of them.

    >>> import numpy as np
    >>> top_k(np.float32([3.0, 1.0, 2.0, 2.0]), 2).tolist()
    [3.0, -inf, 2.0, 2.0]
    """
    least = np.partition(scores, -min(count, len(scores)))[-min(count, len(scores))]
    return _without(scores, scores < least)


def top_p(scores: Scores, mass: float) -> Scores:
    """The largest scores whose probabilities just exceed `mass` together; one at least.

    >>> import numpy as np
    >>> top_p(np.float32([2.0, 0.0, 1.0]), 0.7).tolist()  # 0.67, 0.09 and 0.24
    [2.0, -inf, 1.0]
    """
    order = scores.argsort(kind="stable")
    reached = _softmax(scores[order]).cumsum(dtype=np.float64).astype(scores.dtype)
    out = reached <= 1 - mass
    out[-1] = False
    left_out = np.empty_like(out)
    left_out[order] = out
    return _without(scores, left_out)


def min_p(scores: Scores, share: float) -> Scores:
    """The scores whose probability is at least `share` of the largest one.

    >>> import numpy as np
    >>> min_p(np.float32([2.0, 0.0, 1.0]), 0.3).tolist()  # e ** -2 and e ** -1 of the largest
    [2.0, -inf, 1.0]
    """
    probabilities = _softmax(scores)
    left_out = probabilities < probabilities.max() * scores.dtype.type(share)
    left_out[probabilities.argmax()] = False
    return _without(scores, left_out)


def _softmax(scores: Scores) -> Scores:
    with np.errstate(over="ignore"):  # what lies that far below the largest has no share
        weights = np.exp(scores - scores.max())
    shares: Scores = weights / weights.sum()
    return shares


def _without(scores: Scores, left_out: NDArray[np.bool_]) -> Scores:
    return np.where(left_out, -np.inf, scores).astype(scores.dtype)
