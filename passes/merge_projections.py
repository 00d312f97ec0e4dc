"""Merge linears that read the same value into one, over their weights' rows one after another.

What           linears of one input (q_a and kv_a; gate and up) become one linear over a weight
               expression that concatenates rows, and a split of the result.
Why it pays    the input is read once and one larger GEMM fills the machine better than two small
               ones: for V3 a decode step has 2 kernels fewer in each layer.
Preconditions  stage CANONICAL or OPTIMIZED. The weights are weights of the program, read by these
               linears alone in every entry (else they would be stored twice), and kept in one
               element type or format, whose blocks stay whole. Where some have a bias, the others
               get one of zeros.
Before         graph main(%x: f32[N,8], @m.gate.weight: f32[4,8], @m.up.weight: f32[6,8]) {
                 %gate = linear %x, @m.gate.weight : f32[N,4] loc "m.gate"
                 %up = linear %x, @m.up.weight : f32[N,6] loc "m.up"
                 %a, %b = split %up {sizes=[2,4]} : f32[N,2], f32[N,4]
                 return %gate, %a, %b
               }
After          graph main(%x: f32[N,8], @m.gate-up.weight: f32[10,8]) {
                 %gate-up = linear %x, @m.gate-up.weight : f32[N,10] loc "m.gate"
                 %gate, %a, %b = split %gate-up {axis=-1, sizes=[4,2,4]}
                   : f32[N,4], f32[N,2], f32[N,4] loc "m.gate"
                 return %gate, %a, %b
               }
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsc.ir.analyses import Use, uses, weight_uses
from dsc.ir.dims import Dim
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Node, Value, Weight
from dsc.ir.ops.shape import axis_of
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import WeightExpr, apply, kept_in, stored_type
from dsc.passes._in_format import Dequantised, in_format
from dsc.rewrite.base import Pass, PassReport

Names = tuple[str, ...]
RULE = "merge"


@dataclass(frozen=True)
class MergeProjections(Pass):
    """Merge sibling linears in every entry."""

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    tolerance = 1e-5  # a wider GEMM may sum in another order

    def run(self, program: Program, report: PassReport) -> Program:
        """Find the groups of each entry, keep those that are whole in all of them, and merge."""
        found = {name: list(_siblings(g)) for name, g in program.entries.items()}
        times = Counter(key for groups in found.values() for _, key in groups)
        reads = weight_uses(program.entries.values())
        refused = {key: _refusal(program, key, times[key], reads) for key in times}
        places = {key: nodes[0].loc for groups in found.values() for nodes, key in groups}
        for key, why in refused.items():
            if why:
                report.miss(RULE, places[key], why)
        merge = _Merge(program)
        entries: dict[str, Graph] = {}
        for name, graph in program.entries.items():
            chosen = [nodes for nodes, key in found[name] if not refused[key]]
            entries[name] = merge.rewritten(graph, chosen) if chosen else graph
            if chosen:
                report.fire(RULE, len(chosen))
                report.facts[name] = {"linears": [_linears(graph), _linears(entries[name])]}
        if not merge.added:
            return program
        return replace(program, entries=entries).with_weights(merge.added).pruned()


def _linears(graph: Graph) -> int:
    return sum(n.op == "linear" for n in graph.nodes)


def _siblings(graph: Graph) -> Iterator[tuple[list[Node], Names]]:
    """Linears with weights that read one value, and the names of their weights and biases."""
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "linear":
            continue
        x, *parameters = node.operands
        if all(isinstance(w, Weight) for w in parameters):
            groups.setdefault(str(x), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            yield nodes, tuple(x.name for n in nodes for x in n.operands[1:])


def _refusal(program: Program, key: Names, times: int, reads: Mapping[str, Sequence[Use]]) -> str:
    """Why these weights cannot become one; empty when they can."""
    if len(set(key)) != len(key):
        return f"one weight is read twice among {', '.join(key)}"
    for name in key:
        if len(reads[name]) != times:
            return f"@{name} is also read elsewhere"
    matrices = {name: e for name in key if (e := program.weights[name]).type.rank == 2}
    stored = {name: kind for name, expr in matrices.items() if (kind := kept_in(expr))}
    if len(set(stored.values())) > 1:
        shown = ", ".join(f"@{name} in {kind}" for name, kind in stored.items())
        return f"the weights are kept in different forms: {shown}"
    return _lost(list(matrices.values())) if any(map(stored_type, matrices.values())) else ""


def _lost(parts: Sequence[WeightExpr]) -> str:
    """Why weights that could stay in codes could not as one; empty where that changes nothing."""
    try:
        for part in parts:
            in_format(part)
    except Dequantised:
        return ""
    try:
        in_format(apply("concat", *parts, axis=0))
    except Dequantised as problem:
        return f"the weights are kept in codes, and {problem}"
    return ""


@dataclass
class _Merge:
    """The rewriting of entries that share the merged weights."""

    program: Program
    added: dict[str, WeightExpr] = field(default_factory=dict)

    def rewritten(self, graph: Graph, groups: Sequence[Sequence[Node]]) -> Graph:
        """The graph with each group as one linear and one split, where its first node stood."""
        first = {id(nodes[0]): nodes for nodes in groups}
        gone = {id(n) for nodes in groups for n in nodes}
        inner = _inner_splits(graph, gone)
        gone |= {id(n) for n in inner.values()}
        b = GraphBuilder(graph.name)
        b.taken = {v.name for v in graph.values()}
        for node in graph.nodes:
            if id(node) in first:
                self._emit(b, first[id(node)], inner)
            elif id(node) not in gone:
                b.nodes.append(node)
        return graph.with_nodes(b.nodes)

    def _emit(self, b: GraphBuilder, nodes: Sequence[Node], inner: Mapping[str, Node]) -> None:
        """One linear, and one split into the results, or into what splits made of them."""
        b.loc = nodes[0].loc
        weight, bias = self._weights(nodes)
        hint = _joined([n.output.name for n in nodes])
        (y,) = b.call("linear", nodes[0].inputs[0], weight, bias, hint=hint)
        parts: list[Value] = []
        for node in nodes:
            split = inner.get(node.output.name)
            parts += (node.output,) if split is None else split.outputs
        sizes: tuple[Dim, ...] = tuple(v.type.shape[-1] for v in parts)
        attrs = Attrs({"axis": -1, "sizes": sizes})
        b.nodes.append(Node("split", (y,), attrs, tuple(parts), b.loc))

    def _weights(self, nodes: Sequence[Node]) -> tuple[Weight, Weight | None]:
        """The merged weight and bias of a group, declared once for all entries."""
        merged = self._concat([n.operands[1].name for n in nodes])
        biases = [n.operands[2].name if len(n.operands) > 2 else None for n in nodes]
        if not any(biases):
            return merged, None
        known = [name for name in biases if name is not None]
        zeros = [_zeros(n) for n in nodes]
        exprs = [
            zero if name is None else self.program.weights[name]
            for name, zero in zip(biases, zeros, strict=True)
        ]
        return merged, self._concat(known, exprs)

    def _concat(self, names: Sequence[str], exprs: Sequence[WeightExpr] | None = None) -> Weight:
        parts = exprs or [self.program.weights[name] for name in names]
        expr = apply("concat", *parts, axis=0)
        name = _joined(names)
        while self.added.get(name, expr) != expr or name in self.program.weights:
            name += "_"
        self.added[name] = expr
        return Weight(name, expr.type)


def _zeros(node: Node) -> WeightExpr:
    weight = node.operands[1].type
    return apply("full", shape=weight.shape[:1], value=0.0, dtype=weight.dtype)


def _inner_splits(graph: Graph, merged: set[int]) -> dict[str, Node]:
    """Splits of the last axis that alone read the result of a merged linear, by its name."""
    found: dict[str, Node] = {}
    read = uses(graph)
    for node in graph.nodes:
        if id(node) not in merged:
            continue
        readers = [n for n, _ in read[node.output.name]]
        reader = readers[0] if len(readers) == 1 else None
        if reader is None or reader.op != "split":
            continue
        last = node.output.type.rank - 1
        if axis_of(reader.attrs["axis"], last + 1) == last:
            found[node.output.name] = reader
    return found


def _joined(names: Sequence[str]) -> str:
    """`m.gate.weight` and `m.up.weight` as `m.gate-up.weight`."""
    parts = [name.split(".") for name in names]
    head = 0
    while all(len(p) > head + 1 and p[head] == parts[0][head] for p in parts):
        head += 1
    tail = 0
    while all(len(p) > head + tail + 1 and p[-1 - tail] == parts[0][-1 - tail] for p in parts):
        tail += 1
    middle = "-".join(".".join(p[head : len(p) - tail]) for p in parts)
    return ".".join([*parts[0][:head], middle, *parts[0][len(parts[0]) - tail :]])
