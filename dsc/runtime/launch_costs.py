"""What each launch of a step moves and computes: the plan's bytes at real sizes.

A launch moves the bytes that its plan says it touches. Of a weight it reads the share that its node
reads at that size (of a table the rows taken, of stacked experts those chosen), of caches the rows
that hold tokens, and into them it writes the rows of its step. What several programs of a launch
read is read from memory once: the rest comes from the device's cache. What one launch writes and
the next reads is counted at both, though it may never leave that cache. So reports, the model of a
card, profiles and tests have one source; the floor they are held against is `dsc.runtime.limit`'s,
which counts weights and caches alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsc.ir.analyses import rows_written
from dsc.ir.costs import step_sizes
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.runtime.costs import Moved, real_sizes, weight_shares
from dsc.runtime.limit import distinct_experts
from dsc.runtime.plan import INPUT, READ, UPDATE, WEIGHT, WRITE, EntryPlan, Launch, Plan


@dataclass(frozen=True, slots=True)
class LaunchCost(Moved):
    """Bytes that a launch reads of weights, reads and writes of caches, and of all else; flops.

    `node` is the first result of the node that it is part of.
    """

    kernel: str
    node: str


def step_costs(
    program: Program, plan: Plan, batch: int, new: int, context: int
) -> list[LaunchCost]:
    """The launches of a step over `new` tokens of `batch` sequences after `context` tokens."""
    graph = program.entries[program.choose_entry(new, batch, context + new)]
    sizes = step_sizes(graph, batch, new, context)
    return [
        cost
        for entry in plan.of(graph)
        for cost in launch_costs(graph, entry, sizes, [context] * batch)
        if cost is not None
    ]


def launch_costs(
    graph: Graph, plan: EntryPlan, sizes: Mapping[str, int], lengths: Sequence[int] | None
) -> list[LaunchCost | None]:
    """What each launch costs at some sizes; `None` where its grid is empty, and nothing runs."""
    at = real_sizes(graph, sizes, lengths)
    tokens = evaluate(graph.inputs[0].type.numel, at) if graph.inputs else 1
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    states = {n for n, b in enumerate(plan.buffers) if b.region == INPUT} & {
        p.buffer for p in plan.outputs
    }
    shares: dict[str, dict[str, float]] = {}
    costs: list[LaunchCost | None] = []
    for launch in plan.launches:
        if not launch.runs(sizes):
            costs.append(None)
            continue
        node = nodes.get(launch.node)
        written = evaluate(rows_written(node), at) if node is not None else 0
        if node is not None and launch.node not in shares:
            chosen = distinct_experts(node, at, tokens)
            shares[launch.node] = {
                weight.name + suffix: share
                for weight, share in weight_shares(node, at, chosen)
                for suffix, _ in weight.type.parts
            }
        own = shares.get(launch.node, {})
        costs.append(_cost(launch, plan, at, own, states, written))
    return costs


def _cost(
    launch: Launch,
    plan: EntryPlan,
    at: Mapping[str, int],
    shares: Mapping[str, float],
    states: set[int],
    written: int,
) -> LaunchCost:
    """One launch; `written` are the bytes of rows that its node writes into states."""
    read = _moved(launch, plan, at, (READ, UPDATE))
    stored = _moved(launch, plan, at, (WRITE, UPDATE))
    weights = caches = rest = 0
    for number, moved in read.items():
        buffer = plan.buffers[number]
        if buffer.region == WEIGHT:
            whole = evaluate(buffer.size, at) * shares.get(buffer.name, 1.0)
            weights += min(moved, round(whole))
        elif number not in states:
            rest += moved
        elif number not in stored:
            caches += moved
    caches += written if stored.keys() & states else 0
    rest += sum(moved for number, moved in stored.items() if number not in states)
    flops = evaluate(launch.flops, at)
    return LaunchCost(weights, caches, rest, flops, launch.kernel, launch.node)


def _moved(
    launch: Launch, plan: EntryPlan, at: Mapping[str, int], accesses: Sequence[str]
) -> dict[int, int]:
    """Bytes that a launch moves of each buffer by some accesses: at most all of the buffer."""
    sums: dict[int, int] = {}
    for ref in launch.refs:
        if ref.access in accesses:
            size = evaluate(ref.size, at)
            moved = size if ref.touched is None else min(size, evaluate(ref.touched, at))
            sums[ref.buffer] = sums.get(ref.buffer, 0) + moved
    return {n: min(moved, evaluate(plan.buffers[n].size, at)) for n, moved in sums.items()}
