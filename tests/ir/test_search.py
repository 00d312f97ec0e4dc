"""Small sizes for large ones: what a system of statements about extents is solved by."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsc.ir.dims import symbol
from dsc.ir.extents import Check, Extent, System, Unsolvable, is_merge, normalised

P, S = symbol("P"), symbol("S")


def solved(originals: tuple[int, ...], state: Callable[..., object]) -> list[int]:
    """What each of some numbers becomes where `state(system, *extents)` makes the statements."""
    system = System()
    extents = [_unknown(system, n) for n in originals]
    state(system, *extents)
    values = system.solve()
    return [values[system.find(u)] for u in range(len(originals))]


def _unknown(system: System, value: int) -> Extent:
    return Extent({(): {(system.unknown(value),): 1}})


def nothing(system: System, *extents: Extent) -> None:
    """No statement."""


SOLVED: dict[str, tuple[tuple[int, ...], Callable[..., object], list[int]]] = {
    "each its own, of the same parity": ((7168, 512, 129, 11, 10), nothing, [4, 6, 3, 5, 8]),
    "up to 8 as they are": ((1, 2, 7, 8, 9), nothing, [1, 2, 7, 8, 3]),
    "what is used again where nothing else is below":
        ((9, 3, 5, 7), nothing, [3, 3, 5, 7]),
    "equal": ((600, 600, 40), lambda s, a, b, c: s.equate(a, b), [4, 4, 6]),
    "what was not equal is not made so":
        ((600, 40), lambda s, a, b: s.equate(a, b), [4, 6]),
    "a product": ((24000, 600, 40), lambda s, a, b, c: s.equate(a, b * c), [24, 4, 6]),
    "a product that was another":
        ((24001, 600, 40), lambda s, a, b, c: s.equate(a, b * c), [3, 4, 6]),
    "a sum": ((576, 512, 64), lambda s, a, b, c: s.equate(a, b + c), [10, 4, 6]),
    "two thirds": ((30, 90), lambda s, a, b: s.equate(b, Extent.number(3) * a), [4, 12]),
    "sums of one number":
        ((100, 60, 40, 70, 30),
         lambda s, a, b, c, d, e: (s.equate(a, b + c), s.equate(a, d + e)), [10, 4, 6, 2, 8]),
    "sums of sums":
        ((100, 60, 40, 25, 15),
         lambda s, a, b, c, d, e: (s.equate(a, b + c), s.equate(c, d + e)), [12, 4, 8, 3, 5]),
    "a product beyond all that is tried":
        ((1024 * 640, 1024, 640),
         lambda s, a, b, c: (s.equate(a, b * c), s.divisible(b, 128), s.divisible(c, 128, 256)),
         [128 * 256, 128, 256]),
    "a factor that occurs twice":
        ((1024 * 641, 640, 1024),
         lambda s, a, b, c: (s.equate(a, c + b * c), s.divisible(b, 128), s.divisible(c, 128, 256)),
         [256 + 256 * 128, 128, 256]),
    "a multiple": ((640,), lambda s, a: s.divisible(a, 10), [10]),
    "a multiple of at least so much": ((640,), lambda s, a: s.divisible(a, 10, 20), [20]),
    "what is no multiple need not be one": ((642,), lambda s, a: s.divisible(a, 10), [4]),
    "at least so much exactly": ((640,), lambda s, a: s.divisible(a, 1, 640), [640]),
    "at most": ((60, 600), lambda s, a, b: (s.divisible(a, 10), s.at_most(a, b)), [10, 12]),
    "at most, and equal": ((60, 60), lambda s, a, b: s.at_most(a, b), [4, 4]),
    "at most, but more":
        ((600, 60), lambda s, a, b: (s.divisible(a, 10), s.at_most(a, b)), [10, 4]),
    "cut blocks": ((5, 576), lambda s, n, a: s.counted(n, a, 128), [1, 4]),
    "whole blocks": ((4, 512), lambda s, n, a: s.counted(n, a, 128), [1, 128]),
    "cut blocks, two at least":
        ((5, 577), lambda s, n, a: (s.counted(n, a, 128), s.divisible(n, 1, 2)), [2, 129 + 64]),
    "one cut block": ((100,), lambda s, a: s.counted(Extent.number(1), a, 128), [4]),
    "one whole block": ((128,), lambda s, a: s.counted(Extent.number(1), a, 128), [128]),
    "a count that is a sum":
        ((9, 5, 4, 576, 512),
         lambda s, n, a, b, x, y: (s.counted(a, x, 128), s.counted(b, y, 128), s.equate(n, a + b)),
         [2, 1, 1, 4, 128]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVED)
def test_numbers_become_the_smallest_that_satisfy_all_statements(name: str) -> None:
    originals, state, wanted = SOLVED[name]
    assert solved(originals, state) == wanted


def test_symbols_keep_their_places_and_their_coefficients_shrink() -> None:
    system = System()
    whole, part = system.extent(40 * P * S + 12 * P - S, "w axis 0"), system.extent(12 * P)
    system.equate(whole, part + system.extent(40 * P * S) + system.extent(-1 * S))
    values = system.solve()
    assert str(whole.value(lambda u: values[system.find(u)])) == "4*P+6*P*S-S"
    assert str(part.value(lambda u: values[system.find(u)])) == "4*P"
    assert system.labels == {0: "w axis 0", 1: "w axis 0"}
    assert system.extent(P - 1).parts == {("P",): {(): 1}, (): {(): -1}}
    assert system.original == [12, 40, 12, 40]


def test_products_and_sums_of_extents_are_those_of_their_dims() -> None:
    originals = [2 * P * S + 3, 5 * P + 4 * S + 7, -1 * P, 6]
    system = System()
    extents = [system.extent(d) for d in originals]
    for a, x in zip(originals, extents, strict=True):
        for b, y in zip(originals, extents, strict=True):
            assert (x + y).value(system.original.__getitem__) == a + b
            assert (x * y).value(system.original.__getitem__) == a * b


@pytest.mark.parametrize(
    ("originals", "state", "words"),
    [
        ((30,), lambda s, a: s.checks.append(Check((0,), lambda v: False, "odd")), "odd (30)"),
        ((2, 30), lambda s, a, b: s.checks.append(Check((1, 0), lambda v: False, "no")),
         "no (30, 2)"),
        ((5,), lambda s, a: s.checks.append(Check((0,), lambda v: v[0] == 4, "four")), "four (5)"),
        ((6, 3, 2), lambda s, a, b, c: s.equations.update(
            {(((), 1), ((0,), -1), ((1, 2), 2)): None}), "1 + -1*6 + 2*3*2 = 0"),
        ((900, 30, 30), lambda s, a, b, c: (s.equate(a, b * c), s.checks.append(
            Check((0,), lambda v: v[0] < 4, "small"))), "small (900)"),
    ],
)  # fmt: skip
def test_what_has_no_solution_says_which_statement_fails(
    originals: tuple[int, ...], state: Callable[..., object], words: str
) -> None:
    with pytest.raises(Unsolvable) as caught:
        solved(originals, state)
    assert str(caught.value) == words


def test_numbers_of_one_role_stay_equal_and_counts_apart() -> None:
    system = System()
    extents = [_unknown(system, n) for n in (600, 600, 40, 600, 5, 5, 576)]
    system.counted(extents[4], extents[6], 128)
    other = system.copy()
    system.merge_by(lambda u: u == 3)
    assert [system.find(u) for u in range(7)] == [0, 0, 2, 3, 4, 5, 6]
    assert [other.find(u) for u in range(7)] == list(range(7))
    system.merge_by(lambda u: 0)
    assert [system.find(u) for u in range(7)] == [0, 0, 2, 0, 4, 5, 6]
    system.merge(1, 2)
    assert system.find(2) == 2, "numbers that differ do not become one"


def test_what_counts_are_sums_of_counts_too() -> None:
    system = System()
    n, a, b, x, c, d = (_unknown(system, v) for v in (9, 5, 4, 576, 40, 31))
    system.counted(a, x, 128)
    system.equate(n, a + b)
    system.equate(c, d + n)
    system.equations[(((3, 5), 1), ((4,), -1))] = None
    assert system.block_counts() == {0, 1, 2, 4, 5}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({(0,): 2, (1,): -4}, {(0,): -1, (1,): 2}),
        ({(0,): -6, (1,): 9}, {(0,): -2, (1,): 3}),
        ({(0, 1): 1, (0, 2): -1}, {(1,): -1, (2,): 1}),
        ({(1, 0): 3, (0, 1): -2}, {(): 1}),
        ({(0, 0, 1): 1, (0,): -2}, {(): -2, (0, 1): 1}),
        ({(3,): 1, (0,): -1, (2,): 4}, {(): 1}),
        ({(3,): 1, (0,): -1}, None),
    ],
)
def test_an_equation_has_one_form(
    given: dict[tuple[int, ...], int], wanted: dict[tuple[int, ...], int] | None
) -> None:
    """Unknown 3 is 0 by another name."""
    forms = normalised([tuple(given.items()), tuple(given.items())], lambda u: u % 3)
    assert forms == ([] if wanted is None else [tuple(sorted(wanted.items()))])


def test_an_equation_of_two_single_unknowns_alone_makes_them_one() -> None:
    assert is_merge((((0,), -1), ((1,), 1)))
    assert not is_merge((((0,), -2), ((1,), 1)))
    assert not is_merge((((0, 1), -1), ((1,), 1)))
    assert not is_merge((((0,), -1), ((1,), 2), ((2,), -1)))
    system = System()
    a, b, c, d = (_unknown(system, n) for n in (50, 50, 20, 30))
    system.equate(a + c, b + c)
    assert (system.find(1), system.equations) == (0, {})
    system.equate(a, c + d)
    assert len(system.equations) == 1
