"""Shapes of generic kernels: integers are built in, symbolic dims become run-time sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from typing import Any, TypeVar

from dsc.backends.tvm.tir import Expr, bind, for_each, integer, tirx
from dsc.ir.dims import Dim, Sym, symbol

Key = TypeVar("Key")


class SizeTable:
    """Numbers symbolic dims, so that equal nodes of other layers and entries share a kernel.

    In a kernel's key stand integers, and the symbol `$i` for run-time size i.
    """

    def __init__(self) -> None:
        self.dims: list[Dim] = []

    def numbered(self, key: Key) -> Key:
        """A dim as it stands in a key, or a tuple or dataclass with all of its dims so."""
        return self._numbered(key)  # type: ignore[no-any-return]

    def _numbered(self, key: Any) -> Any:
        if isinstance(key, Sym):
            if key not in self.dims:
                self.dims.append(key)
            return symbol(f"${self.dims.index(key)}")
        if isinstance(key, tuple):
            return tuple(map(self._numbered, key))
        if is_dataclass(key) and not isinstance(key, type):
            return replace(
                key, **{f.name: self._numbered(getattr(key, f.name)) for f in fields(key)}
            )
        return key

    def size(self, dim: Dim) -> Sym:
        """A dim as a run-time size even where it is an integer, to share a kernel among sizes."""
        self.dims.append(dim)
        return symbol(f"${len(self.dims) - 1}")


def sized(dim: Dim, sizes: Sequence[Expr]) -> Expr:
    """A dim of a key inside a kernel: a Python int, or a run-time size."""
    return dim if isinstance(dim, int) else sizes[int(str(dim)[1:])]


def resolve(shape: Sequence[Dim], sizes: Sequence[Expr]) -> list[Expr]:
    """The dims of a shape of a key inside a kernel."""
    return [sized(dim, sizes) for dim in shape]


def size_names(count: int) -> list[str]:
    """Parameter names of run-time sizes."""
    return [f"n{i}" for i in range(count)]


def count(extents: Sequence[Expr]) -> Expr:
    """The product of extents: a Python int when all are."""
    return reduce(lambda a, b: a * b, extents, 1)


def each_index(extents: Sequence[Expr], work: Expr, body: Callable[[list[Expr]], None]) -> None:
    """`body(index)` for every index of a shape, over threads when there is enough work."""

    def flat(position: Expr) -> None:
        index: list[Expr] = []
        for extent in reversed(extents):
            if isinstance(extent, int) and extent == 1:
                index.insert(0, integer(0))
                continue
            index.insert(0, bind(tirx.truncmod(position, integer(extent))))
            position = bind(tirx.truncdiv(position, integer(extent)))
        body(index)

    for_each(count(extents), work, flat)
