"""Drop nodes whose results nobody reads, and weights that no entry reads.

What           a node is dead when none of its results reaches an output; passes leave such nodes
               behind and rely on this one.
Why it pays    dead nodes would be compiled, planned and run.
Preconditions  none; every operator is pure or returns what it updates.
Before         graph main(%x: f32[B]) {
                 %a = neg %x : f32[B]
                 %b = abs %a : f32[B]
                 return %a
               }
After          graph main(%x: f32[B]) {
                 %a = neg %x : f32[B]
                 return %a
               }
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.analyses import live
from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove dead nodes of every entry."""

    def run(self, program: Program, report: PassReport) -> Program:
        """One backward walk an entry."""
        after = program.map_entries(live)
        removed = sum(
            len(graph.nodes) - len(after.entries[name].nodes)
            for name, graph in program.entries.items()
        )
        if removed:
            report.fire("dead node", removed)
        return after.pruned()
