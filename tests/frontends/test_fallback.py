"""What cannot be compiled is refused in words or runs eagerly, and what became of a function."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dsc
from dsc.errors import UnsupportedOperator, UsageError
from dsc.frontends import capture
from dsc.ir.program import Program
from tests.frontends.conftest import Interpreted
from tests.frontends.tracing import four_rows, ops_of

pytestmark = pytest.mark.usefixtures("compiled")
FACTOR = 3


def chooses(p: Tensor, e: int) -> Tensor:
    if p[:, e].max() > 0.5:
        return p + 1
    return p - 1


def decomposed(x: Tensor) -> Tensor:
    y = x.exp()
    u = torch.linalg.svd(y)[0]
    found: Tensor = (y @ u).relu()
    return found


def test_branching_on_data_names_the_line_and_what_to_write() -> None:
    with pytest.raises(UsageError) as refused:
        dsc.optimize(chooses)(torch.rand(3, 3), 1)
    text = str(refused.value)
    assert "chooses branches on the values of a tensor" in text
    assert "test_fallback.py" in text
    assert "if p[:, e].max() > 0.5:" in text
    assert "torch.where" in text
    assert 'fallback="eager"' in text
    assert len(text.splitlines()) == 3
    function = dsc.optimize(fallback="eager")(chooses)
    for x in (torch.ones(3, 3), torch.zeros(3, 3)):
        assert torch.equal(function(x, 1), chooses(x, 1))
    assert any("branches on the values" in t for t in dsc.explain(function).breaks)


def test_unsupported_operators_are_named_with_the_users_line(compiled: list[Program]) -> None:
    with pytest.raises(UnsupportedOperator) as refused:
        dsc.optimize(decomposed)(torch.rand(3, 3))
    text = str(refused.value)
    assert "aten._linalg_svd.default" in text
    assert "frontends/test_fallback.py" in text
    assert "torch.linalg.svd(y)[0]" in text
    assert "/torch/" not in text
    assert not compiled


def test_unsupported_operators_run_eagerly_between_compiled_parts(compiled: list[Program]) -> None:
    function = dsc.optimize(fallback="eager")(decomposed)
    x = torch.rand(3, 3)
    with pytest.warns(UserWarning, match="eagerly in part: aten._linalg_svd") as warned:
        torch.testing.assert_close(function(x), decomposed(x))
    assert len(warned) == 1
    assert [ops_of(next(iter(p.entries.values()))) for p in compiled] == [
        ["exp"],
        ["matmul", "relu"],
    ]
    explained = dsc.explain(function)
    assert len(explained.regions) == 2
    assert "svd" in explained.fallbacks[0]


def test_writes_of_a_range_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # through the passes, of which one joins what stays with what is written

    def written(x: Tensor, y: Tensor) -> Tensor:
        z = x.clone()
        z[1:3] = y
        z[:, 0] = 7
        x[0] = 5
        return z.sin()

    function = dsc.optimize(backend="reference")(written)
    for rows in (4, 5, 6):
        x, y = torch.randn(rows, 3), torch.randn(2, 3)
        other = x.clone()
        wanted = written(other, y)
        torch.testing.assert_close(function(x, y), wanted)
        assert torch.equal(x, other)


def test_random_numbers_come_in_the_order_of_the_program() -> None:
    def drawn(x: Tensor) -> Tensor:
        y = torch.rand_like(torch.linalg.det(x.exp()).sin())  # as late as can be
        return y + torch.rand_like(x) * 2

    x = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        found = dsc.optimize(fallback="eager")(drawn)(x)
    torch.manual_seed(3)
    assert torch.equal(found, drawn(x))


def test_a_backend_refusal_costs_its_own_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsc.backends.base import No, Yes
    from dsc.backends.reference import ReferenceBackend

    monkeypatch.undo()
    monkeypatch.setattr(
        ReferenceBackend,
        "supports",
        lambda self, node: No("no sines today") if node.op == "sin" else Yes(),
    )
    x = torch.randn(4)

    def waves(x: Tensor) -> Tensor:
        y = x.exp()
        z = y.sin()
        return z.cos()

    function = dsc.optimize(backend="reference", fallback="eager", fusion_level=0)(waves)
    with pytest.warns(UserWarning, match="no sines today"):
        torch.testing.assert_close(function(x), waves(x))
    assert [r.operators for r in dsc.explain(function).regions] == [("exp",), ("cos",)]
    with pytest.raises(UnsupportedOperator, match=r"no sines today .*test_fallback.py:\d+"):
        dsc.optimize(backend="reference", fusion_level=0)(waves)(x)


def test_mistakes_of_the_function_raise_what_they_raise_eagerly() -> None:
    @dsc.optimize
    def raising(x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("no threes")
        return x + torch.ones(4)

    with pytest.raises(ValueError, match="no threes"):
        raising(torch.ones(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        raising(torch.ones(2))


def test_mixed_types_and_wrong_shapes_are_told_by_pytorch_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = torch.ones(4, 4)
    for wrong in (torch.ones(2, 4).double(), torch.ones(2, 5)):

        def function(x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight)

        with pytest.raises(RuntimeError) as eager:
            function(wrong)
        with warnings.catch_warnings(), caplog.at_level("ERROR"):
            warnings.simplefilter("error")
            with pytest.raises(RuntimeError) as told:
                dsc.optimize(function)(wrong)
        assert (str(told.value), caplog.records) == (str(eager.value), [])


def test_a_builtin_and_an_unknown_option_are_named() -> None:
    def printing(x: Tensor) -> Tensor:
        print("here")
        return x + 1

    with pytest.raises(UsageError, match="printing calls print, "):
        dsc.optimize(printing)(torch.ones(2))
    with pytest.raises(UsageError, match=r"unknown option fusion .*\n.*fusion_level"):
        dsc.optimize(fusion=2)  # type: ignore[call-overload]


def test_explain_takes_the_options_of_torch_compile_and_tells_no_recompile() -> None:
    options: Any = {"backend": "reference", "fusion_level": 0}
    function = torch.compile(lambda x: x.exp() + 1, backend="dsc", options=options)
    function(torch.ones(2))
    explained = dsc.explain(function, torch.ones(2))
    (region,) = explained.regions
    assert (region.model.backend, explained.recompiles) == ("reference", ())
    assert ": 1 graph, 0 breaks, 0 fallbacks, 0 recompiles" in str(explained)


def test_an_extreme_of_no_numbers_is_an_error(compiled: list[Program]) -> None:
    for largest in (lambda x: x.max(0)[0], lambda x: x.min(0)[1], lambda x: x.amax(0)):
        with pytest.raises((UnsupportedOperator, IndexError), match=r"dim 0|no numbers"):
            dsc.optimize(largest)(torch.zeros(0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(IndexError, match="dim 0"):
            dsc.optimize(fallback="eager")(lambda x: x.max(0)[0])(torch.zeros(0, 3))
    assert not compiled


def test_an_assertion_on_a_size_fails_as_it_does_eagerly() -> None:
    asserting = dsc.optimize(four_rows)
    assert torch.equal(asserting(torch.ones(4)), torch.full((4,), 2.0))
    with pytest.raises(AssertionError, match="four rows"):
        asserting(torch.ones(3))


def test_what_only_its_shape_depends_on_the_data_is_not_told_as_a_branch() -> None:
    with pytest.raises(UsageError, match="one_hot") as refused:
        dsc.optimize(lambda x: torch.nn.functional.one_hot(x))(torch.arange(3))
    assert "torch.where" not in str(refused.value)
    with pytest.raises(UsageError, match="branches on the values"):
        dsc.optimize(lambda x: x + 1 if x.sum().item() > 1 else x)(torch.ones(3))


def test_the_refusals_told_apart_are_those_of_the_installed_torch() -> None:
    """An upgrade that words one otherwise fails here, not in the messages of users."""
    folder = Path(torch._dynamo.__file__).parent
    text = "".join(p.read_text() for p in folder.rglob("*.py"))
    kinds = capture._FAILS_EAGERLY_TOO | capture._BRANCHES_ON_DATA | {capture._BUILTIN}
    assert [k for k in kinds if f'"{k}"' not in text] == []


def test_warnings_point_at_the_users_line() -> None:
    x = torch.rand(3, 3)
    grad = torch.rand(3, requires_grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dsc.optimize(fallback="eager")(torch.linalg.det)(x)
        torch.compile(lambda x: torch.linalg.det(x) + 1, backend="dsc")(x)
        dsc.optimize(lambda x: x * 2)(grad)
    ours = [w for w in told if str(w.message).startswith("dsc")]
    assert {w.filename for w in ours} == {__file__}
    assert len({w.lineno for w in ours}) == 3


def test_explain_tells_graphs_guards_breaks_fallbacks_and_recompiles() -> None:
    def broken(x: Tensor) -> Tensor:
        y = (x * FACTOR).cumsum(0).sin()
        torch._dynamo.graph_break()
        found: Tensor = torch.linalg.det(y) + 1
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dsc.explain(broken, torch.randn(3, 3))
    assert len(found.graphs) == 2
    assert len(found.breaks) == 1
    assert any("det" in t for t in found.fallbacks)
    assert "FACTOR" in str(found.guards)
    assert "x float32[3, 3]" in found.graphs[0].inputs
    text = str(found)
    assert text.startswith("broken: 2 graphs, 1 break, ")
    assert "compiled" in text
    assert "guard" in text
    assert "eager" in text
    decorated = dsc.optimize(lambda x: x + 1)
    assert dsc.explain(decorated).graphs == ()
    assert len(dsc.explain(decorated, torch.ones(2)).graphs) == 1
    with pytest.raises(UsageError, match="takes a function"):
        dsc.explain(3)  # type: ignore[arg-type]


def test_explain_says_it_in_the_words_of_the_function() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, q: Tensor, k: Tensor, n: int, many: dict[str, Tensor]) -> Tensor:
            found: Tensor = self.layer(q) * FACTOR + many["x"] + torch.arange(n).sum() + k.sum()
            return found

    function: Any = dsc.optimize(Scaled().eval())
    with torch.no_grad():
        for rows, n in ((2, 3), (4, 5), (5, 6)):
            x = torch.randn(rows, 3)
            function(x, x, n, {"x": torch.randn(rows, 3)})
    found = dsc.explain(function)
    assert "q = k float32[2, 3]" in found.graphs[0].inputs
    assert {"q = k float32[any, 3]", "n any"} <= {*found.graphs[1].inputs}
    assert "many.x float32[q.shape[0], 3]" in found.graphs[1].inputs
    assert found.regions[-1].symbols.keys() == {"q.shape[0]", "n"}
    assert {"FACTOR == 3", "gradients are off", "self.layer is unchanged"} <= {*found.guards}
    strange = re.compile(r"\bL\[|\bG\[|\bs\d+|\bD\d|size\(\)|_modules|_DICT|GRAD_MODE|\d/\d")
    assert not strange.search(str(found)), str(found)


def test_what_stands_in_for_compiled_code_is_told_once_and_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = SimpleNamespace(stand_in="this is slow", computes=True)
    monkeypatch.setattr(Interpreted, "executable", slow, raising=False)
    function = dsc.optimize(lambda x: x + 1)
    with pytest.warns(UserWarning, match="<lambda>: this is slow"):
        function(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(function(torch.ones(3)), torch.full((3,), 2.0))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the null backend plans and counts, and computes nothing"):
        dsc.optimize(backend="null")(lambda x: x + 1)(torch.ones(2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.var(-1), x.std(0, correction=0), x.sum(-1), x.argmax(0), x.softmax(-1)),
        lambda x: x.sort(-1),
        lambda x: x.topk(1),
        lambda x: x.flip(0),
        lambda x: torch.index_select(x, 0, torch.tensor([0])),
    ],
)
def test_a_single_number_has_axes_as_in_torch_or_is_refused(
    function: Callable[[Tensor], Any],
) -> None:
    x = torch.tensor(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = function(x)
        try:
            found = dsc.optimize(function)(x)
        except UnsupportedOperator:
            found = dsc.optimize(fallback="eager")(function)(x)
    for a, b in zip(torch.utils._pytree.tree_leaves(found),
                    torch.utils._pytree.tree_leaves(wanted), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, equal_nan=True)
