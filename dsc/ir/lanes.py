"""Lanes: queues of steps that run at the same time, each in order.

What computes is in one lane, collectives are in another, so that a rank computes while tensors
travel; copies between memories have a third. A step starts when the step before it in its lane has
ended, and those steps of other lanes that it waits for.
"""

from __future__ import annotations

from collections.abc import Callable

from dsc.ir.graph import Node
from dsc.ir.op import traits_of
from dsc.ir.traits import COLLECTIVE, COMPUTE, COPY, LANES

__all__ = ["COLLECTIVE", "COMPUTE", "COPY", "LANES", "NO_STEP", "LaneOf", "lane_of"]
LaneOf = Callable[[Node], str]
NO_STEP = frozenset({"reshape"})
"""Operators whose result is their operand's bytes, unmoved: nothing runs, so nothing waits."""


def lane_of(node: Node) -> str:
    """The lane of a node. No operator of the IR copies between memories so far."""
    if node.body is None:
        return traits_of(node.op).lane
    return next((lane for lane in map(lane_of, node.body.nodes) if lane != COMPUTE), COMPUTE)
