"""Attention as people write it: what becomes one operator, and what must not.

Functions are traced as `@dsc.optimize` traces them: on the first call every size is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

import dsc
from dsc.api import CompiledModel

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def documented(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 0.25
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("btd,bhsd->bths", k[:, 0], q)
    return torch.einsum("btd,bths->bhsd", v[:, 0], (scores / 4).softmax(1))


def queries_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v


def statistics_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    weights: Tensor = scores.softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tril(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v


def where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.full_like(scores, torch.finfo(scores.dtype).min)
    return torch.where(j <= i, scores, hidden).softmax(-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.triu(torch.full((q.shape[-2], k.shape[-2]), float("-inf")), diagonal=1)
    scores: Tensor = mask + q @ k.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


def last_query_sees_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = k.shape[-2] - q.shape[-2]
    i, j = torch.arange(q.shape[-2])[:, None] + past, torch.arange(k.shape[-2])[None]
    return (q @ k.mT / 4).masked_fill(j > i, float("-inf")).softmax(-1) @ v


def whole_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def queries_and_keys_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-2) @ v


def scaled_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) / 4) @ v


def one_mask_too_low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tril(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool), diagonal=1)
    return (q @ k.mT / 4).masked_fill(~seen, float("-inf")).softmax(-1) @ v


def mask_upside_down(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tril(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool))
    return (q @ k.mT / 4).masked_fill(seen, float("-inf")).softmax(-1).nan_to_num() @ v


def other_batch_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:1].mT / 4).softmax(-1) @ v


def scores_are_a_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT / 4).softmax(-1)
    return torch.cat([scores @ v, scores], -1)


def bias_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
    return (q @ k.mT / 4 - (i - j).abs() * 0.5).softmax(-1) @ v


WIDTH = 16
"""Features of a head."""
SHAPES: dict[int, tuple[tuple[int, ...], int, int]] = {
    2: ((), 5, 7), 3: ((3,), 7, 5), 4: ((2, 3), 5, 7), 5: ((2, 3, 2), 4, 5),
}  # fmt: skip
"""By rank: the leading axes, queries and keys."""
MASKED = (masked_fill, where, added, whole_causal)
PLAIN = (documented, queries_scaled, statistics_in_fp32)


def operands(rank: int) -> list[Tensor]:
    lead, new, total = SHAPES[rank]
    torch.manual_seed(rank)
    return [torch.randn(*lead, n, WIDTH) for n in (new, total, total)]


def compiled(
    function: Function, *tensors: Tensor, backend: str = "reference"
) -> tuple[Tensor, CompiledModel]:
    torch._dynamo.reset()  # a size that another test varied would be a symbol
    fast = dsc.optimize(backend=backend)(function)
    result = fast(*tensors)
    (region,) = dsc.explain(fast).regions
    return result, cast(CompiledModel, region.model)


def ops(model: CompiledModel) -> list[str]:
    return [n.op for g in model.program.entries.values() for n in g.walk()]


def check_raised(function: Function, tensors: list[Tensor], backend: str = "reference") -> None:
    """One attention, nothing of queries by keys, and the result that eager has."""
    found, model = compiled(function, *tensors, backend=backend)
    torch.testing.assert_close(found, function(*tensors), atol=2e-5, rtol=2e-5)
    assert ops(model).count("attention") == 1
    assert not {"matmul", "einsum", "softmax", "where"} & {*ops(model)}
    (graph,) = model.program.entries.values()
    shapes = [v.type.shape for n in graph.walk() for v in n.outputs]
    assert all(shape[-1] == WIDTH for shape in shapes if len(shape) > 1)
    (record,) = (p for p in model.report["passes"] if p["name"] == "raise_attention")
    assert record["fired"]["Attention"] == 1


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("function", [*PLAIN, *MASKED], ids=lambda f: f.__name__)
def test_spellings_are_one_attention(function: Function, rank: int) -> None:
    check_raised(function, operands(rank))


@pytest.mark.parametrize("function", [einsums, keys_first, last_query_sees_all])
def test_spellings_in_other_orders(function: Function) -> None:
    q, k, v = operands(4)
    if function is einsums:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    check_raised(function, [q, k, v])


def test_16_bit_operands_are_widened_by_the_kernel() -> None:
    q, k, v = (x.bfloat16() for x in operands(4))
    found, model = compiled(statistics_in_fp32, q, k, v)
    torch.testing.assert_close(found, statistics_in_fp32(q, k, v))
    assert ops(model).count("attention") == 1
    assert "cast" not in ops(model)


@pytest.mark.parametrize("backend", ["tvm", "triton"])
@pytest.mark.parametrize(
    ("function", "rank"), [(documented, 3), (masked_fill, 4)], ids=["documented", "masked_fill"]
)
def test_kernels_take_it(function: Function, rank: int, backend: str) -> None:
    pytest.importorskip(backend)
    check_raised(function, operands(rank), backend)


NEAR_MISSES = (
    queries_and_keys_swapped, scaled_after_softmax, one_mask_too_low, mask_upside_down,
    other_batch_axes, bias_by_distance, scores_are_a_result,
)  # fmt: skip


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_what_is_nearly_attention_stays_as_it_is(function: Function) -> None:
    q, k, v = operands(3)
    q = q[:, :3]
    found, model = compiled(function, q, k, v)
    torch.testing.assert_close(found, function(q, k, v), atol=2e-5, rtol=2e-5)
    assert "attention" not in ops(model)
