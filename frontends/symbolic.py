"""Sizes as PyTorch's tracer writes them (sympy over its own symbols) to dims of the IR.

`torch.export` names sizes `s23`, `s18`, ...; a program names them `B`, `S`, `P`. `SizeReader` holds
that renaming and translates every expression the shape environment can contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc.ir.dims import Dim, symbol


class NotADim(Exception):
    """A size that has no form in the IR: it depends on data, or uses max, min or rounding up."""


class SizeReader:
    """Translates sizes; unnamed symbols get the names `D0`, `D1`, ... in order of appearance."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names: dict[str, str] = dict(names or {})

    def read(self, size: Any) -> Dim:
        """An `int` or `torch.SymInt` as a dim. Raises `NotADim`."""
        return int(size) if isinstance(size, int) else self._dim(size.node.expr)

    def shape(self, sizes: Any) -> tuple[Dim, ...]:
        """A whole shape."""
        return tuple(self.read(size) for size in sizes)

    def _dim(self, expr: Any) -> Dim:
        """Recursive descent over a sympy expression."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return symbol(self._name(str(expr)))
        terms = expr.args
        match type(expr).__name__:
            case "Add":
                total: Dim = 0
                for term in terms:
                    total = total + self._dim(term)
                return total
            case "Mul":
                result: Dim = 1
                for term in terms:
                    result = result * self._dim(term)
                return result
            case "Pow" if terms[1].is_Integer and int(terms[1]) > 0:
                power: Dim = 1
                for _ in range(int(terms[1])):
                    power = power * self._dim(terms[0])
                return power
            case "FloorDiv" | "CleanDiv":
                return self._dim(terms[0]) // self._dim(terms[1])
            case "Mod" | "PythonMod":
                whole, part = self._dim(terms[0]), self._dim(terms[1])
                return whole - whole // part * part
        raise NotADim(f"the size {expr} has no symbolic form")

    def _name(self, name: str) -> str:
        if name.startswith(("u", "zuf")):
            raise NotADim(f"the size {name} depends on the data")
        if name not in self.names:
            taken = set(self.names.values())
            self.names[name] = next(n for n in (f"D{i}" for i in range(99999)) if n not in taken)
        return self.names[name]
