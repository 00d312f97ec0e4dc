"""The step of a stock decoder is the stock decoder, whatever states it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsc.frontends.causal_lm import CausalLMStep, trace_step
from dsc.ir.dims import Range
from dsc.ir.interpreter import Interpreter
from tests.decoders import CONFIGS, decoder, ids

SYMBOLS = {"B": Range(1, 4), "S": Range(1, 64), "P": Range(0, 64), "L": Range(1, 64)}
TOLERANCE = 1e-5


def stock_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [B,S,vocab] of the stock model alone, without a cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def run(step: CausalLMStep, tokens: Tensor, lengths: Tensor, past: list[Tensor]) -> list[Tensor]:
    """Run one step on new tokens behind `lengths` rows; all logits, then the states."""
    batch, new = tokens.shape
    columns = torch.arange(new).expand(batch, new)
    with torch.no_grad():
        return list(step(tokens, lengths[:, None] + columns, lengths, columns, *past))


def empty(step: CausalLMStep, batch: int) -> list[Tensor]:
    return [torch.zeros(s.sizes(batch, 0)) for s in step.signature.states]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_the_stock_model(name: str) -> None:
    """A prefill, a chunk, and a batch of different lengths with rubbish behind the shorter one."""
    model = decoder(name)
    step = CausalLMStep(model)
    tokens = ids(2, 14)
    wanted = stock_logits(model, tokens)
    first, *past = run(step, tokens[:, :9], torch.zeros(2, dtype=torch.int64), empty(step, 2))
    lengths = torch.tensor([9, 4])
    later = torch.stack([tokens[0, 9:12], tokens[1, 4:7]])
    for state in past:
        state[1, 4:] = 9.0
    second, *_ = run(step, later, lengths, past)
    torch.testing.assert_close(first, wanted[:, :9], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(second[0], wanted[0, 9:12], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(second[1], wanted[1, 4:7], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_trace_of_one_layer_of_each_kind_computes_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(name, num_hidden_layers=4)
    step = CausalLMStep(model)
    program = trace_step(step, step.signature, SYMBOLS)
    tokens = ids(1, 6)
    columns = torch.arange(6)[None]
    given = (tokens, columns, torch.zeros(1, dtype=torch.int64), columns, *empty(step, 1))
    inputs = dict(zip(step.signature.input_names(), given, strict=True))
    found = Interpreter(program).run("step", inputs)["logits"]
    torch.testing.assert_close(found, stock_logits(model, tokens), rtol=TOLERANCE, atol=TOLERANCE)
