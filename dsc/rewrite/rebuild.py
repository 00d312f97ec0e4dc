"""Rebuild a graph node by node, replacing some: for passes that look at one operator at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value

Operands = tuple[Operand | None, ...]
Rewrite = Callable[[GraphBuilder, Node, Operands], Sequence[Operand] | None]


def rebuild(graph: Graph, rewrite: Rewrite, inputs: Sequence[Value] | None = None) -> Graph:
    """The graph with each node passed through `rewrite(builder, node, operands)`.

    `rewrite` appends what it likes to the builder and returns the operands that take the place of
    the node's results, or `None` to keep the node. Types after a change are inferred again. Graph
    inputs may be given anew (same names). Returns `graph` itself when nothing changed.
    """
    builder = GraphBuilder(graph.name)
    builder.taken = {v.name for v in graph.values()}
    given = graph.inputs if inputs is None else tuple(inputs)
    changed = given != graph.inputs
    mapped: dict[str, Operand] = {v.name: v for v in given}
    for node in graph.nodes:
        operands = tuple(mapped[x.name] if isinstance(x, Value) else x for x in node.inputs)
        builder.loc = node.loc
        results = rewrite(builder, node, operands)
        if results is None:
            results = node.outputs
            if operands == node.inputs:
                builder.nodes.append(node)
            else:
                results = builder.again(node, operands)
        else:
            changed = True
        mapped.update(zip((v.name for v in node.outputs), results, strict=True))
    if not changed:
        return graph
    outputs = tuple(mapped[x.name] if isinstance(x, Value) else x for x in graph.outputs)
    return replace(graph, inputs=given, nodes=tuple(builder.nodes), outputs=outputs)
