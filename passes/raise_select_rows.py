"""Recognise the choice of the rows whose logits are wanted.

What           gather(x, index broadcast over the channels) along the sequence becomes select_rows.
Why it pays    the language-model head, the largest matrix of many models, then runs on the chosen
               rows; and no index tensor as wide as the hidden size is built.
Preconditions  stage TRACED; x is [b,s,d], the index [b,l].
Before         graph main(%x: f32[B,S,4], %at: i64[B,L]) {
                 %a = reshape %at {shape=[B,L,1]} : i64[B,L,1]
                 %b = expand %a {shape=[B,L,4]} : i64[B,L,4]
                 %y = gather %x, %b {axis=1} : f32[B,L,4]
                 return %y
               }
After          graph main(%x: f32[B,S,4], %at: i64[B,L]) {
                 %y = select_rows %x, %at : f32[B,L,4]
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.ir.graph import Operand
from dsc.ir.ops.shape import axis_of
from dsc.rewrite import pattern as patterns
from dsc.rewrite.base import EXACT
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject


class SelectRows(Rule):
    """gather(x, expand(reshape(index)))  ==>  select_rows(x, index)."""

    examples = (
        "graph g(%x: f32[B,S,4], %at: i64[B,L]) { %a = reshape %at {shape=[B,L,1]}\n"
        " %b = expand %a {shape=[B,L,4]}\n %y = gather %x, %b {axis=1}\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "another axis is looked up": "graph g(%x: f32[B,4,S], %at: i64[B,4]) {"
        " %a = reshape %at {shape=[B,4,1]}\n %b = expand %a {shape=[B,4,2]}\n"
        " %y = gather %x, %b {axis=2}\n return %y }",
        "every channel has its own index": "graph g(%x: f32[B,S,4], %at: i64[B,L,4]) {"
        " %y = gather %x, %at {axis=1}\n return %y }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The index is broadcast, perhaps for several readers."""
        index = p.expand(p.reshape(p.index).may_be_shared().named("column")).may_be_shared()
        return p.gather(p.x, index)

    def check(self, m: Match) -> Facts | Reject:
        """One index a row, along the sequence."""
        x, index, y = m.x.type, m.index.type, m.root.output.type
        if x.rank != 3 or axis_of(m.root.attrs["axis"], x.rank) != 1:
            return reject("the gather is not along the sequence of [b,s,d]", m.x)
        column = (*index.shape, 1)
        if m.column.output.type.shape != column or y.shape != (*index.shape, x.shape[-1]):
            return reject("the index is not the same for all channels", m.index)
        if index.shape[0] != x.shape[0]:
            return reject("the index is not one row number a sequence and place", m.index)
        return {}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Whole rows."""
        x: Operand = m.x
        return b.call("select_rows", x, m.index)


@dataclass(frozen=True)
class RaiseSelectRows(RaisePass):
    """Raise every choice of rows."""

    rules = (SelectRows(),)
    tolerance = EXACT
