"""Runs a planned graph step by step over an arena: what a memory plan and its waits come to.

Every value lies where the plan puts it, every lane is a thread, and a step starts when the one
before it in its lane and those that it waits for have ended. Kernels are the operators' references:
slow, for finding out what a plan or a lane does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from math import prod
from typing import TYPE_CHECKING, Any

from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.interpreter import bind_symbols, run_graph
from dsc.ir.lanes import NO_STEP, LaneOf, lane_of
from dsc.ir.memory import MemoryPlan
from dsc.ir.op import concrete, lookup

if TYPE_CHECKING:
    import torch

Weights = Callable[[str], Any]


def run_planned(
    graph: Graph,
    plan: MemoryPlan,
    inputs: Mapping[str, torch.Tensor],
    weight: Weights,
    lanes: LaneOf = lane_of,
) -> dict[str, torch.Tensor]:
    """The outputs by name; caches that are updated in place are the tensors that were given.

    Raises the first error of any lane.
    """
    run = _Run(graph, plan, inputs, weight)
    queues: dict[str, list[int]] = {}
    for position, node in enumerate(graph.nodes):
        if node.op not in NO_STEP:
            queues.setdefault(lanes(node), []).append(position)
    threads = [
        threading.Thread(target=copy_context().run, args=(run.lane, queue), daemon=True)
        for queue in queues.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if run.failure is not None:
        raise run.failure
    return dict(zip(graph.output_names, map(run.tensor, graph.outputs), strict=True))


class _Run:
    """One run: memory, and which steps have ended."""

    def __init__(
        self, graph: Graph, plan: MemoryPlan, inputs: Mapping[str, torch.Tensor], weight: Weights
    ) -> None:
        import torch

        self.graph, self.plan, self.weight = graph, plan, weight
        self.regions: dict[tuple[str, str], torch.Tensor] = {
            ("input", v.name): inputs[v.name] for v in graph.inputs
        }
        self.env = bind_symbols(graph, [inputs[v.name] for v in graph.inputs])
        self.arena = torch.empty(plan.size, dtype=torch.uint8)
        for name, operand in zip(graph.output_names, graph.outputs, strict=True):
            shape = [evaluate(d, self.env) for d in operand.type.shape]
            self.regions["output", name] = torch.empty(shape, dtype=operand.type.dtype.torch)
        self.ended = [threading.Event() for _ in graph.nodes]
        self.failure: BaseException | None = None

    def lane(self, queue: list[int]) -> None:
        """Run the steps of one lane in order."""
        for position in queue:
            for other in self.plan.waits.get(position, ()):
                self.ended[other].wait()
            try:
                if self.failure is None:
                    self.step(self.graph.nodes[position])
            except BaseException as problem:
                self.failure = self.failure or problem
            self.ended[position].set()

    def step(self, node: Node) -> None:
        """Run a node's reference and put its results where they belong."""
        given = [None if x is None else self.tensor(x) for x in node.inputs]
        if node.body is not None:
            made = run_graph(node.body, given, self.weight, outer=self.env)
        else:
            definition = lookup(node.op)
            attrs = concrete(node.attrs, self.env)
            found = definition.reference(*given, **attrs)
            made = list(found) if isinstance(found, (tuple, list)) else [found]
        for value, tensor in zip(node.outputs, made, strict=True):
            self.tensor(value).copy_(tensor)

    def tensor(self, operand: Operand) -> torch.Tensor:
        """The memory of an operand, as a tensor of its type."""
        if not isinstance(operand, Value):
            found: torch.Tensor = self.weight(operand.name)
            return found
        place, dtype = self.plan.places[operand.name], operand.type.dtype
        shape = [evaluate(d, self.env) for d in operand.type.shape]
        if place.region == "weight":
            found = self.weight(place.key)
            return found.view(shape)
        if place.region != "arena":
            return self.regions[place.region, place.key].view(shape)
        raw = self.arena[place.offset : place.offset + prod(shape) * dtype.itemsize]
        return raw.view(dtype.torch).view(shape)
