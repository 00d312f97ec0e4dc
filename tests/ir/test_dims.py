"""Symbolic dims: a commutative ring with floor division, one form for equal values."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.dims import (
    MAX_DIM,
    Dim,
    Range,
    bounds,
    evaluate,
    free_symbols,
    from_json,
    from_terms,
    parse_dim,
    product,
    substitute,
    symbol,
    terms,
    to_json,
)
from dsc.runtime.standalone import number
from tests.ir.strategies import dims

B, S, P = (symbol(n) for n in "BSP")
ENVIRONMENTS = [
    dict(zip("BSP", values, strict=True)) for values in itertools.product((1, 2, 5), (1, 4), (0, 3))
]


def agree(a: Dim, b: Dim) -> bool:
    return all(evaluate(a, env) == evaluate(b, env) for env in ENVIRONMENTS)


@given(dims(), dims(), dims())
def test_ring_laws_hold_as_equality_of_objects(a: Dim, b: Dim, c: Dim) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) + c == a + (b + c)
    assert (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a - a == 0
    assert a + 0 == a * 1 == a
    assert hash(a + b) == hash(b + a)


@given(dims(), dims())
def test_arithmetic_agrees_with_integers(a: Dim, b: Dim) -> None:
    for env in ENVIRONMENTS:
        x, y = evaluate(a, env), evaluate(b, env)
        assert evaluate(a + b, env) == x + y
        assert evaluate(a - b, env) == x - y
        assert evaluate(a * b, env) == x * y
        if y and not (isinstance(b, int) and b == 0):
            assert evaluate(a // b, env) == x // y


@given(dims())
def test_text_round_trips(d: Dim) -> None:
    assert parse_dim(str(d)) == d


@given(dims())
def test_data_round_trips_and_a_script_reads_the_same_numbers(d: Dim) -> None:
    data = json.loads(json.dumps(to_json(d)))
    assert from_json(data) == d
    for env in ENVIRONMENTS:
        assert number(data, env) == evaluate(d, env)


@given(dims(), dims())
def test_substitute_agrees_with_evaluate(d: Dim, replacement: Dim) -> None:
    for env in ENVIRONMENTS:
        inner = {**env, "S": evaluate(replacement, env)}
        assert evaluate(substitute(d, {"S": replacement}), env) == evaluate(d, inner)
    assert substitute(d, ENVIRONMENTS[0]) == evaluate(d, ENVIRONMENTS[0])
    assert substitute(d, {}) == d


@given(dims())
def test_bounds_hold_every_value(d: Dim) -> None:
    ranges = {"B": Range(1, 3), "S": Range(1, 4), "P": Range(0, 3)}
    interval = bounds(d, ranges)
    for b, s, p in itertools.product(range(1, 4), range(1, 5), range(4)):
        assert interval.lo <= evaluate(d, {"B": b, "S": s, "P": p}) <= interval.hi


def test_bounds_are_tight_for_monotone_dims() -> None:
    ranges = {"B": Range(1, 4), "S": Range(2, 10), "P": Range(0, 100)}
    assert bounds(B * (P + S), ranges) == Range(2, 440)
    assert bounds((S + 63) // 64, ranges) == Range(1, 1)
    assert bounds(P - S, ranges) == Range(-10, 98)
    assert bounds(7, ranges) == Range(7, 7)
    assert bounds((P + 7) // S, ranges) == Range(0, 53)
    assert bounds((P - 50) // S, ranges) == Range(-25, 25)


def test_equal_sums_and_products_are_one_object_value() -> None:
    assert B * (P + S) == B * P + S * B
    assert str(B * (P + S)) == "B*P+B*S"
    assert (P + S) - S == P
    assert len({B * S, S * B, B * S + 0}) == 1


def test_division_takes_out_what_divides() -> None:
    assert (B * S * 192) // 64 == B * S * 3
    assert (64 * S + 63) // 64 == S
    assert (S + 128) // 64 == S // 64 + 2
    assert (P * S + S) // S == P + 1
    assert (B * S) // (B * S) == 1
    assert 0 // S == 0
    assert free_symbols((S + 1) // P) == {"S", "P"}


def test_a_sign_binds_as_in_python() -> None:
    assert evaluate(parse_dim("-S//2"), {"S": 3}) == -3 // 2
    assert evaluate(parse_dim("4-S*-2"), {"S": 3}) == 10


def test_terms_round_trip() -> None:
    d = 3 * B * S - 7 + (S + 1) // 2
    assert from_terms(terms(d)) == d
    assert from_terms(terms(5)) == 5
    assert product((B, 3, S)) == 3 * B * S


@pytest.mark.parametrize(
    "text",
    ["", " ", "B+", "(B", "B)", "B**2", "2 3", "B S", "1.5", "B//0", "S//(P-P)", "--B", "B/2", "é",
     "(" * 40 + "B" + ")" * 40, str(MAX_DIM + 1), "9" * 5000, f"{MAX_DIM}*2", "+".join("B" * 400),
     "*".join(["(A+B+C+D+E+F+G+H)"] * 20), "²", "B;S"],
)  # fmt: skip
def test_text_that_is_no_dim_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_dim(text)


def test_the_largest_dim_is_read() -> None:
    assert parse_dim(str(MAX_DIM)) == MAX_DIM


def test_an_unbound_symbol_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="P"):
        evaluate(P + S, {"S": 1})


def test_division_by_zero_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        S // 0
    with pytest.raises(ZeroDivisionError):
        substitute(S // P, {"P": 0})
    with pytest.raises(ValueError, match="empty range"):
        Range(3, 2)
    with pytest.raises(ValueError, match="zero"):
        bounds(S // P, {"S": Range(1, 2), "P": Range(0, 3)})


@given(st.text(alphabet="BSP019+-*/() ", max_size=30))
def test_any_text_gives_a_dim_or_a_value_error(text: str) -> None:
    try:
        d = parse_dim(text)
    except ValueError:
        return
    assert parse_dim(str(d)) == d
