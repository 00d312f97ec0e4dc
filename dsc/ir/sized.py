"""A call with the extents that stand for its dims: what the trait `demand` is written over.

`shrink` gives every dim of a program an unknown. Of an operator, equal names in its signature are
equal extents; what a signature cannot say (products of a reshape, sums of a concat, halves of a
rotary embedding) the declaration states by a function of a `Sized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsc.ir.dims import Dim
from dsc.ir.extents import Extent, System
from dsc.ir.types import TensorType

Shape = list[Extent]


@dataclass
class Sized:
    """One use of an operator: types as they are, and the extents that stand for their dims.

    `call["x"]` is the shape of operand x in extents, `call.type("x")` its type, `call.dims["d"]`
    what the letter d of the signature stands for (of a starred one a list), `call.extents["shape"]`
    those of an attribute. In a weight expression (`in_weights`) a stack may lose operands.
    """

    system: System
    op: str
    names: Sequence[str]
    types: Sequence[TensorType | None]
    results: Sequence[TensorType]
    ins: Sequence[Shape | None]
    outs: Sequence[Shape]
    attrs: Mapping[str, Any]
    extents: Mapping[str, Any]
    in_weights: bool = False
    dims: dict[str, Any] = field(default_factory=dict)

    def __contains__(self, operand: str) -> bool:
        """Whether an operand is given."""
        return operand in self.names and self.ins[self.names.index(operand)] is not None

    def __getitem__(self, operand: str) -> Shape:
        shape = self.ins[self.names.index(operand)]
        assert shape is not None
        return shape

    def type(self, operand: str) -> TensorType:
        """The type of an operand that is given."""
        found = self.types[self.names.index(operand)]
        assert found is not None
        return found

    def given(self) -> list[tuple[TensorType, Shape]]:
        """Types and shapes of all operands that are given, in order."""
        both = zip(self.types, self.ins, strict=True)
        return [(t, shape) for t, shape in both if t is not None and shape is not None]

    def same(self, a: Sequence[Extent], b: Sequence[Extent]) -> None:
        """Equate extents pairwise."""
        for x, y in zip(a, b, strict=True):
            self.system.equate(x, y)

    def broadcast(
        self, t: TensorType, shape: Shape, to: Sequence[Extent], dims: Sequence[Dim]
    ) -> None:
        """Equate the extents of an operand with those it broadcasts to, which stand for `dims`."""
        for i in range(1, len(shape) + 1):
            if t.shape[-i] != 1 or dims[-i] == 1:
                self.system.equate(shape[-i], to[-i])

    def in_proportion(self, many: Extent, few: Extent, dims: tuple[Dim, Dim]) -> None:
        """Keep how often a whole number of few is in many, as heads that share a key head."""
        large, small = dims
        if large == small:
            self.system.equate(many, few)
        elif isinstance(large, int) and isinstance(small, int) and small and large % small == 0:
            self.system.equate(many, Extent.number(large // small) * few)


def broadcasting(call: Sized) -> None:
    """Every operand broadcasts to the result: what a pointwise operator demands."""
    for t, shape in call.given():
        call.broadcast(t, shape, call.outs[0], call.results[0].shape)


Demand = Callable[[Sized], None]
