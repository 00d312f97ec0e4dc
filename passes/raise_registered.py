"""Apply the rules that packages from outside have registered.

What           where a rule of `dsc.register_rule` matches, its operator takes the place of what a
               model spells out.
Why it pays    an operator from outside brings a kernel of its own along, or lets others fuse.
Preconditions  stage TRACED. Without registered rules nothing changes.
Before         graph main(%x: f32[B,4]) {
                 %y = relu %x : f32[B,4]
                 return %y
               }
After          graph main(%x: f32[B,4]) {
                 %y = relu %x : f32[B,4]
                 return %y
               }
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import apply_rules
from dsc.rewrite.registered import registered_rules


@dataclass(frozen=True)
class RaiseRegistered(Pass):
    """Apply every registered rule, until none matches."""

    needs = frozenset({Stage.TRACED})
    tolerance = 1e-5

    def run(self, program: Program, report: PassReport) -> Program:
        """One sweep of all rules."""
        rules = registered_rules()
        return apply_rules(program, rules, report) if rules else program
