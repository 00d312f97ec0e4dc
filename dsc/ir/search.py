"""A backtracking search for small values of the unknowns of a `System`.

Most unknowns are defined by the others: a product of heads and head width, a sum of two parts. The
few that are left take values from short lists, smallest and unused first, and every statement is
checked as soon as all that it rests on is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod

from dsc.ir.extents import MAX_STEPS, SMALL, Equation, System, Unsolvable, is_merge, normalised

Values = dict[int, int]
_SIZES = sorted({*range(3, 33), *range(32, 129, 4), *range(128, 385, 16)})


@dataclass(frozen=True)
class Definition:
    """An unknown that others determine: those it needs, and its value for theirs."""

    needs: tuple[int, ...]
    value: Callable[[Callable[[int], int]], int]


@dataclass
class Search:
    """One search. Unknowns are named by their representatives."""

    system: System
    defined: dict[int, Definition] = field(default_factory=dict)
    fixed: Values = field(default_factory=dict)
    steps: int = 0
    last: str = "nothing fits"

    def run(self) -> Values:
        """Values for all representatives. Raises `Unsolvable`."""
        equations = self._merged()
        self._fix()
        self._define_counts()
        left = [eq for eq in equations if not self._define(eq)]
        checks = [*self._equation_checks(left), *self._other_checks(), *self._range_checks()]
        free = [u for u in self._unknowns() if u not in self.fixed and u not in self.defined]
        order, due = self._order(free, checks)
        for what, holds in due.get(-1, ()):
            if not holds(self.fixed):
                raise Unsolvable(what)
        values = dict(self.fixed)
        if not self._assign(order, 0, due, values):
            raise Unsolvable(self.last)
        return {u: self._value(u, values) for u in self._unknowns()}

    def _merged(self) -> list[Equation]:
        while True:
            equations = normalised(self.system.equations, self.system.find)
            equal = [eq for eq in equations if is_merge(eq)]
            for eq in equal:
                self.system.merge(eq[0][0][0], eq[1][0][0])
            if not equal:
                return equations

    def _unknowns(self) -> list[int]:
        return [u for u, parent in enumerate(self.system.parent) if u == parent]

    def _fix(self) -> None:
        """Small numbers stay as they are."""
        counts = self.system.block_counts()
        for u in self._unknowns():
            if self.system.original[u] <= SMALL and u not in counts:
                self.fixed[u] = self.system.original[u]

    def _define_counts(self) -> None:
        find = self.system.find
        for c in self.system.counts:
            count, extent, block = find(c.count), find(c.extent), c.block
            if count not in self.fixed and count not in self.defined:
                self.defined[count] = Definition((extent,), ceil_of(extent, block))

    def _define(self, equation: Equation) -> bool:
        """Let an equation define its largest lone unknown, if it has one that is still open."""
        once = [
            (self.system.original[key[0]], key[0], c)
            for key, c in equation
            if len(key) == 1 and abs(c) == 1 and sum(key[0] in k for k, _ in equation) == 1
        ]
        for _, unknown, sign in sorted(once, reverse=True):
            if unknown in self.fixed or unknown in self.defined:
                continue
            others = [(key, c) for key, c in equation if key != (unknown,)]
            needs = tuple(sorted({u for key, _ in others for u in key}))
            if any(self._rests_on(u, unknown) for u in needs):
                continue
            self.defined[unknown] = Definition(needs, sum_of(others, -sign))
            return True
        return False

    def _rests_on(self, unknown: int, other: int) -> bool:
        stack, seen = [unknown], set()
        while stack:
            u = stack.pop()
            if u == other:
                return True
            if u in self.defined and u not in seen:
                seen.add(u)
                stack.extend(self.defined[u].needs)
        return False

    def _value(self, unknown: int, values: Values) -> int:
        if unknown in values:
            return values[unknown]
        return self.defined[unknown].value(lambda u: self._value(u, values))

    # Statements, as (unknowns they rest on, words, test of the values)

    def _equation_checks(self, equations: list[Equation]) -> Iterator[_Check]:
        for eq in equations:
            unknowns = {u for key, _ in eq for u in key}
            yield unknowns, f"{self._text(eq)} = 0", partial(self._is_zero, eq)

    def _is_zero(self, equation: Equation, values: Values) -> bool:
        return not sum(c * prod(self._value(u, values) for u in k) for k, c in equation)

    def _other_checks(self) -> Iterator[_Check]:
        find = self.system.find
        once = {(tuple(map(find, c.unknowns)), c.what): c for c in self.system.checks}
        for (names, _), check in once.items():
            shown = ", ".join(str(self.system.original[u]) for u in names)
            yield set(names), f"{check.what} ({shown})", partial(self._holds, names, check.holds)
        for c in self.system.counts:
            pair = (find(c.extent), find(c.count))
            covers = partial(_covers, c.block, self.system.original[pair[0]] % c.block == 0)
            yield set(pair), f"blocks of {c.block}", partial(self._holds, pair, covers)

    def _range_checks(self) -> Iterator[_Check]:
        counts = self.system.block_counts()
        for unknown in self.defined:
            low, high = 1 if unknown in counts else 2, self.system.original[unknown]
            inside = partial(_is_within, low, high)
            words = f"{high} shrinks into {low}..{high}"
            yield {unknown}, words, partial(self._holds, (unknown,), inside)

    def _holds(
        self, unknowns: tuple[int, ...], test: Callable[[Sequence[int]], bool], values: Values
    ) -> bool:
        return test([self._value(u, values) for u in unknowns])

    def _text(self, equation: Equation) -> str:
        numbers = self.system.original
        return " + ".join(
            "*".join(map(str, [*([c] if c != 1 or not k else []), *(numbers[u] for u in k)]))
            for k, c in equation
        )

    # The search itself

    def _order(self, free: list[int], checks: list[_Check]) -> tuple[list[int], _Due]:
        """Unknowns in the order of assignment, and the checks due after each (-1: at once)."""

        @cache
        def rests(unknown: int) -> frozenset[int]:
            if unknown in self.fixed:
                return frozenset()
            if unknown not in self.defined:
                return frozenset((unknown,))
            return frozenset().union(*(rests(u) for u in self.defined[unknown].needs))

        bases = [frozenset().union(*(rests(u) for u in unknowns)) for unknowns, _, _ in checks]
        order: list[int] = []
        waiting = {base for base in bases if len(base) > 1}
        while waiting:
            nearest = min(waiting, key=lambda base: (len(base - set(order)), sorted(base)))
            order += sorted(nearest - set(order))
            waiting = {base for base in waiting if not base <= set(order)}
        order += [u for u in free if u not in set(order)]
        place = {u: i for i, u in enumerate(order)}
        due: _Due = {}
        for base, (_, what, holds) in zip(bases, checks, strict=True):
            due.setdefault(max((place[u] for u in base), default=-1), []).append((what, holds))
        return order, due

    def _assign(self, order: list[int], at: int, due: _Due, values: Values) -> bool:
        if at == len(order):
            return True
        unknown = order[at]
        for candidate in self._candidates(unknown, set(values.values())):
            self.steps += 1
            if self.steps > MAX_STEPS:
                return False
            values[unknown] = candidate
            broken = next((what for what, holds in due.get(at, ()) if not holds(values)), None)
            if broken is not None:
                self.last = broken
            elif self._assign(order, at + 1, due, values):
                return True
            del values[unknown]
        return False

    def _candidates(self, unknown: int, used: set[int]) -> list[int]:
        """Small numbers of the same parity, unused ones first, and at last the original."""
        original = self.system.original[unknown]
        sizes = {n for n in _SIZES if n < original and n % 2 == original % 2}
        blocks = {c.block for c in self.system.counts if self.system.find(c.extent) == unknown}
        sizes |= {original % b + b for b in blocks if original % b + b < original}
        return [*sorted(sizes, key=lambda n: (n in used, n)), original]


_Check = tuple[set[int], str, Callable[[Values], bool]]
_Due = dict[int, list[tuple[str, Callable[[Values], bool]]]]


def _covers(block: int, whole: bool, sizes: Sequence[int]) -> bool:
    """Whether an extent takes so many blocks, its last one whole or cut as it was."""
    extent, count = sizes
    return -(-extent // block) == count and (extent % block == 0) == whole


def _is_within(low: int, high: int, sizes: Sequence[int]) -> bool:
    return low <= sizes[0] <= high


def ceil_of(extent: int, block: int) -> Callable[[Callable[[int], int]], int]:
    """The number of blocks that cover an extent."""
    return lambda value: -(-value(extent) // block)


def sum_of(
    products: list[tuple[tuple[int, ...], int]], sign: int
) -> Callable[[Callable[[int], int]], int]:
    """`sign` times a sum of products."""
    return lambda value: sign * sum(c * prod(map(value, key)) for key, c in products)
