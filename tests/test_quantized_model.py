"""`dsc.QuantizedModel`: what `dsc.compile` makes of a `quant_config`, and a model to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc.errors import UsageError
from tests.runtime.test_session import ids, small_lm

LIMITS: dict[str, Any] = {
    "backend": "reference",
    "max_batch": 2,
    "max_context": 16,
    "prefill_chunk": 8,
}


def test_a_call_gives_the_logits_of_all_positions() -> None:
    config = {"weight_bits": 4, "activation_bits": 8, "quant_scheme": "symmetric"}
    q = dsc.QuantizedModel(small_lm(), quant_config=config, **LIMITS)
    plain = dsc.compile(small_lm(), quant="int4", **LIMITS)
    tokens = ids(2, 11)
    logits = q(tokens)
    assert torch.equal(logits, plain.session(max_batch=2).prefill(tokens, all_logits=True))
    assert logits.shape == (2, 11, 9)
    exact = dsc.compile(small_lm(), **LIMITS).session(max_batch=2).prefill(tokens, all_logits=True)
    assert not torch.equal(logits, exact)
    assert torch.equal(q(tokens[0]), q(tokens[:1]))


def test_generate_continues_each_row_and_what_is_saved_loads(tmp_path: Path) -> None:
    config: dict[str, Any] = {"calibrate": [1, 2, 3, 4], "keep": ["head"]}
    q = dsc.QuantizedModel(small_lm(), config, **LIMITS)
    tokens = ids(2, 5)
    rows = q.generate(tokens, 4)
    assert [row[:5] for row in rows] == tokens.tolist()
    for row in rows:
        for end in range(5, 9):
            assert row[end] == int(q(row[:end])[0, -1].argmax())
    assert q.generate(tokens[0], 4, stop=[rows[0][6]])[0] == rows[0][:6]
    assert "quantisation" in q.report
    loaded = dsc.load(q.save(tmp_path / "out"))
    assert torch.equal(loaded.session(max_batch=2).prefill(tokens, all_logits=True), q(tokens))


def test_one_error_tells_all_that_a_config_may_not_hold() -> None:
    config = {"weight_bit": 8, "weight_bits": 8.0, "quant_scheme": "asymmetric", "zap": 1}
    with pytest.raises(UsageError) as told:
        dsc.QuantizedModel(small_lm(), config)
    for words in (
        "no key is called 'weight_bit', weight_bits is",
        "no key is called 'zap'",
        "weight_bits is 8.0, not 8 or 4",
        "quant_scheme is 'asymmetric', not 'symmetric'",
        "activation_bits",
    ):
        assert words in str(told.value)


@pytest.mark.parametrize("key", ["activation_bits", "weight_bits"])
def test_bits_that_there_are_not_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key} is 3, not 8 or"):
        dsc.QuantizedModel(small_lm(), {key: 3})
