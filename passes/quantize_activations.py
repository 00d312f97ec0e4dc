"""Let products whose weights are codes take their rows as codes too.

What           a linear, grouped_linear or experts over weights in codes takes each row of x as the
               nearest codes, with a scale in fp32 for some columns: beside integers as 8-bit ones,
               32 columns each, beside FP8 as FP8, 128 columns each (DeepSeek-V3, section 3.3.2).
               Scales are powers of two where the weight's are (DeepSeek-V3.1, which stores them in
               fp32: its configuration says so).
Why it pays    integers multiply integers, 64 products an instruction of AVX-512 where fp32 has 16,
               and FP8 multiplies FP8 where the machine has it; no weight is widened first.
Preconditions  stage OPTIMIZED or CANONICAL, and the backend asks for it. All weights that the
               product reads are in codes of `weights`, and ask for the same rows; none are said
               yet.
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

from dsc.ir.formats import ROWS, SCALE_FMT, UE8M0, WHOLE
from dsc.ir.graph import Attrs, Graph, Node
from dsc.ir.op import lookup
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option

ACTIVATIONS = "activations"
"""The attribute of products that says what their rows are taken as."""
RULE = "quantise"


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Say of every such product what its rows are taken as.

    With `blocks` their scales are for as many columns as those of the weight, and with `powers`
    they are powers of two beside weights that store exponents of such, and beside all in FP8 where
    the program's checkpoint was trained so. With `least` rows beside integers are codes only where
    a scale is for so many columns or a multiple, and nothing else.
    """

    weights: tuple[str, ...] = option(tuple(ROWS), among=ROWS)
    blocks: bool = False
    powers: bool = False
    least: int = option(0, least=0)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk over all nodes."""
        trained = program.meta.get(SCALE_FMT) == UE8M0
        return program.map_entries(partial(self._said, report, self.powers and trained))

    def comparable(self, before: Program, after: Program) -> Program:
        """With rows as they were: what codes say of them is their operators' to prove."""
        entries = {name: before.entries[name].with_nodes(
            [_with(new, old.attrs.get(ACTIVATIONS, "")) if ACTIVATIONS in new.attrs else new
             for old, new in zip(before.entries[name].nodes, graph.nodes, strict=True)]
        ) for name, graph in after.entries.items()}  # fmt: skip
        return replace(after, entries=entries)

    def _said(self, report: PassReport, trained: bool, graph: Graph) -> Graph:
        def said(node: Node) -> Node:
            rows = self._rows(node, trained)
            if not rows:
                return node
            report.fire(RULE, places=[node.loc])
            return _with(node, rows)

        return replace(graph, nodes=tuple(map(said, graph.nodes)))

    def _rows(self, node: Node, trained: bool) -> str:
        """What a product takes its rows as, or nothing."""
        if lookup(node.op).attr(ACTIVATIONS) is None or node.attrs.get(ACTIVATIONS):
            return ""
        stored = {node[name].type for name in lookup(node.op).traits.stored}
        coded = [t if t.format and t.dtype in self.weights else None for t in stored]
        found = {self._beside(t, trained) if t is not None else "" for t in coded}
        return found.pop() if len(found) == 1 else ""

    def _beside(self, weight: TensorType, trained: bool) -> str:
        """What rows are taken as beside a weight's codes."""
        usual = ROWS[weight.dtype]
        assert weight.format is not None
        exponents = trained and weight.dtype.is_float
        if exponents or (self.powers and weight.format.scales is DType.f8e8m0):
            usual = f"{usual}:{DType.f8e8m0}"
        if self.least and weight.dtype.is_int:
            columns, zeros = weight.format.block[1], weight.format.zeros
            fits = zeros is None and columns % self.least == WHOLE
            return f"{usual.partition(':')[0]}:{self.least}" if fits else ""
        if not self.blocks:
            return usual
        return f"{usual.partition(':')[0]}:{weight.format.block[1]}"


def _with(node: Node, activations: str) -> Node:
    return replace(node, attrs=Attrs({**node.attrs, ACTIVATIONS: activations}))
