"""Rows of the ATen table called alone, where a trace seldom comes: single numbers, nothing, ends.

And what a `Lowering` remembers of ranges, numbers and constants.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from dsc.frontends import aten_math as m
from dsc.frontends import aten_reduce as r
from dsc.frontends import aten_shape as s
from dsc.frontends.lowering import Complex, Lowering, SymbolicNumber, Unsupported
from dsc.frontends.symbolic import SizeReader
from dsc.ir.dims import symbol
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.interpreter import run_graph
from dsc.ir.types import DType, TensorType

NUMBER, NAN = torch.tensor(3.0), math.nan
X = torch.tensor([[0.5, -2.0, 3.0], [NAN, 1.0, -1.0]])
BYTES = torch.tensor([3, 0, 255], dtype=torch.uint8)
LONGS = torch.tensor([5, -(2**63), 2**63 - 1, 0])
EMPTY = torch.zeros(0, 3)
B = symbol("B")


def lowered(wanted: list[Tensor], *tensors: Tensor) -> tuple[Lowering, list[Value]]:
    """What a row works with where the tracer recorded these results."""
    t = Lowering("g", SizeReader())
    given = [t.builder.input(f"x{i}", t.type_of(x)) for i, x in enumerate(tensors)]
    t.outs = tuple(t.type_of(x) for x in wanted)
    return t, given


def run(t: Lowering, results: Any, *tensors: Tensor) -> list[Tensor]:
    """What the operators that a row appended make of tensors."""
    many = results if isinstance(results, tuple) else (results,)
    names = tuple(f"out{i}" for i in range(len(many)))
    return run_graph(t.builder.finish(list(many), names), tensors, t.constants.__getitem__)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
    "any of a number": (r.any_of, torch.any, (NUMBER,)),
    "any of nothing": (lambda t, x: r.any_of(t, x, 0), lambda x: x.any(0), (EMPTY,)),
    "any, kept": (lambda t, x: r.any_of(t, x, -1, True), lambda x: x.any(-1, True), (X,)),
    "the sum of a number": (r.reduction("sum"), torch.sum, (NUMBER,)),
    "the least of a number": (r.reduction("amin"), torch.amin, (NUMBER,)),
    "no axes are all": (lambda t, x: r.reduction("sum")(t, x, []), lambda x: x.sum([]), (X,)),
    "the first of a number": (r.arg(-1), torch.argmin, (NUMBER,)),
    "the first of bytes": (r.arg(-1), torch.argmin, (BYTES,)),
    "the first of the least": (r.arg(-1), torch.argmin, (LONGS,)),
    "the first of the most": (r.arg(1), torch.argmax, (LONGS,)),
    "an axis kept": (lambda t, x: r.arg(1)(t, x, 0, True), lambda x: x.argmax(0, True), (X,)),
    "extremes of a number": (
        lambda t, x: r.extreme("amin", -1)(t, x, 0), lambda x: tuple(x.min(0)), (NUMBER,)),
    "extremes of bytes": (
        lambda t, x: r.extreme("amin", -1)(t, x, 0), lambda x: tuple(x.min(0)), (BYTES,)),
    "a spread of a number": (
        lambda t, x: r.variance(t, x, correction=0), lambda x: x.var(correction=0), (NUMBER,)),
    "a spread of one": (lambda t, x: r.variance(t, x, 0), lambda x: x.var(0), (X[:1],)),
    "a spread without freedom": (
        lambda t, x: r.variance(t, x, 0, 3), lambda x: x.var(0, correction=3), (X,)),
    "a spread of 16 bits": (
        lambda t, x: r.variance(t, x, [1], None), lambda x: x.var(1), (X.bfloat16(),)),
    "softmax of a number": (lambda t, x: r.softmax(t, x, 0), lambda x: x.softmax(0), (NUMBER,)),
    "its logarithm": (
        lambda t, x: r.log_softmax(t, x, 0), lambda x: x.log_softmax(0), (NUMBER.half(),)),
    "the least two": (
        lambda t, x: r.topk(t, x, 2, 1, False), lambda x: tuple(x.topk(2, 1, False)), (X,)),
    "the least two of bytes": (
        lambda t, x: r.topk(t, x, 2, 0, False), lambda x: tuple(x.topk(2, 0, False)), (BYTES,)),
    "counts": (
        lambda t, x: r.histogram(t, x, 4, 0, 3), lambda x: torch.histc(x, 4, 0, 3),
        (torch.tensor([0.0, 3.0, 3.0, 1.0]),)),
    "trunc of whole numbers": (
        m.trunc, torch.trunc, (torch.tensor([2.0**52, 2.0**60, -0.0, -2.5]).double(),)),
    "to the fourth": (lambda t, x: m.power(t, x, 4), lambda x: x**4, (torch.tensor([3, -2]),)),
    "the cube": (lambda t, x: m.power(t, x, 3), lambda x: x**3, (torch.tensor([1.1, -2.3]),)),
    "to the 16th": (lambda t, x: m.power(t, x, 16), lambda x: x**16, (torch.tensor([3, -2]),)),
    "to the 0th": (lambda t, x: m.power(t, x, 0), lambda x: x**0, (torch.tensor([3, 0]),)),
    "a root of halves": (
        lambda t, x: m.power(t, x, 0.5), lambda x: x**0.5,
        (torch.tensor([-math.inf, -0.0, 4.0]).half(),)),
    "fmod of the least": (
        lambda t, x: m.fmod(t, x, 3), lambda x: torch.fmod(x, 3), (LONGS,)),
    "limited from nowhere": (m.clamp, lambda x: x, (X[0],)),
    "times one": (lambda t, x: m.product_of_two(t, x, 1), lambda x: x * 1, (BYTES,)),
    "or": (lambda t, x: m.sum_of_two(t, x, True), lambda x: x + True, (X > 0,)),
    "a column": (
        lambda t, x: m.matmul(t, x, x), lambda x: x @ x, (torch.tensor([1.0, 2.0]),)),
    "a selected end": (lambda t, x: s.select(t, x, 1, -1), lambda x: x.select(1, -1), (X,)),
    "a transposed vector": (s.transpose, torch.t, (X[0],)),
    "padded and cut": (
        lambda t, x: s.pad(t, x, [-1, 2, 1, -1], 7.0),
        lambda x: torch.nn.functional.pad(x, (-1, 2, 1, -1), value=7.0), (X,)),
    "the whole replaced": (
        lambda t, x: s.slice_scatter(t, x, x), lambda x: torch.slice_scatter(x, x), (X,)),
    "a part replaced": (
        lambda t, x, y: s.slice_scatter(t, x, y, -1, -2, 9),
        lambda x, y: torch.slice_scatter(x, y, -1, -2, 9), (X, torch.zeros(2, 2).long())),
    "every second replaced": (
        lambda t, x, y: s.slice_scatter(t, x, y, 1, 1, 9, 2),
        lambda x, y: torch.slice_scatter(x, y, 1, 1, 9, 2), (X, torch.zeros(2, 1).long())),
    "a joined nothing": (
        lambda t, x: s.concat(t, [x, x], 0), lambda x: torch.cat([x, x]), (EMPTY,)),
    "spread axes": (
        lambda t, x: s.broadcast_in_dim(t, x, (2, 4, 3), [0, 2]),
        lambda x: x[:, None].expand(2, 4, 3), (X,)),
    "one index below": (
        lambda t, x, i: s.index(t, x, [None, i]), lambda x, i: x[:, i],
        (X, torch.tensor([[-1, 0]]))),
    "two indices apart": (
        lambda t, x, i: s.index(t, x, [i, None, i]), lambda x, i: x[i, :, i],
        (torch.arange(12.0).reshape(2, 3, 2), torch.tensor([1, -1]))),
    "two indices behind": (
        lambda t, x, i: s.index(t, x, [None, i, i]), lambda x, i: x[:, i, i],
        (torch.arange(12.0).reshape(2, 3, 2), torch.tensor([1, -1]))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_row_alone_means_what_pytorch_means(name: str) -> None:
    row, wanted, tensors = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of spreads without freedom
        expected = wanted(*tensors)
    many = list(expected) if isinstance(expected, tuple) else [expected]
    t, given = lowered(many, *tensors)
    for a, b in zip(run(t, row(t, *given), *tensors), many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


def test_nothing_has_no_extreme_and_other_histograms_no_meaning() -> None:
    t, (x,) = lowered([EMPTY], EMPTY)
    for row in (r.reduction("amax"), r.reduction("amin"), r.extreme("amax", 1)):
        with pytest.raises(Unsupported, match=r"^the extreme of no numbers, which is an error$"):
            row(t, x, 0)
        row(t, x, 1)
    for low, high in ((1, 3), (0, 4), (0, 0)):
        with pytest.raises(Unsupported, match=r"as a count of the integers 0 .. bins-1$"):
            r.histogram(t, x, 4, low, high)
    with pytest.raises(Unsupported, match="topk of a symbolic count"):
        r.topk(t, x, B)
    real = Complex(x, x)
    for pair in ((real, x), (x, real)):
        with pytest.raises(Unsupported, match="a sum of a complex and a real tensor"):
            m.COMPLEX["aten.add.Tensor"](t, *pair)


def test_a_spread_over_a_symbolic_count_is_divided_by_what_is_free_and_at_least_0() -> None:
    t = Lowering("g", SizeReader())
    x = t.builder.input("x", TensorType(DType.f32, (B, 2)))
    t.outs = (TensorType(DType.f32, (2,)),)
    results = tuple(r.variance(t, x, 0, correction) for correction in (0, 1, 3))
    given = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    found = run(t, results, given)
    assert [x.tolist() for x in found[:2]] == [[1, 0], [2, 0]]
    assert found[2][0] == math.inf
    assert found[2][1].isnan()


def test_a_range_that_is_shifted_stays_a_range() -> None:
    t = Lowering("g", SizeReader())
    x = t.builder.input("x", TensorType(DType.i64, (4,)))
    span = t.arange(1, B)
    assert t.shifted(span, 0) is span
    moved = t.shifted(span, B)
    again = t.shifted(moved, -1) if moved is not None else None
    nodes = {n.output.name: n for n in t.builder.nodes}
    told = [nodes[v.name].attrs for v in (moved, again) if isinstance(v, Value)]
    assert [(str(a["start"]), str(a["end"])) for a in told] == [("B+1", "2*B"), ("B", "2*B-1")]
    for other, by in ((x, 1), (span, 1.0), (span, True), (span, x), (3, 1)):
        assert t.shifted(other, by) is None


def test_positions_are_what_is_known_to_be_no_less_than_0() -> None:
    t = Lowering("g", SizeReader())
    x = t.builder.input("x", TensorType(DType.i64, (4,)))
    starts: list[Any] = [0, 1, -1, B, B - 1]
    found = [t.is_position(t.arange(n, n + 3)) for n in starts]
    assert [*found, t.is_position(x)] == [True, True, False, True, False, False]


def test_numbers_are_remembered_and_constants_get_names_of_their_own() -> None:
    t = Lowering("g", SizeReader())
    two = t.number(2, DType.i64)
    assert t.known(two) == 2
    assert t.known(7) == 7
    size = t.number(B, DType.f32)
    assert t.known(size) is size
    names = [t.constant("w", torch.full((2,), float(i))) for i in range(3)]
    assert [str(w) for w in names] == ["@w", "@w_", "@w__"]
    assert [float(t.constants[w.name][0]) for w in names] == [0, 1, 2]
    assert isinstance(names[0], Weight)
    same: list[Operand] = [t.cast(two, DType.i64), t.reshape(two, ()), t.expand(two, ())]
    assert all(x is two for x in same)


def test_a_number_is_what_torch_makes_of_it_in_its_element_type() -> None:
    t = Lowering("g", SizeReader())
    numbers: list[tuple[Any, DType]] = [
        (300, DType.u8), (-1, DType.u8), (2.5, DType.f32), (True, DType.f32), (2, DType.boolean),
        (2**53, DType.i64),
    ]  # fmt: skip
    found = run(t, tuple(t.number(n, d) for n, d in numbers))
    assert [x.item() for x in found] == [44, 255, 2.5, 1.0, True, 2**53]
    with pytest.raises(Unsupported, match="9007199254740993, which fp64 does not hold exactly"):
        t.number(2**53 + 1, DType.i64)


N = sympy.Symbol("s1", integer=True, positive=True)


@pytest.mark.parametrize(
    ("expr", "wanted"),
    [
        (N, 3.0), (N**2, 9.0), (N**0.5, 3**0.5), (N + 4, 7.0), (2 * N, 6.0), (N * N * N, 27.0),
        (sympy.Float(1.5), 1.5), (2 * N + N**0.5 + 1, 7 + 3**0.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_number_that_was_computed_from_sizes_is_computed_again(expr: Any, wanted: float) -> None:
    t = Lowering("g", SizeReader({"s1": "B"}))
    t.builder.input("x", TensorType(DType.f32, (B,)))
    (found,) = run(t, t.full((2,), SymbolicNumber(expr), DType.f64), torch.zeros(3))
    assert found.tolist() == pytest.approx([wanted, wanted], rel=1e-12)


def test_a_number_of_another_form_is_refused() -> None:
    t = Lowering("g", SizeReader({"s1": "B"}))
    with pytest.raises(Unsupported, match=r"the number cos\(s1\), computed from sizes"):
        t.number(SymbolicNumber(sympy.cos(N)), DType.f32)
