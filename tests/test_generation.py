"""Generation is greedy or a seeded draw, and takes no step whose logits nobody reads."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dsc.generation import generate, sampler


class Countdown:
    """After token t the likeliest token is t - 1; counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def prefill(self, ids: Any) -> Any:
        """Return logits [1, 10]."""
        return self.decode(ids[:, -1])

    def decode(self, next_ids: Any) -> Any:
        """Return logits [1, 10]."""
        self.steps += 1
        return np.eye(10, dtype=np.float32)[(next_ids - 1) % 10]


def test_greedy_counts_down_and_stops() -> None:
    session = Countdown()
    assert list(generate(session, [5, 4], 10, stop={0})) == [3, 2, 1]


def test_the_last_token_costs_no_step() -> None:
    session = Countdown()
    assert list(generate(session, [5], 3)) == [4, 3, 2]
    assert session.steps == 3  # one prefill, two decodes
    assert list(generate(session, [5], 0)) == []


def test_a_seed_repeats_and_another_differs() -> None:
    runs = [list(generate(Countdown(), [5], 20, temperature=2.0, seed=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_draws_follow_the_softmax() -> None:
    pick = sampler(0.5, seed=0)
    logits = np.log(np.asarray([1, 2, 1], dtype=np.float32))  # at temperature 1/2: 1 : 4 : 1
    shares = Counter(pick(logits) for _ in range(6000))
    assert shares[1] / 6000 == pytest.approx(4 / 6, abs=0.02)


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        sampler(-1.0, 0)
