"""The kinds of attributes that operators declare: what each takes, and what it is in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc.ir.dims import Sym
from dsc.ir.graph import Graph
from dsc.ir.types import DType


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def is_exact(v: Any) -> bool:
    """Whether a whole number is one in fp64 too."""
    return _is_int(v) and -(1 << 63) <= v < 1 << 63 and int(float(v)) == v


def is_dim(v: Any) -> bool:
    """Whether something is a size, a number or symbolic."""
    return _is_int(v) or isinstance(v, Sym)


KINDS: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "extent": _is_int,
    "dim": is_dim,
    "float": lambda v: isinstance(v, float) or is_exact(v),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "dtype": lambda v: isinstance(v, DType),
    "ints": lambda v: isinstance(v, tuple) and all(_is_int(x) for x in v),
    "dims": lambda v: isinstance(v, tuple) and all(is_dim(x) for x in v),
    "graph": lambda v: isinstance(v, Graph),
}
KIND_WORDS = {
    "int": "an integer", "extent": "an integer", "dim": "a size",
    "float": "a number that fp64 holds", "bool": "true or false", "str": "a string",
    "dtype": "an element type", "ints": "a list of integers", "dims": "a list of sizes",
    "graph": "a graph",
}  # fmt: skip
