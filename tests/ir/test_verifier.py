"""Each rule of the verifier, and a graph that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsc.errors import VerificationError
from dsc.ir.dims import Range
from dsc.ir.formats import Format
from dsc.ir.graph import Attrs, Graph, Node, Value, Weight
from dsc.ir.interface import Storage
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify, verify_graph
from dsc.ir.weights import Source

F4 = TensorType(DType.f32, (4,))
X, W = Value("x", F4), Weight("w", F4)


def neg(name: str, x: Value | Weight, t: TensorType = F4, op: str = "neg") -> Node:
    return Node(op, (x,), Attrs(), (Value(name, t),), "model.layers.3")


def broken(graph: Graph, words: str, weights: dict[str, TensorType] | None = None) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_graph(graph, weights)
    assert words in caught.value.what, caught.value
    return str(caught.value)


def graph_of(*nodes: Node, inputs: tuple[Value, ...] = (X,)) -> Graph:
    return Graph("g", inputs, nodes, (nodes[-1].outputs[0],))


def test_a_sound_graph_passes() -> None:
    verify_graph(graph_of(neg("y", X), neg("z", Value("y", F4))))


def test_a_value_is_defined_once() -> None:
    broken(graph_of(neg("y", X), neg("y", X)), "%y is defined twice")
    broken(graph_of(neg("x", X)), "%x is defined twice")
    broken(Graph("g", (X, X), (), (X,)), "%x is defined twice")


def test_a_value_is_defined_before_its_use() -> None:
    shown = broken(graph_of(neg("z", Value("y", F4)), neg("y", X)), "%y is used before")
    assert "model.layers.3" in shown
    assert "> %z = neg %y" in shown
    broken(Graph("g", (X,), (), (Value("y", F4),)), "%y is used before")


def test_an_operand_has_the_type_it_was_defined_with() -> None:
    other = Value("x", F4.with_dtype(DType.bf16))
    broken(graph_of(neg("y", other, other.type)), "%x is f32[4], used as bf16[4]")


def test_types_are_inferred_again() -> None:
    broken(graph_of(neg("y", X, F4.with_shape((5,)))), "neg has the type f32[4], f32[5] declared")
    two = Node("neg", (X,), Attrs(), (Value("y", F4), Value("z", F4)))
    broken(graph_of(two), "declared")
    broken(graph_of(neg("y", X, op="frobnicate")), "unknown operator frobnicate")
    broken(graph_of(Node("neg", (X,), Attrs({"a": 1}), (Value("y", F4),))), "unknown attribute a")


def test_weights_are_declared_with_their_types() -> None:
    graph = graph_of(neg("y", W))
    verify_graph(graph, {"w": F4})
    broken(graph, "@w is undeclared", {})
    broken(graph, "@w is f32[5]", {"w": F4.with_shape((5,))})


def test_bodies_are_verified_too() -> None:
    body = graph_of(neg("y", X, F4.with_shape((5,))))
    node = Node("fused", (X,), Attrs({"body": body}), (Value("f", F4.with_shape((5,))),))
    broken(graph_of(node), "neg has the type")


@pytest.mark.parametrize("name", ["a b", "", "a/b", "x%", "a\n"])
def test_names_must_fit_the_text_form(name: str) -> None:
    broken(graph_of(neg(name, X)), "cannot hold the name")


def test_names_of_graphs_weights_and_symbols_must_too() -> None:
    broken(replace(graph_of(neg("y", X)), name="prefill 1"), "cannot hold the name")
    text = 'program "p" {stage=TRACED} weights { @w : f32[4] = source "w" : f32[4] }'
    program = parse_program(text)
    verify(program)
    with pytest.raises(VerificationError, match="cannot hold the name"):
        verify(replace(program, weights={"a weight": program.weights["w"]}))
    with pytest.raises(VerificationError, match="cannot hold the name 'nan'"):
        verify(replace(program, weights={"nan": program.weights["w"]}))
    for name in ("inf", "true", "B 1", "a.b"):
        with pytest.raises(VerificationError, match="cannot hold the name"):
            verify(replace(program, symbols={name: Range(1, 2)}))


def test_aliases_name_one_output_and_one_input_each() -> None:
    past = Value("past", TensorType(DType.f32, (1, 2, 4)))
    graph = Graph("g", (X, past), (neg("y", X),), (Value("y", F4), past))
    for aliases in (((1, 1),), ((0, 0),), ((0, 0), (1, 1))):
        verify_graph(replace(graph, aliases=aliases))
    for aliases in (((2, 1),), ((1, 2),), ((-1, 1),), ((0, 0), (1, 0)), ((0, 0), (0, 0))):
        broken(replace(graph, aliases=aliases), "cannot update")
    broken(replace(graph, aliases=((1, -1),)), "output 1 cannot update input -1")
    broken(replace(graph, aliases=((0, 1),)), "output 0, f32[4], cannot update f32[1,2,4]")
    half = Value("h", F4.with_dtype(DType.bf16))
    other = Graph("g", (X, half), (), (half,), aliases=((0, 0),))
    broken(other, "output 0, bf16[4], cannot update f32[4]")


CACHE = """graph g(%c: f32[2,7,4], %new: f32[2,1,4], %n: i64[2], @w: f32[2,7,4]) {{
  {}
}}"""


@pytest.mark.parametrize(
    "lines",
    [
        "%d = cache_write %c, %new, %n\n %y = neg %c\n return %y, %d",
        "%d = cache_write %c, %new, %n\n return %d, %c",
        "%v = reshape %c {shape=[14,4]}\n %d = cache_write %c, %new, %n\n %y = neg %v\n return %y",
        "%v = reshape %c {shape=[2,7,2,2]}\n %u = reshape %v {shape=[2,7,4]}\n"
        " %d = cache_write %u, %new, %n\n %y = neg %c\n return %y",
        "%d = cache_write %c, %new, %n\n %e = cache_write %d, %new, %n\n %y = neg %d\n return %y",
        "%p, %q = split %c {axis=1, sizes=[1,6]}\n %d = cache_write %c, %p, %n\n return %d",
        "%d = cache_write @w, %new, %n\n return %d",
        "%d = fused %c, %new, %n {body=graph b(%k: f32[2,7,4], %m: f32[2,1,4], %l: i64[2]) {\n"
        "  %e = cache_write %k, %m, %l\n return %e }}\n %y = neg %c\n return %y, %d",
    ],
)
def test_what_was_overwritten_is_not_read(lines: str) -> None:
    text = CACHE.replace("{{", "{").replace("}}", "}").replace("{}", lines)
    with pytest.raises(VerificationError, match=r"overwr"):
        verify_graph(parse_graph(text))


@pytest.mark.parametrize(
    "lines",
    [
        "%y = neg %c\n %d = cache_write %c, %new, %n\n return %y, %d",
        "%d = cache_write %c, %new, %n\n %e = cache_write %d, %new, %n\n return %e",
        "%v = neg %c\n %d = cache_write %c, %new, %n\n %y = add %v, %d\n return %y",
        "%d = cache_write %c, %new, %n\n %v = reshape %d {shape=[14,4]}\n return %v",
        "%d = cache_write %c, @w, %n\n return %d, @w",
    ],
)
def test_what_was_written_or_copied_is_read(lines: str) -> None:
    text = CACHE.replace("{{", "{").replace("}}", "}").replace("{}", lines)
    verify_graph(parse_graph(text.replace("@w: f32[2,7,4]", "@w: f32[2,1,4]")))


PROGRAM = """program "p" {{stage={stage}}}
symbols {{B=[1,4]}}
graph main(%x: f32[{dim},4]) {{
  {line}
  return %y
}}"""


def program(stage: str, line: str, dim: str = "B") -> Program:
    return parse_program(PROGRAM.format(stage=stage, line=line, dim=dim))


def test_operators_are_legal_at_their_stage() -> None:
    fused = "%y = fused %x {body=graph b(%z: f32[B,4]) { %s, %i = sort %z {axis=0} return %s }}"
    verify(program("TRACED", "%y, %i = sort %x {axis=0}"))
    for stage in ("CANONICAL", "OPTIMIZED", "LOWERED"):
        with pytest.raises(VerificationError, match=f"sort is not legal at stage {stage}"):
            verify(program(stage, "%y, %i = sort %x {axis=0}"))
    with pytest.raises(VerificationError, match="sort is not legal at stage LOWERED"):
        verify(program("LOWERED", fused))
    verify(program("LOWERED", fused.replace("%s, %i = sort %z {axis=0}", "%s = neg %z")))
    assert Stage.TRACED < Stage.CANONICAL


def test_symbols_have_ranges() -> None:
    verify(program("CANONICAL", "%y = neg %x"))
    with pytest.raises(VerificationError, match="without a range: Q"):
        verify(program("CANONICAL", "%y = neg %x", "Q"))
    with pytest.raises(VerificationError, match="without a range: Q"):
        verify(program("CANONICAL", "%y = neg %x\n %f = full {shape=[Q], value=0.0, dtype=f32}"))
    with pytest.raises(VerificationError, match="without a range: Q"):
        verify(program("CANONICAL", "%y = slice %x {axis=0, start=Q, end=Q+1}"))


def test_outputs_have_names_of_their_own() -> None:
    p = program("CANONICAL", "%y = neg %x")
    graph = p.entries["main"]
    doubled = replace(graph, outputs=(*graph.outputs, X), output_names=("y", "y"))
    doubled = replace(doubled, outputs=(graph.outputs[0], graph.outputs[0]))
    with pytest.raises(VerificationError, match="two outputs share a name"):
        verify(replace(p, entries={"main": doubled}))


def test_an_error_shows_three_nodes_before_and_three_behind() -> None:
    def shown(wrong: int) -> str | None:
        values = [Value(f"v{i}", F4) for i in range(9)]
        values[wrong] = Value(f"v{wrong}", F4.with_shape((5,)))
        nodes = [Node("neg", (X,), Attrs(), (v,)) for v in values]
        with pytest.raises(VerificationError) as caught:
            verify_graph(graph_of(*nodes))
        assert caught.value.culprit is nodes[wrong]
        assert (caught.value.where, caught.value.part) == ("graph g", "type")
        return caught.value.picture

    def picture(first: int, last: int, wrong: int) -> str:
        return "\n".join(
            f"> %v{i} = neg %x : f32[5]" if i == wrong else f"  %v{i} = neg %x : f32[4]"
            for i in range(first, last + 1)
        )

    assert shown(4) == picture(1, 7, 4)
    assert shown(0) == picture(0, 3, 0)
    assert shown(1) == picture(0, 4, 1)
    assert shown(8) == picture(5, 8, 8)


def test_an_error_of_a_graph_has_no_picture() -> None:
    with pytest.raises(VerificationError) as caught:
        verify_graph(Graph("g", (X,), (), (Value("y", F4),)))
    found = caught.value
    assert (found.where, found.picture, found.part) == ("graph g", None, "")


STEP = """program "p" {stage=TRACED}
symbols {B=[1,2], S=[1,2], L=[1,2], P=[0,9]}
graph step(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
           %past: f32[B,P,3], %new: f32[B,S,3]) {
  %now = append %past, %new, %lengths
  return %now as "present" updates %past
}"""


def test_what_a_step_updates_is_declared_as_it_is_stored() -> None:
    good = parse_program(STEP)
    verify(good)
    (state,) = good.states
    row = state.type.with_shape((5,))
    wrong = [
        (replace(state, input="other"),), (replace(state, output="other"),),
        (replace(state, type=row),), (replace(state, storage=Storage.FIXED),),
        (replace(state, storage=Storage.PAGED, rows=4),), (replace(state, rows=1),),
    ]  # fmt: skip
    for states in wrong:
        with pytest.raises(VerificationError) as caught:
            verify(good.declaring(states=states))
        assert caught.value.what == (
            "%past: f32[B,P,3], which present updates, is not declared as this state:"
            " declare the state, and how it is stored, in the interface"
        )
        assert caught.value.part == "return"
    verify(good.declaring(states=(state, replace(state, input="more", rows=7))))
    main = replace(good.entries["step"], aliases=())
    verify(replace(good, entries={"step": main}).declaring(states=(replace(state, rows=1),)))


def test_a_stored_format_is_one_of_weights_and_of_states_with_scales_behind_their_rows() -> None:
    stored = Value("x", TensorType(DType.f8e4m3, (4, 128), Format((1, 128), DType.f32)))
    with pytest.raises(VerificationError) as caught:
        verify(Program("p", {"g": Graph("g", (stored,), (), ())}))
    assert caught.value.what.startswith(f"%x is {stored.type}: only weights have a stored format")
    behind = Format((1, 128), DType.f32, behind=True)
    state = Value("x", TensorType(DType.i8, (4, 2, 128), behind))
    verify(Program("p", {"g": Graph("g", (state,), (), (state,), ("y",), ((0, 0),))}))
    with pytest.raises(VerificationError, match="only weights have a stored format"):
        verify(Program("p", {"g": Graph("g", (state,), (), (state,), ("y",))}))
    with pytest.raises(VerificationError, match="only states have scales behind"):
        verify(Program("p", {}, weights={"w": Source("w", state.type)}))
