"""Decoders of transformers become canonical operators, few a layer, that mean the same.

`python -m bench.canonical` has the table over all types that are named there.
"""

from __future__ import annotations

import pytest
import torch

from bench.canonical import MOST, nodes_by_layer, raised
from dsc.frontends.causal_lm import CausalLMStep, trace_step
from dsc.ir.interpreter import Interpreter
from dsc.ir.stages import Stage
from tests.decoders import decoder, ids

HAS: dict[str, set[str]] = {
    "gemma2": {"rms_norm", "rope", "attention", "gelu_tanh"},
    "gpt_oss": {"rms_norm", "rope", "attention", "route", "experts"},
    "glm4": {"rms_norm", "rope", "attention", "swiglu"},
    "starcoder2": {"layer_norm", "rope", "attention", "gelu_tanh"},
    "glm4_moe_lite": {"rms_norm", "rope", "mla_attention", "route", "experts", "swiglu"},
}
"""What the last layer of each is made of, among others."""


@pytest.mark.parametrize("name", HAS)
def test_a_layer_is_few_nodes_and_means_the_same(name: str) -> None:
    model = decoder(name)
    step = CausalLMStep(model)
    canonical = raised(trace_step(step, step.signature, {}, whole=True))
    assert canonical.stage is Stage.CANONICAL
    layers = nodes_by_layer(canonical)
    assert max(sum(each.values()) for each in layers.values()) <= MOST
    assert set(layers[max(layers)]) >= HAS[name]
    assert "concat" not in layers[max(layers)], "a head that turns in part is one rope"
    tokens = ids(2, 7)
    columns, lengths = torch.arange(7).expand(2, 7), torch.zeros(2, dtype=torch.int64)
    states = [torch.zeros(s.sizes(2, 0)) for s in step.signature.states]
    given = [tokens, columns, lengths, columns, *states]
    names = step.signature.input_names()
    found = Interpreter(canonical).run("step", dict(zip(names, given, strict=True)))
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-4, atol=1e-4)
