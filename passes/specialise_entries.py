"""Make the entry graphs that a backend wants out of the one graph that was traced.

What           the traced graph, symbolic in new tokens S, becomes `decode` (S = 1, one row of
               logits), `extend` and `prefill`, where more than `few` sequences are allowed also
               `decode_few`, for up to so many; the guards for choosing are declared.
Why it pays    one trace serves all; each entry is then optimised for its own cost.
Preconditions  stage CANONICAL; one entry `step` with the inputs of a causal LM.
Before         graph step(%input_ids: i64[B,S], %logits_at: i64[B,L], @embed: f32[9,8]) {
                 %h = embedding %input_ids, @embed : f32[B,S,8]
                 %r = select_rows %h, %logits_at : f32[B,L,8]
                 return %r as "logits"
               }
After          graph decode(%input_ids: i64[B,1], %logits_at: i64[B,1], @embed: f32[9,8]) {
                 %h = embedding %input_ids, @embed : f32[B,1,8]
                 %r = select_rows %h, %logits_at : f32[B,1,8]
                 return %r as "logits"
               }

`extend` and `prefill` are the traced graph under those names; `decode_few` is what `decode` is. It
pays where kernels of few rows are others: its forms, tiles and buffers are for its sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsc.ir.analyses import ANY, few_tokens
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph
from dsc.ir.interface import Guard
from dsc.ir.limits import BATCH, STEP, WANTED
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option

FEW, DECODE = "decode_few", "decode"
ENTRIES = (DECODE, "extend", "prefill")


@dataclass(frozen=True)
class SpecialiseEntries(Pass):
    """Split the entry `step` into the named entries."""

    entries: tuple[str, ...] = option(ENTRIES, among=ENTRIES)
    few: int = option(0, least=0)

    needs = frozenset({Stage.CANONICAL})

    def run(self, program: Program, report: PassReport) -> Program:
        """Substitute and rename; other programs pass unchanged."""
        step = program.entries.get("step")
        if step is None:
            return program
        most = program.symbols.get(BATCH)
        apart = 0 < self.few < (most.hi if most is not None else 0) and DECODE in self.entries
        names = (FEW, *self.entries) if apart else self.entries
        made = {name: replace(_specialised(step, name), name=name) for name in names}
        report.fire("specialise", len(made))
        declared = program.declaring(guards=guards(step, names, self.few))
        return replace(declared, entries=made)


def guards(step: Graph, entries: tuple[str, ...], few: int = 0) -> tuple[Guard, ...]:
    """The steps that each entry serves, by new tokens, and by sequences the one for `few`.

    `extend` serves up to the absorption break-even (`few_tokens`).
    """
    most = {FEW: 1, DECODE: 1, "extend": break_even(step) or None, "prefill": None}
    return tuple(Guard(name, most[name], few if name == FEW else None) for name in entries)


def break_even(step: Graph) -> int:
    """New tokens up to which attention over the latent costs fewer flops than expanding it."""
    for node in step.nodes:
        if node.op != "mla_attention":
            continue
        nope, latent = node["q_nope"].type.shape[3], node["latent"].type.shape[2]
        value = node.output.type.shape[3]
        if not (isinstance(nope, int) and isinstance(latent, int) and isinstance(value, int)):
            continue
        most = few_tokens(nope, value, latent)
        return most if most < ANY else 0
    return 0


def _specialised(step: Graph, name: str) -> Graph:
    env: dict[str, Dim] = {STEP: 1, WANTED: 1}
    return step.substitute(env) if name in (FEW, DECODE) else step
