"""Operands in stored formats: the types that a signature sees of them, and what references get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsc.ir.formats import Packed, pack_state
from dsc.ir.types import DType, TensorType

if TYPE_CHECKING:
    from dsc.ir.traits import Traits

Types = Sequence[TensorType | None]


def in_numbers(
    names: Sequence[str], letters: Sequence[str], types: Types, traits: Traits
) -> list[TensorType | None]:
    """The types of operands as of their numbers: those that share a letter have one element type.

    Raises `ValueError` for one that may be in no format.
    """
    pairs = list(zip(names, letters, types, strict=True))
    plain = {letter: t.dtype for _, letter, t in pairs if t is not None and t.format is None}
    seen: list[TensorType | None] = []
    for name, letter, t in pairs:
        if t is not None and t.format is not None:
            if name not in traits.stored:
                raise ValueError(f"{name} is {t}, and may be in no stored format")
            t = t.with_dtype(plain.get(letter, DType.f32))
        seen.append(t)
    return seen


def with_rows(
    names: Sequence[str], types: Types, made: tuple[TensorType, ...], traits: Traits
) -> tuple[TensorType, ...]:
    """The types of results, of which the first is stored as the rows among which it puts new ones.

    Raises `ValueError` where those cannot grow row by row.
    """
    kinds = dict(zip(names, types, strict=False))
    for target in traits.into.values():
        t = kinds[target]
        if t is not None and t.format is not None:
            if not t.format.behind:
                raise ValueError(f"{target} is {t}, whose scales are not behind its rows")
            return TensorType(t.dtype, made[0].shape, t.format), *made[1:]
    return made


def operands_of(
    names: Sequence[str], operands: Sequence[Any], seen: Types, traits: Traits
) -> list[Any]:
    """Operands as a reference gets them: numbers, or rows in bytes where rows are only placed."""
    given = dict(zip(names, operands, strict=False))
    found = []
    for name, x, t in zip(names, operands, seen, strict=False):
        rows = given.get(traits.into.get(name, ""))
        if isinstance(rows, Packed):
            x = pack_state(x, rows.type.with_shape(tuple(x.shape))).parts[0]
        elif isinstance(x, Packed) and t is not None:
            placed = name in traits.into.values()
            x = x.parts[0] if placed else x.unpack(t.dtype.torch)
        found.append(x)
    return found
