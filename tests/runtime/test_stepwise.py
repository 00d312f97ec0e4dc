"""Planned graphs run over real bytes, a thread a lane, as the interpreter runs them over none."""

from __future__ import annotations

import random
import time
import zlib

import pytest
import torch

from dsc import pipeline
from dsc.backends.base import Capabilities
from dsc.errors import UsageError
from dsc.ir.analyses import producers
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, Node
from dsc.ir.interface import Storage
from dsc.ir.interpreter import Interpreter, run_graph
from dsc.ir.lanes import COLLECTIVE, LANES, lane_of
from dsc.ir.program import Program
from dsc.ir.ranks import at_rank, run_ranks
from dsc.ir.samples import sample_inputs
from dsc.passes.own_outputs import own_outputs
from dsc.rewrite.manager import Manager
from dsc.runtime.check_plan import check_plan
from dsc.runtime.nodes import draft_nodes, plan_nodes
from dsc.runtime.placing import place
from dsc.runtime.plan import EntryPlan, Launch
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.passes.test_structure import chain
from tests.runtime import stepwise
from tests.runtime.stepwise import run_planned

SIZES = {"B": 2, "S": 3, "L": 2, "C": 9, "P": 4}


def dealt(node: Node) -> str:
    """One of three lanes, by the name of what a node makes."""
    return LANES[zlib.crc32(node.output.name.encode()) % len(LANES)]


def no_weight(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is read")


@pytest.mark.parametrize("seed", range(6))
def test_lanes_that_run_apart_compute_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take random times, so that lanes drift as far apart as waits let them."""
    graph = own_outputs(chain(seed, 40))
    found = place(draft_nodes(graph, dealt), {"N": Range(1, 8)})
    x = torch.randn(5, 4)
    wanted = run_graph(graph, [x])
    chooser, step = random.Random(seed), stepwise._Run.step

    def slow(run: stepwise._Run, launch: Launch) -> None:
        time.sleep(chooser.choice([0, 0, 0.001]))
        step(run, launch)

    monkeypatch.setattr(stepwise._Run, "step", slow)
    got = run_planned(graph, found, {"x": x}, no_weight)
    for tensor, reference in zip(got.values(), wanted, strict=True):
        assert torch.equal(tensor, reference)


def sharded(ranks: int) -> Program:
    """A model over ranks, planned: collectives beside what computes."""
    options = pipeline.PipelineOptions(ranks=ranks, fusion_level=0)
    passes = pipeline.passes_for(
        canonical_lm(Sizes(heads=4, inner=52, vocab=50)),
        Capabilities(states=(Storage.CONTIGUOUS,), collectives=True),
        options,
    )
    return Manager().run(canonical_lm(Sizes(heads=4, inner=52, vocab=50)), passes)


def test_a_sharded_model_computes_while_collectives_are_in_flight() -> None:
    program = sharded(2)
    plans = plan_nodes(program, {}).entries
    for entry, graph in program.entries.items():
        found = plans[entry]
        check_plan(found, program.symbols)
        assert COLLECTIVE in {x.lane for x in found.launches}
        _check_waits(graph, found)
    graph = program.entries["extend"]
    inputs = sample_inputs(graph, SIZES, 3)

    def one(rank: int) -> list[dict[str, torch.Tensor]]:
        mine = Interpreter(at_rank(program, rank))
        runs = [{k: v.clone() for k, v in inputs.items()} for _ in range(2)]
        wanted = mine.run("extend", runs[0])
        return [wanted, run_planned(graph, plans["extend"], runs[1], mine.weight)]

    for wanted, got in run_ranks(2, one):
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def _check_waits(graph: Graph, plan: EntryPlan) -> None:
    """Whatever reads a collective's result outside its lane waits, unless something before did."""
    made = producers(graph)
    waits = [x.waits for x in plan.launches]
    assert any(waits)
    position = {x.node: i for i, x in enumerate(plan.launches)}
    for node in graph.nodes:
        for operand in node.operands:
            source = made.get(operand.name)
            if source is None or "reshape" in (source.op, node.op):
                continue
            if lane_of(source) == lane_of(node):
                continue
            first, last = position[source.outputs[0].name], position[node.outputs[0].name]
            reached = [w for i in range(first, last + 1) for w in waits[i]]
            assert any(w >= first for w in reached), f"{node.op} does not wait for {source.op}"


def test_an_error_in_a_lane_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = own_outputs(chain(1, 20))
    found = place(draft_nodes(graph, dealt), {"N": Range(1, 8)})

    def broken(run: stepwise._Run, launch: Launch) -> None:
        raise UsageError("out of luck")

    monkeypatch.setattr(stepwise._Run, "step", broken)
    with pytest.raises(UsageError, match="out of luck"):
        run_planned(graph, found, {"x": torch.randn(5, 4)}, no_weight)
