"""Fold W_UK into the query and W_UV into the output of multi-head latent attention.

What           mla_attention, which rebuilds keys and values of every cached token, becomes
               attention over the latent rows themselves between two small contractions.
Why it pays    a decode step reads c + r values a cached token (576 for V3) where the expanded form
               builds heads x (nope + v) of them (32,768).
Preconditions  stage CANONICAL; kv_b is a weight; the entry is one of `entries` (decode and extend:
               for long prefills the expanded form has fewer flops).
Before         graph main(%qn: f32[B,1,2,4], %qr: f32[B,1,2,2], %c: f32[B,T,6], %r: f32[B,T,2],
                 %n: i64[B], @kv_b: f32[14,6]) {
                 %o = mla_attention %qn, %qr, %c, %r, @kv_b, %n {scale=0.5} : f32[B,1,2,3]
                 return %o
               }
After          graph main(%qn: f32[B,1,2,4], %qr: f32[B,1,2,2], %c: f32[B,T,6], %r: f32[B,T,2],
                 %n: i64[B], @kv_b.k: f32[2,4,6], @kv_b.v: f32[2,3,6]) {
                 %q_latent = einsum %qn, @kv_b.k {eq="bshn,hnc->bshc"} : f32[B,1,2,6]
                 %o_latent = latent_attention %q_latent, %qr, %c, %r, %n {scale=0.5} : f32[B,1,2,6]
                 %o = einsum %o_latent, @kv_b.v {eq="bshc,hvc->bshv"} : f32[B,1,2,3]
                 return %o
               }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import WeightExpr, apply
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.rebuild import Operands, rebuild


@dataclass(frozen=True)
class AbsorbMla(Pass):
    """Absorb kv_b in the named entries."""

    entries: tuple[str, ...] = ("decode_few", "decode", "extend")

    needs = frozenset({Stage.CANONICAL})
    tolerance = 1e-4  # the order of two contractions changes

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite every mla_attention of the named entries whose kv_b is a weight."""
        added: dict[str, WeightExpr] = {}

        def absorb(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            if node.op != "mla_attention":
                return None
            q_nope, q_rope, latent, rope, kv_b, lengths = operands
            if not isinstance(kv_b, Weight) or not isinstance(q_nope, Value):
                blamed = [x.name for x in (node.output, kv_b) if x is not None]
                report.miss("absorb", node.loc, "kv_b is computed, not a weight", blamed)
                return None
            w_uk, w_uv = _halves(program, kv_b, q_nope, added)
            (q_latent,) = b.call("einsum", q_nope, w_uk, eq="bshn,hnc->bshc", hint="q_latent")
            (o_latent,) = b.call(
                "latent_attention", q_latent, q_rope, latent, rope, lengths,
                scale=node.attrs["scale"], hint="o_latent",
            )  # fmt: skip
            b.taken.discard(node.output.name)
            report.fire("absorb", places=[node.loc])
            return b.call("einsum", o_latent, w_uv, eq="bshc,hvc->bshv", hint=node.output.name)

        entries = {
            name: rebuild(graph, absorb) if name in self.entries else graph
            for name, graph in program.entries.items()
        }
        for name in entries.keys() - set(self.entries):
            self._explain(program.entries[name], report)
        if not added:
            return program
        return replace(program, entries=entries).with_weights(added).pruned()

    def _explain(self, graph: Graph, report: PassReport) -> None:
        """Note that an entry keeps its expanded form, at its first attention."""
        kept = [n for n in graph.nodes if n.op == "mla_attention"]
        if kept:
            asked = ", ".join(self.entries)
            reason = f"entry {graph.name} keeps the expanded form: only {asked} are absorbed"
            report.miss("absorb", kept[0].loc, reason, [n.output.name for n in kept[:1]])


def _halves(
    program: Program, kv_b: Weight, q_nope: Value, added: dict[str, WeightExpr]
) -> tuple[Weight, Weight]:
    """W_UK [h,n,c] and W_UV [h,v,c] of kv_b [h*(n+v),c]: per head, the nope rows come first."""
    heads, nope = q_nope.type.shape[2:]
    rows, width = kv_b.type.shape
    per_head = apply("reshape", program.weights[kv_b.name], shape=(heads, rows // heads, width))
    total = per_head.type.shape[1]
    k = apply("slice", per_head, axis=1, start=0, end=nope)
    v = apply("slice", per_head, axis=1, start=nope, end=total)
    added[f"{kv_b.name}.k"], added[f"{kv_b.name}.v"] = k, v
    return Weight(f"{kv_b.name}.k", k.type), Weight(f"{kv_b.name}.v", v.type)
