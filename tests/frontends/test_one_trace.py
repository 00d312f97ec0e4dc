"""One run gives what `torch.export` gives, word for word, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsc.errors import UsageError
from dsc.frontends import torch_export
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.one_trace import NotPlain, capture
from dsc.ir.printer import print_program
from dsc.ir.types import DType
from tests.family import small, small_v2
from tests.frontends.tracing import Function, Lambda, interpreted, traced

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
B = torch.export.Dim("B")
WEIGHTS = torch.ones(4)


def both(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> tuple[str, str]:
    """The program as text, from one run and from `torch.export`."""
    dims = torch_export._dims(module, args, shapes)
    table = torch_export.decompositions(composite=False)
    ways = capture(module, args, dims, table), torch_export.export(module, args, shapes)
    one, other = (torch_export._imported(w, "f", dims, None, None, None, ()) for w in ways)
    return print_program(one), print_program(other)


def captured(function: Function, *tensors: Tensor) -> None:
    dims = [{0: B}] * len(tensors)
    capture(Lambda(function), tensors, dims, torch_export.decompositions(composite=False))


def filled(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], 6)
    y[:, :4].copy_(x)
    y[..., 4:].copy_(x[:, :2] * 2)
    return y


def read_after(x: Tensor) -> Tensor:
    y = x * 2
    row, part = y[:, 0], y[:, 1:3]
    y.add_(1)
    part.mul_(3)
    return y.sum(1) + row + part[:, 0]


def scattered(x: Tensor) -> Tensor:
    top = x.topk(2, sorted=False)[1]
    mask = torch.zeros_like(x).scatter_(1, top, 1).unsqueeze(-1).expand(-1, 4, 3)
    return x.masked_fill(~mask.reshape(-1, 4, 3)[..., 0].bool(), float("-inf"))


def sized(x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0] * 2).view(x.shape[0], -1)
    return x.repeat(1, 2).view(-1, 4) @ torch.ones(4, 3) + rows.sum() * torch.tensor(0.5)


@pytest.mark.parametrize("function", [scattered, sized])
def test_one_run_gives_the_program_of_torch_export(function: Function) -> None:
    one, other = both(Lambda(function), (torch.randn(3, 4),), {"tensors": ({0: B},)})
    assert one == other
    assert "B" in one


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("function", [filled, read_after, scattered, sized])
def test_what_is_written_is_what_is_read(function: Function, rows: int) -> None:
    captured(function, torch.randn(3, 4))
    x = torch.randn(rows, 4)
    program = traced(function, torch.randn(3, 4), dynamic={0: "B"})
    assert torch.equal(interpreted(program, x)[0], function(x))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (small(**ONE_LAYER, tie_word_embeddings=True), DType.bf16),
        pytest.param(small(num_hidden_layers=2), DType.f32, marks=pytest.mark.exhaustive),
        pytest.param(small_v2(num_hidden_layers=2), DType.bf16, marks=pytest.mark.slow),
    ],
)
def test_a_stock_model_is_plain(config: ModelConfig, dtype: DType) -> None:
    inputs = states_of(config).example_inputs(device="meta", dtype=dtype.torch)
    step = CausalLMStep(stock_causal_lm(config, dtype))
    one, other = both(step, inputs, states_of(config).dynamic_shapes())
    assert one == other


class Remembers(nn.Module):
    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x * 2
        return self.seen


def after_a_split(x: Tensor) -> Tensor:
    y = x * 2
    left: Tensor = y.split(2, 1)[0]
    y.add_(1)
    return left


BEYOND: dict[str, tuple[Function, str]] = {
    "a write to an input": (lambda x: x.add_(1), "writes to an input"),
    "a write through a turn": (lambda x: (x * 2).t().add_(1), "writes through aten.permute"),
    "a size that is asked": (lambda x: x * 2 if x.shape[0] > 3 else x, "some sizes alone"),
    "a size that must be one": (lambda x: x + torch.ones(3, 4), "some sizes alone"),
    "one of several views": (after_a_split, "one of several views"),
    "another element type": (lambda x: x.half().add_(x), "another type than it makes"),
    "an output that is no tensor": (lambda x: (x, 1), "an output is a int"),
    "a constant with axes": (lambda x: x + WEIGHTS, "comes from nowhere"),
}


@pytest.mark.parametrize(("function", "why"), BEYOND.values(), ids=BEYOND.keys())
def test_what_is_beyond_one_run_is_said(function: Callable[..., Any], why: str) -> None:
    with pytest.raises((NotPlain, RuntimeError), match=why):
        captured(function, torch.randn(3, 4))


@pytest.mark.parametrize("rows", [(3, 3), (1, 5)])
def test_sizes_that_could_be_mistaken_are_beyond_it(rows: tuple[int, int]) -> None:
    tensors = [torch.randn(n, 2) for n in rows]
    dims = [{0: torch.export.Dim(name)} for name in "AB"]
    with pytest.raises(NotPlain, match="alike, or 0 or 1"):
        capture(Lambda(lambda x, y: x.sum() + y.sum()), tensors, dims, {})


def test_a_module_that_sets_attributes_is_left_as_it_was() -> None:
    module = Remembers()
    with pytest.raises(NotPlain, match="sets attributes"):
        capture(module, (torch.randn(3, 4),), [{}], {})
    assert module.seen is None


def test_what_is_left_to_torch_export_is_refused_in_its_words() -> None:
    with pytest.raises(UsageError, match=r"torch\.export cannot trace"):
        traced(lambda x: x * 2 if x.shape[0] > 3 else x, torch.randn(5, 4), dynamic={0: "B"})
