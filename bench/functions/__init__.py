"""Small functions and modules of torch, each a script that is run eagerly and through a door.

A script is a generator: it gets `door`, which makes a callable of a function or a module, and
yields what a user would see: results, exceptions, arguments after a call. The same script through
the identity says what is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Door: TypeAlias = Callable[..., Callable[..., Any]]
Function: TypeAlias = Callable[..., Any]
Script: TypeAlias = Callable[[Door], Iterator[Any]]


@dataclass(frozen=True)
class Case:
    """A script with a name and the kind of thing it looks at."""

    name: str
    kind: str
    script: Script


CASES: dict[str, Case] = {}
"""All cases by name, in the order in which they were written."""


def add(name: str, kind: str, script: Script) -> None:
    """Register a script. Raises `ValueError` where the name is taken."""
    if name in CASES:
        raise ValueError(f"two cases are called {name}")
    CASES[name] = Case(name, kind, script)


def case(kind: str) -> Callable[[Script], Script]:
    """Register a generator function under its own name."""

    def register(script: Script) -> Script:
        add(script.__name__, kind, script)
        return script

    return register


@dataclass(frozen=True)
class Raised:
    """An exception that a call ended with."""

    error: Exception


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or `Raised`."""
    try:
        return function(*args, **kwargs)
    except Exception as problem:
        return Raised(problem)


def place_of(result: Tensor, *others: Tensor) -> str:
    """Whose memory a result is in, with its strides and offset there; "its own" otherwise."""
    for i, other in enumerate(others):
        if result.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0:
            return f"of {i} at {result.storage_offset()} by {result.stride()}"
    return "its own"


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers; of integers -9 .. 9, of bool either."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if not dtype.is_floating_point:
        low = 0 if dtype is torch.uint8 else -9
        return torch.randint(low, 10, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


VARIANTS = ("f64", "bf16", "f16", "empty", "scalar", "transposed", "strided", "expanded", "one")
"""What the last call of a generated case is made with; each case has two of them."""


def variant(kind: str, x: Tensor) -> Tensor:
    """A tensor like x (a matrix) of another kind."""
    if kind in ("f64", "bf16", "f16"):
        dtypes = {"f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
        return x.to(dtypes[kind]) if x.is_floating_point() else x
    if kind == "empty":
        return x[:0]
    if kind == "scalar":
        return x[0, 0].clone()
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "strided":
        return x.repeat_interleave(2, 0)[::2]
    return x[:1].expand(x.shape) if kind == "expanded" else x[:1].clone()


def over(
    kind: str,
    name: str,
    function: Function,
    *inputs: Tensor,
    variants: Sequence[str] = VARIANTS,
    sizes: Sequence[int] = (6, 5),
) -> None:
    """Register calls of a function on matrices: as given, with fewer rows, and of two variants.

    After the first call its results are written to, to see whether the inputs or a later result
    change with them.
    """
    first = zlib.crc32(name.encode()) % len(variants) if variants else 0
    chosen = (*variants[first:], *variants[:first])[:2]

    def script(door: Door) -> Iterator[Any]:
        optimised = door(function)
        whole = [x.clone() for x in inputs]
        for rows in (inputs[0].shape[0] if inputs[0].dim() else 0, *sizes[1:]):
            given = [x[:rows].clone() if x.dim() > 1 else x.clone() for x in whole]
            result = attempt(optimised, *given)
            yield result
            yield [place_of(each, *given) for each in _tensors(result)]
            for each in _tensors(result):
                if each.numel() and each.is_contiguous():
                    each.zero_()
            yield given
        for one in chosen:
            yield attempt(optimised, *(variant(one, x) if x.dim() == 2 else x for x in whole))

    add(name, kind, script)


def _tensors(result: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(result)
    return [x for x in found if isinstance(x, Tensor)]
