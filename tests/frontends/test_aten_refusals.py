"""What rows of the ATen table refuse, and in which words: nothing is translated by guessing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dsc.frontends import aten_math as math_rows
from dsc.frontends import aten_shape as shape_rows
from dsc.frontends.lowering import Unsupported
from dsc.ir.dims import Dim, symbol
from dsc.ir.graph import Value
from dsc.ir.types import DType, TensorType


def operand(*shape: Dim, dtype: DType = DType.f32) -> Value:
    return Value("x", TensorType(dtype, shape))


X, I64 = operand(2, 3), operand(2, dtype=DType.i64)
WIDE = operand(2, symbol("B"))
REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an ellipsis": (lambda t: math_rows.einsum(t, "...i,ij->...j", (X, X)), "with an ellipsis"),
    "a diagonal": (lambda t: math_rows.einsum(t, "ij,jj->i", (X, X)), "takes a diagonal"),
    "dropout": (lambda t: math_rows.sdpa(t, X, X, X, None, 0.1), "attention with dropout"),
    "an open width": (lambda t: math_rows.sdpa(t, WIDE, WIDE, WIDE), "a symbolic head width"),
    "a norm of two axes": (lambda t: math_rows.rms_norm(t, X, (2, 3)), "over several axes"),
    "a weight of rank 1": (lambda t: math_rows.linear(t, X, operand(3)), "a weight of rank 1"),
    "groups without ends": (lambda t: math_rows.grouped_mm(t, X, operand(2, 3, 4)), "grouped"),
    "groups of a matrix": (lambda t: math_rows.grouped_mm(t, X, X, I64), "a grouped product of"),
    "groups of groups": (
        lambda t: math_rows.grouped_mm(t, operand(2, 3, 4), operand(2, 4, 3), I64), "a grouped"
    ),
    "groups with a bias": (
        lambda t: math_rows.grouped_mm(t, X, operand(2, 3, 4), I64, X), "product with a bias"
    ),
    "decimals": (lambda t: math_rows.round_half_to_even(t, X, decimals=1), "to decimals"),
    "bits of integers": (lambda t: math_rows.bitwise("logical_or")(t, I64, I64), "on integers"),
    "division by a tensor": (lambda t: math_rows.quotient(t, I64, I64, "floor"), "may be 0"),
    "division by 0": (lambda t: math_rows.quotient(t, I64, 0, "floor"), "may be 0"),
    "the rest of a tensor": (lambda t: math_rows.remainder(t, I64, I64), "may be 0"),
    "its sign kept": (lambda t: math_rows.fmod(t, I64, I64), "may be 0"),
    "no classes": (lambda t: shape_rows.one_hot(t, I64, -1), "without a number of classes"),
    "open classes": (lambda t: shape_rows.one_hot(t, I64, symbol("B")), "without a number"),
    "open padding": (lambda t: shape_rows.pad(t, X, (0, symbol("B"))), "by a symbolic width"),
    "open padding before": (lambda t: shape_rows.pad(t, X, (symbol("B"), 0)), "a symbolic width"),
    "a turn by two": (lambda t: shape_rows.roll(t, WIDE, [2], [1]), "may exceed the axis"),
    "an open turn": (lambda t: shape_rows.roll(t, X, [symbol("B")], [1]), "may exceed the axis"),
    "a mask": (
        lambda t: shape_rows.index(t, X, [operand(2, dtype=DType.boolean)]), "indexing by a mask"
    ),
    "a gap": (lambda t: shape_rows.index_put(t, X, [I64, None, I64], X), "that skips an axis"),
    "many under a mask": (
        lambda t: shape_rows.index_put(t, X, [operand(2, dtype=DType.boolean)], X), "several values"
    ),
    "added under a mask": (
        lambda t: shape_rows.index_put(t, X, [operand(2, dtype=DType.boolean)], operand(), True),
        "several values under a mask",
    ),
    "under two masks": (
        lambda t: shape_rows.index_put(t, X, [operand(2, dtype=DType.boolean)] * 2, operand()),
        "several values under a mask",
    ),
    "a place in the data": (
        lambda t: shape_rows.select(t, X, 0, I64), "a slice at a position that depends on data"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_meaning_here_is_refused(name: str) -> None:
    row, words = REFUSALS[name]
    lowering = SimpleNamespace(out=I64.type, known=lambda x: x)
    with pytest.raises(Unsupported, match=words):
        row(lowering)
