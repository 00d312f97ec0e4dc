"""Symbolic dimensions: integers, or polynomials over named symbols in one canonical form.

A dim is a plain `int` or a `Sym`. A `Sym` is a polynomial with integer coefficients whose atoms are
symbol names and floor divisions, kept sorted, so that two equal dims are equal Python objects by
value (`B*(P+S) == B*P + B*S`) and no simplifier is ever asked. Bounds come from interval
arithmetic over the symbols' ranges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import mul
from typing import Any, TypeAlias, Union

MAX_DIM = 2**63 - 1
MAX_TOKENS = 512
MAX_TERMS = 256
_NESTING = 16


@dataclass(frozen=True, slots=True)
class FloorDiv:
    """The atom `numerator // denominator`, for what a polynomial cannot hold."""

    numerator: Sym
    denominator: Dim

    def __str__(self) -> str:
        return f"({self.numerator})//({self.denominator})"


Atom: TypeAlias = str | FloorDiv
Monomial: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class Sym:
    """A polynomial: sorted `(monomial, coefficient)` pairs, never a bare integer."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        return _poly(_merge(_terms(self), _terms(other)))

    def __radd__(self, other: int) -> Dim:
        return self + other

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: int) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        if isinstance(other, int):
            return Sym(tuple((m, c * other) for m, c in self.terms)) if other else 0
        out: dict[Monomial, int] = {}
        for a, x in _terms(self).items():
            for b, y in _terms(other).items():
                key = tuple(sorted(a + b, key=_atom_key)) if a and b else a or b
                out[key] = out.get(key, 0) + x * y
        return _poly(out)

    def __rmul__(self, other: int) -> Dim:
        return self * other

    def __floordiv__(self, other: Dim) -> Dim:
        return _divide(self, other)

    def __rfloordiv__(self, other: int) -> Dim:
        if other == 0:
            return 0
        return Sym((((FloorDiv(Sym((((), other),)), self),), 1),))

    def __str__(self) -> str:
        out = "+".join(_term_text(m, c) for m, c in self.terms)
        return out.replace("+-", "-")

    __repr__ = __str__


Dim: TypeAlias = Union[int, Sym]  # noqa: UP007 - a name before it is defined


@dataclass(frozen=True, slots=True)
class Range:
    """The inclusive range of a symbol."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if self.lo > self.hi:
            raise ValueError(f"empty range [{self.lo},{self.hi}]")

    def __str__(self) -> str:
        return f"[{self.lo},{self.hi}]"

    def nearest(self, size: int) -> int:
        """The size in the range that is nearest to another."""
        return min(max(size, self.lo), self.hi)


def symbol(name: str) -> Sym:
    """The dim that is one symbol."""
    return Sym((((name,), 1),))


def product(dims: tuple[Dim, ...]) -> Dim:
    """The product of dims: the number of elements of a shape."""
    return reduce(mul, dims, 1)


def terms(dim: Dim) -> dict[Monomial, int]:
    """The coefficients of a dim by monomial; the monomial of a plain number is `()`."""
    return _terms(dim)


def from_terms(coefficients: Mapping[Monomial, int]) -> Dim:
    """The dim with these coefficients: the inverse of `terms`."""
    return _poly(dict(coefficients))


def symbol_name(dim: Dim) -> str | None:
    """The name of a dim that is a symbol and nothing else.

    >>> symbol_name(symbol("B")), symbol_name(symbol("B") + 1), symbol_name(4)
    ('B', None, None)
    """
    if isinstance(dim, int) or len(dim.terms) != 1:
        return None
    (atoms, coefficient) = dim.terms[0]
    alone = coefficient == 1 and len(atoms) == 1 and isinstance(atoms[0], str)
    return str(atoms[0]) if alone else None


def free_symbols(dim: Dim) -> frozenset[str]:
    """The names of all symbols in `dim`."""
    return frozenset() if isinstance(dim, int) else _symbols_of(dim)


@lru_cache(maxsize=4096)
def _symbols_of(dim: Sym) -> frozenset[str]:
    found: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            if isinstance(atom, str):
                found.add(atom)
            else:
                found |= free_symbols(atom.numerator) | free_symbols(atom.denominator)
    return frozenset(found)


def substitute(dim: Dim, env: Mapping[str, Dim]) -> Dim:
    """`dim` with symbols replaced by `env`; symbols not named stay."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        term: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, str):
                term = term * env.get(atom, symbol(atom))
            else:
                term = term * (substitute(atom.numerator, env) // substitute(atom.denominator, env))
        total = total + term
    return total


def evaluate(dim: Dim, env: Mapping[str, int]) -> int:
    """The integer value of `dim`; a symbol that `env` lacks is a `KeyError`."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        for atom in monomial:
            if isinstance(atom, str):
                coefficient *= env[atom]
            else:
                coefficient *= evaluate(atom.numerator, env) // evaluate(atom.denominator, env)
        total += coefficient
    return total


def to_json(dim: Dim) -> Any:
    """A dim as data: an int, or a list of `[coefficient, factor, ...]`, which are multiplied.

    A factor is a symbol's name, or `[numerator, denominator]` for their floor division.

    >>> to_json(symbol("B") * 4 + 1)
    [[4, 'B'], [1]]
    """
    if isinstance(dim, int):
        return dim
    return [[coefficient, *map(_atom_json, monomial)] for monomial, coefficient in dim.terms]


def from_json(data: Any) -> Dim:
    """The dim that `to_json` gave. Raises `ValueError` or `TypeError` for other data."""
    if isinstance(data, int):
        return data
    total: Dim = 0
    for coefficient, *factors in data:
        term: Dim = coefficient + 0
        for factor in factors:
            if isinstance(factor, str):
                term = term * symbol(factor)
            else:
                numerator, denominator = map(from_json, factor)
                term = term * (numerator // denominator)
        total = total + term
    return total


def bounds(dim: Dim, ranges: Mapping[str, Range]) -> Range:
    """The interval that `dim` lies in when each symbol lies in its range."""
    if isinstance(dim, int):
        return Range(dim, dim)
    lo = hi = 0
    for monomial, coefficient in dim.terms:
        interval = Range(coefficient, coefficient)
        for atom in monomial:
            interval = _interval_mul(interval, _atom_bounds(atom, ranges))
        lo, hi = lo + interval.lo, hi + interval.hi
    return Range(lo, hi)


def parse_dim(text: str) -> Dim:
    """Read a dim as `str` writes it: `B*(P+S)`, `P+S`, `(S+63)//(64)`. Raises `ValueError`.

    A sign binds tighter than `*` and `//`, as in Python: `-S//2` is `(-S)//2`.
    """
    tokens = re.findall(r"[0-9]+|[A-Za-z_][A-Za-z_0-9]*|//|[-+*()]|\S", text)
    if not tokens:
        raise ValueError("a dimension is missing")
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"a dimension of {len(tokens)} tokens, {MAX_TOKENS} at most")
    value, rest = _parse_sum(tokens, 0)
    if rest != len(tokens):
        raise ValueError(f"not a dimension: {text!r}")
    if any(abs(c) > MAX_DIM for c in _terms(value).values()):
        raise ValueError("a dimension does not fit 64 bits")
    return value


def _parse_sum(tokens: list[str], at: int, depth: int = 0) -> tuple[Dim, int]:
    value, at = _parse_product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        operator = tokens[at]
        term, at = _parse_product(tokens, at + 1, depth)
        value = value + term if operator == "+" else value - term
    return value, at


def _parse_product(tokens: list[str], at: int, depth: int) -> tuple[Dim, int]:
    value, at = _parse_atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] in ("*", "//"):
        operator = tokens[at]
        factor, at = _parse_atom(tokens, at + 1, depth)
        if operator == "//" and factor == 0:
            raise ValueError("division by zero in a dimension")
        value = value * factor if operator == "*" else value // factor
        if len(_terms(value)) > MAX_TERMS:
            raise ValueError(f"a dimension of more than {MAX_TERMS} terms")
    return value, at


def _parse_atom(tokens: list[str], at: int, depth: int) -> tuple[Dim, int]:
    if at >= len(tokens):
        raise ValueError("a dimension ends too early")
    if depth > _NESTING:
        raise ValueError(f"a dimension nests deeper than {_NESTING}")
    token = tokens[at]
    if token == "-" and tokens[at - 1 : at] != ["-"]:
        value, at = _parse_atom(tokens, at + 1, depth)
        return value * -1, at
    if token == "(":
        value, at = _parse_sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("an unclosed parenthesis in a dimension")
        return value, at + 1
    if token[0] in "0123456789":
        if len(token) > 19:
            raise ValueError("a dimension does not fit 64 bits")
        return int(token), at + 1
    if token.isascii() and token.isidentifier():
        return symbol(token), at + 1
    raise ValueError(f"unexpected {token!r} in a dimension")


def _terms(dim: Dim) -> dict[Monomial, int]:
    return {(): dim} if isinstance(dim, int) else dict(dim.terms)


def _merge(a: dict[Monomial, int], b: dict[Monomial, int]) -> dict[Monomial, int]:
    for key, coefficient in b.items():
        a[key] = a.get(key, 0) + coefficient
    return a


def _poly(terms: dict[Monomial, int]) -> Dim:
    kept = [(m, c) for m, c in terms.items() if c]
    if not kept:
        return 0
    if len(kept) == 1 and kept[0][0] == ():
        return kept[0][1]
    if len(kept) > 1:
        kept.sort(key=lambda t: (not t[0], [_atom_key(a) for a in t[0]]))
    return Sym(tuple(kept))


def _divide(a: Sym, b: Dim) -> Dim:
    """Divide what divides exactly, term by term; the rest is an opaque floor division.

    floor((q*b + rest) / b) = q + floor(rest / b) for whole q, so both ways agree for all integers.
    """
    if b == 0:
        raise ZeroDivisionError(f"{a} // 0")
    if a == b:
        return 1
    divisor = _terms(b)
    if len(divisor) > 1:
        return Sym((((FloorDiv(a, b),), 1),))
    ((monomial, coefficient),) = divisor.items()
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for m, c in a.terms:
        atoms = list(m)
        if c % coefficient or any(not _remove(atoms, atom) for atom in monomial):
            rest[m] = c
        else:
            quotient[tuple(atoms)] = c // coefficient
    left = _poly(rest)
    if isinstance(left, Sym):
        return _poly(quotient) + Sym((((FloorDiv(left, b),), 1),))
    return _poly(quotient) + left // b


def _remove(atoms: list[Atom], atom: Atom) -> bool:
    if atom not in atoms:
        return False
    atoms.remove(atom)
    return True


def _atom_key(atom: Atom) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (1, str(atom))


def _term_text(monomial: Monomial, coefficient: int) -> str:
    if not monomial:
        return str(coefficient)
    factors = "*".join(f"({a})" if isinstance(a, FloorDiv) else a for a in monomial)
    prefix = {1: "", -1: "-"}.get(coefficient, f"{coefficient}*")
    return prefix + factors


def _atom_json(atom: Atom) -> Any:
    return atom if isinstance(atom, str) else [to_json(atom.numerator), to_json(atom.denominator)]


def _interval_mul(a: Range, b: Range) -> Range:
    corners = (a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi)
    return Range(min(corners), max(corners))


def _atom_bounds(atom: Atom, ranges: Mapping[str, Range]) -> Range:
    if isinstance(atom, str):
        return ranges[atom]
    top, bottom = bounds(atom.numerator, ranges), bounds(atom.denominator, ranges)
    if bottom.lo <= 0:
        raise ValueError(f"the divisor of {atom} may be zero or negative")
    corners = [n // d for n in (top.lo, top.hi) for d in (bottom.lo, bottom.hi)]
    return Range(min(corners), max(corners))
