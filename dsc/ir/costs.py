"""What nodes cost at given sizes: bytes, operations, and the parameters that a step touches.

Bytes count every operand and result of every kernel once; of a table or of stacked experts only the
part that a step of that size can touch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsc.ir.analyses import Cost, cost, elements_taken
from dsc.ir.dims import Range, evaluate
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.limits import BATCH, PAST, STEP, WANTED, cache_sizes
from dsc.ir.paging import page_rows

Sizes = Mapping[str, int]
Costs = Mapping[str, Cost]


def step_sizes(
    graph: Graph, batch: int, new: int, context: int, ranges: Mapping[str, Range] | None = None
) -> dict[str, int]:
    """Sizes of a graph's symbols: `new` tokens of `batch` sequences with `context` in the cache.

    Of pages there are as many as hold them. A size outside of its range is the nearest inside: a
    capacity has a lower bound of its own, a past an upper one.
    """
    wanted = {BATCH: batch, STEP: new, WANTED: 1, PAST: context}
    wanted |= cache_sizes(batch, context + new, page_rows(graph) or 1)
    symbols = sorted({s for v in graph.values() for s in v.type.symbols})
    sizes = {s: wanted.get(s, 1) for s in symbols}
    return {s: ranges[s].nearest(n) if ranges and s in ranges else n for s, n in sizes.items()}


def node_costs(graph: Graph) -> Costs:
    """The cost of each node, by the name of its first result; equal nodes are costed once."""
    memo: dict[tuple[Any, ...], Cost] = {}
    costs = {}
    for node in graph.nodes:
        types = tuple(None if x is None else (type(x), x.type) for x in node.inputs)
        key = (node.op, types, node.attrs, tuple(v.type for v in node.outputs))
        if key not in memo:
            memo[key] = cost(node)
        costs[node.outputs[0].name] = memo[key]
    return costs


def total(nodes: Sequence[Node], costs: Costs, at: Sizes) -> dict[str, int]:
    """Bytes, operations and parameters of some nodes at the given sizes.

    `parameters` are the weight elements that such a step reads, each counted once: of an embedding
    the rows of its tokens, of stacked experts as many as the tokens can choose.
    """
    sums = {"read_bytes": 0, "written_bytes": 0, "weight_bytes": 0, "flops": 0}
    touched: dict[Weight, float] = {}
    for node in nodes:
        found = costs[node.outputs[0].name]
        sums["read_bytes"] += evaluate(found.read, at)
        sums["written_bytes"] += evaluate(found.written, at)
        sums["flops"] += evaluate(found.flops, at)
        for weight, share in weights_read(node, at):
            sums["weight_bytes"] += round(evaluate(weight.type.nbytes, at) * share)
            touched[weight] = min(1.0, touched.get(weight, 0.0) + share)
    parameters = sum(round(evaluate(w.type.numel, at) * share) for w, share in touched.items())
    return {**sums, "parameters": parameters}


def weights_read(
    node: Node, at: Sizes, outer: Mapping[str, Weight] | None = None
) -> Iterator[tuple[Weight, float]]:
    """The weights that a node reads, those of its body included, and the share of each."""
    if node.body is not None:
        inner = dict(zip((v.name for v in node.body.inputs), node.inputs, strict=True))
        known = {k: _weight(x, outer or {}) for k, x in inner.items()}
        for each in node.body.nodes:
            yield from weights_read(each, at, {k: w for k, w in known.items() if w is not None})
        return
    for index, operand in enumerate(node.inputs):
        weight = _weight(operand, outer or {})
        if weight is not None:
            yield weight, _share(node, index, at)


def _weight(operand: Value | Weight | None, outer: Mapping[str, Weight]) -> Weight | None:
    if isinstance(operand, Weight) or operand is None:
        return operand
    return outer.get(operand.name)


def _share(node: Node, index: int, at: Sizes) -> float:
    """The part of an operand that a node reads: of a table its rows, of experts the chosen."""
    operand, taken = node.inputs[index], elements_taken(node, index)
    if taken is None:
        return 1.0
    assert operand is not None
    return min(1.0, evaluate(taken, at) / max(1, evaluate(operand.type.numel, at)))
