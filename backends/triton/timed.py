"""What a profiler is told of a run: when each launch that ran began, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsc.ir.graph import Graph
from dsc.runtime.launch_costs import LaunchCost, launch_costs
from dsc.runtime.plan import EntryPlan, live_bytes
from dsc.runtime.profiler import EntryRun, StepTime


def timed_run(
    graph: Graph,
    plan: EntryPlan,
    sizes: Mapping[str, int],
    lengths: Sequence[int] | None,
    spans: Sequence[tuple[float, float]],
) -> EntryRun:
    """A run of an entry; `spans` are the start and the seconds of each launch that ran."""
    ran = [at for at, launch in enumerate(plan.launches) if launch.runs(sizes)]

    def steps() -> list[StepTime]:
        made = [plan.launches[at] for at in ran]
        return [StepTime(x.node, x.kernel, *span) for x, span in zip(made, spans, strict=True)]

    def live() -> list[int]:
        every = live_bytes(plan, sizes)
        return [every[at] for at in ran]

    def costs() -> list[LaunchCost]:
        return [x for x in launch_costs(graph, plan, sizes, lengths) if x is not None]

    return EntryRun(graph, sizes, lengths, steps, live, costs)
