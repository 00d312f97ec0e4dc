"""torch.compile(model, backend="dsc")."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsc
from dsc.errors import UsageError
from dsc.frontends.dynamo import dsc_backend
from dsc.ir.program import Program
from tests.frontends.tracing import ops_of


class Model(nn.Module):
    """Two layers, a buffer, a result that is a size."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for layer in self.layers:
            x = F.silu(layer(x)) + self.shift
        return x.reshape(x.shape[0] * x.shape[1], -1), x.shape[0]


def test_the_backend_is_known_to_torch() -> None:
    assert "dsc" in torch._dynamo.list_backends()


def test_a_model_through_the_whole_compiler() -> None:
    torch._dynamo.reset()
    model = Model().eval()
    fast = torch.compile(model, backend="dsc", options={"backend": "reference", "fusion_level": 1})
    x = torch.randn(2, 3, 4)
    with torch.no_grad(), dsc.Profiler() as profiler:
        torch.testing.assert_close(fast(x), model(x))
    assert {"linear"} <= {e.name for e in profiler.events}


def test_parameters_are_inputs_under_their_names(compiled: list[Program]) -> None:
    model = Model().eval()
    fast = torch.compile(model, backend=dsc_backend)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(fast(x)[0], model(x)[0])
    (program,) = compiled
    assert not program.weights
    (graph,) = program.entries.values()
    names = {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "shift", "x"}
    assert {v.name for v in graph.inputs} == names
    assert [n.loc for n in graph.nodes if n.op == "linear"] == ["layers.0", "layers.1"]


def test_sizes_become_symbols_and_results_may_be_sizes(compiled: list[Program]) -> None:
    model = Model().eval()
    fast = torch.compile(model, backend=dsc_backend, dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 3), (5, 6), (4, 8)):
            x = torch.randn(batch, tokens, 4)
            y, n = fast(x)
            assert torch.equal(y, model(x)[0])
            assert n == batch
    assert len(compiled) == 1
    assert len(compiled[0].symbols) == 2


@pytest.mark.parametrize("freeze", [False, True])
def test_changed_weights_and_other_models_are_not_confused(
    freeze: bool, compiled: list[Program]
) -> None:
    x = torch.randn(2, 3, 4)
    with torch.inference_mode():
        for model in (Model().eval(), Model().eval()):
            fast = torch.compile(model, backend="dsc", options={"freeze": freeze})
            assert torch.equal(fast(x)[0], model(x)[0])
            weight = model.layers[0].get_parameter("weight")
            with torch.no_grad():
                weight.mul_(2)
            assert torch.equal(fast(x)[0], model(x)[0])
            weight.data = weight.data * 1.5
            assert torch.equal(fast(x)[0], model(x)[0])
            if not freeze:
                weight.data.mul_(2)
                assert torch.equal(fast(x)[0], model(x)[0])


def test_training_runs_eagerly_with_a_warning(compiled: list[Program]) -> None:
    model = Model()
    fast = torch.compile(model, backend=dsc_backend)
    with pytest.warns(UserWarning, match="require gradients"):
        fast(torch.randn(2, 3, 4))[0].sum().backward()
    assert model.layers[0].weight.grad is not None
    assert not compiled


def test_what_cannot_be_compiled_is_named_and_runs_eagerly(compiled: list[Program]) -> None:
    def function(x: Tensor) -> Any:
        return torch.linalg.det(x.exp()) + torch.fft.fft(x).real.sum()

    fast = torch.compile(function, backend=dsc_backend)
    x = torch.randn(3, 3)
    with pytest.warns(UserWarning, match=r"eagerly in part: .*_linalg_det"):
        torch.testing.assert_close(fast(x), function(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fast(x), function(x))
    found = [ops_of(next(iter(p.entries.values()))) for p in compiled]
    assert [found[0], found[1][-2:], found[2:]] == [["exp"], ["sum", "add"], []]


def test_by_choice_it_is_an_error(compiled: list[Program]) -> None:
    def function(x: Tensor) -> Any:
        return torch.linalg.det(x)

    fast = torch.compile(function, backend="dsc", options={"fallback": "error"})
    with pytest.raises(Exception, match=r"cannot be compiled:\n +aten\._linalg_det"):
        fast(torch.randn(3, 3))


def test_a_graph_break_makes_two_programs(compiled: list[Program]) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    x = torch.randn(3, 3)
    assert torch.equal(torch.compile(function, backend=dsc_backend)(x), x * 2 + 1)
    assert [ops_of(next(iter(p.entries.values()))) for p in compiled] == [
        ["full", "mul"],
        ["full", "add"],
    ]


def test_unknown_options_are_refused() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(UsageError, match="unknown option speed"):
        dsc_backend(graph, [], options={"speed": 3})
    with pytest.raises(UsageError, match="fallback 'never'"):
        dsc_backend(graph, [], options={"fallback": "never"})
