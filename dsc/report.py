"""What report.json holds: what every pass did, and what each entry costs, layer by layer.

Costs are read off the final program at stated points: sizes of its symbols. Bytes count every
operand and result of every kernel once; of a table or of stacked experts only the part that a step
of that size can touch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from dsc.ir import regions
from dsc.ir.analyses import Cost, cost
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.paging import page_rows
from dsc.ir.program import Program
from dsc.ir.weights import sources
from dsc.rewrite.manager import PassRecord
from dsc.runtime.caches import cache_specs

CONTEXTS = (1024, 4096)
"""Tokens in the cache at the points where costs are stated."""
NEW_TOKENS = {"decode": 1}
"""Tokens of one step by entry; `CHUNK` for the others."""
CHUNK = 512
TABLES = {"embedding": 1, "gather": 0, "take": 0, "select_rows": 0}
"""Operators that read rows of one operand, and which operand that is."""
EXPERTS = {"experts": (1, (3, 4)), "grouped_linear": (0, (1,))}
"""Operators over stacked experts: the operand that counts the choices, the stacked operands."""

_NUMBERED = re.compile(r"(?:.*?\.)?layers\.\d+(?=\.|$)")

Sizes = Mapping[str, int]
Costs = Mapping[str, Cost]


def build_report(
    program: Program,
    records: Sequence[PassRecord],
    seconds: Mapping[str, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The report of a compile, as JSON values."""
    return {
        "seconds": dict(seconds),
        "passes": [r.as_dict() for r in records],
        "entries": {name: entry_report(program, name) for name in program.entries},
        "notes": list(notes),
        "cache_bytes_per_token": cache_bytes(program),
        "parameters": parameter_count(program),
    }


def entry_report(program: Program, name: str) -> dict[str, Any]:
    """What one entry holds and costs: at the first point as a whole and by layer, at all in sum."""
    graph = program.entries[name]
    costs = node_costs(graph)
    found = [sizes_at(program, graph, name, context) for context in CONTEXTS]
    points = list({tuple(sorted(at.items())): at for at in found}.values())
    sums = [total(graph.nodes, costs, at) for at in points]
    first = sums[0]
    entry: dict[str, Any] = {
        "nodes": len(graph.nodes),
        "regions": region_names(graph.nodes),
        "at": points[0],
        "weight_bytes": first["weight_bytes"],
        "activation_bytes": first["read_bytes"] + first["written_bytes"],
        "flops": first["flops"],
        "parameters": first["parameters"],
        "points": [{"at": at, **found} for at, found in zip(points, sums, strict=True)],
        "layers": layer_reports(graph, costs, points[0]),
    }
    if name in program.memory:
        plan = program.memory[name]
        entry |= {"arena_bytes": plan.size, "arena_lower_bound": plan.lower_bound}
    return entry


def sizes_at(program: Program, graph: Graph, name: str, context: int) -> dict[str, int]:
    """Sizes of a graph's symbols at a point: one sequence, `context` tokens in its cache."""
    new = NEW_TOKENS.get(name, CHUNK)
    wanted = {"B": 1, "S": new, "L": 1, "P": context, "C": context + new}
    blocks = -(-(context + new) // (page_rows(graph) or 1))
    wanted |= {"M": blocks, "N": blocks}
    sizes = {"S": new} if is_causal(graph) else {}
    for symbol in sorted({s for v in graph.values() for s in v.type.symbols}):
        known = program.symbols.get(symbol)
        size = wanted.get(symbol, 1)
        # A capacity has a lower bound of its own, a past an upper one; the point moves with them.
        sizes[symbol] = size if known is None else min(max(size, known.lo), known.hi)
    return sizes


def layer_reports(graph: Graph, costs: Costs, at: Sizes) -> list[dict[str, Any]]:
    """Nodes and costs of each part of a model, in the order of the graph."""
    caches: Counter[str] = Counter()
    for spec in cache_specs(graph):
        caches[cache_layer(spec.input.name)] += cache_width(spec.input)
    layers = []
    for name, nodes in by_layer(graph).items():
        number = name.rpartition("layers.")[2]
        found = {"layer": name, "nodes": len(nodes), "regions": region_names(nodes)}
        spent = total(nodes, costs, at)
        layers.append({**found, **spent, "cache_bytes_per_token": caches[number]})
    return layers


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
    types = [None if x is None else x.type for x in node.inputs]
    operand = types[index]
    assert operand is not None
    if TABLES.get(node.op) == index:
        rows = evaluate(node.output.type.numel, at) / max(1, evaluate(operand.numel, at))
        return min(1.0, rows)
    if node.op in EXPERTS and index in EXPERTS[node.op][1]:
        choices = types[EXPERTS[node.op][0]]
        assert choices is not None
        counted = choices.numel if node.op == "experts" else choices.shape[0]
        return min(1.0, evaluate(counted, at) / max(1, evaluate(operand.shape[0], at)))
    return 1.0


def region_names(nodes: Sequence[Node]) -> dict[str, int]:
    """How many fused regions of each name there are."""
    return dict(Counter(regions.name_of(n) for n in nodes if n.body is not None))


def by_layer(graph: Graph) -> dict[str, list[Node]]:
    """The nodes of each part of a model, by the module path that tells parts apart."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        found.setdefault(layer_of(home(node)), []).append(node)
    return found


def home(node: Node) -> str:
    """The module path under which a node counts: its own.

    A region over several layers lies in none of them; it counts where its first node does that
    lies in one.
    """
    if node.body is None or _NUMBERED.match(node.loc):
        return node.loc
    return next((n.loc for n in node.body.nodes if _NUMBERED.match(n.loc)), node.loc)


def layer_of(loc: str) -> str:
    """The part of a model that a module path lies in: its numbered layer, or the path itself.

    >>> layer_of("model.layers.3.self_attn.q_a_proj"), layer_of("model.norm"), layer_of("")
    ('model.layers.3', 'model.norm', 'elsewhere')
    """
    found = _NUMBERED.match(loc)
    return found[0] if found else loc or "elsewhere"


def parameter_count(program: Program) -> int:
    """Elements of all tensors that the weights of a program are made of, each counted once."""
    found = {s.key: s.type for e in program.weights.values() for s in sources(e)}
    return sum(cast(int, t.numel) for t in found.values())


def is_causal(graph: Graph) -> bool:
    """Whether a graph is a step of a causal language model."""
    return {"input_ids", "lengths"} <= {v.name for v in graph.inputs}


def cache_layer(name: str) -> str:
    """The layer number in the name of a cache: `past.3.latent` is of layer 3."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else ""


def cache_width(value: Value) -> int:
    """Bytes that one token takes in a cache [B, rows, width]."""
    elements = 1
    for dim in value.type.shape[2:]:
        elements *= cast(int, dim)
    return elements * value.type.dtype.itemsize


def cache_bytes(program: Program) -> int:
    """Bytes of all caches that one token takes."""
    graph = next(iter(program.entries.values()))
    return sum(cache_width(spec.input) for spec in cache_specs(graph))
