"""Let products whose weights are codes take their rows as codes too.

What           a linear, grouped_linear or experts over weights in integer codes takes each row of x
               as the nearest codes, with a scale in fp32 for each `group` columns.
Why it pays    integers multiply integers: 64 products an instruction where fp32 has 16, and no
               weight is widened first.
Preconditions  stage OPTIMIZED or CANONICAL, and the backend asks for it. All that the product reads
               in a format is in `weights`, and no activations are said yet.
Before         graph main(%x: f32[N,64], @w: i8{1x32,f16}[8,64], @r: f32[4,8]) {
                 %y = linear %x, @w : f32[N,8]
                 %z = linear %y, @r : f32[N,4]
                 return %z
               }
After          graph main(%x: f32[N,64], @w: i8{1x32,f16}[8,64], @r: f32[4,8]) {
                 %y = linear %x, @w {activations="i8:32"} : f32[N,8]
                 %z = linear %y, @r : f32[N,4]
                 return %z
               }
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from dsc.ir.formats import CODINGS
from dsc.ir.graph import Attrs, Graph, Node
from dsc.ir.op import lookup
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option

ACTIVATIONS = "activations"
"""The attribute of products that says what their rows are taken as."""
RULE = "quantise"


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Say of every such product what its rows are taken as."""

    codes: str = option("i8", among=[c for c, coding in CODINGS.items() if coding.together == 1])
    group: int = option(32, least=1)
    weights: tuple[str, ...] = option(("i8", "i4"), among=CODINGS)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk over all nodes."""
        return program.map_entries(partial(self._said, report))

    def comparable(self, before: Program, after: Program) -> Program:
        """With rows as they were: what codes say of them is their operators' to prove."""
        return after.map_entries(_unsaid)

    def _said(self, report: PassReport, graph: Graph) -> Graph:
        def said(node: Node) -> Node:
            if not self._takes(node):
                return node
            report.fire(RULE, places=[node.loc])
            return _with(node, f"{self.codes}:{self.group}")

        return replace(graph, nodes=tuple(map(said, graph.nodes)))

    def _takes(self, node: Node) -> bool:
        if lookup(node.op).attr(ACTIVATIONS) is None or node.attrs.get(ACTIVATIONS):
            return False
        stored = [x.type.dtype for x in node.operands if x.type.format is not None]
        return bool(stored) and set(stored) <= set(self.weights)


def _unsaid(graph: Graph) -> Graph:
    nodes = (_with(n, "") if n.attrs.get(ACTIVATIONS) else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def _with(node: Node, activations: str) -> Node:
    return replace(node, attrs=Attrs({**node.attrs, ACTIVATIONS: activations}))
