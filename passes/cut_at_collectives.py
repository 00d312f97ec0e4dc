"""Cut entries at their collectives, for backends that speak to no other rank.

What           each stretch of an entry between two collectives becomes an entry of its own,
               `decode_0` and so on, that owns its outputs; collectives are left out.
Why it pays    a backend that knows nothing of ranks runs a sharded program: it emits the segments,
               and the run time (`dsc/runtime/segmented.py`) calls them with collectives between.
Preconditions  stage PLANNED. A session still runs the program as it was before: this is what the
               backend emits of it.
Before         graph main(%x: f32[N,8], @w: f32[8,8], @v: f32[8,8]) {
                 %y = linear %x, @w : f32[N,8]
                 %s = all_reduce %y {ranks=2} : f32[N,8]
                 %z = linear %s, @v : f32[N,8]
                 return %z
               }
After          graph main_0(%x: f32[N,8], @w: f32[8,8]) {
                 %y = linear %x, @w : f32[N,8]
                 return %y
               }

`main_1` is the other linear, over an input `s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.op import traits_of
from dsc.ir.program import Program
from dsc.ir.segments import cut, joined
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.passes.own_outputs import OwnOutputs
from dsc.rewrite.base import Pass, PassReport


@dataclass(frozen=True)
class CutAtCollectives(Pass):
    """Make every segment an entry."""

    needs = frozenset({Stage.PLANNED})
    ensures = Stage.PLANNED

    def run(self, program: Program, report: PassReport) -> Program:
        """Cut all entries."""
        nodes = [n for graph in program.entries.values() for n in graph.nodes]
        report.fire("cut", sum(traits_of(n.op).role is Role.COLLECTIVE for n in nodes))
        return OwnOutputs().run(cut(program), report)

    def comparable(self, before: Program, after: Program) -> Program:
        """The segments put together again with the collectives of `before`."""
        return joined(before, after)
