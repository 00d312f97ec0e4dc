"""One of LongRoPE's two sets of angles is compiled, by the largest context."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.parity import randomise
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.longrope import SHORT, for_short_texts, told_of
from dsc.frontends.self_check import self_check
from dsc.frontends.stock import clean, stock_model
from tests.decoders import LATENT, PLAIN, ids

FIRST = 12
"""The length that the small models were first trained for."""


def config(name: str) -> dict[str, Any]:
    width = 4 if name == "phi3" else 2
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": FIRST,
        "short_factor": [1.0 + 0.1 * i for i in range(width)],
        "long_factor": [2.0 + 0.3 * i for i in range(width)],
    }  # fmt: skip
    more = LATENT if name == "minicpm3" else {}
    named = {"model_type": name, "original_max_position_embeddings": FIRST}
    return PLAIN | more | named | {"rope_parameters": rope}


@pytest.mark.parametrize("name", ["phi3", "minicpm3"])
@pytest.mark.parametrize(("context", "length"), [(FIRST, 10), (64, 20), (None, 20)])
def test_short_and_long_texts_are_turned_as_stock_turns_them(
    name: str, context: int | None, length: int
) -> None:
    model: Any = randomise(stock_model(clean(config(name)), device="cpu"))
    rope = model.model.rotary_emb
    step = CausalLMStep(model, context=context)
    tokens, columns = ids(1, length), torch.arange(length)[None]
    past = [torch.zeros(s.sizes(1, 0)) for s in step.signature.states]
    lengths = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        found, *_ = step(tokens, columns, lengths, columns, *past)
        wanted = model(input_ids=tokens, use_cache=False).logits
        other, *_ = CausalLMStep(model, context=FIRST if length > FIRST else 64)(
            tokens, columns, lengths, columns, *past
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (other - wanted).abs().max() > 1e-3
    assert model.model.rotary_emb is rope
    assert rope.rope_type == "longrope"


def test_a_twin_is_checked_on_short_texts() -> None:
    raw = config("phi3")
    assert self_check(clean(raw)).fault == ""
    longer = for_short_texts(raw)
    assert longer["rope_parameters"]["original_max_position_embeddings"] == SHORT
    assert longer["original_max_position_embeddings"] == SHORT
    assert for_short_texts(PLAIN) == PLAIN


def test_the_user_is_told_which_angles_hold() -> None:
    values = clean(config("phi3")).values
    assert told_of(values, FIRST) == ""
    assert f"--max-context {FIRST} takes" in told_of(values, 64)
    assert told_of(PLAIN, 64) == ""
