"""@dsc.optimize: equal to eager, guarded, compiled rarely, or refused in words."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false

import dsc
from dsc.errors import UnsupportedOperator, UsageError
from dsc.frontends.overlaps import shared as shared_memory
from dsc.ir.program import Program
from tests.frontends.conftest import Interpreted
from tests.frontends.tracing import ops_of

pytestmark = pytest.mark.usefixtures("compiled")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v


SIZES = [(1, 4, 16, 16), (2, 4, 33, 70), (3, 4, 7, 129), (1, 4, 1, 500), (2, 4, 64, 64)]


@pytest.mark.parametrize("crossed", [False, True], ids=["self", "crossed"])
def test_the_documented_example_is_compiled_twice_for_any_sizes(
    crossed: bool, compiled: list[Program]
) -> None:
    function = dsc.optimize(memory_reuse=True, fusion_level=3)(attention)
    for batch, heads, new, last in SIZES:
        widths = (new, last, 32) if crossed else (new, new, last)
        q = torch.randn(batch, heads, widths[0], widths[2])
        k, v = (torch.randn(batch, heads, widths[1], widths[2]) for _ in range(2))
        torch.testing.assert_close(function(q, k, v), attention(q, k, v))
    assert len(compiled) == 2
    assert len(dsc.explain(function).recompiles) == 1


def test_sizes_of_one_and_none_are_right_where_they_matter(compiled: list[Program]) -> None:
    """They broadcast, vanish, or leave no largest element: those functions are captured again."""

    @dsc.optimize
    def broadcast(x: Tensor, y: Tensor) -> Tensor:
        return x * y + 1

    @dsc.optimize
    def squeezed(x: Tensor) -> Tensor:
        return x.squeeze(0) + 1

    for a, b in ((4, 4), (6, 6), (1, 6), (6, 1), (1, 1), (0, 1), (7, 7), (0, 0)):
        x, y = torch.randn(a, 5), torch.randn(b, 5)
        torch.testing.assert_close(broadcast(x, y), x * y + 1)
        torch.testing.assert_close(squeezed(x), x.squeeze(0) + 1)

    @dsc.optimize
    def largest(x: Tensor) -> Tensor:
        return x.amax(0)

    for n in (3, 4, 1):
        x = torch.randn(n, 2)
        assert torch.equal(largest(x), x.amax(0))
    with pytest.raises(IndexError, match="amax"):
        largest(torch.randn(0, 2))


def test_another_librarys_operator_of_a_name_of_torchs_is_not_torchs() -> None:
    """This `exp` drops an axis of one: a capture with such sizes open would be wrong of it."""

    def exp(x: Tensor) -> Tensor:
        return x[0].exp() if x.shape[0] == 1 else x.exp()

    operator = torch.library.custom_op(
        "dsc_tests::exp", exp, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator.register_fake(
        lambda x: x.new_empty(x.shape[1:] if guard_or_false(x.shape[0] == 1) else x.shape)
    )
    function = dsc.optimize(fallback="eager")(lambda x: operator(x) * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (4, 6, 1, 5, 0):
            x = torch.randn(n, 3)
            torch.testing.assert_close(function(x), exp(x) * 2)


def test_a_varying_batch_is_compiled_once_and_the_reason_is_logged(
    compiled: list[Program], caplog: pytest.LogCaptureFixture
) -> None:
    function = dsc.optimize(lambda x, w: F.linear(x, w))
    w = torch.randn(4, 3)
    with caplog.at_level(logging.INFO, "dsc"):
        for n in (5, 6, 7, 8, 1, 300, 0):
            x = torch.randn(n, 3)
            torch.testing.assert_close(function(x, w), F.linear(x, w))
    assert len(compiled) == 2
    (record,) = caplog.records
    assert "<lambda> is compiled again" in record.message
    assert "expected 5, actual 6" in record.message


def test_recompiles_end_at_the_limit_with_one_warning(compiled: list[Program]) -> None:
    function = dsc.optimize(lambda x, kind: x * len(kind))
    x = torch.randn(3)
    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        for n in range(1, 7):
            assert torch.equal(function(x, "k" * n), x * n)
    (warned,) = [str(each.message) for each in w]
    assert "<lambda> has been compiled 3 times and runs eagerly" in warned
    assert "kind" in warned
    assert len(compiled) == 3


def test_memory_that_is_outgrown_is_planned_again_without_a_capture(
    compiled: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsc.frontends.regions.ARENA", 0)
    function = dsc.optimize(dynamic=True)(lambda x: x.sin().softmax(-1))
    for n in (5, 8, 9, 100, 7):
        x = torch.randn(n, 6)
        torch.testing.assert_close(function(x), x.sin().softmax(-1))
    assert [p.symbols["D0"].hi for p in compiled] == [8, 16, 128]
    (graph,) = dsc.explain(function).graphs
    assert graph.regions[0].compilations == 3


def test_a_backend_that_wants_constant_sizes_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_program(program: Program, **_: Any) -> Any:
        asked.append(sorted(program.symbols))
        (graph,) = program.entries.values()
        if not isinstance(graph.inputs[0].type.shape[-1], int):
            raise UnsupportedOperator("symbolic features")
        return Interpreted(program)

    monkeypatch.setattr("dsc.api.compile_program", compile_program)

    @dsc.optimize(dynamic=True)
    def double(x: Tensor) -> Tensor:
        return x * 2

    for shape in ((2, 4, 5, 6), (3, 4, 5, 6), (3, 4, 5, 7)):
        x = torch.randn(shape)
        assert torch.equal(double(x), x * 2)
    assert asked == [["D0", "D1", "D2", "D3"], ["D0", "D1", "D2"]] * 2


# What is captured is guarded.

SCALE = torch.arange(4.0)
FACTOR = 3


def test_tensors_from_outside_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    local = torch.ones(4)
    function = dsc.optimize(lambda x: x * SCALE * FACTOR + local)
    x = torch.ones(4)

    def check() -> None:
        assert torch.equal(function(x), x * SCALE * FACTOR + local)

    check()
    SCALE.mul_(5)
    check()
    SCALE.data.add_(1)
    check()
    local.neg_()
    check()
    monkeypatch.setitem(globals(), "FACTOR", 4)
    check()
    monkeypatch.setitem(globals(), "SCALE", torch.full((4,), 7.0))
    check()


def test_weights_are_read_at_every_call(compiled: list[Program]) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    function = dsc.optimize(module)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(function(x), module(x))
        weight = module[0].get_parameter("weight")
        for values in (weight, weight.data):
            values.mul_(2)
            assert torch.equal(function(x), module(x))
        module[0].weight = nn.Parameter(torch.ones(3, 4))
        assert torch.equal(function(x), module(x))
    assert len(compiled) == 1
    (graph,) = compiled[0].entries.values()
    assert {"0.weight", "0.bias"} <= {v.name for v in graph.inputs}


def test_frozen_weights_are_constants_until_they_change(compiled: list[Program]) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    function = dsc.optimize(freeze=True)(module)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(function(x), module(x))
        assert set(compiled[0].weights) == {"0.weight", "0.bias"}
        module[0].weight.mul_(2)  # type: ignore[operator]
        assert torch.equal(function(x), module(x))
    assert len(compiled) == 2


def test_training_and_grad_mode_are_guarded() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    function = dsc.optimize(fallback="eager")(module)
    x = torch.ones(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.eval()
        assert torch.equal(function(x), module(x))
        module.train()
        torch.manual_seed(0)
        found = function(x)
        torch.manual_seed(0)
        assert torch.equal(found, module(x))
        module.eval()
        assert torch.equal(function(x), module(x))


def test_gradients_run_eagerly_with_one_warning(compiled: list[Program]) -> None:
    function = dsc.optimize(lambda x: x * 2)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="eagerly, because its inputs require gradients"):
        function(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(x)
    assert not compiled
    with torch.no_grad():
        assert torch.equal(function(x), x * 2)
    assert len(compiled) == 1


# Views, changes in place, numbers and structures.


def test_outputs_alias_inputs_as_they_do_eagerly() -> None:
    for view in (
        lambda x: x[0],
        lambda x: x.t()[1:],
        lambda x: (x * 2, x.view(-1)),
        lambda x: x,
        lambda x: x.unsqueeze(1).expand(2, 4, 3),
    ):
        x = torch.arange(6.0).reshape(2, 3)
        y = x.clone()
        found, wanted = dsc.optimize(view)(x), view(y)
        for a, b in zip(_leaves(found), _leaves(wanted), strict=True):
            assert a.stride() == b.stride()
            assert (a.data_ptr() == x.data_ptr() + 4 * b.storage_offset()) == (
                b._base is y or b is y
            )
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).mT,
        lambda x: x.mT * 2,
        lambda x: (x.mT + 1).mT.view(-1),
        lambda x: x.permute(2, 0, 1).contiguous().sin().permute(1, 2, 0),
        lambda x: x.permute(2, 0, 1).sin(),
    ],
)
def test_results_lie_in_memory_as_they_do_eagerly(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4)
    wanted, found = function(x), dsc.optimize(function)(x)
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()


def test_changes_in_place_reach_the_caller() -> None:
    def change(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        x[0].mul_(2)
        y.copy_(x[0])
        return x.sum()

    first, second = torch.arange(6.0).reshape(2, 3), torch.zeros(3)
    wanted = [first.clone(), second.clone()]
    result = dsc.optimize(change)(first, second)
    assert result == change(*wanted)
    assert torch.equal(first, wanted[0])
    assert torch.equal(second, wanted[1])
    both = torch.arange(4.0)
    wanted = [both.clone()]
    dsc.optimize(lambda a, b: a.add_(b))(both, both[:])
    assert torch.equal(both, wanted[0] * 2)


def added(a: Tensor, b: Tensor) -> Tensor:
    a.add_(1)
    return b * 2


def test_what_pytorch_refuses_to_change_in_place_is_refused() -> None:
    line, other = torch.arange(5.0), torch.arange(5.0)
    cases: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda x: x.add_(1), [torch.ones(1, 4).expand(3, 4)]),
        (lambda a, b: a.add_(b), [line[1:], line[:-1]]),
        (lambda a, b: torch.mul(a, 2, out=b), [other[1:], other[:-1]]),
    ]
    for function, given in cases:
        before = [x.clone() for x in given]
        with pytest.raises(RuntimeError, match="single memory location"):
            dsc.optimize(function)(*given)
        assert all(map(torch.equal, given, before))
    windows = [torch.arange(6.0).as_strided((3, 4), (1, 1)) for _ in range(2)]
    assert torch.equal(dsc.optimize(lambda x: x.mul_(2))(windows[0]), windows[1].mul_(2))


def test_inputs_that_share_memory_as_none_did_before_are_changed_as_eagerly() -> None:
    """Nothing guards what inputs share: code made for none of it, or for other places, is wrong."""
    apart, shared = (dsc.optimize(added) for _ in range(2))
    apart(torch.zeros(3), torch.zeros(3))
    x = torch.zeros(4)
    shared(x[1:], x[:-1])
    for function in (apart, shared):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for a, b in ((2, 1), (1, 2), (0, 0), (0, 3)):
                x, y = torch.zeros(6), torch.zeros(6)
                wanted = added(y[a : a + 3], y[b : b + 3])
                assert torch.equal(function(x[a : a + 3], x[b : b + 3]), wanted)
                assert torch.equal(x, y)
        assert len([w for w in told if "share memory in another way" in str(w.message)]) == 1


def test_memory_that_is_shared_is_told_by_the_bytes_that_inputs_span() -> None:
    x = torch.zeros(12)
    assert not shared_memory([x[:6], x[6:], 3, torch.zeros(0), torch.zeros(2).expand(1, 2)])
    assert not shared_memory([x.view(3, 4).t(), torch.zeros(5)])
    assert shared_memory([x[:7], torch.zeros(2), x[6:]]) == {(0, 2, 24, 0)}
    assert shared_memory([x[3:4].expand(5)]) == {(0, 0, 0, 3)}


def test_the_documented_example_runs_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # through the passes and the kernels of tvm
    function = dsc.optimize(backend="tvm")(attention)
    for rows in (5, 7, 1):
        q, k, v = (torch.randn(2, rows, 8) for _ in range(3))
        torch.testing.assert_close(function(q, k, v), attention(q, k, v))
    regions = dsc.explain(function).regions
    assert {r.model.backend for r in regions} == {"tvm"}
    assert len(regions) == 2


def test_numbers_go_in_and_out() -> None:
    x = torch.arange(1.0, 4.0)
    assert dsc.optimize(lambda x: x.sum().item())(x) == 6.0
    assert dsc.optimize(lambda x: (x.shape[0] * 2, x.numel() > 3, 1.5))(x) == (6, False, 1.5)
    scaled = dsc.optimize(lambda x, by, *, negate=False: -x * by if negate else x * by)
    for by in (2.0, 3.0, 0.5, 3, 4, -1, 0, True):
        assert torch.equal(scaled(x, by), x * by)
    assert torch.equal(scaled(x, 3.0, negate=True), -x * 3)
    ranged = dsc.optimize(lambda x, n: x.sum() + torch.arange(n).sum())
    for n in (3, 4, 7, 1, 0):
        assert ranged(x, n) == 6 + sum(range(n))


@dataclass
class Pair:
    left: Tensor
    right: float


def test_results_keep_their_structure(compiled: list[Program]) -> None:
    @dsc.optimize
    def several(pair: tuple[Tensor, Tensor], more: dict[str, Any]) -> dict[str, Any]:
        y = pair[0] + pair[1] * more["z"]
        return {"y": y, "rest": (y.sum(), "text", None, y.shape[0], 3), "p": Pair(y, more["k"])}

    for n in (5, 3, 4):
        x = torch.randn(n, 4)
        result = several((x, x), {"z": x, "k": 1.0})
        assert torch.equal(result["y"], x + x * x)
        assert result["rest"][1:] == ("text", None, n, 3)
        assert torch.equal(result["p"].left, result["y"])
        assert result["p"].right == 1.0
    assert len(compiled) == 2


def test_conditions_on_sizes_are_guarded(compiled: list[Program]) -> None:
    @dsc.optimize
    def branch(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] > 3 else x - 1

    for n in (2, 5, 3, 4, 8, 1):
        x = torch.randn(n, 4)
        assert torch.equal(branch(x), x + 1 if n > 3 else x - 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"fusion_level": 7}, "fusion_level 7"),
        ({"fallback": "maybe"}, "fallback 'maybe'"),
        ({"backend": "nothing"}, "nothing"),
        ({"mode": "max-autotune"}, "no modes"),
        ({"fullgraph": False}, "fullgraph"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        dsc.optimize(**arguments)


# As a decorator.


def test_names_methods_and_static_methods_stay() -> None:
    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        @dsc.optimize
        def scaled(self, x: Tensor) -> Tensor:
            """Scale x."""
            return x * self.by

        @staticmethod
        @dsc.optimize
        def doubled(x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(2, 4)
    assert Scale.scaled.__name__ == "scaled"
    assert Scale.scaled.__doc__ == "Scale x."
    assert torch.equal(Scale(3.0).scaled(x), x * 3)
    assert torch.equal(Scale(2.0).scaled(x), x * 2)
    assert torch.equal(Scale.doubled(x), x * 2)


def test_modules_stay_modules_and_are_copied() -> None:
    module = nn.Linear(4, 3).eval()
    function = dsc.optimize(module)
    assert isinstance(function, nn.Module)
    assert {n for n, _ in function.named_parameters()} == {"_orig_mod.weight", "_orig_mod.bias"}
    other = copy.deepcopy(function)
    x = torch.randn(2, 4)
    with torch.no_grad():
        module.weight.zero_()
        assert torch.equal(function(x), module.bias.expand(2, 3))
        torch.testing.assert_close(other(x), F.linear(x, *other.parameters()))
        assert not torch.equal(other(x), function(x))


@dsc.optimize
def doubled(x: Tensor) -> Tensor:
    return x * 2


def test_pickles_are_those_of_torch_compile() -> None:
    """A function is its name; a module its weights, compiled anew; a lambda is refused."""
    assert pickle.loads(pickle.dumps(doubled)) is doubled
    module: Any = dsc.optimize(nn.Linear(4, 3).eval())
    x = torch.randn(2, 4)
    with torch.no_grad():
        wanted = module(x)
        other = pickle.loads(pickle.dumps(module))
        assert torch.equal(other(x), wanted)
        assert type(other) is type(module)
        other.bias.add_(1)
        assert torch.equal(module(x), wanted)
        torch.testing.assert_close(other(x), wanted + 1)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(dsc.optimize(lambda x: x))  # type: ignore[misc]


def test_calls_within_other_compiled_functions_are_inlined(compiled: list[Program]) -> None:
    inner = dsc.optimize(lambda x: x * 2)
    outer = dsc.optimize(lambda x: inner(x) + 1)
    x = torch.randn(3)
    assert torch.equal(outer(x), x * 2 + 1)
    assert len(compiled) == 1
    assert torch.equal(torch.compile(lambda x: inner(x) + 1, backend="eager")(x), x * 2 + 1)
    mixed = dsc.optimize(lambda x: torch.compile(lambda y: y * 3, backend="eager")(x) + 1)
    assert torch.equal(mixed(x), x * 3 + 1)


def test_threads_share_a_function() -> None:
    function = dsc.optimize(lambda x: x.softmax(-1) @ x.mT)
    wrong: list[Exception] = []

    def work(seed: int) -> None:
        x = torch.randn(3 + seed, 4, generator=torch.Generator().manual_seed(seed))
        try:
            for _ in range(20):
                torch.testing.assert_close(function(x), x.softmax(-1) @ x.mT)
        except Exception as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_mixture_of_experts_is_two_operators(compiled: list[Program]) -> None:
    def moe(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        chosen, weights = dsc.route(x, gate, top_k=2)
        return dsc.experts(x, chosen, weights, gate_up, down)

    weights = torch.randn(6, 8), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    function = dsc.optimize(moe)
    for tokens in (3, 5, 4):
        x = torch.randn(2, tokens, 8)
        assert torch.equal(function(x, *weights), moe(x, *weights))
    assert len(compiled) == 2
    assert ops_of(compiled[1].entries["moe"]) == ["route", "experts"]
    assert str(compiled[1].entries["moe"].inputs[0].type) == "f32[2,D0,8]"


def _leaves(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def test_negated_views_are_read_as_what_they_are() -> None:
    def imaginary(x: Tensor) -> Tensor:
        return x.conj().imag * 2

    x = torch.complex(torch.ones(2), torch.ones(2))
    assert torch.equal(dsc.optimize(fallback="eager")(imaginary)(x), imaginary(x))


def test_least_integers_and_fp16_roots_are_what_they_are_eagerly() -> None:
    def both(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return x.fmod(3), x.fmod(-5), y.fmod(7), h**0.5, h**-0.5

    x, y = (
        torch.tensor([torch.iinfo(t).min, -7, 7, 0], dtype=t) for t in (torch.int8, torch.int16)
    )
    h = torch.tensor([float("-inf"), -0.0, 4.0, float("inf")], dtype=torch.float16)
    for found, wanted in zip(dsc.optimize(both)(x, y, h), both(x, y, h), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert torch.equal(found.float().signbit(), wanted.float().signbit())


def test_rounding_keeps_the_sign_of_zero() -> None:
    def whole(x: Tensor) -> tuple[Tensor, ...]:
        return x.trunc(), x.floor(), x.ceil(), x.round(), x // 2, x // -2

    x = torch.tensor([-0.3, -0.0, 0.0, 0.3, -0.7, 0.7, -2.5, 2.5, 1e20, -1e20, float("-inf")])
    for found, wanted in zip(dsc.optimize(whole)(x), whole(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & (found == 0), wanted.signbit() & (wanted == 0))


def test_a_tensor_given_other_memory_is_refused_or_runs_eagerly() -> None:
    def moved(x: Tensor, y: Tensor) -> Tensor:
        x.data = y
        return x * 2

    y = torch.full((3,), 5.0)
    with pytest.raises(UnsupportedOperator, match=r"x\.data = y"):
        dsc.optimize(moved)(torch.ones(3), y)
    x = torch.ones(3)
    with pytest.warns(UserWarning, match="runs eagerly"):
        assert torch.equal(torch.compile(moved, backend="dsc")(x, y), y * 2)
    assert torch.equal(x, y)
