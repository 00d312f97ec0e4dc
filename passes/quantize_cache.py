"""Keep the rows of latent caches as codes, each with its scales behind it.

What           a state of tokens that attention reads as a latent is stored in FP8 or as 8-bit
               integers, a scale in fp32 for each `group` elements of a row: where new rows are
               placed they become codes, and attention reads what codes stand for. Scales of FP8
               are powers of two: 512 codes, 4 scales and 64 rope keys in bf16 are 656 bytes, as in
               DeepSeek-V3.2.
Why it pays    a long context holds, and reads, not much more than half of the bytes.
Preconditions  stage CANONICAL or OPTIMIZED, and the backend's kernels read such states. Rows of the
               state go where it is updated and into operands that may be in a format, and nowhere
               else, in every entry. Of rope keys nobody declares that: they stay numbers.
Before         graph main(%q: f32[B,S,2,6], %r: f32[B,S,2,2], %new: f32[B,S,6], %rope: f32[B,T,2],
                   %past: f32[B,P,6], %n: i64[B]) {
                 %c = append %past, %new, %n : f32[B,P+S,6]
                 %k = slice %rope {axis=1, start=0, end=P+S} : f32[B,P+S,2]
                 %o = latent_attention %q, %r, %c, %k, %n {scale=0.5} : f32[B,S,2,6]
                 return %o, %c as "present" updates %past
               }
After          graph main(%q: f32[B,S,2,6], %r: f32[B,S,2,2], %new: f32[B,S,6], %rope: f32[B,T,2],
                   %past: f8e4m3{1x128,f32,behind}[B,P,6], %n: i64[B]) {
                 %c = append %past, %new, %n : f8e4m3{1x128,f32,behind}[B,P+S,6]
                 %k = slice %rope {axis=1, start=0, end=P+S} : f32[B,P+S,2]
                 %o = latent_attention %q, %r, %c, %k, %n {scale=0.5} : f32[B,S,2,6]
                 return %o, %c as "present" updates %past
               }
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsc.ir.analyses import uses
from dsc.ir.formats import CACHED, Format
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import rebuild

RULE = "quantise"
GROUP = 128
SCALES = DType.f32


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Store all such states as codes, or none."""

    codes: str = option(CACHED[0], among=CACHED)
    group: int = option(GROUP, least=1)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})

    def run(self, program: Program, report: PassReport) -> Program:
        """Retype the states and what updates them; types of all else stay."""
        graphs = program.entries.values()
        latents = {v.name for graph in graphs for v in _latents(graph)}
        misses = [miss for graph in graphs for miss in _obstacles(graph, latents)]
        for where, why, culprit in misses:
            report.miss(RULE, where, why, (culprit,))
        if misses or not latents:
            return program
        report.fire(RULE, len(latents), sorted(latents))
        entries = {
            name: rebuild(graph, lambda *_: None, [self._stored(v, latents) for v in graph.inputs])
            for name, graph in program.entries.items()
        }
        states = tuple(
            replace(s, type=self._coded(s.type)) if s.input in latents else s
            for s in program.interface.states
        )
        interface = replace(program.interface, states=states)
        return replace(program, entries=entries, interface=interface)

    def comparable(self, before: Program, after: Program) -> Program:
        """With rows as they were: what codes say of them is for the operators to prove."""

        def plain(graph: Graph) -> Graph:
            known = {v.name: v for v in before.entries[graph.name].inputs}
            return rebuild(graph, lambda *_: None, [known[v.name] for v in graph.inputs])

        entries = {name: plain(graph) for name, graph in after.entries.items()}
        return replace(after, entries=entries, interface=before.interface)

    def _stored(self, value: Value, latents: set[str]) -> Value:
        return Value(value.name, self._coded(value.type)) if value.name in latents else value

    def _coded(self, t: TensorType) -> TensorType:
        format = Format((1, self.group), SCALES, behind=True)
        return TensorType(DType(self.codes), t.shape, format)


def _latents(graph: Graph) -> Iterator[Value]:
    """The inputs whose rows, with those that a step adds, attention may read in a format."""
    found = uses(graph)
    for output, source in graph.aliases:
        state, grown = graph.inputs[source], graph.outputs[output]
        if state.type.format is None and state.type.dtype.is_float:
            if any(_reads_formats(node, i) for node, i in found[grown.name]):
                yield state


def _obstacles(graph: Graph, latents: set[str]) -> Iterator[tuple[str, str, str]]:
    """Where, and why, rows of these states must stay numbers in an entry."""
    found = uses(graph)
    updates = {graph.inputs[i].name: graph.outputs[o].name for o, i in graph.aliases}
    for state in (v for v in graph.inputs if v.name in latents):
        grown = updates.get(state.name, state.name)
        for name, takes in ((state.name, _places), (grown, _reads_formats)):
            for node, i in found[name]:
                if node is not None and not takes(node, i):
                    yield node.loc or graph.name, f"{node.op} reads rows of {state}", name
                if node is None and name == state.name:
                    yield graph.name, f"{state} is a result as it came", name


def _places(node: Node, index: int) -> bool:
    """Whether an operator only puts new rows among those of an operand."""
    name = lookup(node.op).operand_names(len(node.inputs))[index]
    return name in traits_of(node.op).into.values()


def _reads_formats(node: Node | None, index: int) -> bool:
    """Whether an operator reads an operand also in a format, as numbers."""
    if node is None:
        return False
    name = lookup(node.op).operand_names(len(node.inputs))[index]
    return name in traits_of(node.op).stored and not _places(node, index)
