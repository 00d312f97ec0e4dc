"""The comparison sees what is wrong, forgives what rounding does, and counts what it forgave."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, LayeredSource
from dsc.verification import Comparison, Noise, compare, compute_dtype, session_logits
from tests.backends.canonical_lm import Sizes, canonical_lm

IDS = list(range(100))
Logits = np.ndarray[Any, np.dtype[np.float32]]


def clear_logits() -> Logits:
    """Logits [100, 100] whose best token is better by 1, with small differences below."""
    below = np.random.default_rng(0).normal(0, 1e-3, (100, 100))
    return (np.eye(100) + below).astype(np.float32)


def rounded(logits: Logits, seed: int, size: float = 1e-3) -> Logits:
    """The logits with the error of an element type: normal, `size` wide."""
    error = np.random.default_rng(seed).normal(0, size, logits.shape)
    return (logits + error).astype(np.float32)


def noise(logits: Logits, size: float = 1e-3) -> Noise:
    """What a yardstick in that type measures."""
    return Noise.of(rounded(logits, 100, size), logits)


def judged(ours: Logits, oracle: Logits, **options: bool) -> Comparison:
    return compare(ours, oracle, IDS, noise(oracle), **options)


def test_equal_logits_agree() -> None:
    result = judged(clear_logits(), clear_logits())
    assert (result.max_logit_diff, result.greedy_agreement, result.excluded) == (0, 1, 0)
    assert result.perplexity == result.oracle_perplexity
    assert result.failures() == []


def test_a_wrong_token_at_a_clear_position_counts() -> None:
    oracle = clear_logits()
    ours = oracle.copy()
    ours[7, 8] = 1.02 * ours[7, 7]
    oracle[7, 7] *= 1.5
    ours[7, 7] = 1.0
    result = judged(ours, oracle)
    assert result.max_logit_diff == pytest.approx(1.02, abs=0.01)
    assert result.greedy_agreement == pytest.approx(0.99)
    assert "99.00%" in result.failures()[-1]


def test_a_tie_is_left_out_and_counted() -> None:
    oracle = clear_logits()
    oracle[3, 4] = oracle[3, 3] - 1e-5
    ours = rounded(oracle, 1, 1e-4)
    ours[3, 4] = ours[3, 3] + 1e-5
    result = judged(ours, oracle)
    assert result.greedy_agreement == 1
    assert result.excluded == pytest.approx(0.01)
    assert result.failures() == []


def test_nothing_compared_is_no_pass() -> None:
    """Rows of the head that are nearly equal: every position is a near-tie."""
    oracle = (1.0 + clear_logits() * 1e-6).astype(np.float32)
    result = judged(rounded(oracle, 1), oracle)
    assert result.excluded == 1
    assert result.greedy_agreement == 0
    assert result.failures(require=0.0) != []
    assert result.failures(require=0.0, most_excluded=1.0) == []


@pytest.mark.parametrize("off", [0.15, 1.65])
def test_logits_have_a_bound_of_their_own(off: float) -> None:
    """Off alike for all tokens, so that every token is still the same."""
    oracle = clear_logits()
    result = judged(oracle + np.float32(off), oracle)
    assert result.greedy_agreement == 1
    assert result.excluded == 0
    assert "a logit's error at a typical position" in result.failures()[0]


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.5])
def test_errors_are_held_against_what_the_type_does(factor: float) -> None:
    oracle = clear_logits()
    ours = rounded(oracle, 1, 1e-3 * factor)
    assert (judged(ours, oracle).failures() == []) == (factor < 2)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_error_in_one_phase_is_seen(phase: str) -> None:
    oracle, at = clear_logits(), slice(None, -16) if phase == "prefill" else slice(-16, None)
    ours = rounded(oracle, 1)
    ours[at] += np.float32(0.003)
    assert phase in judged(ours, oracle).failures()[0]


@pytest.mark.parametrize("strays", [2, 30])
def test_few_positions_where_a_router_chose_otherwise_are_no_fault(strays: int) -> None:
    oracle = clear_logits()
    ours = rounded(oracle, 1)
    ours[:strays] = rounded(oracle, 2, 0.02)[:strays]
    failures = judged(ours, oracle).failures()
    assert [f.split(" ")[0] for f in failures] == ([] if strays == 2 else ["positions"])


def test_one_position_that_is_wrong_altogether_is_seen() -> None:
    oracle = clear_logits()
    ours = rounded(oracle, 1)
    ours[40] = ours[41]
    assert any("worst position (40)" in f for f in judged(ours, oracle).failures())


@pytest.mark.parametrize("size", [1e-6, 1e-4])
def test_fp32_is_held_to_its_own_rounding_and_has_no_strays(size: float) -> None:
    oracle = rounded(clear_logits(), 3, 1.0)
    explained = Noise.in_fp32(oracle, layers=4)
    ours = rounded(oracle, 1, size)
    assert (compare(ours, oracle, IDS, explained).failures() == []) == (size < 1e-5)
    ours = oracle.copy()
    ours[50] += np.float32(0.01)
    assert compare(ours, oracle, IDS, explained).failures() != []


def test_rounding_in_fp32_grows_as_the_square_root_of_the_layers() -> None:
    oracle = clear_logits()
    one, nine = (Noise.in_fp32(oracle, layers).errors for layers in (1, 9))
    np.testing.assert_allclose(nine, 3 * one)


def test_what_is_no_number_fails() -> None:
    oracle = clear_logits()
    ours = oracle.copy()
    ours[:60] = np.nan
    assert "a logit is NaN or infinite: no text can tell more" in judged(ours, oracle).failures()
    assert not any("take another text" in line for line in judged(ours, oracle).failures())
    ours = oracle.copy()
    ours[3, 5] = np.nan
    assert judged(ours, oracle).failures() != []


def model(dtype: DType, backend: str = "reference", doubled: str = "") -> Logits:
    """Logits of a small model with two layers; the weight `doubled` is twice what it should be."""
    program = canonical_lm(Sizes(dtype=dtype, layers=3, vocab=300), max_context=128)
    if doubled:
        twice = DictSource({doubled: program.source.load(doubled) * 2})
        program = replace(program, source=LayeredSource((twice, program.source)))
    compiled = dsc.compile(program, backend=backend, max_context=128, prefill_chunk=64)
    ids = np.random.default_rng(0).integers(0, 300, 80).tolist()
    return session_logits(compiled, ids)


@pytest.fixture(scope="module")
def exact() -> Logits:
    return model(DType.f32)


@pytest.mark.parametrize("dtype", [DType.bf16, DType.f16])
def test_a_sound_model_passes_in_its_own_type_and_a_doubled_layer_fails(
    dtype: DType, exact: Logits
) -> None:
    explained = Noise.of(model(dtype), exact)
    ids = list(range(80))
    sound = compare(model(dtype, "onnxruntime"), exact, ids, explained)
    assert sound.failures() == []
    assert sound.excluded < 0.5
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj"):
        wrong = model(dtype, doubled=f"model.layers.1.{name}")
        assert compare(wrong, exact, ids, explained).failures() != []


def test_random_tokens_have_no_perplexity() -> None:
    assert judged(clear_logits(), clear_logits(), is_text=False).perplexity is None


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="for 99 tokens"):
        compare(clear_logits(), clear_logits(), IDS[:-1], noise(clear_logits()))


def root_mean_square(values: Any) -> float:
    return math.sqrt(statistics.fmean([v * v for v in values]))


@pytest.mark.parametrize("measured", [True, False])
def test_every_figure_is_that_of_its_definition(measured: bool) -> None:
    """Written out with Python's numbers: 20 positions, of which 16 are decoded, over 5 tokens."""
    chance = np.random.default_rng(3)
    oracle = chance.normal(0, 1, (20, 5)).astype(np.float32)
    ours = oracle + chance.normal(0, 0.05, (20, 5)).astype(np.float32)
    ours[7] += np.float32(2)
    rounding = np.abs(chance.normal(0, 0.03, 20))
    rounding[11] = 1.0
    ids = chance.integers(0, 5, 20).tolist()
    found = compare(ours, oracle, ids, Noise(rounding, measured))
    off = [
        [float(a) - float(b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(ours, oracle, strict=True)
    ]
    errors = [root_mean_square(row) for row in off]
    spread = [statistics.pstdev(map(float, row)) for row in oracle]
    best = [sorted(map(float, row))[-2:] for row in oracle]
    clear = [b - a > 10 * statistics.pstdev(row) for (a, b), row in zip(best, off, strict=True)]
    equal = [a.argmax() == b.argmax() for a, b in zip(ours, oracle, strict=True)]
    assert 2 < sum(clear) < 18
    assert found.positions == 20
    assert found.max_logit_diff == pytest.approx(max(abs(v) for row in off for v in row))
    assert found.rms_logit_diff == pytest.approx(root_mean_square(v for row in off for v in row))
    assert found.excluded == pytest.approx(1 - sum(clear) / 20)
    agreed = [e for e, c in zip(equal, clear, strict=True) if c]
    assert found.greedy_agreement == pytest.approx(sum(agreed) / len(agreed))
    for logits, value in ((ours, found.perplexity), (oracle, found.oracle_perplexity)):
        each = [
            math.log(sum(math.exp(v) for v in map(float, row))) - float(row[token])
            for row, token in zip(logits, ids[1:], strict=False)
        ]
        assert value == pytest.approx(math.exp(statistics.fmean(each)), rel=1e-5)
    far = 4 * statistics.median(rounding)
    worst = max(range(20), key=lambda i: errors[i] / spread[i])
    wanted = [
        ("a logit's error at a typical position of prefill",
         statistics.median(errors[:4]), 2 * statistics.median(rounding[:4])),
        ("a logit's error at a typical position of decode",
         statistics.median(errors[4:]), 2 * statistics.median(rounding[4:])),
        (f"positions where a logit is off by more than {far:.3g}",
         sum(e > far for e in errors), 2 * sum(r > far for r in rounding) + 1 if measured else 0),
        (f"a logit's error at the worst position ({worst})",
         errors[worst], max(spread[worst] / 2, far)),
    ]  # fmt: skip
    checks = [(c.what, c.found, c.bound) for c in found.checks]
    assert [c[0] for c in checks] == [w[0] for w in wanted[: 4 if measured else 3]]
    for check, want in zip(checks, wanted, strict=False):
        assert check[1:] == pytest.approx(want[1:], rel=1e-5)


def test_what_fp32_rounds_is_sixteen_last_bits_for_a_layer() -> None:
    oracle = np.full((3, 4), -2.0, np.float32)
    explained = Noise.in_fp32(oracle, 4)
    np.testing.assert_allclose(explained.errors, 2 * 16 * 2.0**-23 * 2, rtol=1e-12)
    assert not explained.measured
    assert noise(oracle).measured


def test_failures_are_told_in_percent() -> None:
    found = replace(judged(clear_logits(), clear_logits()), excluded=0.625, greedy_agreement=0.75)
    assert found.failures(0.9, 0.25) == [
        "62.50% of the positions are near-ties that say nothing, at most 25.00% may be; take"
        " another text (--text), or more of it (--tokens)",
        "greedy tokens agree at 75.00% of the clear positions, 90.00% required",
    ]
    assert len(found.failures()) == 2
    assert replace(found, greedy_agreement=1.0, excluded=0.5).failures() == []
    assert found.as_dict()["checks"][0]["ok"] is True


@pytest.mark.parametrize(("tokens", "prompt"), [(1, 1), (16, 1), (17, 1), (18, 2), (100, 84)])
def test_the_last_sixteen_tokens_are_decoded(tokens: int, prompt: int) -> None:
    calls: list[list[int]] = []

    class Session:
        def prefill(self, ids: Any, all_logits: bool) -> Any:
            assert all_logits
            calls.append(ids[0].tolist())
            return ids[..., None].astype(np.float64)

        def decode(self, ids: Any) -> Any:
            calls.append(ids.tolist())
            return ids[:, None].astype(np.float64)

    def session(max_batch: int, max_context: int) -> Session:
        assert (max_batch, max_context) == (1, tokens)
        return Session()

    ids = list(range(10, 10 + tokens))
    rows = session_logits(SimpleNamespace(session=session), ids)
    assert rows.dtype == np.float32
    assert rows[:, 0].tolist() == ids
    assert calls == [ids[:prompt], *([i] for i in ids[prompt:])]


def test_a_program_computes_in_the_type_of_most_of_its_bytes() -> None:
    types = {
        "a": TensorType(DType.f32, (10,)), "b": TensorType(DType.bf16, (30,)),
        "c": TensorType(DType.f32, (6,)), "d": TensorType(DType.i64, (1000,)),
    }  # fmt: skip
    program: Any = SimpleNamespace(weight_types=lambda: types)
    assert compute_dtype(program) == "fp32"  # 64 bytes, and 60
    types["e"] = TensorType(DType.bf16, (3,))
    assert compute_dtype(program) == "bf16"
    types.clear()
    assert compute_dtype(program) == "fp32"
