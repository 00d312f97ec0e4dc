"""Regions and proofs: what is cut out, what is proved, and what is not taken for proved."""

from __future__ import annotations

import pytest
import torch

from dsc.ir.dims import symbol
from dsc.ir.graph import GraphBuilder, Operand, Value
from dsc.ir.op import TypeMismatch
from dsc.rewrite import lift
from dsc.rewrite.scope import Scope
from dsc.rewrite.widen import widened
from tests.rewrite.harness import program_of

TEXT = """graph g(%x: bf16[B,32], %z: bf16[B,32], @w: bf16[48,32]) {
  %a = cast %x {dtype=f32}
  %b = silu %a
  %c = cast %b {dtype=bf16}
  %d = linear %c, @w
  %e = reshape %d {shape=[B,3,16]}
  %f = add %x, %z
  return %e, %f
}"""


def region() -> lift.Region:
    program = program_of(TEXT)
    scope = Scope(program, program.entries["main"])
    found = lift.cut(scope, [scope.producers["e"].output], lambda v: False)
    assert found is not None
    return found


def test_a_region_holds_what_its_outputs_need_and_nothing_else() -> None:
    found = region()
    assert [n.op for n in found.nodes] == ["cast", "silu", "cast", "linear", "reshape"]
    assert [str(x) for x in found.leaves] == ["%x", "@w"]
    assert found.constants() >= {3.0, 16.0}


def test_the_key_forgets_names() -> None:
    program = program_of(TEXT.replace("%a", "%other").replace("@w", "@v"))
    scope = Scope(program, program.entries["main"])
    again = lift.cut(scope, [scope.producers["e"].output], lambda v: False)
    assert again is not None
    assert again.key == region().key


def test_widening_and_resizing_infer_all_types_again() -> None:
    graph = lift.resized(widened(region().graph), {32: 4, 48: 6, 16: 2})
    assert str(graph.outputs[0].type) == "f32[B,3,2]"
    with pytest.raises(TypeMismatch):
        lift.resized(region().graph, {32: 4, 48: 7})


def test_small_sizes_keep_equal_what_is_equal() -> None:
    h, n, v = (symbol(x) for x in "hnv")
    sizes = lift.shrunk_sizes({"h": 128, "n": 128, "v": 128}, [n + v, h * (n + v)])
    assert sizes is not None
    assert sizes[256] == 2 * sizes[128]
    assert sizes[32768] == sizes[128] * sizes[256]


def prove(build: str) -> str:
    found = region()
    graph = widened(found.graph)
    inputs = [Value(v.name, v.type) for v in graph.inputs]

    def body(b: GraphBuilder, x: Value, w: Value) -> Operand:
        (y,) = b.call("linear", b.call(build, x)[0], w)
        return b.call("reshape", y, shape=(*y.type.shape[:-1], 3, 16))[0]

    cases = [
        lift.Case(sizes, [lift.normal(v, sizes, i) for i, v in enumerate(inputs)])
        for sizes in lift.assignments(graph)
    ]
    return lift.prove(graph, lift.build(inputs, body), cases)


def test_equal_functions_are_proved_and_others_are_not() -> None:
    assert prove("silu") == ""
    assert "difference" in prove("relu")


def test_a_difference_that_rounding_cannot_explain_is_told() -> None:
    a = torch.ones(3)
    assert lift.differ(a, a + 1e-6) == ""
    assert "difference of 0.01" in lift.differ(a, a + 0.01)
    assert lift.differ(a, a * torch.inf) != ""
    assert "shape" in lift.differ(a, a[:2])


def test_a_measured_number_is_taken_as_it_is_written() -> None:
    assert lift.as_written(2.4999998, [1.0, 2.5]) == 2.5
    assert lift.as_written(0.33333334, [1.0]) == 0.333333


@pytest.mark.parametrize(
    ("value", "written", "wanted"),
    [
        (0.5000001, [0.5, 0.25], 0.5),
        (100.0006, [100.0, 100.001], 100.001),
        (-0.5000001, [0.5, -0.5], -0.5),
        (0.50001, [0.5], 0.50001),
        (0.12345678, [], 0.123457),
        (0.0, [0.0], 0.0),
    ],
)
def test_a_measured_number_is_spelled_as_the_nearest_that_is_written(
    value: float, written: list[float], wanted: float
) -> None:
    assert lift.as_written(value, written) == wanted
