"""Runs a plan launch by launch over an arena: what its places and its waits come to.

Every buffer lies where the plan puts it, every lane is a thread, and a launch starts when the one
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
from dsc.ir.graph import Graph
from dsc.ir.interpreter import bind_symbols, run_graph
from dsc.ir.op import concrete, lookup
from dsc.ir.types import TensorType
from dsc.runtime.plan import ARENA, WEIGHT, EntryPlan, Launch

if TYPE_CHECKING:
    import torch

Weights = Callable[[str], Any]


def run_planned(
    graph: Graph, plan: EntryPlan, inputs: Mapping[str, torch.Tensor], weight: Weights
) -> dict[str, torch.Tensor]:
    """The outputs by name, where each launch of the plan is a node of the graph.

    Caches that are updated in place are the tensors that were given. Raises the first error of any
    lane.
    """
    run = _Run(graph, plan, inputs, weight)
    queues: dict[str, list[int]] = {}
    for position, launch in enumerate(plan.launches):
        queues.setdefault(launch.lane, []).append(position)
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
    return {port.name: run.tensor(port.buffer, port.type) for port in plan.outputs}


class _Run:
    """One run: memory, and which launches have ended."""

    def __init__(
        self,
        graph: Graph,
        plan: EntryPlan,
        inputs: Mapping[str, torch.Tensor],
        weight: Weights,
    ) -> None:
        import torch

        self.nodes = {node.outputs[0].name: node for node in graph.nodes}
        self.plan, self.weight = plan, weight
        self.env = bind_symbols(graph, [inputs[v.name] for v in graph.inputs])
        self.arena = torch.empty(plan.arena_bytes, dtype=torch.uint8)
        self.outside = {port.buffer: inputs[port.name] for port in plan.inputs}
        for port in plan.outputs:
            if port.buffer not in self.outside:
                shape = [evaluate(d, self.env) for d in port.type.shape]
                self.outside[port.buffer] = torch.empty(shape, dtype=port.type.dtype.torch)
        self.ended = [threading.Event() for _ in plan.launches]
        self.failure: BaseException | None = None

    def lane(self, queue: list[int]) -> None:
        """Run the launches of one lane in order."""
        for position in queue:
            launch = self.plan.launches[position]
            for other in launch.waits:
                self.ended[other].wait()
            try:
                if self.failure is None:
                    self.step(launch)
            except BaseException as problem:
                self.failure = self.failure or problem
            self.ended[position].set()

    def step(self, launch: Launch) -> None:
        """Run a node's reference and put its results where they belong."""
        node = self.nodes[launch.node]
        places = iter(launch.refs)
        given = [
            None if x is None else self.tensor(next(places).buffer, x.type) for x in node.inputs
        ]
        if node.body is not None:
            made = run_graph(node.body, given, self.weight, outer=self.env)
        else:
            definition = lookup(node.op)
            attrs = concrete(node.attrs, self.env)
            found = definition.reference(*given, **attrs)
            made = list(found) if isinstance(found, (tuple, list)) else [found]
        for value, place, tensor in zip(node.outputs, places, made, strict=True):
            self.tensor(place.buffer, value.type).copy_(tensor)

    def tensor(self, number: int, type: TensorType) -> torch.Tensor:
        """The memory of a buffer, as a tensor of a type."""
        buffer = self.plan.buffers[number]
        shape = [evaluate(d, self.env) for d in type.shape]
        if buffer.region == WEIGHT:
            found: torch.Tensor = self.weight(buffer.name)
            return found.view(shape)
        if buffer.region != ARENA:
            return self.outside[number].view(shape)
        raw = self.arena[buffer.offset : buffer.offset + prod(shape) * type.dtype.itemsize]
        return raw.view(type.dtype.torch).view(shape)
