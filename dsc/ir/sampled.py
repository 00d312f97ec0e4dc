"""A causal language model whose entries choose tokens, beside the logits that they give."""

from __future__ import annotations

from dataclasses import replace

from dsc.ir.graph import Graph, GraphBuilder, Value
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType

SAMPLING, SEEDS, LOGITS, IDS = "sampling", "seeds", "logits", "ids"
SAMPLE = "sample"
"""The operator, and what its launches are known by: who wants no ids leaves them out."""


def giving_ids(program: Program) -> Program:
    """The program whose entries also give `ids`, the tokens that `sampling` and `seeds` choose."""
    return program.map_entries(_giving) if program.is_causal_lm else program


def _giving(graph: Graph) -> Graph:
    """The entry with the choice behind its logits; itself where it has none, or ids already."""
    names = {v.name for v in graph.values()} | {*graph.output_names}
    if LOGITS not in graph.output_names or names & {SAMPLING, SEEDS, IDS}:
        return graph
    logits = graph.outputs[graph.output_names.index(LOGITS)]
    shape = logits.type.shape
    if len(shape) != 3 or not isinstance(shape[-1], int) or not logits.type.dtype.is_float:
        return graph
    options = Value(SAMPLING, TensorType(DType.f32, (shape[0], 4)))
    seeds = Value(SEEDS, TensorType(DType.i64, (shape[0], 2)))
    builder = GraphBuilder(graph.name, taken=names | {SAMPLING, SEEDS})
    (ids,) = builder.call(SAMPLE, logits, options, seeds, hint=IDS)
    return replace(
        graph,
        inputs=(*graph.inputs, options, seeds),
        nodes=(*graph.nodes, *builder.nodes),
        outputs=(*graph.outputs, ids),
        output_names=(*graph.output_names, IDS),
    )
