"""What the model of a card says of the steps that `steps` measures: no measurement.

The same figures by the same names, so that the same bars read them. A launch takes what
`dsc.backends.triton.modelled` says; what was measured so far took 0.94 to 1.01 times that in
decode, and in prefill, where tiles do not reach the peak of a large product, 1.2 to 1.4 times.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import bars
from bench.gpu.archive import unpacked
from bench.gpu.steps import POINTS, described, fits
from dsc.backends.triton.devices import CARDS, Card
from dsc.backends.triton.launch import runnable
from dsc.backends.triton.modelled import launch_seconds
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.runtime.costs import label, multiplies_fp8
from dsc.runtime.launch_costs import step_costs
from dsc.runtime.plan import Plan
from dsc.runtime.profiler import Event

Figures = dict[str, Any]


def modelled(archive: Path, name: str) -> Figures:
    """Steps of all models that were prepared, on a card of `devices.CARDS`, and the bars."""
    card = CARDS[name]
    with tempfile.TemporaryDirectory(prefix="dsc-gpu-") as place:
        folder = unpacked(archive, Path(place) / "unpacked")
        found: Figures = {"about": json.loads((folder / "about.json").read_text())}
        found["speeds"] = {"card": name}
        for model in found["about"]["layers"]:
            found[model] = _steps(folder / model, card)
    return found | {"bars": bars.judged(found)}


def _steps(place: Path, card: Card) -> Figures:
    program = parse_program((place / "program.dsc").read_text())
    binaries = place / "triton" / card.arch
    records = json.loads((binaries / "kernels.json").read_text())
    plan = runnable(Plan.from_json((binaries / "plan.json").read_bytes())).plan()
    peak = card.peak("fp8" if multiplies_fp8(program) else "bf16")
    found: Figures = {}
    for step, point in POINTS.items():
        if fits(program, point):
            events = _events(program, plan, records, card, point)
            taken = sum(each.seconds for each in events)
            found[step] = described(events, program, point, card.bandwidth, peak, taken)
    return found


def _events(
    program: Program,
    plan: Plan,
    records: Mapping[str, Mapping[str, Any]],
    card: Card,
    point: tuple[int, int, int],
) -> Sequence[Event]:
    batch, new, context = point
    graph = program.entries[program.choose_entry(new, batch, context + new)]
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    return [
        Event(
            label(nodes[cost.node]), "step", 0.0, launch_seconds(cost, card, records),
            cost.bytes, cost.flops, nodes[cost.node].loc, cost.kernel,
        )
        for cost in step_costs(program, plan, batch, new, context)
    ]  # fmt: skip
