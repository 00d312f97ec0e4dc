"""A call with the extents that stand for its dims: what the trait `demand` is written over.

`shrink` gives every dim of a program an unknown. Of an operator, equal names in its signature are
equal extents; what a signature cannot say (products of a reshape, sums of a concat, halves of a
rotary embedding) the declaration states by a function of a `Sized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc.ir.calls import Use
from dsc.ir.dims import Dim
from dsc.ir.extents import Extent, System
from dsc.ir.types import TensorType

Shape = list[Extent]


@dataclass(frozen=True, kw_only=True)
class Sized(Use):
    """A use of an operator, and the extents that stand for its dims.

    `call["x"]` is the shape of operand x in extents, `call.dims["d"]` what the letter d of the
    signature stands for (of a starred one a list), `call.extents["shape"]` those of an attribute.
    In a weight expression (`in_weights`) a stack may lose operands.
    """

    system: System
    op: str
    ins: Mapping[str, Shape]
    outs: Sequence[Shape]
    extents: Mapping[str, Any]
    in_weights: bool = False

    def __contains__(self, operand: str) -> bool:
        """Whether an operand is given."""
        return operand in self.ins

    def __getitem__(self, operand: str) -> Shape:
        return self.ins[operand]

    def given(self) -> list[tuple[TensorType, Shape]]:
        """Types and shapes of all operands that are given, in order."""
        return list(zip(self.operands.values(), self.ins.values(), strict=True))

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
