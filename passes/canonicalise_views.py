"""Leave as few reshapes, permutes, slices and casts as there can be, in one order.

What           views that change nothing go; two in a row become one; a split of a permuted value
               is split first; writes that cover a new tensor become a concat; slices that part an
               axis become a split; factors of 1 and terms of 0 go.
Why it pays    later rules see one spelling instead of many, and every view that stays must be
               paid for or fused.
Preconditions  none.
Before         graph main(%x: f32[B,S,24]) {
                 %a = reshape %x {shape=[B,S,4,6]} : f32[B,S,4,6]
                 %b = permute %a {dims=[0,2,1,3]} : f32[B,4,S,6]
                 %c, %d = split %b {axis=3, sizes=[4,2]} : f32[B,4,S,4], f32[B,4,S,2]
                 %e = permute %d {dims=[0,2,1,3]} : f32[B,S,4,2]
                 return %c, %e
               }
After          graph main(%x: f32[B,S,24]) {
                 %a = reshape %x {shape=[B,S,4,6]} : f32[B,S,4,6]
                 %split, %split_1 = split %a {sizes=[4,2]} : f32[B,S,4,4], f32[B,S,4,2]
                 %c = permute %split {dims=[0,2,1,3]} : f32[B,4,S,4]
                 return %c, %split_1 as "e"
               }
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.program import Program
from dsc.passes._views import VIEW_RULES
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import apply_rules


@dataclass(frozen=True)
class CanonicaliseViews(Pass):
    """Apply the rules of `passes/_views.py` until none fires."""

    def run(self, program: Program, report: PassReport) -> Program:
        """Sweep all rules until the program settles."""
        return apply_rules(program, VIEW_RULES, report)
