"""The comparison sees a wrong token, forgives a tie, and counts what it forgave."""

from __future__ import annotations

import numpy as np
import pytest

from dsc.verification import compare

IDS = list(range(100))


def clear_logits() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return logits [100, 100] whose best token is better by 1, with small noise below."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (100, 100))
    return (np.eye(100) + noise).astype(np.float32)


def test_equal_logits_agree() -> None:
    result = compare(clear_logits(), clear_logits(), IDS)
    assert (result.max_logit_diff, result.greedy_agreement, result.excluded) == (0, 1, 0)
    assert result.perplexity == result.oracle_perplexity


def test_a_wrong_token_at_a_clear_position_counts() -> None:
    wrong = clear_logits()
    wrong[7, 8] = 2.0
    result = compare(wrong, clear_logits(), IDS)
    assert result.greedy_agreement == pytest.approx(0.99)
    assert result.max_logit_diff == pytest.approx(2.0, abs=0.01)


def test_a_tie_is_left_out_and_counted() -> None:
    oracle, ours = clear_logits(), clear_logits()
    oracle[3, 4] = oracle[3, 3] - 1e-5
    ours[3, 4] = oracle[3, 3] + 1e-5
    ours += np.random.default_rng(1).normal(0, 1e-4, ours.shape).astype(np.float32)
    result = compare(ours, oracle, IDS)
    assert result.greedy_agreement == 1
    assert result.excluded == pytest.approx(0.01)


def test_random_tokens_have_no_perplexity() -> None:
    assert compare(clear_logits(), clear_logits(), IDS, is_text=False).perplexity is None


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="for 99 tokens"):
        compare(clear_logits(), clear_logits(), IDS[:-1])
