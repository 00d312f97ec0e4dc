"""What cannot be compiled is refused in words or runs eagerly, and what became of a function."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import dsc
from dsc.errors import UnsupportedOperator, UsageError
from dsc.ir.program import Program
from tests.frontends.tracing import ops_of

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
    assert text.startswith("broken: 2 graphs, 1 breaks")
    assert "compiled" in text
    assert "guard" in text
    assert "eager" in text
    decorated = dsc.optimize(lambda x: x + 1)
    assert dsc.explain(decorated).graphs == ()
    assert len(dsc.explain(decorated, torch.ones(2)).graphs) == 1
    with pytest.raises(UsageError, match="takes a function"):
        dsc.explain(3)  # type: ignore[arg-type]
