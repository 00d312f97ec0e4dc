"""Unknown extents: polynomials over them, and a search for small values that satisfy equations.

`shrink` gives every dim of a program an unknown, states what the operators demand of them, and asks
`System.solve` for small numbers. A statement that does not hold for the original numbers is no
demand of the program and is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

from dsc.ir.dims import Dim, Monomial, from_terms, terms

SMALL = 8
MAX_STEPS = 40_000
Product = tuple[int, ...]
Equation = tuple[tuple[Product, int], ...]
"""A sum of `coefficient * product of unknowns` that is zero; the product `()` is a number."""


class Unsolvable(Exception):
    """No small numbers satisfy all statements."""


@dataclass(frozen=True)
class Extent:
    """A dim whose coefficients are unknowns: monomial of symbols -> sum of products of unknowns."""

    parts: Mapping[Monomial, Mapping[Product, int]]

    @staticmethod
    def number(value: int) -> Extent:
        """A known number."""
        return Extent({(): {(): value}})

    def __add__(self, other: Extent) -> Extent:
        parts = {m: dict(p) for m, p in self.parts.items()}
        for monomial, products in other.parts.items():
            mine = parts.setdefault(monomial, {})
            for key, coefficient in products.items():
                mine[key] = mine.get(key, 0) + coefficient
        return Extent(parts)

    def __mul__(self, other: Extent) -> Extent:
        parts: dict[Monomial, dict[Product, int]] = {}
        for m, mine in self.parts.items():
            for n, theirs in other.parts.items():
                key = tuple(sorted((*m, *n), key=str))
                into = parts.setdefault(key, {})
                for p, x in mine.items():
                    for q, y in theirs.items():
                        both = tuple(sorted((*p, *q)))
                        into[both] = into.get(both, 0) + x * y
        return Extent(parts)

    def value(self, values: Callable[[int], int]) -> Dim:
        """The dim for given values of the unknowns."""
        found = {
            m: sum(c * prod(map(values, key)) for key, c in products.items())
            for m, products in self.parts.items()
        }
        return from_terms(found)


@dataclass(frozen=True)
class Check:
    """A statement other than an equation: `holds(values of unknowns)`."""

    unknowns: tuple[int, ...]
    holds: Callable[[Sequence[int]], bool]
    what: str


@dataclass(frozen=True)
class Count:
    """`count = ceil(extent / block)`, whole blocks staying whole and cut ones cut."""

    count: int
    extent: int
    block: int


@dataclass
class System:
    """Unknowns with their original values, merged where they must be equal, and statements."""

    original: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    equations: dict[Equation, None] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    counts: dict[Count, None] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)

    def unknown(self, value: int, label: str = "") -> int:
        """A new unknown whose original value is `value`."""
        self.original.append(value)
        self.parent.append(len(self.parent))
        if label:
            self.labels[len(self.parent) - 1] = label
        return len(self.parent) - 1

    def extent(self, dim: Dim, label: str = "") -> Extent:
        """A dim with an unknown for every coefficient but -1, 0 and 1."""
        parts: dict[Monomial, dict[Product, int]] = {}
        for monomial, coefficient in terms(dim).items():
            if coefficient <= 1:
                parts[monomial] = {(): coefficient}
            else:
                parts[monomial] = {(self.unknown(coefficient, label),): 1}
        return Extent(parts)

    def find(self, unknown: int) -> int:
        """The representative of the unknowns that equal `unknown`."""
        root = unknown
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[unknown] != root:
            self.parent[unknown], unknown = root, self.parent[unknown]
        return root

    def merge(self, a: int, b: int) -> None:
        """State that two unknowns are equal, if they were."""
        if self.original[a] == self.original[b]:
            low, high = sorted((self.find(a), self.find(b)))
            self.parent[high] = low

    def equate(self, a: Extent, b: Extent) -> None:
        """State that two extents are equal, if they were."""
        if a is b:
            return
        left, right = _single(a), _single(b)
        if left is not None and right is not None:
            self.merge(left, right)
            return
        for monomial in a.parts.keys() | b.parts.keys():
            total = dict(a.parts.get(monomial, {}))
            for key, coefficient in b.parts.get(monomial, {}).items():
                total[key] = total.get(key, 0) - coefficient
            self._state(total)

    def _state(self, total: Mapping[Product, int]) -> None:
        equation = _normal(total, self.find)
        if not equation or _value(dict(equation), self.original.__getitem__):
            return
        if is_merge(equation):
            self.merge(equation[0][0][0], equation[1][0][0])
        else:
            self.equations[equation] = None

    def at_most(self, a: Extent, b: Extent) -> None:
        """State `a <= b` for single unknowns, if it was so; what was equal stays equal."""
        left, right = _single(a), _single(b)
        if left is None or right is None:
            return
        small, large = self.original[left], self.original[right]
        if small == large:
            self.merge(left, right)
        else:
            self._check(Check((left, right), lambda v: v[0] <= v[1], f"{small} <= {large}"))

    def divisible(self, a: Extent, by: int, at_least: int = 1) -> None:
        """State that a single unknown is a multiple of `by`, and `at_least` that, if it was so."""
        unknown = _single(a)
        if unknown is not None:
            what = f"a multiple of {by}, at least {at_least}"
            self._check(Check((unknown,), lambda v: v[0] % by == 0 and v[0] >= at_least, what))

    def counted(self, count: Extent, extent: Extent, block: int) -> None:
        """State `count = ceil(extent / block)` where the extent is a single unknown."""
        length, number = _single(extent), _single(count)
        if length is not None and number is not None:
            self.counts[Count(number, length, block)] = None
        elif length is not None:
            whole = self.original[length] % block == 0
            what = f"one {'whole' if whole else 'cut'} block of {block}"
            self._check(Check((length,), lambda v: v[0] == block if whole else v[0] < block, what))

    def _check(self, check: Check) -> None:
        if check.unknowns and check.holds([self.original[u] for u in check.unknowns]):
            self.checks.append(check)

    def block_counts(self) -> set[int]:
        """Representatives of the unknowns that count blocks, and of what they are sums of."""
        found = {self.find(c.count) for c in self.counts}
        linear = [
            {self.find(key[0]) for key, _ in eq if key}
            for eq in self.equations
            if all(len(key) <= 1 for key, _ in eq)
        ]
        while grown := [s for s in linear if s & found and not s <= found]:
            for group in grown:
                found |= group
        return found

    def merge_by(self, role: Callable[[int], object]) -> None:
        """Merge the unknowns of equal original value and equal role, but block counts."""
        apart = self.block_counts()
        first: dict[object, int] = {}
        for unknown in range(len(self.parent)):
            if self.find(unknown) not in apart:
                key = (self.original[unknown], role(unknown))
                self.merge(first.setdefault(key, unknown), unknown)

    def copy(self) -> System:
        """An independent system with the same statements."""
        return System(
            list(self.original),
            list(self.parent),
            dict(self.equations),
            list(self.checks),
            dict(self.counts),
            self.labels,
        )

    def solve(self) -> dict[int, int]:
        """Small values for all unknowns, by representative. Raises `Unsolvable`."""
        from dsc.ir.search import Search

        return Search(self).run()


def _single(extent: Extent) -> int | None:
    products = extent.parts.get(()) if len(extent.parts) == 1 else None
    if products is None or len(products) != 1:
        return None
    ((key, coefficient),) = products.items()
    return key[0] if len(key) == 1 and coefficient == 1 else None


def _value(total: Mapping[Product, int], values: Callable[[int], int]) -> int:
    return sum(c * prod(map(values, key)) for key, c in total.items())


def _normal(total: Mapping[Product, int], find: Callable[[int], int]) -> Equation:
    """The equation over representatives, sorted, divided by its common factor, led by a plus."""
    merged: dict[Product, int] = {}
    for key, coefficient in total.items():
        named = tuple(sorted(map(find, key)))
        merged[named] = merged.get(named, 0) + coefficient
    kept = _cancelled({k: c for k, c in merged.items() if c})
    if not kept:
        return ()
    factor = gcd(*(c for _, c in kept))
    factor = factor if kept[-1][1] > 0 else -factor
    return tuple((k, c // factor) for k, c in kept)


def _cancelled(products: Mapping[Product, int]) -> list[tuple[Product, int]]:
    """The sorted terms without the unknowns, all positive, that are factors of every term."""
    keys = list(products)
    common = Counter(keys[0]) if keys else Counter()
    for key in keys[1:]:
        common &= Counter(key)
    rest = {tuple(sorted((Counter(k) - common).elements())): c for k, c in products.items()}
    return sorted(rest.items())


def normalised(equations: Iterable[Equation], find: Callable[[int], int]) -> list[Equation]:
    """The equations over representatives, once each, without those that have become trivial."""
    seen = dict.fromkeys(_normal(dict(eq), find) for eq in equations)
    return [eq for eq in seen if eq]


def is_merge(equation: Equation) -> bool:
    """Whether an equation says that two unknowns are equal."""
    return [len(key) for key, _ in equation] == [1, 1] and sum(c for _, c in equation) == 0
