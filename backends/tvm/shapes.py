"""Shapes of generic kernels: integers are built in, symbolic dims become run-time sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeAlias

from dsc.backends.tvm.tir import (
    Expr,
    bind,
    for_each,
    integer,
    tirx,
)
from dsc.ir.dims import Dim

Pattern: TypeAlias = tuple[int | str, ...]
"""A shape in a kernel's key: an integer, or `$i` for run-time size i."""


class SizeTable:
    """Numbers the symbolic dims of a node, so that equal nodes of other layers share a kernel."""

    def __init__(self) -> None:
        self.dims: list[Dim] = []

    def dim(self, dim: Dim) -> int | str:
        """A dim as it stands in a key."""
        if isinstance(dim, int):
            return dim
        if dim not in self.dims:
            self.dims.append(dim)
        return f"${self.dims.index(dim)}"

    def size(self, dim: Dim) -> str:
        """A dim as a run-time size even where it is an integer, to share a kernel among sizes."""
        self.dims.append(dim)
        return f"${len(self.dims) - 1}"

    def shape(self, shape: Sequence[Dim]) -> Pattern:
        """A shape as it stands in a key."""
        return tuple(self.dim(d) for d in shape)


def resolve(pattern: Pattern, sizes: Sequence[Expr]) -> list[Expr]:
    """The extents of a shape inside a kernel: Python ints, or run-time expressions."""
    return [d if isinstance(d, int) else sizes[int(d[1:])] for d in pattern]


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
