"""Sizes of PyTorch's tracer as dims: the same number for every value of their symbols."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import FloorDiv, PythonMod

from dsc.frontends.symbolic import NotADim, SizeReader
from dsc.ir.dims import evaluate

A, B = (sympy.Symbol(name, integer=True, positive=True) for name in ("s1", "s2"))
EXPRESSIONS = [
    A + 2 * B + 3, A * B - 1, A**3, FloorDiv(A, 3), FloorDiv(A + B, 2), PythonMod(A, 5),
    PythonMod(A + B, 4) + 1, sympy.Integer(7), A,
]  # fmt: skip


def size(expr: Any) -> Any:
    return SimpleNamespace(node=SimpleNamespace(expr=expr))


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_a_size_keeps_its_value(expr: Any) -> None:
    dim = SizeReader({"s1": "P", "s2": "Q"}).read(size(expr))
    for p in (1, 4, 7):
        for q in (1, 6):
            assert evaluate(dim, {"P": p, "Q": q}) == int(expr.subs({A: p, B: q}))


@pytest.mark.parametrize(
    ("expr", "told"),
    [
        (sympy.Max(A, B), "has no symbolic form"),
        (1 / A, "has no symbolic form"),
        (sympy.Symbol("u0"), "the size u0 depends on the data"),
        (sympy.Symbol("zuf3"), "the size zuf3 depends on the data"),
    ],
)
def test_a_size_without_a_form_is_refused(expr: Any, told: str) -> None:
    with pytest.raises(NotADim, match=told):
        SizeReader().read(size(expr))


def test_new_symbols_get_the_first_names_that_are_free() -> None:
    reader = SizeReader({"s9": "D1"})
    assert [str(d) for d in reader.shape([size(A), 3, size(B), size(A)])] == ["D0", "3", "D2", "D0"]
