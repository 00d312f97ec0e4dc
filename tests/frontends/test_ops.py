"""The dsc operators: registered with torch as what the IR says they are, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsc
from dsc.frontends import ops
from dsc.ir.op import registry
from dsc.ir.parser import parse_operands
from dsc.ir.weights import random_tensor
from tests.frontends.tracing import checked, interpreted, ops_of, traced

REGISTERED = sorted(ops.registered())


def example(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Random operands and attributes of an operator, from its own example."""
    operands, attrs = parse_operands(registry()[name].example)
    tensors = [random_tensor(t, f"{name}{i}", (n or 1) + 1) for i, (t, n) in enumerate(operands)]
    definition = registry()[name]
    full = definition.with_defaults(attrs)
    torch_attrs = {k: v.torch if hasattr(v, "torch") else v for k, v in full.items()}
    return tensors, torch_attrs


@pytest.mark.parametrize("name", REGISTERED)
def test_a_registered_operator_is_the_one_of_the_ir(name: str) -> None:
    tensors, attrs = example(name)
    operator = getattr(torch.ops.dsc, name)
    program = traced(lambda *xs: operator(*xs, **attrs), *tensors)
    assert ops_of(checked(program)) == [name]
    wanted = operator(*tensors, **attrs)
    wanted = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    for a, b in zip(interpreted(program, *tensors), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda x, w: dsc.rms_norm(x, w), [(3, 4), (4,)]),
        (lambda x, w, b: dsc.layer_norm(x, w, b), [(3, 4), (4,), (4,)]),
        (lambda x, w: dsc.layer_norm(x, w), [(3, 4), (4,)]),
        (lambda g, u: dsc.swiglu(g, u), [(3, 4), (3, 4)]),
        (lambda q, k, v: dsc.attention(q, k, v), [(1, 3, 2, 4), (1, 5, 1, 4), (1, 5, 1, 3)]),
        (
            lambda q, k, v, s: dsc.attention(q, k, v, sinks=s, window=2, softcap=1.5),
            [(1, 3, 2, 4), (1, 5, 1, 4), (1, 5, 1, 3), (2,)],
        ),
    ],
)
def test_operators_have_gradients(
    call: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    tensors = [torch.randn(s, requires_grad=True) for s in shapes]
    call(*tensors).square().sum().backward()
    step = 1e-2
    for x in tensors:
        assert x.grad is not None
        direction = torch.randn(x.shape)
        with torch.no_grad():
            x.add_(direction, alpha=step)
            above = call(*tensors).square().sum()
            x.sub_(direction, alpha=2 * step)
            below = call(*tensors).square().sum()
            x.add_(direction, alpha=step)
        slope = (above - below) / (2 * step)
        torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=2e-2, atol=1e-2)


def test_operands_that_do_not_fit_are_refused_when_traced() -> None:
    with pytest.raises(Exception, match=r"dsc\.rms_norm"):
        traced(lambda x, w: dsc.rms_norm(x, w), torch.randn(3, 4), torch.randn(5))


def test_chosen_experts_share_one_token_unless_asked_otherwise() -> None:
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    _, shares = dsc.route(x, weight, top_k=3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(5))
    _, scores = dsc.route(x, weight, top_k=3, normalise=False)
    assert not torch.allclose(scores.sum(-1), torch.ones(5))


def test_routers_and_experts_take_the_biases_and_limits_of_gpt_oss() -> None:
    x, gate, logit_bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6) * 3
    gate_up, down = torch.randn(6, 8, 8), torch.randn(6, 8, 4)
    biases = torch.randn(6, 8), torch.randn(6, 8)

    def layer(x: Tensor, logit_bias: Tensor, *biases: Tensor) -> Tensor:
        idx, w = dsc.route(x, gate, top_k=2, score="softmax", logit_bias=logit_bias)
        return dsc.experts(
            x, idx, w, gate_up, down, gate_up_bias=biases[0], down_bias=biases[1],
            limit=1.0, alpha=1.702, shift=1.0,
        )  # fmt: skip

    logits, chosen = (x @ gate.T + logit_bias).topk(2)
    wanted = torch.zeros(5, 8)
    for token in range(5):
        for e, share in zip(chosen[token], logits[token].softmax(-1), strict=True):
            g, u = (gate_up[e] @ x[token] + biases[0][e]).split(4)
            g, u = g.clamp(max=1.0), u.clamp(-1.0, 1.0)
            h = g * torch.sigmoid(1.702 * g) * (u + 1)
            wanted[token] += share * (down[e] @ h + biases[1][e])
    torch.testing.assert_close(layer(x, logit_bias, *biases), wanted, rtol=1e-4, atol=1e-4)
    compiled = interpreted(traced(layer, x, logit_bias, *biases), x, logit_bias, *biases)
    torch.testing.assert_close(compiled[0], wanted, rtol=1e-4, atol=1e-4)
