"""A deep program is verified in few layers, and never when the others are not like them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from dsc import pipeline
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import GraphBuilder, Node, Weight
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import Source, random_source
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.manager import Manager
from dsc.rewrite.shallow import shallow
from dsc.rewrite.twin import Twin
from dsc.rewrite.verify import Comparison
from tests.ir import spellings as spell

DEPTH = 8
B, S, P = (symbol(n) for n in "BSP")


def deep(width: int = 48, odd: int = -1) -> Program:
    """DEPTH traced layers, each with a cache; layer `odd` has one operator more."""
    b = GraphBuilder("main")
    weights: dict[str, Source] = {}

    def weight(name: str, *shape: int) -> Weight:
        weights[name] = Source(name, TensorType(DType.f32, shape))
        return Weight(name, weights[name].type)

    x = b.input("x", TensorType(DType.f32, (B, S, width)))
    lengths = b.input("lengths", TensorType(DType.i64, (B,)))
    present = []
    for i in range(DEPTH):
        b.loc = f"model.layers.{i}"
        past = b.input(f"past.{i}", TensorType(DType.f32, (B, P, 16)))
        y = spell.rms_norm(b, x, weight(f"layers.{i}.norm", width), 1e-6, "rsqrt")
        (row,) = b.call("linear", y, weight(f"layers.{i}.kv", 16, width))
        present.append(spell.append(b, past, row, lengths, "scatter"))
        (gate,) = b.call("linear", y, weight(f"layers.{i}.gate", 32, width))
        (up,) = b.call("linear", y, weight(f"layers.{i}.up", 32, width))
        (y,) = b.call(
            "linear", spell.swiglu(b, gate, up, "silu"), weight(f"layers.{i}.down", width, 32)
        )
        y = b.call("tanh", y)[0] if i == odd else y
        (x,) = b.call("add", x, y)
    names = ("x", *(f"present.{i}" for i in range(DEPTH)))
    graph = b.finish([x, *present], names, tuple((i + 1, i + 2) for i in range(DEPTH)))
    types = {name: source.type for name, source in weights.items()}
    ranges = {"B": Range(1, 4), "S": Range(1, 8), "P": Range(0, 32)}
    return Program("deep", {"main": graph}, weights, ranges, random_source(types))


@dataclass(frozen=True)
class DoubleOne(Pass):
    """A pass that is wrong in one layer."""

    layer: int = 0
    tolerance = 1e-5

    def run(self, program: Program, report: PassReport) -> Program:
        def changed(node: Node) -> Node:
            here = node.op == "silu" and node.loc == f"model.layers.{self.layer}"
            return replace(node, op="sigmoid") if here else node

        return program.map_entries(lambda g: g.with_nodes(map(changed, g.nodes)))


def compared(program: Program, each: Pass) -> Comparison:
    return Twin(widest=0).compare(each, program, each.run(program, PassReport()))


def test_the_first_two_layers_and_the_last_stand_for_all() -> None:
    small, depth = shallow(deep())
    verify(small)
    assert depth.instead == {i: 2 for i in range(3, DEPTH - 1)}
    (graph,) = small.entries.values()
    assert graph.output_names == ("x", "present.0", "present.1", "present.2", "present.7")
    assert [v.name for v in graph.inputs][2:] == ["past.0", "past.1", "past.2", "past.7"]
    assert "layers.5.gate" not in small.weights


def test_a_layer_unlike_the_others_stays() -> None:
    _, depth = shallow(deep(odd=4))
    assert not depth.instead.keys() & {3, 4}


def test_passes_are_verified_on_the_twin_and_the_record_says_so() -> None:
    manager = Manager()
    manager.watch = replace(manager.watch, verify_each=True)
    manager.twin = Twin(widest=0)
    done = manager.run(deep(), [pipeline.make(n) for n in pipeline.RAISE])
    verified = [r.verified for r in manager.records if r.verified]
    assert len(verified) > 3
    assert all("shrunk (4 of 8 layers" in line for line in verified), verified
    assert sum(n.op == "append" for n in done.entries["main"].nodes) == DEPTH


@pytest.mark.parametrize("layer", [0, 2, 5, DEPTH - 1])
def test_a_fault_in_any_one_layer_is_caught(layer: int) -> None:
    found = compared(deep(), DoubleOne(layer))
    assert not found.ok, "layer 5 is not in the twin: the whole program has to be looked at"


def test_a_fault_in_a_late_layer_is_caught_by_the_whole_program() -> None:
    assert compared(deep(), DoubleOne(5)).form == "shrunk"
    assert compared(deep(), DoubleOne(-1)).form.startswith("shrunk (4 of 8")
