"""A step of a causal LM beside the stock class that it was made of, on the same ids.

What is asked of the stock class is one forward of whole sequences without a cache: its own cache
may be wrong, and of what it gives at position t nothing depends on how the ids before came in. The
step is run as sessions run it: a prompt, a chunk after it, one token, sequences of different
lengths side by side, and positions far from the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsc.frontends.signature import Signature
from dsc.frontends.states import cache_argument, positions_for

PROMPT, CHUNK, SHORT = 9, 4, 5
"""New tokens of the first step and of the second, and what the shorter of two sequences has."""
LENGTH = PROMPT + CHUNK + 3
FAR = 20_000
"""A position beyond those where scales of positions begin, and before their ends."""
STALE = 3.0
"""What lies in rows past the end of a sequence: nothing may depend on it."""

Step = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""One step: inputs and outputs in the order of the signature."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of a scenario are from stock's, relative to max(1, the largest)."""

    scenario: str
    error: float


def differences(
    step: Step, signature: Signature, stock: nn.Module, positions: int | None
) -> Iterator[Difference]:
    """The scenarios one after the other, and how far each is off.

    `positions` are those that the model has, as far as it says so. Weights are in memory.
    """
    ids = _ids(signature.vocab_size, 2, LENGTH)
    wanted = logits_of(stock, ids)
    first = _run(step, ids[:, :PROMPT], [0, 0], _fresh(signature, 2))
    yield _difference("a prompt", first[0], wanted[:, :PROMPT])

    at = torch.tensor([[CHUNK - 1, 0], [1, 2]])
    chunk = ids[:, PROMPT : PROMPT + CHUNK]
    second = _run(step, chunk, [PROMPT, PROMPT], first[1:], logits_at=at)
    seen = wanted[:, PROMPT : PROMPT + CHUNK]
    rows = at.unsqueeze(-1).expand(-1, -1, seen.shape[-1])
    yield _difference("a chunk after a prompt", second[0], seen.gather(1, rows))

    after = PROMPT + CHUNK
    third = _run(step, ids[:, after : after + 1], [after, after], second[1:])
    yield _difference("one token after a prompt", third[0], wanted[:, after : after + 1])

    spoilt = [
        _stale(state, SHORT) if kind.per_token else state
        for kind, state in zip(signature.states, first[1:], strict=True)
    ]
    lengths = [PROMPT, SHORT]
    new = torch.stack([row[n : n + 3] for row, n in zip(ids, lengths, strict=True)])
    ours = _run(step, new, lengths, spoilt)[0]
    theirs = torch.stack([row[n : n + 3] for row, n in zip(wanted, lengths, strict=True)])
    yield _difference("sequences of different lengths", ours, theirs)

    start = min(positions or FAR, FAR) - LENGTH
    if start > 0 and positions_for(stock, ids):
        ids = ids[:, :PROMPT]
        ours = _run(step, ids, [0, 0], _fresh(signature, 2), start=start)[0]
        yield _difference("positions far from the first", ours, logits_of(stock, ids, start))


def own_cache_error(stock: nn.Module, signature: Signature) -> float:
    """How far the stock class with its own cache is from itself without one; inf where it fails."""
    ids = _ids(signature.vocab_size, 2, LENGTH)
    wanted = logits_of(stock, ids)
    name = cache_argument(stock)
    cache, at, worst = None, 0, 0.0
    try:
        for new in (PROMPT, CHUNK, 1):
            out = stock(input_ids=ids[:, at : at + new], **{name: cache}, use_cache=True)
            cache = out[name]
            error = _difference("", out.logits, wanted[:, at : at + new]).error
            worst, at = max(worst, error), at + new
    except Exception:  # whatever the class runs into is its own affair
        return float("inf")
    return worst


def logits_of(stock: nn.Module, ids: Tensor, start: int = 0) -> Tensor:
    """Logits of whole sequences [B,T] in one forward of the stock class, without a cache."""
    placed: dict[str, Tensor] = {}
    if start:
        placed["position_ids"] = torch.arange(start, start + ids.shape[1]).expand(ids.shape)
    out: Any = stock(input_ids=ids, use_cache=False, **placed)
    logits: Tensor = out.logits
    return logits.float()


def _ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(11))


def _fresh(signature: Signature, batch: int) -> list[Tensor]:
    """States before the first token."""
    return [torch.zeros(s.sizes(batch, 0), dtype=s.dtype.torch) for s in signature.states]


def _run(
    step: Step,
    ids: Tensor,
    lengths: Sequence[int],
    states: Sequence[Tensor],
    *,
    start: int = 0,
    logits_at: Tensor | None = None,
) -> Sequence[Tensor]:
    batch, new = ids.shape
    cached = torch.tensor(lengths)
    positions = (start + cached)[:, None] + torch.arange(new)
    every = torch.arange(new).expand(batch, new).contiguous()
    return step([ids, positions, cached, every if logits_at is None else logits_at, *states])


def _stale(state: Tensor, length: int) -> Tensor:
    """A state of tokens whose second sequence has ended after `length` of them."""
    spoilt = state.clone()
    spoilt[1, length:] = STALE
    return spoilt


def _difference(scenario: str, ours: Tensor, theirs: Tensor) -> Difference:
    if ours.shape != theirs.shape:
        return Difference(scenario, float("inf"))
    scale = max(1.0, float(theirs.abs().max()))
    error = float((ours.float() - theirs.float()).abs().max()) / scale
    return Difference(scenario, error if error == error else float("inf"))
