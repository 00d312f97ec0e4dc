"""Each step of sampling, and their order, are transformers' logits processors'."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as stock

from dsc.errors import UsageError
from dsc.ir.choosing import Choice, gumbel, philox
from dsc.sampling import Sampling, min_p, penalised, top_k, top_p

VOCAB = 40


def logits(seed: int, ties: bool = False) -> Any:
    """Logits [VOCAB]; with ties, of few different values."""
    drawn = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    return drawn.round(0) if ties else drawn


def theirs(processors: Any, scores: Any, ids: list[int]) -> Any:
    """What transformers makes of the same logits."""
    return processors(torch.tensor([ids]), torch.tensor(scores)[None].clone())[0].numpy()


def same(ours: Any, wanted: Any, ties: bool = False) -> None:
    """The same tokens are left, with the same scores to the last bits; of equal ones as many."""
    if ties:
        ours, wanted = np.sort(ours), np.sort(wanted)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=3e-7)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_each_step_is_transformers(seed: int, ties: bool) -> None:
    scores, ids = logits(seed, ties), [3, 3, 39, 0, 17]
    for k in (1, 2, 7, VOCAB, 1000):
        same(top_k(scores, k), theirs(stock.TopKLogitsWarper(k), scores, ids))
    for p in (0.0, 0.1, 0.5, 0.95, 0.999999, 1.0):
        same(top_p(scores, p), theirs(stock.TopPLogitsWarper(p), scores, ids), ties)
    for share in (0.0, 0.01, 0.3, 1.0):
        same(min_p(scores, share), theirs(stock.MinPLogitsWarper(share), scores, ids))
    for penalty in (0.5, 1.3, 4.0):
        wanted = theirs(stock.RepetitionPenaltyLogitsProcessor(penalty), scores, ids)
        same(penalised(scores, ids, penalty), wanted)


@cache
def any_model() -> Any:
    """A model, for what its `generate` makes of settings."""
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB))


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 20]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.2, 3.0]),
    },
)


@given(SETTINGS, st.integers(0, 1000), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
def test_all_steps_together_are_those_that_generate_takes(
    settings: dict[str, Any], seed: int, ids: list[int]
) -> None:
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    processors = any_model()._get_logits_processor(config, input_ids_seq_length=len(ids))
    scores = logits(seed)
    ours = Sampling(sample=True, **settings).processed(scores, ids)
    same(ours, theirs(processors, scores, ids))


def test_what_is_off_leaves_logits_alone() -> None:
    scores = logits(0)
    assert Sampling().processed(scores, [1]) is scores
    assert Sampling(sample=True).processed(scores, [1]) is scores
    greedy = Sampling(sample=False, temperature=3.0, top_k=1, top_p=0.1, min_p=0.5)
    assert greedy.processed(scores, [1]) is scores


def test_a_penalty_holds_without_drawing_and_for_prompts() -> None:
    scores = np.array([1.0, 1.5, 1.4], dtype=np.float32)
    pick = Sampling(repetition_penalty=2.0).picker()
    assert pick(scores, [0]) == 1
    assert pick(scores, [1]) == 2


def test_presence_and_frequency_are_of_what_was_generated() -> None:
    """As vLLM has them: `logits -= frequency * counts + presence * (counts > 0)`."""
    scores, new = logits(3), [3, 3, 39]
    counts = np.bincount(new, minlength=VOCAB)
    sampling = Sampling(presence_penalty=0.75, frequency_penalty=-0.5)
    wanted = scores - np.float32(-0.5) * counts - np.float32(0.75) * (counts > 0)
    same(sampling.processed(scores, [7, 7, *new], new), wanted)
    assert sampling.processed(scores, [7, 7], []) is scores
    pick = Sampling(presence_penalty=1.0).picker()
    near = np.asarray([1.0, 1.5, 1.4], np.float32)
    assert [pick(near, [1]), pick(near, [1], [1])] == [1, 2]
    assert str(sampling) == "greedily: --presence-penalty 0.75, --frequency-penalty -0.5"


def test_draws_follow_the_softmax_and_never_take_what_was_left_out() -> None:
    pick = Sampling(sample=True, temperature=0.5, top_k=3).picker(0)
    scores = np.log(np.asarray([0.01, 1, 2, 1], dtype=np.float32))  # squared: 1 : 4 : 1
    shares = Counter(pick(scores, []) for _ in range(6000))
    assert shares[0] == 0
    assert shares[2] / 6000 == pytest.approx(4 / 6, abs=0.02)
    assert shares[1] / 6000 == pytest.approx(1 / 6, abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_the_least_temperature_takes_the_likeliest(temperature: float, rest: Any) -> None:
    pick = Sampling(sample=True, temperature=temperature, **rest).picker(0)
    for seed in range(3):
        for scale in (0, 1e-6, 1, 1e37):
            scores = logits(seed) * np.float32(scale)
            if temperature > 1e-30 and scale < 1:
                continue
            chosen = pick(scores, [])
            assert scores[chosen] == scores.max()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [1e-300, 1e-38, 1e38, 1e300])
def test_the_largest_penalty_leaves_numbers(penalty: float) -> None:
    for temperature in (0.0, 1.0, 1e-38):
        sampling = Sampling(temperature > 0, temperature, top_p=0.9, repetition_penalty=penalty)
        assert 0 <= sampling.picker(0)(logits(0), [0, 1, 2]) < VOCAB
    assert np.isfinite(penalised(logits(0), range(VOCAB), penalty)).all()


@pytest.mark.parametrize("sample", [False, True])
def test_no_token_is_taken_from_what_is_no_number(sample: bool) -> None:
    pick = Sampling(sample=sample).picker(0)
    for wrong in (np.nan, np.inf):
        scores = logits(0)
        scores[7] = wrong
        with pytest.raises(UsageError, match="no number"):
            pick(scores, [])


def test_sequences_of_one_seed_draw_apart_and_repeat() -> None:
    scores = logits(1)
    warm = Sampling(sample=True, temperature=5.0)
    pickers = [warm.picker(7, row) for row in (0, 0, 1)]
    first, again, other = ([pick(scores, []) for _ in range(20)] for pick in pickers)
    assert first == again != other


def test_the_generator_is_philox() -> None:
    """The known answers of Salmon et al. (Random123, `kat_vectors`), for two of four counters."""
    zero = np.zeros(1, np.uint64)
    words = [int(x[0]) for x in philox(zero, 0, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_gumbel_numbers_have_their_distribution() -> None:
    """Of 40,000: mean 0.5772, variance pi^2 / 6, and none twice in a row of draws."""
    tokens = np.arange(20_000)
    found = np.concatenate([gumbel(tokens, 11, draw) for draw in (0, 1)])
    assert found.mean() == pytest.approx(0.5772, abs=0.02)
    assert found.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    assert np.mean(found < 0) == pytest.approx(np.exp(-1), abs=0.01)
    assert not (gumbel(tokens, 11, 0) == gumbel(tokens, 12, 0)).any(where=tokens < 100)
    some = np.array([3, 17, 19_999])
    assert (gumbel(some, 11, 1) == found[20_000 + some]).all()


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -0.5},
        {"top_k": -1}, {"top_k": 2.5}, {"top_k": True}, {"top_p": 1.5}, {"top_p": float("nan")},
        {"min_p": -0.1}, {"min_p": "0.1"},
    ],
)  # fmt: skip
def test_what_is_no_choice_is_refused(given: dict[str, Any]) -> None:
    """A host and a device would each make something of it."""
    ((name, value),) = given.items()
    with pytest.raises(UsageError, match=f"a choice of tokens with {name}={value!r}"):
        Choice(**given)
    numbers: list[Any] = [np.float32(0.5), np.int64(3), np.float32(1.0), 1]
    assert Choice(*numbers).row == (0.5, 3.0, 1.0, 1.0)
