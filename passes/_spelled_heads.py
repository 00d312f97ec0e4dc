"""Keys and values of grouped heads, repeated for every query head that shares them.

transformers repeats a head by an axis of one that is expanded and merged with the heads:
[b,g,t,d] -> [b,g,1,t,d] -> [b,g,n,t,d] -> [b,g*n,t,d].
"""

from __future__ import annotations

from typing import NamedTuple

from dsc.ir.dims import Dim
from dsc.ir.graph import Operand
from dsc.rewrite.scope import Scope

Shape = tuple[Dim, ...]
_RESHAPE = frozenset({"reshape"})


class Repeated(NamedTuple):
    """A value, the shape under which it is what was repeated, and the axis of its heads."""

    x: Operand
    shape: Shape
    axis: int


def before_repeats(scope: Scope, x: Operand, order: tuple[int, ...]) -> Repeated | None:
    """What the heads of `x` were repeated from; `order` has its axes as batch, heads, t, d."""
    merged = scope.producer(x)
    if merged is None or merged.op != "reshape" or len(order) < 3:
        return None
    spread = scope.producer(merged.operands[0])
    if spread is None or spread.op != "expand":
        return None
    narrow, wide = spread.operands[0].type.shape, spread.output.type.shape
    axis = order[-3]
    copies = axis + 1
    if len(narrow) != len(wide) or len(wide) != len(order) + 1 or narrow[copies] != 1:
        return None
    heads = wide[axis] * wide[copies]
    alike = all(a == b for i, (a, b) in enumerate(zip(narrow, wide, strict=True)) if i != copies)
    if not alike or merged.output.type.shape != (*wide[:axis], heads, *wide[copies + 1 :]):
        return None
    shape = (*narrow[:copies], *narrow[copies + 1 :])
    return Repeated(scope.through(spread.operands[0], _RESHAPE), shape, axis)
