"""Finish raising: tidy what the raise passes left, and prove that nothing traced remains.

What           joins what a write of a range leaves with what it writes, moves views behind what
               works on each row, folds what is computed from weights alone, merges equal nodes,
               drops dead ones, puts nodes in the order in which the outputs need them, and marks
               the program CANONICAL.
               Operators that only a trace may hold are an error that says, for each, why no raise
               pass took it.
Why it pays    every later pass and every backend relies on the few operators of this stage.
Preconditions  stage TRACED, after all raise passes.
Before         graph main(%x: f32[B,2], @w: bf16[3,2]) {
                 %a = cast @w {dtype=f32} : f32[3,2]
                 %b = linear %x, %a : f32[B,3]
                 %c = linear %x, %a : f32[B,3]
                 %y = add %b, %c : f32[B,3]
                 return %y
               }
After          graph main(%x: f32[B,2], @w.cast: f32[3,2]) {
                 %b = linear %x, @w.cast : f32[B,3]
                 %y = add %b, %b : f32[B,3]
                 return %y
               }
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from dsc.errors import UnsupportedOperator
from dsc.ir.analyses import producers
from dsc.ir.graph import Graph, Node
from dsc.ir.program import Program
from dsc.ir.stages import Stage, is_legal
from dsc.passes._moved_views import MOVED_VIEWS
from dsc.passes._splits import WriteToConcat
from dsc.passes.canonicalise_views import CanonicaliseViews
from dsc.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from dsc.passes.eliminate_dead_code import EliminateDeadCode
from dsc.passes.fold_constants import FoldConstants
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import apply_rules

_TIDY: tuple[Pass, ...] = (
    FoldConstants(weights=True),
    CanonicaliseViews(),
    EliminateCommonSubexpressions(),
    EliminateDeadCode(),
)
_EXPLAIN = {
    "sdpa": "raise_attention:RaiseAttention",
    "grouped_mm": "raise_experts:RaiseExperts",
    "sort": "raise_experts:RaiseExperts",
    "histc": "raise_experts:RaiseExperts",
    "index_put": "raise_experts:RaiseExperts",
    "scatter": "raise_append:RaiseAppend raise_router:RaiseRouter raise_experts:RaiseExperts"
    " spell_out_scatter:SpellOutScatter",
}
"""Which passes should have removed an operator."""


@dataclass(frozen=True)
class RaiseCanonical(Pass):
    """Tidy, check and mark."""

    needs = frozenset({Stage.TRACED})
    ensures = Stage.CANONICAL
    tolerance = 1e-6

    def run(self, program: Program, report: PassReport) -> Program:
        """Raises `UnsupportedOperator` when something traced is left."""
        program = apply_rules(program, (WriteToConcat(), *MOVED_VIEWS), report)
        for each in _TIDY:
            program = each.run(program, report)
        left = _left_over(program)
        if left:
            raise UnsupportedOperator(
                "operators that no pass could raise:\n" + "\n".join(f"  {x}" for x in left),
                hint="write them with other operators; of a model, `dsc compile --dump-dir DIR`"
                " keeps the program, and `dsc opt DIR/00_input.dsc --explain PASS` tells why a"
                " pass did not fire",
            )
        return program.map_entries(ordered).at(Stage.CANONICAL)


def ordered(graph: Graph) -> Graph:
    """Nodes in the order of first need, depth first from the outputs; itself when they are so.

    The same computation traced in another order becomes the same text.
    """
    made = producers(graph)
    done: dict[int, Node] = {}
    pending = [made[x.name] for x in reversed(graph.outputs) if x.name in made]
    while pending:
        node = pending[-1]
        needed = [made[x.name] for x in node.operands if x.name in made]
        missing = [n for n in reversed(needed) if id(n) not in done]
        if missing and id(node) not in done:
            pending += missing
            continue
        done.setdefault(id(pending.pop()), node)
    nodes = tuple(done.values())
    return graph if nodes == graph.nodes else graph.with_nodes(nodes)


def _left_over(program: Program) -> list[str]:
    """One line for each operator that is not legal any more, with reasons from the raise passes."""
    found: dict[str, list[str]] = {}
    for graph in program.entries.values():
        for node in graph.nodes:
            if not is_legal(node.op, Stage.CANONICAL):
                found.setdefault(node.op, []).append(node.loc or graph.name)
    lines = []
    for op, places in found.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        reasons = dict.fromkeys(_reasons(program, op))
        lines += [f"{op} at {places[0]}{more}", *(f"  {reason}" for reason in reasons)]
    return lines


def _reasons(program: Program, op: str) -> list[str]:
    """What the passes that raise `op` say about the program as it is."""
    report = PassReport()
    for place in _EXPLAIN.get(op, "").split():
        module, _, name = place.partition(":")
        each: Pass = getattr(importlib.import_module(f"dsc.passes.{module}"), name)()
        each.run(program, report)
    return [f"{rule} at {where}: {why}" for rule, where, why in report.missed[:4]]
