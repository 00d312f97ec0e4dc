"""The interpreter: binding of symbols, in-place caches, freed values, bodies, errors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

from dsc.errors import RankError, UsageError, VerificationError
from dsc.ir import interpreter
from dsc.ir.graph import Graph, Node
from dsc.ir.interpreter import Interpreter, bind_symbols, run_graph, symbol_places
from dsc.ir.op import lookup
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.samples import sample_inputs
from dsc.ir.types import DType
from dsc.ir.weights import DictSource, random_tensor
from tests.ir.strategies import SIZES, graphs, weights_of


@given(graphs())
def test_random_graphs_give_the_types_they_infer(graph: Graph) -> None:
    inputs = sample_inputs(graph, SIZES)
    types = weights_of(graph)
    outputs = run_graph(graph, list(inputs.values()), lambda n: random_tensor(types[n], n))
    for operand, tensor in zip(graph.outputs, outputs, strict=True):
        assert DType.of(tensor.dtype) is operand.type.dtype
        assert tensor.dim() == operand.type.rank


def bound(types: str, *shapes: tuple[int, ...]) -> dict[str, int]:
    graph = parse_graph(f"graph g({types}) {{ return }}")
    return bind_symbols(graph, [torch.zeros(s) for s in shapes])


def test_symbols_are_read_off_the_inputs() -> None:
    assert bound("%x: f32[B,S]", (2, 3)) == {"B": 2, "S": 3}
    assert bound("%x: f32[P+S], %y: f32[S]", (7,), (3,)) == {"S": 3, "P": 4}
    assert bound("%x: f32[2*S+1]", (7,)) == {"S": 3}
    assert bound("%x: f32[B*S], %y: f32[B], %z: f32[S]", (6,), (2,), (3,)) == {"B": 2, "S": 3}
    assert bound("%x: f32[B*S], %y: f32[B]", (6,), (2,)) == {"B": 2, "S": 3}
    assert bound("%x: f32[P+S], %y: f32[S]", (3,), (3,)) == {"S": 3, "P": 0}
    assert bound("%x: f32[9-S]", (7,)) == {"S": 2}


def test_a_size_that_has_no_whole_solution_is_left_open() -> None:
    assert bound("%x: f32[P+S], %y: f32[S]", (2,), (3,)) == {"S": 3}
    assert bound("%x: f32[2*S]", (7,)) == {}
    assert bound("%x: f32[S*S]", (9,)) == {}
    assert bound("%x: f32[B*S], %y: f32[B]", (0,), (0,)) == {"B": 0}
    assert bound("%x: f32[P+S]", (5,)) == {}


def test_a_size_is_read_where_its_symbol_stands_alone_if_it_does() -> None:
    graph = parse_graph("graph g(%x: f32[4,P+S,Q*Q], %y: f32[4,S], %z: f32[S,P+Q]) { return }")
    assert symbol_places(graph) == {"S": ("y", 1), "P": ("x", 1), "Q": ("x", 2)}


@pytest.mark.parametrize(
    ("types", "shapes", "words"),
    [
        ("%x: f32[B,B]", [(2, 3)], "has 3 at axis 1, axis 0 of x has 2"),
        ("%x: f32[B], %y: f32[B]", [(2,), (3,)], "input y has 3 at axis 0, axis 0 of x has 2"),
        ("%x: f32[4]", [(5,)], "input x has 5 at axis 0, the model has 4"),
        ("%x: f32[4]", [(4, 1)], "input x has shape"),
        (
            "%x: f32[S], %y: f32[P], %z: f32[P+S]",
            [(2,), (3,), (6,)],
            "has 6 at axis 0, where .* want 5",
        ),
        ("%x: f32[2*S]", [(7,)], "S"),
        ("%x: f32[4]", [], "takes 1 inputs, 0 given"),
        ("%x: i64[4]", [(4,)], "torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    types: str, shapes: list[tuple[int, ...]], words: str
) -> None:
    graph = parse_graph(f"graph g({types}) {{ %y9 = full {{shape=[1], value=0.0, dtype=f32}}"
                        " return %y9 }")  # fmt: skip
    if types == "%x: f32[2*S]":
        graph = parse_graph("graph g(%x: f32[2*S]) { %f = full {shape=[S], value=0.0, dtype=f32}"
                            " return %f }")  # fmt: skip
    with pytest.raises(UsageError, match=words.replace("+", r"\+")):
        run_graph(graph, [torch.zeros(s) for s in shapes])


def test_a_size_that_no_input_gives_is_an_error() -> None:
    graph = parse_graph("graph g(%x: f32[B*S]) { %f = full {shape=[S], value=0.0, dtype=f32}"
                        " return %f }")  # fmt: skip
    words = "^full needs the size of 'S', which no input gives$"
    with pytest.raises(UsageError, match=words) as caught:
        run_graph(graph, [torch.zeros(6)])
    assert caught.value.where is None
    declared = parse_graph('graph g(%x: f32[B*S]) { %y = neg %x loc "here" return %y }')
    words = r"^%y is f32\[B\*S\], and no input gives the size of 'B'\n  where:  here$"
    with pytest.raises(UsageError, match=words):
        run_graph(declared, [torch.zeros(6)])


def test_a_cache_is_written_in_place_and_returned() -> None:
    graph = parse_graph(
        """graph g(%c: f32[B,C,1], %new: f32[B,S,1], %n: i64[B]) {
             %d = cache_write %c, %new, %n
             return %d as "present" updates %c
           }"""
    )
    cache, new = torch.zeros(2, 5, 1), torch.ones(2, 2, 1)
    (present,) = run_graph(graph, [cache, new, torch.tensor([0, 3])])
    assert present is cache
    assert cache[..., 0].tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]


def test_append_leaves_the_past_alone_and_writes_at_lengths() -> None:
    graph = parse_graph(
        """graph g(%p: f32[B,P,1], %new: f32[B,S,1], %n: i64[B]) {
             %d = append %p, %new, %n
             return %d
           }"""
    )
    past, new = torch.full((2, 3, 1), 7.0), torch.ones(2, 2, 1)
    (out,) = run_graph(graph, [past, new, torch.tensor([1, 3])])
    assert out[..., 0].tolist() == [[7, 1, 1, 0, 0], [7, 7, 7, 1, 1]]
    assert past.eq(7).all()


def test_values_are_freed_after_their_last_use() -> None:
    graph = parse_graph(
        """graph g(%x: f32[4]) {
             %a = neg %x
             %unused = exp %x
             %b = exp %a
             %c = neg %b
             return %c
           }"""
    )
    alive: dict[str, Any] = {}
    seen: list[list[str]] = []

    def observe(node: Node, results: tuple[Any, ...]) -> None:
        gc.collect()
        seen.append([name for name, ref in alive.items() if ref() is not None])
        alive[node.output.name] = weakref.ref(results[0])

    run_graph(graph, [torch.ones(4)], observe=observe)
    assert seen[2] == ["a"], "an unused result dies at once"
    assert seen[3] == ["b"], "an operand dies after its last use"


PROGRAM = """program "p" {stage=LOWERED}
symbols {B=[1,4], S=[1,4]}
weights { @w : f32[4] = source "w" : f32[4] }
graph main(%x: f32[B*S,4], %n: i64[B]) {
  %y = fused %x, %n {body=graph b(%z: f32[B*S,4], %m: i64[B]) {
    %s = reshape %z {shape=[B,S,4]}
    %t = mul %s, @w
    return %t
  }}
  return %y
}"""


def test_bodies_see_the_symbols_and_weights_around_them() -> None:
    program = parse_program(PROGRAM, DictSource({"w": torch.arange(4.0)}))
    out = Interpreter(program).run("main", {"x": torch.ones(6, 4), "n": torch.zeros(2).long()})
    assert out["y"].shape == (2, 3, 4)
    assert torch.equal(out["y"][0, 0], torch.arange(4.0))


def test_nodes_can_be_observed_and_intercepted() -> None:
    program = parse_program(PROGRAM, DictSource({"w": torch.arange(4.0)}))
    inputs = {"x": torch.ones(6, 4), "n": torch.zeros(2).long()}
    seen: list[str] = []
    Interpreter(program).run("main", inputs, observe=lambda node, results: seen.append(node.op))
    assert seen == ["reshape", "mul", "fused"]

    def zero(node: Node, operands: list[Any]) -> tuple[Any, ...] | None:
        return (operands[0] * 0,) if node.op == "mul" else None

    out = Interpreter(program).run("main", inputs, intercept=zero)
    assert out["y"].abs().sum() == 0


def test_mistakes_of_the_caller_are_named() -> None:
    program = parse_program(PROGRAM, DictSource({"w": torch.arange(4.0)}))
    interpreter = Interpreter(program)
    with pytest.raises(UsageError, match=r"no entry decode(.|\n)*one of main"):
        interpreter.run("decode", {})
    with pytest.raises(UsageError, match="main needs the inputs n"):
        interpreter.run("main", {"x": torch.ones(6, 4)})
    with pytest.raises(UsageError, match="no weight values"):
        Interpreter(parse_program(PROGRAM)).run("main", {"x": torch.ones(6, 4),
                                                         "n": torch.zeros(2).long()})  # fmt: skip
    graph = parse_graph("graph g(%x: f32[4], @w: f32[4]) { %y = add %x, @w\n return %y }")
    with pytest.raises(VerificationError, match="without weights"):
        run_graph(graph, [torch.ones(4)])


def test_a_result_of_another_type_than_declared_is_an_error() -> None:
    graph = parse_graph('graph g(%x: f32[4]) { %y = neg %x : f32[5] loc "model"\n return %y }')
    with pytest.raises(VerificationError, match=r"neg gave torch.float32 \(4,\)") as caught:
        run_graph(graph, [torch.ones(4)])
    assert caught.value.where == "model"


def test_as_many_results_are_given_as_are_declared() -> None:
    text = "graph g(%x: f32[4]) { %y, %z = split %x {axis=0, sizes=[1,3]} LOC return %z }"
    for loc, where in (('loc "model"', "model"), ("", None)):
        graph = parse_graph(text.replace("LOC", loc))
        with pytest.raises(VerificationError, match="split gave 1 results, 2 are decl") as caught:
            run_graph(graph, [torch.ones(4)], intercept=lambda node, given: (torch.ones(1),))
        assert caught.value.where == where
    wrong = run_graph(graph, [torch.ones(4)], intercept=lambda node, given: None)
    assert torch.equal(wrong[0], torch.ones(3))


@pytest.mark.parametrize(
    ("loc", "known", "where"),
    [("model.norm", None, "model.norm"), ("", None, None), ("model.norm", "rank 3", "rank 3")],
)
def test_a_rank_that_is_missed_is_told_with_the_place_of_its_collective(
    loc: str, known: str | None, where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(x: Any) -> Any:
        raise RankError("nothing came", known)

    definition = replace(lookup("neg"), reference=alone)
    monkeypatch.setattr(interpreter, "lookup", lambda op: definition)
    graph = parse_graph("graph g(%x: f32[4]) { %y = neg %x return %y }")
    placed = replace(graph, nodes=(replace(graph.nodes[0], loc=loc),))
    with pytest.raises(RankError, match=r"^nothing came") as caught:
        run_graph(placed, [torch.ones(4)])
    assert caught.value.where == where
