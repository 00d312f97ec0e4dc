"""What a run of an entry moved and computed: the IR's cost functions at the run's real sizes.

Real means: of a cache with room for C rows those that hold tokens (a batch of different lengths
counts its mean), of stacked experts those that the tokens chose where the backend tells, else at
most as many as were chosen. Attention counts every row it may see for every new token, the upper
triangle of a prompt's own tokens included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsc.ir.analyses import Cost, elements_read, storage_roots
from dsc.ir.costs import Sizes, node_costs, weights_read
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.layers import home
from dsc.ir.limits import CAPACITY, STEP, cache_sizes
from dsc.ir.op import traits_of
from dsc.ir.paging import page_rows
from dsc.ir.program import Program
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.runtime.profiler import EntryRun, Event, Spent

CODES = "i8"
"""Codes of rows whose products with codes processors have units for."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes and flops of a node or a launch; `stored` are the bytes of weights and caches."""

    weights: int
    caches: int
    activations: int
    flops: int

    @property
    def stored(self) -> int:
        """Bytes that no cache of the processor holds from one step to the next."""
        return self.weights + self.caches

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.stored + self.activations


NOTHING = Moved(0, 0, 0, 0)


def step_events(run: EntryRun) -> Iterator[Event]:
    """The events of a run's steps."""
    sizes = real_sizes(run.graph, run.sizes, run.lengths)
    nodes = {node.outputs[0].name: node for node in run.graph.nodes}
    live = run.live() if run.live is not None else ()
    costs = run.costs() if run.costs is not None else ()
    for index, step in enumerate(run.steps()):
        node = nodes.get(step.node)
        now = live[index] if index < len(live) else None
        if node is None:
            yield Event(step.kernel, "step", step.start, step.seconds, 0, 0, "", step.kernel, now)
            continue
        found: Spent = NOTHING
        if costs:
            found = costs[index]
        elif not step.again:
            found = moved(run.graph, node, sizes, step.chosen)
        yield Event(
            label(node), "step", step.start, step.seconds,
            found.bytes, found.flops, home(node), step.kernel, now, found.stored,
            found.flops if multiplies_codes(node) else 0,
        )  # fmt: skip


def entry_cost(graph: Graph, sizes: Sizes, lengths: Sequence[int] | None) -> tuple[int, int, int]:
    """Bytes, flops and stored bytes of a whole run; of experts, as many as could be chosen."""
    found = entry_moved(graph, sizes, lengths)
    bytes_and_flops = sum(m.bytes for m in found), sum(m.flops for m in found)
    return (*bytes_and_flops, sum(m.stored for m in found))


def entry_moved(graph: Graph, sizes: Sizes, lengths: Sequence[int] | None) -> list[Moved]:
    """What each node of a run moved and computed."""
    real = real_sizes(graph, sizes, lengths)
    return [moved(graph, node, real) for node in graph.nodes]


def real_sizes(graph: Graph, sizes: Sizes, lengths: Sequence[int] | None) -> dict[str, int]:
    """The symbols' sizes, with the capacity of caches replaced by the rows that hold tokens."""
    if lengths is None or not len(lengths):
        return dict(sizes)
    rows = -(-sum(lengths) // len(lengths)) + sizes.get(STEP, 1)
    page = page_rows(graph)
    held = {CAPACITY: rows} if page is None else cache_sizes(len(lengths), rows, page)
    return {name: min(n, held.get(name, n)) for name, n in sizes.items()}


def moved(graph: Graph, node: Node, sizes: Sizes, chosen: int | None = None) -> Moved:
    """What a node moves and computes; `chosen` are the distinct experts that it reads."""
    spent = _facts(graph).costs[node.outputs[0].name]
    shares = weight_shares(node, sizes, chosen)
    weights = sum(round(evaluate(w.type.nbytes, sizes) * share) for w, share in shares)
    counted, caches = _cache_bytes(graph, node, sizes)
    touched = evaluate(spent.read, sizes) + evaluate(spent.written, sizes)
    return Moved(weights, caches, max(0, touched - counted), evaluate(spent.flops, sizes))


def weight_shares(
    node: Node, sizes: Sizes, chosen: int | None = None
) -> Iterator[tuple[Weight, float]]:
    """The weights that a node reads and the share of each; `chosen` as for `moved`."""
    stacked = _expert_weights(node) if chosen is not None else frozenset()
    for weight, share in weights_read(node, sizes):
        if chosen is not None and weight.name in stacked:
            share = chosen / max(1, evaluate(weight.type.shape[0], sizes))
        yield weight, share


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is worked out once for a graph: costs of nodes, and the values that are caches."""

    graph: Graph
    costs: Mapping[str, Cost]
    caches: frozenset[str]


_KEPT = 16
_facts_of: dict[int, _Facts] = {}
"""By the identity of a graph, which each entry keeps alive: hashing a graph would walk it."""


def _facts(graph: Graph) -> _Facts:
    found = _facts_of.get(id(graph))
    if found is None:
        if len(_facts_of) >= _KEPT:
            _facts_of.pop(next(iter(_facts_of)))
        found = _facts_of[id(graph)] = _Facts(graph, node_costs(graph), _cache_values(graph))
    return found


def _expert_weights(node: Node) -> frozenset[str]:
    """Names of the stacked weights that the experts of a node read, those of its body included."""
    outer = {}
    if node.body is not None:
        outer = {v.name: x for v, x in zip(node.body.inputs, node.inputs, strict=True)}
    found = set()
    for inner in expert_nodes(node):
        for name in traits_of(inner.op).stacked:
            operand = inner[name]
            x = outer.get(operand.name, operand)
            if isinstance(x, Weight):
                found.add(x.name)
    return frozenset(found)


def expert_nodes(node: Node) -> list[Node]:
    """The operators over stacked experts that a node is or holds."""
    inside = node.body.nodes if node.body is not None else (node,)
    return [n for n in inside if traits_of(n.op).stacked]


def multiplies_codes(node: Node) -> bool:
    """Whether what a node is, or holds, multiplies rows in 8-bit integers with codes."""
    inside = node.body.nodes if node.body is not None else (node,)
    return any(str(each.attrs.get("activations", "")).startswith(CODES) for each in inside)


def multiplies_fp8(program: Program) -> bool:
    """Whether a product of a program takes its rows as codes in e4m3."""
    rows = (node.attrs.get("activations") for g in program.entries.values() for node in g.walk())
    return any(str(each or "").startswith(str(DType.f8e4m3)) for each in rows)


def _cache_bytes(graph: Graph, node: Node, sizes: Sizes) -> tuple[int, int]:
    """Bytes of cache rows that a node reads: attention does, appending does not.

    As its declaration counts them, and of these as many as there are: a window may be wider.
    """
    held = _facts(graph).caches
    inside = node.body.nodes if node.body is not None else (node,)
    attends = any(traits_of(n.op).role is Role.ATTENTION for n in inside)
    if not attends and any(v.name in held for v in node.outputs):
        return 0, 0
    read = {x.name: i for i, x in enumerate(node.inputs) if isinstance(x, Value)}
    counted = there = 0
    for index in (i for name, i in read.items() if name in held):
        t = node.inputs[index].type  # type: ignore[union-attr]
        taken = evaluate(t.bytes_of(elements_read(node, index)), sizes)
        counted, there = counted + taken, there + min(taken, evaluate(t.nbytes, sizes))
    return counted, there


def _cache_values(graph: Graph) -> frozenset[str]:
    """Values whose storage is a cache, or that hold a grown one."""
    roots = storage_roots(graph)
    caches = {graph.inputs[source].name for _, source in graph.aliases}
    grown = {x.name for o, _ in graph.aliases if isinstance(x := graph.outputs[o], Value)}
    return frozenset(name for name, root in roots.items() if root in caches | grown)


def label(node: Node) -> str:
    """How a node is called in a table: its operator, of a region all that it fuses."""
    if node.body is None:
        return node.op
    told = (n.op for n in node.body.nodes if not _is_silent(n.op))
    return "+".join(dict.fromkeys(told)) or node.op


def _is_silent(op: str) -> bool:
    """Whether an operator says nothing of what a region computes."""
    return op == "cast" or traits_of(op).role in (Role.VIEW, Role.CONSTANT)
