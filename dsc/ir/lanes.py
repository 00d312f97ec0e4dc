"""Lanes: queues of steps that run at the same time, each in order.

What computes is in one lane, collectives are in another, so that a rank computes while tensors
travel; copies between memories have a third. A step starts when the step before it in its lane has
ended, and those steps of other lanes that it waits for.

The price is memory: what a collective reads or writes stays until somebody has waited for it.
"""

from __future__ import annotations

from collections.abc import Callable

from dsc.ir.graph import Node
from dsc.ir.op import traits_of
from dsc.ir.traits import COLLECTIVE, COMPUTE, COPY, LANES, Role

__all__ = ["COLLECTIVE", "COMPUTE", "COPY", "LANES", "LaneOf", "lane_of", "moves_nothing"]
LaneOf = Callable[[Node], str]


def moves_nothing(node: Node) -> bool:
    """Whether a node is a view that gives all elements in order: nothing runs, so nothing waits."""
    if traits_of(node.op).role is not Role.VIEW or len(node.outputs) > 1:
        return False
    x = node.operands[0].type
    order = [a for a in node.attrs.get("dims", ()) if x.shape[a] != 1]
    return order == sorted(order) and x.numel == node.output.type.numel


def lane_of(node: Node) -> str:
    """The lane of a node. No operator of the IR copies between memories so far."""
    if node.body is None:
        return traits_of(node.op).lane
    return next((lane for lane in map(lane_of, node.body.nodes) if lane != COMPUTE), COMPUTE)
