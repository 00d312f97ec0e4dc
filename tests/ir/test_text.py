"""The text form: what is printed reads back the same, and any other text is a ParseError."""

from __future__ import annotations

import gc
import time
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsc.errors import ParseError
from dsc.ir.graph import Attrs, Graph, Node, Value
from dsc.ir.op import registry
from dsc.ir.parser import parse_graph, parse_operands, parse_program
from dsc.ir.printer import print_graph, print_node, print_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify, verify_graph
from dsc.ir.weights import MetaSource, Source
from tests.ir.strategies import graphs, programs

TEXT = """\
program "tiny" {stage=LOWERED}
meta {"config": {"hidden_size": 4, "scale": 1.5}, "name": "a # b // {x}"}
symbols {B=[1,64], P=[0,96], S=[1,512]}
weights {
  @lm_head.weight : bf16[9,4] = cast(source "lm_head.weight" : f32[9,4]) {dtype=bf16}
  @w/a-b : f32[4] = source "w" : f32[4]
}
graph step(%x: f32[B,S,4], %past: f32[B,P,4], %lengths: i64[B]) {
  %h = rms_norm %x, @w/a-b {eps=1e-06} : f32[B,S,4] loc "model.\\"norm\\""
  %a, %b = split %h {sizes=[1,3]} : f32[B,S,1], f32[B,S,3]
  %c = append %past, %h, %lengths : f32[B,P+S,4]
  %f = fused %a {body=graph body(%y: f32[B,S,1]) {
    %z = neg %y : f32[B,S,1]
    return %z
  }} : f32[B,S,1]
  %k = full {dtype=f32, shape=[], value=-inf} : f32[]
  return %f as "out", %c as "present" updates %past, @w/a-b
}
"""


@given(graphs())
def test_graphs_round_trip(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again) == text


@given(programs())
def test_programs_round_trip(program: Program) -> None:
    text = print_program(program)
    again = parse_program(text, program.source)
    assert again == program
    assert print_program(again) == text
    assert text.isascii() or "é" in text


def test_the_text_of_the_manual_is_a_fixed_point() -> None:
    program = parse_program(TEXT)
    verify(program)
    assert print_program(program) == TEXT
    assert program.stage is Stage.LOWERED
    assert program.meta["config"] == {"hidden_size": 4, "scale": 1.5}
    assert program.source.types["w"] == TensorType(DType.f32, (4,))
    graph = program.entries["step"]
    assert graph.aliases == ((1, 1),)
    assert graph.output_names == ("out", "present", "w/a-b")
    assert graph.nodes[0].loc == 'model."norm"'


def test_types_and_comments_may_be_left_out_or_added() -> None:
    graph = parse_graph(
        """# a comment
        graph g(%x: f32[B,4], @w: f32[4]) {  # another
          %y = rms_norm %x, @w {eps=1}
          %a, %b = split %y {sizes=[1,3]}
          %c = full {shape=[], value=3, dtype=f32}
          %d = mul %b, %c
          return %d, %a
        }"""
    )
    verify_graph(graph)
    assert [str(x.type) for x in graph.outputs] == ["f32[B,3]", "f32[B,1]"]
    assert parse_graph(print_graph(graph)) == graph


def test_floats_and_integers_keep_every_bit() -> None:
    for value in (
        5e-324,
        1e-20,
        0.1,
        -0.0,
        1e22,
        float("inf"),
        float("-inf"),
        1.7976931348623157e308,
    ):
        graph = parse_graph(
            f"graph g() {{ %c = full {{shape=[], value={value!r}, dtype=f32}} return %c }}"
        )
        assert repr(graph.nodes[0].attrs["value"]) == repr(value)
    graph = parse_graph("graph g() { %c = full {shape=[9223372036854775807], value=nan, dtype=f32}"
                        " return %c }")  # fmt: skip
    assert graph.outputs[0].type.shape == (2**63 - 1,)
    assert parse_graph(print_graph(graph)) == graph


def test_examples_are_types_bounds_and_attributes() -> None:
    operands, attrs = parse_operands('f32[2,3], i64[2]=4 {eps=1e-06, on=true, kind="a", n=[1,2]}')
    assert operands == [(TensorType(DType.f32, (2, 3)), None), (TensorType(DType.i64, (2,)), 4)]
    assert attrs == {"eps": 1e-06, "on": True, "kind": "a", "n": (1, 2)}


def test_a_node_prints_on_one_line_with_its_type_and_place() -> None:
    node = parse_graph('graph g(%x: f32[B,4]) { %y = neg %x loc "a.b"\n return %y }').nodes[0]
    assert print_node(node) == '%y = neg %x : f32[B,4] loc "a.b"'


# --- errors ---------------------------------------------------------------------------------------


def refused(text: str) -> ParseError:
    with pytest.raises(ParseError) as caught:
        parse_program(text) if text.lstrip().startswith("program") else parse_graph(text)
    error = caught.value
    assert error.where is not None
    assert error.where.startswith("line ")
    assert "column " in error.where
    return error


def test_an_error_shows_the_line_and_a_caret_under_the_word() -> None:
    error = refused("graph g(%x: f32[B,4]) {\n  %y = frobnicate %x\n  return %y\n}")
    assert error.where == "line 2, column 8"
    assert "frobnicate" in error.what
    assert error.picture is not None
    line, caret = error.picture.splitlines()
    assert line[caret.index("^") :].startswith("frobnicate")


GRAPH = "graph g(%x: f32[B,4], @w: f32[4]) {{ {} return %y }}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GRAPH.format("%y = neg %z"), "%z is not defined"),
        (GRAPH.format("%y = div %x, 0.5"), "%c = full {shape=[], value=0.5"),
        (GRAPH.format("%y = frobnicate %x"), "import the module that declares it"),
        (GRAPH.format("%y = rms_norm %x, @v {eps=1.0}"), "@v is not declared"),
        (GRAPH.format("%x = neg %x"), "%x is defined twice"),
        (GRAPH.format("%y, %y = split %x {sizes=[1,3]}"), "%y is defined twice"),
        (GRAPH.format("%y = split %x {sizes=[1,3]}"), "1 results for 2 types"),
        (GRAPH.format("%y = neg %x : f33[4]"), "unknown element type f33"),
        (GRAPH.format("%y = neg %x : f32[2 3]"), ", expected"),
        (GRAPH.format("%y = neg %x : f32[-1]"), "dimension"),
        (GRAPH.format("%y = neg %x : f32[1,1,1,1,1,1,1,1,1]"), "rank"),
        (GRAPH.format("%y = neg %x : f32[9999999999999999999999]"), "64 bits"),
        (GRAPH.format("%y = rms_norm %x, @w"), "eps is missing"),
        (GRAPH.format("%y = rms_norm %x, @w {eps=true}"), "eps is not a number"),
        (GRAPH.format("%y = rms_norm %x, @w {eps=1.0, eps=2.0}"), "given twice"),
        (GRAPH.format("%y = rms_norm %x, @w {eps=1.0, epz=2.0}"), "no attribute epz"),
        (GRAPH.format("%y = softmax %x {axis=B}"), "axis is not an integer"),
        (GRAPH.format("%y = cast %x {dtype=f33}"), "dtype is not an element type"),
        (GRAPH.format("%y = reshape %x {shape=[B,[4]]}"), "shape is not a list of sizes"),
        (GRAPH.format('%y = neg %x loc "a'), "starts nothing"),
        (GRAPH.format('%y = neg %x loc "\\q"'), "escape"),
        (GRAPH.format("%y = neg %x ?"), "starts nothing"),
        ("graph g(%x: f32[4]) { return %x } graph h() { return }", "nothing more"),
        ("graph g(%x: f32[4]) { return %x updates %y }", "no input"),
        ("graph g(@w: f32[4], @w: f32[4]) { return @w }", "declared twice"),
        ("graph g(%x: f32[4]) { return _ }", "absent"),
        ("graph g(x: f32[4]) { return }", "input %name"),
        ("graph g(%x: f32[4]) { return %x", "the end found"),
        ("", "graph expected, the end"),
        ('program "p" {stage=LATE}', "unknown stage LATE"),
        ('program "p" {stage=TRACED} meta [1]', "meta block"),
        ('program "p" {stage=TRACED} meta {"a": }', "meta block"),
        ('program "p" {stage=TRACED} symbols {B=[3,1]}', "empty range"),
        ('program "p" {stage=TRACED} symbols {B=[1,2], B=[1,2]}', "second range"),
        ('program "p" {stage=TRACED} symbols {B=[1,99999999999999999999999]}', "64 bits"),
        ('program "p" {stage=TRACED} weights { @w : f32[4] = source "w" : f32[5] }', "its expr"),
        ('program "p" {stage=TRACED} weights { @w : f32[4] = neg(source "w" : i8[4], '
         'source "w" : i8[4]) }', "neg"),
        ('program "p" {stage=TRACED} weights { @w : f32[2] = split(source "w" : f32[4])'
         " {sizes=[2,2]} }", "2 results"),
        ('program "p" {stage=TRACED} weights { @w : f32[4] = source "w" : f32[4]\n'
         '@w : f32[4] = source "w" : f32[4] }', "declared twice"),
        ('program "p" {stage=TRACED} graph a() { return } graph a() { return }', "second graph"),
    ],
)  # fmt: skip
def test_mistakes_are_named(text: str, words: str) -> None:
    assert words in str(refused(text))


def test_limits_of_depth_and_size() -> None:
    nested = "%x"
    body = "graph g(%x: f32[4]) { return %x }"
    for _ in range(40):
        body = f"graph g(%x: f32[4]) {{ %y = fused %x {{body={body}}} return %y }}"
    assert "deeper" in str(refused(body))
    nested = 'source "w" : f32[4]'
    for _ in range(60):
        nested = f"neg({nested})"
    weights = f'program "p" {{stage=TRACED}} weights {{ @w : f32[4] = {nested} }}'
    assert "deeper" in str(refused(weights))
    lists = "[" * 3000 + "]" * 3000
    assert "deeper" in str(refused(GRAPH.format(f"%y = reshape %x {{shape={lists}}}")))
    meta = "[" * 100_000
    assert "meta" in str(refused(f'program "p" {{stage=TRACED}} meta {{"a": {meta}'))
    refused(GRAPH.format(f"%y = neg %x : f32[{'(' * 5000}"))
    refused(GRAPH.format(f"%y = neg %x : f32[{'9' * 100_000}]"))
    refused(GRAPH.format(f"%y = neg %x : f32[{'*'.join(['(A+B+C+D)'] * 3000)}]"))
    refused(f'program "p" {{stage=TRACED}} symbols {{B=[1,{"9" * 10_000}]}}')


def test_a_text_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc.ir.lexer.MAX_CHARACTERS", 10)
    assert "11 characters, 10 at most" in str(refused("graph g() {"))


def test_parsing_takes_time_in_proportion_to_the_text() -> None:
    def seconds(n: int) -> float:
        lines = "\n".join(f"%v{i + 1} = add %v{i}, %v{i} : f32[B,4]" for i in range(n))
        text = f"graph g(%v0: f32[B,4]) {{\n{lines}\nreturn %v{n}\n}}"
        gc.collect()
        gc.disable()  # a collection walks all that other tests have left
        try:
            start = time.process_time()
            parse_graph(text)
            return time.process_time() - start
        finally:
            gc.enable()

    seconds(100)
    few, many = (min(seconds(n) for _ in range(3)) for n in (200, 2000))
    assert many < 40 * max(few, 0.005)


def check_only_parse_errors(text: str) -> None:
    for parse in (parse_program, parse_graph):
        with suppress(ParseError):
            parse(text)


@given(st.text(max_size=60))
@example("\x00")
@example("graph g() { return }\ufeff")
def test_any_text_parses_or_is_a_parse_error(text: str) -> None:
    check_only_parse_errors(text)


@given(st.binary(max_size=60))
def test_garbage_bytes_are_a_parse_error(data: bytes) -> None:
    check_only_parse_errors(data.decode("latin-1"))


_LEXEMES = sorted({*TEXT.split(), "[", "]", "{", "}", "(", ")", ",", ":", "=", "_", "1e9", "-inf",
                   "//", "*", "-", '"', "%", "@", *list(registry())[:20]})  # fmt: skip


@given(st.lists(st.sampled_from(_LEXEMES), max_size=40))
def test_shuffled_words_are_a_parse_error(words: list[str]) -> None:
    check_only_parse_errors("graph g(%x: f32[B,4]) { " + " ".join(words))


@given(st.data())
def test_a_damaged_program_parses_or_is_a_parse_error(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TEXT) - 1))
    end = data.draw(st.integers(at, min(len(TEXT), at + 8)))
    middle = data.draw(st.one_of(st.text(max_size=3), st.sampled_from(_LEXEMES)))
    check_only_parse_errors(TEXT[:at] + middle + TEXT[end:])


def test_a_whole_number_in_a_float_attribute_prints_as_a_float() -> None:
    x = Value("x", TensorType(DType.f32, (4,)))
    node = Node("rms_norm", (x, x), Attrs({"eps": 1}), (Value("y", x.type),))
    assert "{eps=1.0}" in print_node(node)
    graph = Graph("g", (x,), (node,), (node.output,))
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text


def test_a_source_with_two_types_takes_the_last() -> None:
    program = Program("p", {}, {"w": Source("w", TensorType(DType.f32, (2,)))})
    assert parse_program(print_program(program)).source == MetaSource(
        {"w": TensorType(DType.f32, (2,))}
    )


INTERFACE = """\
program "p" {stage=CANONICAL}
interface {
  limits {max_batch=4, max_context=96, prefill_chunk=16}
  mesh {ranks=2, parallel="tp+ep"}
  guard decode {step=1}
  guard main {}
  state %x as "present \\"0\\"" : f32[3] {storage="paged", rows=4}
  state %y as "now" : f32[] {storage="fixed"}
}
graph main(%x: f32[2,4,3], %y: f32[2]) {
  return %x, %y
}
"""


def test_an_interface_round_trips_and_what_it_cannot_hold_is_an_error() -> None:
    program = parse_program(INTERFACE)
    assert print_program(program) == INTERFACE
    for wrong, told in (
        ("batch=4, ", "limits: "),
        ("ranks=2", "mesh: ranks is no number"),
        ("step=1", "guard: step is no number"),
        ("rows=4", "state: rows is no number"),
    ):
        key = wrong.split("=")[0]
        text = INTERFACE.replace(wrong, f"{key}=1.5" if key != "batch" else "other=4, ")
        with pytest.raises(ParseError, match=told):
            parse_program(text)
    with pytest.raises(ParseError, match="storage is one of grown, contiguous, paged, ring, fixed"):
        parse_program(INTERFACE.replace('"fixed"', '"lost"'))
    with pytest.raises(ParseError, match="limits, mesh, guard or state expected, guards found"):
        parse_program(INTERFACE.replace("guard main", "guards main"))
