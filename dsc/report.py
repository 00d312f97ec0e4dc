"""What report.json holds: what every pass did, and what each entry costs, layer by layer.

Costs (`dsc.ir.costs`) are read off the final program at stated points: sizes of its symbols.
Launches and memory are those of the plan that the backend made of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dsc.ir import regions
from dsc.ir.costs import Costs, Sizes, node_costs, step_sizes, total
from dsc.ir.graph import Graph, Node
from dsc.ir.interface import Storage
from dsc.ir.layers import by_layer, home, layer_of
from dsc.ir.limits import STEP, Limits
from dsc.ir.program import Program, is_causal_step
from dsc.ir.weights import source_types
from dsc.rewrite.manager import PassRecord
from dsc.runtime.plan import EntryPlan, Plan

CONTEXTS = (1024, 4096)
"""Tokens in the cache at the points where costs are stated."""
CHUNK = 512
"""New tokens of a sequence at those points, where an entry takes more than one."""


def build_report(
    program: Program,
    records: Sequence[PassRecord],
    seconds: Mapping[str, float],
    notes: Sequence[str],
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The report of a compile, as JSON values; without a plan it tells of no launches."""
    return {
        "seconds": dict(seconds),
        "passes": [r.as_dict() for r in records],
        "entries": {name: entry_report(program, name, plan) for name in program.entries},
        "notes": list(notes),
        "cache_bytes_per_token": cache_bytes(program),
        "parameters": parameter_count(program),
        "packed": packed_report(program),
    }


def replanned(report: Mapping[str, Any], program: Program, plan: Plan) -> dict[str, Any]:
    """The report of a program whose plan has become another."""
    entries = {name: entry_report(program, name, plan) for name in program.entries}
    return {**report, "entries": entries}


def packed_report(program: Program) -> dict[str, Any]:
    """Bytes of the weights that each rank packs: in all, and of each layer by what they are in."""
    layers: dict[str, Counter[str]] = {}
    for name, expr in program.weights.items():
        kind = f"{expr.type.dtype}{expr.type.format or ''}"
        layers.setdefault(layer_of(name), Counter())[kind] += cast(int, expr.type.nbytes)
    found = [
        {"layer": name, "bytes": kinds.total(), "formats": dict(kinds)}
        for name, kinds in layers.items()
    ]
    ranks, total = program.mesh.ranks, sum(kinds.total() for kinds in layers.values())
    return {"bytes": total, "ranks": ranks, "layers": found}


def entry_report(program: Program, name: str, plan: Plan | None = None) -> dict[str, Any]:
    """What one entry holds and costs: at the first point as a whole and by layer, at all in sum."""
    graph = program.entries[name]
    costs = node_costs(graph)
    found = [sizes_at(program, graph, context) for context in CONTEXTS]
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
        "layers": layer_reports(program, graph, costs, points[0]),
    }
    plans = [] if plan is None else plan.of(graph)
    if plans:
        entry |= {
            "launches": sum(len(p.launches) for p in plans),
            "arena_bytes": max(p.arena_bytes for p in plans),
            "arena_lower_bound": max(p.lower_bound for p in plans),
            "allocator": plans[0].allocator,
        }
        counts = launches_by_layer(graph, plans)
        for layer in entry["layers"]:
            layer["launches"] = counts.pop(layer["layer"], 0)
        entry["other_launches"] = sum(counts.values())
    return entry


def launches_by_layer(graph: Graph, plans: Sequence[EntryPlan]) -> dict[str, int]:
    """Launches for each part of a model; of what runs a graph as a whole, one `elsewhere`."""
    homes = {node.outputs[0].name: home(node) for node in graph.nodes}
    launches = (launch for plan in plans for launch in plan.launches)
    return dict(Counter(layer_of(homes.get(x.node, x.loc)) for x in launches))


def sizes_at(program: Program, graph: Graph, context: int) -> dict[str, int]:
    """Sizes of a graph's symbols at a point: one sequence, `context` tokens in its cache."""
    new = CHUNK if any(STEP in v.type.symbols for v in graph.inputs) else 1
    sizes = {STEP: new} if is_causal_step(graph) else {}
    return sizes | step_sizes(graph, 1, new, context, program.symbols)


def layer_reports(program: Program, graph: Graph, costs: Costs, at: Sizes) -> list[dict[str, Any]]:
    """Nodes and costs of each part of a model, in the order of the graph."""
    caches: Counter[str] = Counter()
    for state in program.states:
        caches[cache_layer(state.input)] += state.nbytes if state.storage.of_tokens else 0
    layers = []
    for name, nodes in by_layer(graph).items():
        number = name.rpartition("layers.")[2]
        found = {"layer": name, "nodes": len(nodes), "regions": region_names(nodes)}
        spent = total(nodes, costs, at)
        layers.append({**found, **spent, "cache_bytes_per_token": caches[number]})
    return layers


def region_names(nodes: Sequence[Node]) -> dict[str, int]:
    """How many fused regions of each name there are."""
    return dict(Counter(regions.name_of(n) for n in nodes if n.body is not None))


def parameter_count(program: Program) -> int:
    """Elements of all tensors that the weights of a program are made of, each counted once."""
    found = source_types(program.weights.values())
    return sum(cast(int, t.numel) for t in found.values())


def cache_layer(name: str) -> str:
    """The layer number in the name of a cache: `past.3.latent` is of layer 3."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else ""


def cache_bytes(program: Program) -> int:
    """Bytes that one token takes in all states."""
    return sum(s.nbytes for s in program.states if s.storage.of_tokens)


def state_bytes(program: Program, limits: Limits) -> int:
    """Bytes of all that a session holds, at most.

    Rows that a step writes in place may be padding, behind the context; caches that a step returns
    grown lie beside those that it was given.
    """
    context, page = limits.max_context, program.page or 1
    rows = {
        Storage.GROWN: 2 * context + limits.prefill_chunk,
        Storage.CONTIGUOUS: context + limits.prefill_chunk,
        Storage.PAGED: -(-context // page) * page,
        Storage.FIXED: 1,
    }
    held = sum(s.nbytes * rows.get(s.storage, s.rows) for s in program.states)
    return held * limits.max_batch
