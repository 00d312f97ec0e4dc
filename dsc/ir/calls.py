"""One use of an operator under the names of its signature: what traits are written over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.ir.dims import Dim
from dsc.ir.types import TensorType


@dataclass(frozen=True)
class Use:
    """What all traits see of a use.

    `operands` are the types of those that are given, by name and in order, of several under one
    name `xs[0]`, `xs[1]`; `attrs` are all attributes with their defaults, `results` the result
    types; `dims["d"]` is what the letter d of the signature stands for, of a starred one a tuple.
    """

    operands: Mapping[str, TensorType]
    attrs: Mapping[str, Any]
    results: tuple[TensorType, ...]
    dims: dict[str, Any] = field(default_factory=dict)


class Call(Use):
    """A use as costs and ranges of indices are written over it: `call["x"]` is a type."""

    def __getitem__(self, operand: str) -> TensorType:
        return self.operands[operand]

    def dim(self, name: str) -> Dim:
        """The extent that a name of the signature stands for."""
        found: Dim = self.dims[name]
        return found
