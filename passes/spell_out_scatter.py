"""Write out the placing of few numbers in each row.

What           scatter(x, index, value) along the last axis, with up to `MOST` indices a row,
               becomes choices between x and the value by comparing an index with the column's
               number; of two that are equal the later counts.
Why it pays    every backend compares and chooses; scatter is an operator of traces alone. Routers
               that mask an expert that they chose (PhiMoE's sparse mixer) or keep a token's best
               scores (Llama 4) are left with it.
Preconditions  stage TRACED, after the passes that read a scatter as part of something larger.
Before         graph main(%x: f32[N,6], %i: i64[N,1], %v: f32[]) {
                 %y = scatter %x, %i, %v {axis=1} : f32[N,6]
                 return %y
               }
After          graph main(%x: f32[N,6], %i: i64[N,1], %v: f32[]) {
                 %arange = arange {dtype=i64, end=6, start=0} : i64[6]
                 %eq = eq %i, %arange : bool[N,6]
                 %y = where %eq, %v, %x : f32[N,6]
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dsc.ir.graph import Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.ops.shape import axis_of
from dsc.ir.types import DType
from dsc.rewrite import lift
from dsc.rewrite import pattern as patterns
from dsc.rewrite.base import EXACT
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

MOST = 8


class PlaceFew(Rule):
    """scatter(x, i, v), few i a row  ==>  where(i_n == arange, v_n, where(.., where(.., x)))."""

    examples = (
        "graph g(%x: f32[N,6], %i: i64[N,1], %v: f32[N,1]) {"
        " %y = scatter %x, %i, %v {axis=1}\n return %y }",
        "graph g(%x: f32[B,S,6], %i: i64[B,S,1]) {"
        " %v = full {shape=[], value=-inf, dtype=f32}\n"
        " %y = scatter %x, %i, %v {axis=-1}\n return %y }",
        "graph g(%x: f32[B,S,6], %i: i64[B,S,3], %v: f32[B,S,3]) {"
        " %y = scatter %x, %i, %v {axis=-1}\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "a row has many": "graph g(%x: f32[N,16], %i: i64[N,9], %v: f32[]) {"
        " %y = scatter %x, %i, %v {axis=1}\n return %y }",
        "it is along another axis": "graph g(%x: f32[6,4], %i: i64[1,4], %v: f32[]) {"
        " %y = scatter %x, %i, %v {axis=0}\n return %y }",
        "some rows stay as they are": "graph g(%x: f32[4,6], %i: i64[3,1], %v: f32[]) {"
        " %y = scatter %x, %i, %v {axis=1}\n return %y }",
    }

    def sample(self, value: Value, env: Mapping[str, int], seed: int) -> Any:
        """Columns that there are."""
        if value.type.dtype is not DType.i64:
            return lift.normal(value, env, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(6, lift.at_sizes(value, env), generator=generator)

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """Any scatter."""
        return p.scatter(p.x, p.index, p.value)

    def check(self, m: Match) -> Facts | Reject:
        """Few indices in each row, along the last axis."""
        x, index = m.x.type, m.index.type
        if axis_of(m.root.attrs["axis"], x.rank) != x.rank - 1:
            return reject("it is not along the last axis", m.x)
        *rows, count = index.shape
        if tuple(rows) != x.shape[:-1] or not isinstance(count, int) or not 1 <= count <= MOST:
            return reject(f"there are not one to {MOST} indices for each row", m.index)
        return {"count": count}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """A value where its index is the column's number."""
        columns = b.arange(start=0, end=m.x.type.shape[-1], dtype=DType.i64)
        found: Operand = m.x
        several = facts["count"] > 1
        for at in range(facts["count"]):
            index, value = (
                b.slice(x, axis=-1, start=at, end=at + 1) if several and x.type.rank else x
                for x in (m.index, m.value)
            )
            (found,) = b.call("where", b.eq(index, columns), value, found)
        return found


@dataclass(frozen=True)
class SpellOutScatter(RaisePass):
    """Write out every scatter of few numbers a row."""

    rules = (PlaceFew(),)
    tolerance = EXACT
