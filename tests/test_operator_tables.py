"""Operators are told by their declarations: what a table of their names may still be, and where.

A table is a literal of which at least half of the strings are operators' names, two or, in a set,
one. Rules say which operators a spelling is made of, backends how each is written. Whoever else
needs to know which operators are of a kind asks `dsc.ir.traits`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dsc.ir.op import registry

ROOT = Path(__file__).resolve().parent.parent
NAMES = frozenset(registry())
FILES = {
    "passes/raise_*.py": "what a spelling that is raised is made of",
    "passes/_splits.py": "rules about splits and slices",
    "passes/_moved_views.py": "rules about views",
    "passes/_views.py": "rules about views and neutral numbers",
    "passes/_spelled_*.py": "what a spelled attention is made of",
    "passes/_routing.py": "score functions, which have the names of operators",
    "backends/*": "how a backend writes each operator, and which its kernels take",
    "frontends/aten*.py": "ATen's names, and the operators that they become",
}
PLACES = {
    "dsc/ir/regions.py:_epilogue": "what kernels take after a product, unless a backend says",
    "dsc/ir/streams.py:_keeps_rows": "how weights are evaluated block by block",
    "dsc/rewrite/scope.py:TRANSPARENT": "what patterns look through for a number",
    "passes/append_cache_in_place.py:ROW_BY_ROW": "the rule's pattern: what keeps rows apart",
    "passes/name_values.py:_MODULES": "words for readers",
    "passes/name_values.py:_TELLING": "the same",
    "passes/spell_out_sdpa.py:SpellOut": "the pass's own operator",
    "frontends/capture.py:_SIZE_OBLIVIOUS": "torch's functions, some of which have such names",
    "frontends/family.py:ModelConfig": "score functions, which have the names of operators",
}
"""Tables that stand, and why."""
NOT_OPERATORS = {
    "copy": "triton's expression of a value as it is",
    "iota": "triton's step that counts",
}
"""Names in tables of operators that are none."""


def tables(path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """The tables of a file: the name that each is bound in, its line, its strings."""
    tree = ast.parse(path.read_text())
    for statement in tree.body:
        where = _name(statement)
        for node in ast.walk(statement):
            strings = _strings(node)
            known = [s for s in strings if s in NAMES]
            least = 1 if isinstance(node, ast.Set) else 2
            if len(known) >= least and 2 * len(known) >= len(strings):
                yield where, getattr(node, "lineno", 0), strings


def _name(statement: ast.stmt) -> str:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return ""


def _strings(node: ast.AST) -> list[str]:
    match node:
        case ast.Set(elts=found) | ast.Tuple(elts=found) | ast.List(elts=found):
            keys: list[ast.expr] = list(found)
        case ast.Dict(keys=given):
            keys = [key for key in given if key is not None]
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="split")):
            return text.split()
        case _:
            return []
    return [k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def sources() -> Iterator[Path]:
    """The project's own code, but for the declarations."""
    for folder in ("dsc", "passes", "frontends", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            linked = folder == "dsc" and inside.parts[1] in ("passes", "frontends", "backends")
            if not linked and "ops" not in inside.parts:
                yield inside


def test_no_table_of_operators_stands_outside_of_declarations_rules_and_emission() -> None:
    strange = [
        f"{path}:{line} ({where}): {' '.join(strings)}"
        for path in sources()
        for where, line, strings in tables(ROOT / path)
        if not any(fnmatch(str(path), pattern) for pattern in FILES)
        and f"{path}:{where}" not in PLACES
    ]
    assert not strange, "ask the traits of the declarations instead:\n" + "\n".join(strange)


def test_each_exception_is_still_there() -> None:
    found = {f"{path}:{where}" for path in sources() for where, _, _ in tables(ROOT / path)}
    assert PLACES.keys() <= found
    for pattern in FILES:
        assert any(fnmatch(str(path), pattern) and list(tables(ROOT / path)) for path in sources())


def test_each_name_in_a_table_is_an_operator() -> None:
    wrong = [
        f"{path}:{line} ({where}): {name}"
        for path in sources()
        if not fnmatch(str(path), "frontends/*") and path.name != "__init__.py"
        for where, line, strings in tables(ROOT / path)
        if len(strings) >= 3
        for name in strings
        if name not in NAMES and name not in NOT_OPERATORS
    ]
    assert not wrong, "no operators:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        'VIEWS = frozenset({"reshape", "permute", "transpose"})',
        'X = {"linear": 1, "matmul": 0}',
        'X = named(Role.POINTWISE) | {"rope"}',
        'def f(op):\n    return op in ("add", "sub")',
        'KNOWN = "cos sin exp".split()',
    ],
)
def test_a_table_is_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert list(tables(tmp_path / "x.py"))
