"""Graphs, builders, attributes and programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from dsc.ir.dims import Range, symbol
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Value
from dsc.ir.op import TypeMismatch, registry
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_node
from dsc.ir.program import Program
from dsc.ir.stages import Stage, is_legal
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify, verify_graph
from dsc.ir.weights import MetaSource, Source, apply
from tests.ir.strategies import graphs, programs

B, S = symbol("B"), symbol("S")
X = TensorType(DType.f32, (B, S, 4))


def test_attributes_tell_apart_what_the_text_form_does() -> None:
    values = [1, 1.0, True, "1", 0.0, -0.0, (1, 2), (1.0, 2), "f32", DType.f32, B]
    made = [Attrs({"a": v}) for v in values]
    assert len(set(made)) == len(values)
    assert Attrs({"a": float("nan")}) == Attrs({"a": float("nan")})
    assert Attrs({"b": 1, "a": [1, [2]]}) == Attrs({"a": (1, (2,)), "b": 1, "c": None})
    assert Attrs({"a": 1}).updated(a=None, b=2) == Attrs({"b": 2})
    assert Attrs({"a": 1}) != {"a": 1}
    assert Attrs({"a": 1})["a"] == 1
    assert list(Attrs({"b": 1, "a": 2})) == ["a", "b"]


def test_a_builder_infers_types_and_keeps_names_unique() -> None:
    b = GraphBuilder("g", loc="model")
    x = b.input("x", X)
    same = b.input("x", X)
    y = b.add(x, same)
    parts = b.split(y, sizes=(1, 3))
    assert [v.name for v in (x, same, y, *parts)] == ["x", "x_1", "add", "split", "split_1"]
    assert parts[1].type == X.with_shape((B, S, 3))
    assert b.nodes[0].loc == "model"
    assert b.call("neg", y, loc="here", hint="z")[0].name == "z"
    assert b.nodes[-1].loc == "here"
    verify_graph(b.finish(parts))


def test_a_builder_over_given_inputs_avoids_their_names() -> None:
    b = GraphBuilder("g", [Value("neg", X)])
    assert b.neg(b.inputs[0]).name == "neg_1"


def test_a_builder_refuses_what_does_not_fit() -> None:
    b = GraphBuilder()
    x = b.input("x", X)
    with pytest.raises(TypeMismatch, match="linear"):
        b.linear(x, x)
    with pytest.raises(TypeMismatch, match=r"div of 2: operands are values, as full\(.*value=2, "):
        b.div(x, 2)
    with pytest.raises(TypeMismatch, match="unknown operator"):
        b.no_such_operator(x)
    with pytest.raises(AttributeError):
        _ = b._private
    assert not b.nodes


def test_absent_optional_operands_at_the_end_are_dropped() -> None:
    b = GraphBuilder()
    x = b.input("x", X)
    w = b.input("w", TensorType(DType.f32, (2, 4)))
    b.linear(x, w, None)
    assert b.nodes[-1].inputs == (x, w)


def test_names_and_outputs_must_match() -> None:
    x = Value("x", X)
    assert Graph("g", (x,), (), (x,)).output_names == ("x",)
    with pytest.raises(ValueError, match="2 names for 1"):
        Graph("g", (x,), (), (x,), ("a", "b"))
    with pytest.raises(KeyError):
        Graph("g", (x,), (), (x,)).input("y")


@given(graphs())
def test_random_graphs_verify_and_substitute(graph: Graph) -> None:
    verify_graph(graph)
    decode = graph.substitute({"S": 1})
    verify_graph(decode)
    assert not any("S" in v.type.symbols for v in decode.values())
    assert graph.substitute({}) == graph
    assert [n.loc for n in decode.nodes] == [n.loc for n in graph.nodes]


def test_substitution_reaches_bodies_and_attributes() -> None:
    inner = GraphBuilder("body")
    y = inner.input("y", X)
    body = inner.finish([inner.reshape(y, shape=(B * S, 4))])
    b = GraphBuilder()
    x = b.input("x", X)
    decode = b.finish([b.fused(x, body=body)]).substitute({"S": 1, "B": 3})
    inside = decode.nodes[0].body
    assert inside is not None
    assert inside.nodes[0].attrs["shape"] == (3, 4)
    assert decode.outputs[0].type.shape == (3, 4)
    assert [n.op for n in decode.walk()] == ["fused", "reshape"]


@given(programs())
def test_random_programs_verify(program: Program) -> None:
    verify(program)
    assert program.pruned() is program
    assert program.used_weights() == set(program.weights)


def test_a_program_names_its_graphs_by_entry() -> None:
    x = Value("x", X)
    program = Program("p", {"decode": Graph("step", (x,), (), (x,))})
    assert program.entries["decode"].name == "decode"
    assert program.map_entries(lambda g: g) is program
    assert program.at(Stage.TRACED) is program
    assert program.at(Stage.CANONICAL).stage is Stage.CANONICAL


def test_decode_is_the_step_with_one_new_token() -> None:
    b = GraphBuilder("step")
    x = b.input("x", X)
    w = {"w": Source("w", TensorType(DType.f32, (2, 4)))}
    program = Program(
        "p", {"step": b.finish([b.neg(x)])}, w, {"B": Range(1, 2), "S": Range(1, 9)},
        MetaSource({"w": w["w"].type}), stage=Stage.CANONICAL,
    )  # fmt: skip
    decode = program.map_entries(lambda g: g.substitute({"S": 1}))
    verify(decode)
    assert decode is not program
    assert decode.entries["step"].outputs[0].type.shape == (B, 1, 4)
    assert decode.pruned().weights == {}
    assert program.with_weights({}) is program


def test_stages_narrow_from_traced_to_canonical() -> None:
    assert is_legal("sdpa", Stage.TRACED)
    assert not is_legal("sdpa", Stage.CANONICAL)
    assert is_legal("experts", Stage.CANONICAL)
    assert not is_legal("dispatch", Stage.CANONICAL)
    assert is_legal("cache_write", Stage.OPTIMIZED)
    assert not is_legal("fused", Stage.OPTIMIZED)
    assert is_legal("fused", Stage.LOWERED)


def test_a_node_has_every_attribute_and_prints_those_that_are_no_default() -> None:
    """Of nodes and of weight expressions: what is read, listed, counted and compared is whole."""
    b = GraphBuilder()
    x = b.input("x", TensorType(DType.f32, (2, 6)))
    b.call("split", x, sizes=(2, 4))
    b.call("split", x, sizes=(2, 4), axis=-1)
    node, spelled = b.nodes
    assert node.attrs == spelled.attrs
    assert dict(node.attrs) == {"axis": -1, "sizes": (2, 4)}
    assert (
        set(node.attrs)
        == {"axis", "sizes"}
        == {k for k in ("axis", "sizes", "step") if k in node.attrs}
    )
    assert "axis" not in print_node(spelled)
    assert replace(node, attrs=node.attrs.updated(sizes=(4, 2))).attrs["axis"] == -1
    moved = replace(node, attrs=node.attrs.updated(axis=0))
    assert moved.attrs["axis"] == 0
    assert "{axis=0, sizes=[2,4]}" in print_node(moved)
    sliced = apply("slice", Source("w", x.type), axis=0, start=0, end=1)
    assert list(sliced.attrs) == ["axis", "end", "start", "step"]
    for name, op in registry().items():
        declared = {a.name: a.default for a in op.attrs if a.default is not None}
        assert dict(Attrs().of(name)) == declared
        assert Attrs().of(name).given(name) == {}


def test_a_builder_adds_nothing_where_a_value_is_as_it_is_wanted() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", TensorType(DType.f32, (2, 3)))
    assert builder.as_type(x, DType.f32) is x
    assert builder.as_shape(x, (2, 3)) is x
    assert builder.as_order(x, (0, 1)) is x
    assert builder.nodes == []
    assert builder.as_type(x, DType.bf16).type == TensorType(DType.bf16, (2, 3))
    assert builder.as_shape(x, (6,)).type.shape == (6,)
    assert builder.as_order(x, (1, 0)).type.shape == (3, 2)
    assert [n.op for n in builder.nodes] == ["cast", "reshape", "permute"]
    with pytest.raises(AttributeError):
        builder._private  # noqa: B018


def test_an_output_of_its_inputs_type_is_the_input_updated() -> None:
    graph = parse_graph("""graph g(%p: f32[B,P,3], %c: f32[B,9,3], %n: f32[B,S,3], %l: i64[B]) {
      %a = append %p, %n, %l %b = cache_write %c, %n, %l
      return %n, %a as "grown" updates %p, %b as "written" updates %c
    }""")
    assert graph.updated_inputs() == {"written": "c"}
    assert graph.input("l").type == TensorType(DType.i64, (symbol("B"),))
    with pytest.raises(KeyError):
        graph.input("a")
