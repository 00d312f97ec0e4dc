"""@dsc.optimize and the dsc operators: what is compiled equals eager, and is compiled rarely."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsc
from dsc.errors import UnsupportedOperator, UsageError
from dsc.frontends import ops
from dsc.frontends.optimize import Optimized, symbolic_choices
from dsc.ir.interpreter import Interpreter
from dsc.ir.op import registry
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.weights import random_tensor
from tests.frontends.tracing import checked, interpreted, ops_of, traced


@dsc.optimize(memory_reuse=True, fusion_level=3, backend="reference")
def attention_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Programs that were compiled, by an interpreter in the place of a backend."""
    programs: list[Program] = []

    class Interpreted:
        def __init__(self, program: Program, **_: Any) -> None:
            checked(program)
            programs.append(program)
            self.program = program

        def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return Interpreter(self.program).run(next(iter(self.program.entries)), inputs)

    monkeypatch.setattr("dsc.api.compile_program", Interpreted)
    return programs


def test_the_documented_example_agrees_with_eager_at_several_shapes() -> None:
    for batch, new, past in ((2, 7, 11), (3, 8, 16), (2, 5, 12)):
        q, k, v = (torch.randn(batch, 4, n, 16) for n in (new, past, past))
        torch.testing.assert_close(attention_layer(q, k, v), reference(q, k, v))
    assert len(attention_layer.specialisations) == 1
    torch.testing.assert_close(attention_layer(q[0], k[0], v[0]), reference(q[0], k[0], v[0]))
    assert len(attention_layer.specialisations) == 2


def test_the_name_and_the_text_of_a_function_stay() -> None:
    assert attention_layer.__name__ == "attention_layer"
    assert isinstance(attention_layer, Optimized)


@pytest.mark.parametrize(
    ("first", "then", "compilations"),
    [
        ((2, 5, 8), (7, 3, 8), 1),  # both within the bounds
        ((2, 5, 8), (2, 9, 8), 2),  # outgrown
        ((2, 5, 8), (1, 5, 8), 2),  # a size of one broadcasts
        ((2, 5, 8), (2, 5, 6), 2),  # other features
        ((2, 5, 8), (5, 8), 2),  # another rank
    ],
)
def test_code_is_reused_within_bounds(
    first: tuple[int, ...], then: tuple[int, ...], compilations: int, compiled: list[Program]
) -> None:
    function = dsc.optimize(lambda x: x.softmax(-1) * x.shape[0])
    for shape in (first, then, first, then):
        x = torch.randn(shape)
        assert torch.equal(function(x), x.softmax(-1) * shape[0])
    assert len(compiled) == compilations


def test_an_outgrown_program_is_not_traced_again(compiled: list[Program]) -> None:
    calls = []

    @dsc.optimize
    def double(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x * 2

    double(torch.randn(2, 5))
    traces = len(calls)
    double(torch.randn(100, 5))
    assert len(calls) == traces
    assert [p.symbols["D0"].hi for p in compiled] == [8, 128]
    assert len(double.specialisations) == 1


def test_constants_are_part_of_the_key(compiled: list[Program]) -> None:
    @dsc.optimize
    def scaled(x: Tensor, by: float, *, negate: bool = False) -> Tensor:
        return -x * by if negate else x * by

    x = torch.randn(3, 4)
    assert torch.equal(scaled(x, 2.0), x * 2)
    assert torch.equal(scaled(x, 3.0), x * 3)
    assert torch.equal(scaled(x, 3.0, negate=True), -x * 3)
    assert torch.equal(scaled(x, 2.0), x * 2)
    assert torch.equal(scaled(x.to(torch.float64), 2.0), x.double() * 2)
    assert len(compiled) == 4
    with pytest.raises(UsageError, match="neither a tensor nor a constant"):
        scaled(x, bytearray(2))  # type: ignore[arg-type]


def test_conditions_on_sizes_are_guarded(compiled: list[Program]) -> None:
    @dsc.optimize
    def branch(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] > 3 else x - 1

    for n in (2, 5, 3, 4, 8):
        x = torch.randn(n, 4)
        assert torch.equal(branch(x), x + 1 if n > 3 else x - 1)
    assert len(compiled) == 2


def test_a_function_that_needs_constant_sizes_is_compiled_for_each(compiled: list[Program]) -> None:
    @dsc.optimize
    def squares(x: Tensor) -> Tensor:
        return torch.cat([x * i for i in range(x.shape[0])], 0)

    for n in (2, 3):
        x = torch.randn(n, 4)
        assert torch.equal(squares(x), torch.cat([x * i for i in range(n)], 0))
    assert len(compiled) == 2
    assert not compiled[0].symbols


def test_a_backend_that_wants_constant_sizes_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_program(program: Program, **_: Any) -> Any:
        asked.append(sorted(program.symbols))
        if program.symbols:
            raise UnsupportedOperator("symbolic sizes")

        class Done:
            def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
                return Interpreter(program).run("double", inputs)

        return Done()

    monkeypatch.setattr("dsc.api.compile_program", compile_program)

    @dsc.optimize
    def double(x: Tensor) -> Tensor:
        return x * 2

    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(double(x), x * 2)
    assert asked == [["D0", "D1", "D2"], ["D0", "D1"], ["D0", "D1"], []]


def test_results_keep_their_structure(compiled: list[Program]) -> None:
    @dsc.optimize
    def several(pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> dict[str, Any]:
        y = pair[0] + pair[1] * more["z"]
        return {"y": y, "rest": (y.sum(), "text", None, y.shape[0], 3)}

    x = torch.randn(5, 4)
    result = several((x, x), {"z": x})
    assert torch.equal(result["y"], x + x * x)
    assert result["rest"][1:] == ("text", None, 5, 3)
    assert several((x[:3], x[:3]), {"z": x[:3]})["rest"][3] == 3
    assert len(compiled) == 1


def test_gradients_run_eagerly_with_one_warning(compiled: list[Program]) -> None:
    function = dsc.optimize(lambda x: x * 2)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="eagerly, because its inputs require gradients"):
        function(x).sum().backward()
    assert x.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(x)
    assert not compiled
    with torch.no_grad():
        function(x)
    assert len(compiled) == 1


def test_a_module_is_compiled_with_its_weights(compiled: list[Program]) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    function = dsc.optimize(module)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(function(x), module(x))
        assert set(compiled[0].weights) == {"0.weight", "0.bias"}
        module[0].weight.mul_(2)  # type: ignore[operator]
        assert torch.equal(function(x), module(x))
    assert len(compiled) == 2


def test_methods_and_nested_calls(compiled: list[Program]) -> None:
    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        @dsc.optimize
        def scaled(self, x: Tensor) -> Tensor:
            return x * self.by

    @dsc.optimize
    def outer(x: Tensor, scale: Scale) -> Any:
        return scale.scaled(x) + 1

    x = torch.randn(2, 4)
    assert torch.equal(outer(x, Scale(3.0)), x * 3 + 1)
    assert len(compiled) == 1
    assert torch.equal(Scale(2.0).scaled(x), x * 2)


def test_unsupported_operators_are_named_on_the_first_call() -> None:
    with pytest.raises(UnsupportedOperator, match=r"aten\._linalg_det\.default"):
        dsc.optimize(lambda x: torch.linalg.det(x))(torch.randn(3, 3))


def test_a_wrong_level_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="fusion_level 7"):
        dsc.optimize(fusion_level=7)


def test_sizes_that_are_tried_as_symbols() -> None:
    q, ids = torch.randn(2, 4, 5, 8), torch.zeros(3, 6, dtype=torch.int64)
    assert symbolic_choices([q, ids]) == [
        [[0, 1, 2], [0, 1]],
        [[0, 2], [0, 1]],
        [[0, 1], [0, 1]],
    ]
    assert symbolic_choices([torch.randn(1, 7)]) == [[[]]]


# The operators.

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
        (lambda g, u: dsc.swiglu(g, u), [(3, 4), (3, 4)]),
        (lambda q, k, v: dsc.attention(q, k, v), [(1, 3, 2, 4), (1, 5, 1, 4), (1, 5, 1, 3)]),
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


def test_a_mixture_of_experts_is_two_operators(compiled: list[Program]) -> None:
    @dsc.optimize
    def moe(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        chosen, weights = dsc.route(x, gate, top_k=2)
        return dsc.experts(x, chosen, weights, gate_up, down)

    weights = torch.randn(6, 8), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 8)
        assert torch.equal(moe(x, *weights), moe.function(x, *weights))
    (program,) = compiled
    assert ops_of(program.entries["moe"]) == ["route", "experts"]
    assert str(program.entries["moe"].inputs[0].type) == "f32[D0,D1,8]"


def test_operands_that_do_not_fit_are_refused_when_traced() -> None:
    with pytest.raises(Exception, match=r"dsc\.rms_norm"):
        traced(lambda x, w: dsc.rms_norm(x, w), torch.randn(3, 4), torch.randn(5))
