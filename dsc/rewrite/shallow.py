"""A deep program in few layers, and the check that the layers left out are like those that stay.

Layers are what `loc` calls `layers.N`. Of a run of layers that are one node for node (operators,
attributes, types, wiring, forms of weights; everything but names) the first two and the last stay:
the first may differ in what stands in front of it, the last in what follows. What read a value of
a layer that is gone reads the same value of the second layer of its run.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from dsc.ir.analyses import live, structural_hash
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.layers import layer_number
from dsc.ir.program import Program
from dsc.ir.weights import Source, WeightExpr
from dsc.rewrite.driver import substitute

_NUMBER = re.compile(r"\d+")
_FEWEST = 3


@dataclass
class Depth:
    """Which layers of a program stay, and which of them stands for each that does not."""

    layers: int = 0
    instead: dict[int, int] = field(default_factory=dict)
    forms: dict[int, tuple[WeightExpr, int]] = field(default_factory=dict)
    """Hashes of weight expressions modulo numbers in keys, by identity of the expression."""

    def __str__(self) -> str:
        kept = self.layers - len(self.instead)
        return f"{kept} of {self.layers} layers, the others node for node like these"

    def holds(self, program: Program) -> bool:
        """Whether every layer that is left out is still like the one that stands for it."""
        found = self.signatures(program)
        return all(found[gone] == found[kept] for gone, kept in self.instead.items())

    def signatures(self, program: Program) -> dict[int, tuple[Hashable, ...]]:
        """What each layer is, in all entries, modulo names."""
        found: dict[int, list[Hashable]] = {}
        for graph in program.entries.values():
            own: dict[int, list[Hashable]] = {}
            for layer, line in _lines(graph, program, self):
                own.setdefault(layer, []).append(line)
            for layer, lines in own.items():
                found.setdefault(layer, []).append((graph.name, tuple(lines)))
        return {layer: tuple(lines) for layer, lines in sorted(found.items())}

    def form(self, expr: WeightExpr) -> int:
        """A hash of a weight expression, numbers in the keys of its sources left out."""
        known = self.forms.get(id(expr))
        if known is None:
            if isinstance(expr, Source):
                key = hash((_NUMBER.sub("#", expr.key), expr.type))
            else:
                key = hash((expr.op, expr.attrs, tuple(map(self.form, expr.args)), expr.type))
            known = self.forms[id(expr)] = (expr, key)
        return known[1]


def _lines(graph: Graph, program: Program, depth: Depth) -> Iterator[tuple[int, Hashable]]:
    """The nodes of all layers, each as (layer, what it is)."""
    made: dict[str, Hashable] = {
        v.name: ("input", _NUMBER.sub("#", v.name), v.type) for v in graph.inputs
    }
    inside: dict[str, tuple[int, int]] = {}
    counts: dict[int, int] = {}
    for node in graph.nodes:
        layer = layer_number(node.loc)

        def read(x: Operand | None, layer: int | None = layer) -> Hashable:
            if x is None:
                return None
            if isinstance(x, Weight):
                return ("weight", x.type, depth.form(program.weights[x.name]))
            if x.name not in inside:
                return made[x.name]
            where, place = inside[x.name]
            apart = None if layer is None else where - layer
            return (apart, place) if apart in (0, -1) else ("layer", where, place)

        attrs = tuple(
            (k, structural_hash(v) if isinstance(v, Graph) else v) for k, v in node.attrs.items()
        )
        line = (node.op, repr(attrs), tuple(map(read, node.inputs)),
                tuple(v.type for v in node.outputs))  # fmt: skip
        if layer is None:
            made.update((v.name, (hash(line), i)) for i, v in enumerate(node.outputs))
            continue
        for v in node.outputs:
            counts[layer] = counts.get(layer, -1) + 1
            inside[v.name] = (layer, counts[layer])
        yield layer, line


def shallow(program: Program) -> tuple[Program, Depth]:
    """The program without layers that others stand for; itself when there are none."""
    depth = Depth()
    found = depth.signatures(program)
    depth.layers = len(found)
    for _, group in groupby(found, key=found.__getitem__):
        run = list(group)
        if len(run) > _FEWEST:
            depth.instead |= dict.fromkeys(run[2:-1], run[1])
    if not depth.instead:
        return program, depth
    return program.map_entries(lambda g: _without(g, depth.instead)).pruned(), depth


def _without(graph: Graph, instead: Mapping[int, int]) -> Graph:
    """The graph without the layers in `instead`, their caches and what only they need."""
    by_place: dict[tuple[int, int], Value] = {}
    moved: dict[str, Value] = {}
    counts: dict[int, int] = {}
    nodes: list[Node] = []

    for node in graph.nodes:
        layer = layer_number(node.loc)
        if layer is None:
            nodes.append(substitute(node, moved))
            continue
        for v in node.outputs:
            counts[layer] = counts.get(layer, -1) + 1
            if layer in instead:
                moved[v.name] = by_place[instead[layer], counts[layer]]
            by_place[layer, counts[layer]] = v
        if layer not in instead:
            nodes.append(substitute(node, moved))
    gone = _states_of(graph, set(instead))
    lost = {o for o, i in graph.aliases if graph.inputs[i].name in gone}
    inputs = tuple(v for v in graph.inputs if v.name not in gone)
    kept = [i for i in range(len(graph.outputs)) if i not in lost]
    outputs = [moved.get(graph.outputs[i].name, graph.outputs[i]) for i in kept]
    index = {v.name: i for i, v in enumerate(inputs)}
    aliases = [
        (kept.index(o), index[graph.inputs[i].name]) for o, i in graph.aliases if o not in lost
    ]
    names = tuple(graph.output_names[i] for i in kept)
    made = Graph(graph.name, graph.inputs, tuple(nodes), tuple(outputs), names, tuple(aliases))
    return replace(live(replace(made, aliases=())), inputs=inputs, aliases=tuple(aliases))


def _states_of(graph: Graph, layers: set[int]) -> set[str]:
    """Inputs carried from step to step that, also through views, these layers alone read."""
    origins = {graph.inputs[i].name: {graph.inputs[i].name} for _, i in graph.aliases}
    readers: dict[str, set[int]] = {name: set() for name in origins}
    for node in graph.nodes:
        layer = layer_number(node.loc)
        states = {s for x in node.operands for s in origins.get(x.name, ())}
        if layer is None:
            origins |= {v.name: states for v in node.outputs if states}
        for state in states if layer is not None else ():
            readers[state].add(layer)  # type: ignore[arg-type]
    return {state for state, found in readers.items() if found and found <= layers}


def alike(deep: Program, small: Program, depth: Depth) -> bool:
    """Whether the layers of a shrunk program are those of the deep one, operator by operator."""
    return deep.entries.keys() == small.entries.keys() and all(
        _skeleton(graph, depth) == _skeleton(small.entries[name], depth)
        for name, graph in deep.entries.items()
    )


def _skeleton(graph: Graph, depth: Depth) -> dict[int, list[tuple[Hashable, ...]]]:
    found: dict[int, list[tuple[Hashable, ...]]] = {}
    for node in graph.nodes:
        layer = layer_number(node.loc)
        if layer is not None and layer not in depth.instead:
            body = () if node.body is None else tuple(n.op for n in node.body.walk())
            line = (node.op, body, node.loc, tuple(node.attrs), len(node.inputs),
                    tuple(v.type.dtype for v in node.outputs))  # fmt: skip
            found.setdefault(layer, []).append(line)
    return found
