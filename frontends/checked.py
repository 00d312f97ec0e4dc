"""What must hold of a checkpoint's values, looked at when they are read.

A scale that is NaN makes a block of NaN, a code of FP8 that is NaN a row of results, and a size or
a zero point that is not what the rest of the folder says makes another model. Looking ahead would
read all of the folder before anything is compiled; so the source that a program reads its weights
from looks, at no more than is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsc.errors import CheckpointError
from dsc.ir.arrays import Array, tensor_of
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.ir.weights import WeightSource

NAN_CODE = 0x7F
"""The one NaN of e4m3, but for its sign; it has no infinity."""


@dataclass(frozen=True)
class Holds:
    """A tensor's values, or the one of all its elements; `meaning` says what else they mean."""

    key: str
    values: tuple[int, ...]
    meaning: str


class CheckedSource(WeightSource):
    """A source of which some tensors are looked at when they are first read, and floats always.

    A scale may be zero or negative: quantisers write both, and what they stand for is a number.

    `checks`: by key; `None` of floats that must be finite and no more.
    """

    def __init__(self, source: WeightSource, checks: Mapping[str, Holds | None]) -> None:
        self.source, self.checks, self.types = source, checks, source.types
        self._held: set[str] = set()

    @property
    def has_values(self) -> bool:
        """Whether the source below gives values."""
        return self.source.has_values

    def load(self, key: str) -> torch.Tensor:
        """The tensor. `CheckpointError` where what must hold does not."""
        return tensor_of(self.array(key)) if key in self.checks else self.source.load(key)

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """The array, or rows of it. `CheckpointError` where what must hold does not."""
        found = self.source.array(key, rows)
        if key not in self.checks:
            return found
        kind = self.types[key].dtype
        if kind is DType.f8e4m3:
            if (np.bitwise_and(found.view(np.uint8), NAN_CODE) == NAN_CODE).any():
                raise CheckpointError("a weight is NaN", key, "get the file again")
        elif kind.is_float and not np.isfinite(found.astype(np.float32)).all():
            raise CheckpointError("a scale is NaN or infinite", key, "get the file again")
        expected = self.checks[key]
        if expected is not None and key not in self._held:
            self._held.add(key)
            there = self.source.array(expected.key)
            if not np.array_equal(there, np.broadcast_to(expected.values, there.shape)):
                raise CheckpointError(expected.meaning, expected.key)
        return found

    def release(self) -> None:
        """Release the source below."""
        self.source.release()
