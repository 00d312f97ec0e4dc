"""What a kernel does to the memory that its parameters point to, read off its text.

Plans say which bytes a launch reads and writes, and lowering needs no Triton. An address is what
stands first in a load, a store or an atomic; it is made of the names that lead to it through
assignments, but for what was loaded on the way, which is a number. Functions of the kernel's own
module are followed: what they do to a parameter is done to what a call gives them for it, and what
they give back is made of what they were given. A function that is imported from elsewhere than
Triton may do anything to an address.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from dsc.runtime.plan import READ, UPDATE, WRITE

LOAD, STORE, ATOMIC, POINTER = "load", "store", "atomic_", "pointer"
MAKER = "triton"
"""The package whose functions do to memory what their names say, and else nothing."""


def parameters(source: str, function: str) -> tuple[str, ...]:
    """The parameter names of a kernel."""
    return tuple(access(source, function))


@cache
def access(source: str, function: str) -> Mapping[str, str]:
    """By parameter of a kernel whether what it points to is read, written or both."""
    found = _Module(source).effects(function)
    return {
        name: READ if name not in found.stored else UPDATE if name in found.loaded else WRITE
        for name in found.order
    }


@dataclass(frozen=True, slots=True)
class Effects:
    """Parameters of a function that it loads by, stores by, and makes its result of."""

    order: tuple[str, ...]
    loaded: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    returned: frozenset[str] = frozenset()


class _Module:
    """A module's functions, each read once."""

    def __init__(self, source: str) -> None:
        body = ast.parse(source).body
        self.functions = {x.name: x for x in body if isinstance(x, ast.FunctionDef)}
        self.foreign = frozenset(_foreign(body))
        self.known: dict[str, Effects] = {}

    def effects(self, name: str) -> Effects:
        """What a function does, with what those do that it calls."""
        if name not in self.known:
            given = self.functions[name].args
            order = tuple(a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs))
            self.known[name] = Effects(order)  # for one that calls itself
            self.known[name] = self._read(self.functions[name], order)
        return self.known[name]

    def _read(self, function: ast.FunctionDef, order: tuple[str, ...]) -> Effects:
        made: dict[str, set[str]] = {}
        loaded, stored, returned = set[str](), set[str](), set[str]()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in self._names(targets):
                    made.setdefault(target, set()).update(self._names([node.value]))
            elif isinstance(node, ast.Return):
                returned |= self._names([node.value])
            elif isinstance(node, ast.Call):
                reads, writes = self._called(node)
                loaded |= reads
                stored |= writes
        reached = (_grown(names, made) & {*order} for names in (loaded, stored, returned))
        return Effects(order, *reached)

    def _called(self, call: ast.Call) -> tuple[set[str], set[str]]:
        """The names that addresses are made of which a call loads from, and stores to."""
        name, followed = _last(call.func), self._followed(call)
        if followed is not None:
            told = self.effects(followed)
            given = _matched(call, told.order)
            each = (told.loaded, told.stored)
            reads, writes = (self._names([x for p in s for x in given[p]]) for s in each)
            return reads, writes
        if _first(call.func) in self.foreign:
            every = self._names([*call.args, *(k.value for k in call.keywords)])
            return every, every
        pointers = [*call.args[:1], *(k.value for k in call.keywords if k.arg == POINTER)]
        owner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        address = self._names([*pointers, *owner])
        changes = name.startswith(ATOMIC)
        nothing = set[str]()
        return (
            address if changes or name == LOAD else nothing,
            address if changes or name == STORE else nothing,
        )

    def _names(self, parts: Sequence[ast.AST | None]) -> set[str]:
        """The names that an expression is made of, as far as it is an address."""
        found: set[str] = set()
        for part in parts:
            if isinstance(part, ast.Name):
                found.add(part.id)
            elif isinstance(part, ast.Call) and (name := self._followed(part)) is not None:
                told = self.effects(name)
                given = _matched(part, told.order)
                found |= self._names([x for p in told.returned for x in given[p]])
            elif part is not None and not (isinstance(part, ast.Call) and _last(part.func) == LOAD):
                found |= self._names(list(ast.iter_child_nodes(part)))
        return found

    def _followed(self, call: ast.Call) -> str | None:
        """The name of the function of this module that is called, if it is one."""
        name = call.func.id if isinstance(call.func, ast.Name) else None
        return name if name in self.functions else None


def _matched(call: ast.Call, order: Sequence[str]) -> dict[str, list[ast.expr]]:
    """What a call gives for each parameter; where it spreads a list, anything may be for any."""
    every = [*call.args, *(k.value for k in call.keywords)]
    spread = any(isinstance(x, ast.Starred) for x in call.args)
    if spread or any(k.arg is None for k in call.keywords):
        return dict.fromkeys(order, every)
    given = dict(zip(order, call.args, strict=False)) | {
        k.arg: k.value for k in call.keywords if k.arg is not None
    }
    return {name: [given[name]] if name in given else [] for name in order}


def _grown(names: set[str], made: Mapping[str, set[str]]) -> frozenset[str]:
    """Names, with all that these are made of."""
    grown: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        grown.add(name)
        left |= made.get(name, set()) - grown
    return frozenset(grown)


def _foreign(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that a module imports from elsewhere than Triton."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            package = statement.module if isinstance(statement, ast.ImportFrom) else None
            for each in statement.names:
                home = package or each.name
                if home.partition(".")[0] != MAKER:
                    yield each.asname or each.name.partition(".")[0]


def _last(function: ast.expr) -> str:
    """What a call's function is called: `store` of `tl.store`."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _first(function: ast.expr) -> str:
    """The name that a call's function begins with: `tl` of `tl.store`."""
    while isinstance(function, ast.Attribute):
        function = function.value
    return function.id if isinstance(function, ast.Name) else ""
