"""Write new rows into preallocated caches instead of growing copies of them.

What           cache inputs of P rows become caches of capacity C, append becomes cache_write, and
               attention runs over all C rows, of which `lengths` says how many are seen.
Why it pays    a decode step no longer copies the past, and no shape grows from step to step.
Preconditions  stage CANONICAL or OPTIMIZED; every use of P is in the sum P + S that append makes.
Before         graph main(%past: f32[B,P,4], %new: f32[B,S,4], %n: i64[B]) {
                 %c = append %past, %new, %n : f32[B,P+S,4]
                 return %c as "present" updates %past
               }
After          graph main(%past: f32[B,C,4], %new: f32[B,S,4], %n: i64[B]) {
                 %c = cache_write %past, %new, %n : f32[B,C,4]
                 return %c as "present" updates %past
               }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsc.ir.dims import Dim, Range, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.rebuild import Operands, rebuild

PAST, NEW, CAPACITY = "P", "S", "C"


@dataclass(frozen=True)
class AppendCacheInPlace(Pass):
    """Turn every append on a declared cache into cache_write; `slack` rows take padding."""

    slack: int = 512

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # attention sums over C rows where it summed over P + S

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite the entries that have caches."""
        entries = {n: self._in_place(g, report) for n, g in program.entries.items()}
        if all(entries[n] is g for n, g in program.entries.items()):
            return program.at(Stage.OPTIMIZED)
        symbols = {k: r for k, r in program.symbols.items() if k != PAST}
        symbols[CAPACITY] = Range(1, program.symbols[PAST].hi + self.slack)
        return replace(program, entries=entries, symbols=symbols, stage=Stage.OPTIMIZED)

    def _in_place(self, graph: Graph, report: PassReport) -> Graph:
        caches = {graph.inputs[i].name for _, i in graph.aliases}
        appends = [n for n in graph.nodes if n.op == "append" and _name(n) in caches]
        if not appends:
            return graph
        new = appends[0].operands[1].type.shape[1]
        capacity: Dim = symbol(CAPACITY)
        moved = graph.substitute({PAST: capacity - new})
        inputs = [
            Value(v.name, v.type.with_shape((v.type.shape[0], capacity, *v.type.shape[2:])))
            if v.name in caches
            else v
            for v in moved.inputs
        ]

        def write(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            if node.op != "append" or _name(node) not in caches:
                return None
            report.fire("append")
            b.taken.discard(node.output.name)
            return b.call("cache_write", *operands, hint=node.output.name)

        return rebuild(moved, write, inputs)


def _name(node: Node) -> str:
    return node.operands[0].name
