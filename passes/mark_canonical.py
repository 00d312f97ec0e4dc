"""Declare a program canonical, or say what of the tracer's spelling is left in it.

What           the program's stage becomes CANONICAL.
Why it pays    every pass and backend after this one may rely on the canonical operators alone; what
               no raise pass recognised is told here, once, by operator and module.
Preconditions  stage TRACED; no operator that only a tracer writes is left.
Before         graph main(%x: f32[B,8], @w: f32[4,8]) {
                 %y = linear %x, @w : f32[B,4]
                 return %y
               }
After          graph main(%x: f32[B,8], @w: f32[4,8]) {
                 %y = linear %x, @w : f32[B,4]
                 return %y
               }
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.errors import UnsupportedOperator
from dsc.ir.program import Program
from dsc.ir.stages import LEGAL, Stage
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class MarkCanonical(Pass):
    """The last of the raise passes."""

    needs = frozenset({Stage.TRACED})
    ensures = Stage.CANONICAL

    def run(self, program: Program, report: PassReport) -> Program:
        """Check every operator. Raises `UnsupportedOperator` naming those that are left."""
        left: dict[str, list[str]] = {}
        for name, graph in program.entries.items():
            for node in graph.nodes:
                if node.op not in LEGAL[Stage.CANONICAL]:
                    left.setdefault(node.op, []).append(node.loc or name)
        if left:
            lines = [f"{op} in {', '.join(sorted(set(at))[:3])}" for op, at in left.items()]
            raise UnsupportedOperator(
                "the raise passes do not recognise what surrounds:\n" + "\n".join(lines),
                hint="dsc opt FILE.dsc --explain raise_attention (or raise_router, raise_experts,"
                " …) on the traced program says which condition failed",
            )
        return program.at(Stage.CANONICAL)
