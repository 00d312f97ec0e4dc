"""Cut the trace of a causal LM into its decoder layers, and check how they hang together.

A node belongs to the layer that its `loc` names. A node outside of all layers belongs to one all
the same when it views that layer's past, or makes its present; else it stands before the layers or
behind them. The interface of every segment is checked. It may read

- shared values: made outside of all layers, from no cache,
- its own caches, its own weights, and weights outside of all layers,
- ONE value of the segment before, the residual stream,

and it may give that value and its grown caches. So a segment can be moved to another layer by
renaming these. Anything else is `Irregular`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsc.frontends.layer_kinds import CACHE
from dsc.frontends.meta_run import Irregular
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.types import TensorType

HEAD, TAIL = -1, -2
"""Owners of what belongs to no layer: made before them, made from the last one's result."""


@dataclass(frozen=True)
class Cut:
    """A trace in parts; all nodes in the order of the trace.

    `before` and `behind` hold nodes of layers that stand outside of them: views of a past ahead of
    all layers, of a present behind them. `streams[n]` names the value that segment n hands on.
    """

    head: tuple[Node, ...]
    before: tuple[tuple[Node, ...], ...]
    segments: tuple[tuple[Node, ...], ...]
    behind: tuple[tuple[Node, ...], ...]
    tail: tuple[Node, ...]
    streams: tuple[str, ...]


def cut(graph: Graph, path: str) -> Cut:
    """Cut a trace into segments by `loc`, and check each interface. Raises `Irregular`."""
    inside = re.compile(re.escape(path) + r"\.(\d+)(?:\.|$)")
    layers = [int(m[1]) if (m := inside.match(node.loc)) else None for node in graph.nodes]
    last = max((i for i, layer in enumerate(layers) if layer is not None), default=0)
    owners = {v.name: int(m[2]) if (m := CACHE.fullmatch(v.name)) else HEAD for v in graph.inputs}
    ends = _ends(graph, layers)
    begun: set[str] = set()  # values that depend on the inside of a layer
    parts: dict[tuple[str, int], list[Node]] = {}
    for position, (node, layer) in enumerate(zip(graph.nodes, layers, strict=True)):
        read = {x.name for x in node.operands if isinstance(x, Value)}
        if layer is not None:
            part, owner = "segment", layer
        elif read & begun:
            owner = _single(ends[position], f"what {node.op} outside all layers leads to")
            part = "tail" if owner == TAIL else "behind"
        else:
            caches = {owners[name] for name in read} - {HEAD}
            owner = _single(caches or {HEAD}, f"the cache that {node.op} outside all layers reads")
            part = "before" if caches else "head" if position < last else "tail"
        owners |= {v.name: owner for v in node.outputs}
        if layer is not None or read & begun:
            begun |= {v.name for v in node.outputs}
        parts.setdefault((part, max(owner, 0)), []).append(node)

    depth = max((layer for layer in layers if layer is not None), default=-1) + 1
    streams = _streams(graph, path, owners, depth)
    head, tail = (tuple(parts.get((part, 0), ())) for part in ("head", "tail"))
    before, segments, behind = (
        tuple(tuple(parts.get((part, n), ())) for n in range(depth))
        for part in ("before", "segment", "behind")
    )
    return Cut(head, before, segments, behind, tail, streams)


def _single(found: set[int], what: str) -> int:
    if len(found) != 1:
        raise Irregular(f"{what} is not one: {sorted(found)}")
    return next(iter(found))


def _ends(graph: Graph, layers: Sequence[int | None]) -> list[set[int]]:
    """For every node, the layers whose `present` its results lead to; TAIL for another output.

    Only paths outside of layers count; a value that a layer reads leads to HEAD, which no node
    behind the layers may.
    """
    reached: dict[str, set[int]] = {v.name: set() for v in graph.values()}
    for name, output in zip(graph.output_names, graph.outputs, strict=True):
        cache = CACHE.fullmatch(name)
        reached.get(output.name, set()).add(int(cache[2]) if cache else TAIL)
    ends = []
    for node, layer in zip(reversed(graph.nodes), reversed(layers), strict=True):
        found = {n for v in node.outputs for n in reached[v.name]} if layer is None else {HEAD}
        ends.append(found)
        for x in node.operands:
            if isinstance(x, Value):
                reached[x.name] |= found
    return ends[::-1]


def _streams(graph: Graph, path: str, owners: dict[str, int], depth: int) -> tuple[str, ...]:
    """The one value that each layer hands on. Raises `Irregular` where layers share more."""
    weight = re.compile(re.escape(path) + r"\.(\d+)\.")
    handed: list[dict[str, TensorType]] = [{} for _ in range(depth)]

    def read(x: Operand, reader: int, what: str) -> None:
        if isinstance(x, Weight):
            own = weight.match(x.name)
            allowed = own is None or int(own[1]) == reader
        else:
            owner = owners[x.name]
            allowed = owner in (HEAD, reader)
            if not allowed and owner == (depth if reader == TAIL else reader) - 1:
                allowed = owner >= 0
                handed[owner][x.name] = x.type
        if not allowed:
            raise Irregular(f"{what} reads {x}, which belongs to another part")

    for node in graph.nodes:
        for x in node.operands:
            read(x, owners[node.outputs[0].name], f"{node.op} in {node.loc or 'the step'}")
    for name, output in zip(graph.output_names, graph.outputs, strict=True):
        cache = CACHE.fullmatch(name)
        if cache and (isinstance(output, Weight) or owners[output.name] != int(cache[2])):
            raise Irregular(f"the output {name} is not made by its layer")
        if not cache:
            read(output, TAIL, f"the output {name}")
    types = {t for values in handed for t in values.values()}
    names = [next(iter(values), "") for values in handed]
    inputs = {v.name for v in graph.inputs}
    if any(len(values) != 1 for values in handed) or len(types) != 1 or inputs & set(names):
        raise Irregular(f"the layers hand on {[sorted(values) for values in handed]}")
    return tuple(names)
