"""What rules ask about a graph, how nodes are rebuilt, and what a sweep keeps, worked by hand."""

from __future__ import annotations

import pytest

from dsc.ir.graph import GraphBuilder, Node, Value, Weight
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_graph
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source
from dsc.rewrite.rebuild import Operands, rebuild
from dsc.rewrite.rule import Reject, RewriteBuilder
from dsc.rewrite.scope import VIEWS, Scope
from tests.rewrite.harness import program_of

TEXT = """graph main(%x: f32[2,4], @w: f32[4]) {
  %k = full {shape=[], value=2.5, dtype=f64}
  %c = cast %k {dtype=f32}
  %r = reshape %c {shape=[1,1]}
  %e = expand %r {shape=[2,4]}
  %a = mul %x, %e
  %b = add %a, %a
  %p, %q = split %b {axis=1, sizes=[2,2]}
  %v = reshape %q {shape=[4]}
  %y = neg %v
  return %y, %p, %b
}"""


def scope() -> Scope:
    program = program_of(TEXT)
    return Scope(program, program.entries["main"])


def value(name: str) -> Value:
    return next(v for v in scope().graph.values() if v.name == name)


def test_a_scope_knows_who_makes_and_who_reads_a_value() -> None:
    s = scope()
    assert s.position["x"] == -1
    assert [s.position[n] for n in "kcrea"] == [0, 1, 2, 3, 4]
    assert (s.position["p"], s.position["q"], s.position["y"]) == (6, 6, 8)
    assert list(s.inputs) == ["x"]
    assert [n.op for n in s.consumers(value("a"))] == ["add"], "once, though it is read twice"
    assert [n.op for n in s.consumers(value("b"))] == ["split"], "a result has no node"
    made = s.producer(value("q"))
    assert made is not None
    assert made.op == "split"
    assert s.producer(value("x")) is None
    assert s.producer(Weight("w", TensorType(DType.f32, (4,)))) is None
    assert s.producer(None) is None


def test_a_constant_is_seen_through_what_keeps_it() -> None:
    s = scope()
    assert [s.constant(value(n)) for n in "kcre"] == [2.5] * 4
    assert [s.constant(value(n)) for n in "xaq"] == [None] * 3
    assert s.constant(None) is None


def test_a_view_is_followed_back_and_reading_forward() -> None:
    s = scope()
    assert [x.name for x in s.viewed(value("v"), VIEWS)] == ["v", "q", "b"]
    assert s.through(value("v"), VIEWS).name == "b"
    assert s.through(value("x"), VIEWS) == value("x")
    assert [n.op for n in s.forward(value("a"))] == ["add", "split", "reshape", "neg"]
    assert [n.op for n in s.forward(value("a"), limit=2)] == ["add", "split"]
    assert list(s.forward(value("y"))) == []


def test_what_is_rebuilt_alike_is_the_same_graph() -> None:
    graph = scope().graph
    assert rebuild(graph, lambda b, node, operands: None) is graph
    assert rebuild(graph, lambda b, node, operands: None, graph.inputs) is graph


def test_a_node_may_become_others_and_readers_follow() -> None:
    graph = parse_graph(
        'graph g(%x: f32[2,4]) { %a = neg %x loc "m"\n %y = exp %a\n return %y, %x, %a }'
    )

    def doubled(b: GraphBuilder, node: Node, operands: Operands) -> tuple[Value, ...] | None:
        return b.call("add", operands[0], operands[0]) if node.op == "neg" else None

    made = rebuild(graph, doubled)
    (first, second) = made.nodes
    assert (first.op, first.loc, second.op) == ("add", "m", "exp")
    assert second.inputs == first.outputs
    assert made.outputs == (second.output, graph.inputs[0], first.output)
    wide = [Value("x", TensorType(DType.bf16, (3, 4)))]
    again = rebuild(graph, lambda b, node, operands: None, wide)
    assert {str(v.type) for v in again.values()} == {"bf16[3,4]"}
    assert print_graph(again).count("neg") == 1


def test_a_weight_keeps_its_name_where_it_means_the_same() -> None:
    t = TensorType(DType.f32, (4,))
    one, two, three = (Source(k, t) for k in ("one", "two", "three"))
    b = RewriteBuilder(set(), "m", {"w": one})
    assert b.weight("w", one) == Weight("w", t)
    assert b.added == {}
    assert b.weight("w", two) == Weight("w_", t)
    assert b.weight("w", two) == Weight("w_", t)
    assert b.weight("w", three) == Weight("w__", t)
    assert b.added == {"w_": two, "w__": three}
    assert [b.expr(Weight(n, t)) for n in ("w", "w_", "w__")] == [one, two, three]


@pytest.mark.parametrize(
    ("blamed", "wanted"),
    [("", "no"), ("x", "no (%x: f32[2,4])"), ("xy", "no (%x: f32[2,4], %y: f32[4])")],
)
def test_a_refusal_tells_whom_it_blames(blamed: str, wanted: str) -> None:
    assert str(Reject("no", tuple(map(value, blamed)))) == wanted
