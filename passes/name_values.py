"""Name values by what they are: `%l3.q_a_proj`, `%l3.idx`, `%l3.latent`.

What           results get the number of their layer and the name of their module or operator;
               outputs get their public names. Nothing else changes.
Why it pays    a person can read the program, and the same model traced from two sources prints as
               the same text.
Preconditions  none; locations decide, so values without one are named by operator alone.
Before         graph main(%x: f32[B,4], @model.layers.3.mlp.up_proj.weight: f32[6,4]) {
                 %mul_7 = linear %x, @model.layers.3.mlp.up_proj.weight : f32[B,6]
                   loc "model.layers.3.mlp.up_proj"
                 %mul_8 = relu %mul_7 : f32[B,6] loc "model.layers.3.mlp"
                 %mul_9 = neg %mul_8 : f32[B,6]
                 return %mul_9 as "logits"
               }
After          graph main(%x: f32[B,4], @model.layers.3.mlp.up_proj.weight: f32[6,4]) {
                 %l3.up_proj = linear %x, @model.layers.3.mlp.up_proj.weight : f32[B,6]
                   loc "model.layers.3.mlp.up_proj"
                 %l3.relu = relu %l3.up_proj : f32[B,6] loc "model.layers.3.mlp"
                 %logits = neg %l3.relu : f32[B,6]
                 return %logits
               }
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.layers import layer_number
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport

_MODULES = frozenset({"linear", "rms_norm", "layer_norm", "embedding"})
_TELLING = {"mla_attention": "", "rope": "", "rms_norm": "kv"}
"""Readers that say what a part of a split is: its role in the attention, or this word."""
_CACHE = re.compile(r"\.(\w+)$")


@dataclass(frozen=True)
class NameValues(Pass):
    """Rename the values of every entry."""

    def run(self, program: Program, report: PassReport) -> Program:
        """The same program under readable names."""
        return program.map_entries(named)


def named(graph: Graph) -> Graph:
    """The graph with readable names; itself when it has them already."""
    inputs = {v.name for v in graph.inputs}
    names = GraphBuilder(taken=set(inputs))
    public = {
        x.name: n
        for x, n in zip(graph.outputs, graph.output_names, strict=True)
        if _plain(n) and n not in inputs
    }
    names.taken |= set(public.values())
    readers: dict[str, str] = {}
    for node in graph.nodes:
        for operand, value in zip(lookup(node.op).operands, node.inputs, strict=False):
            if node.op in _TELLING and value is not None:
                word = operand.name if node.op == "mla_attention" else _TELLING[node.op]
                if node.op == "rope":
                    word = "q_pe" if value.type.rank == 4 else "k_pe"
                readers.setdefault(value.name, word)
    chosen: dict[str, str] = {}
    for node in graph.nodes:
        for index, value in enumerate(node.outputs):
            given = public.get(value.name)
            role = readers.get(value.name) if node.op == "split" else None
            chosen[value.name] = given or names.fresh(_hint(node, role or _word(node, index)))
    if all(old == new for old, new in chosen.items()):
        return graph

    def new(x: Operand) -> Operand:
        return Value(chosen.get(x.name, x.name), x.type) if isinstance(x, Value) else x

    return graph.mapped(new)


def _plain(name: str) -> bool:
    return re.fullmatch(r"[\w.$-]+", name) is not None


def _hint(node: Node, word: str) -> str:
    """The layer's number and a word for the result."""
    layer = layer_number(node.loc)
    return word if layer is None else f"l{layer}.{word}"


def _word(node: Node, index: int) -> str:
    leaf = node.loc.rpartition(".")[2]
    if node.op in _MODULES and leaf.isidentifier():  # a number, or a line of a file, is no name
        return leaf
    results = traits_of(node.op).results
    if results:
        return results[index]
    if node.op == "rope":
        return "q_rope" if node.output.type.rank == 4 else "k_rope"
    if node.op == "append" and node.inputs[0] is not None:
        kind = _CACHE.search(node.inputs[0].name)
        return kind[1] if kind else "append"
    return node.op
