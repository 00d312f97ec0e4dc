"""What operators declare beside their types: values at the edges, counts of work, and samples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from dsc.errors import RankError
from dsc.ir.analyses import aliases_of, cost, elements_read, written_roots
from dsc.ir.dims import Dim, symbol
from dsc.ir.interpreter import Interpreter
from dsc.ir.op import TypeMismatch, lookup, registry
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.ranks import Alone, RankedInterpreter, at_rank, current, interpreter, run_ranks
from dsc.ir.samples import sample_inputs
from dsc.ir.stages import Stage, is_legal
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate

B, S = symbol("B"), symbol("S")
PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.floordiv,
    "remainder": operator.mod, "maximum": max, "minimum": min, "pow": operator.pow,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
LOGIC = {"logical_and": operator.and_, "logical_or": operator.or_}
SAME_FOR_BOOLEANS = {"add", "mul", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne"}


def test_pointwise_operators_of_two_are_those_of_python() -> None:
    pairs = list(product((-3, -2, -1, 1, 2, 3), (1, 2, 3)))
    for name, function in {**PYTHON, **LOGIC}.items():
        boolean = name in LOGIC
        given = list(product((False, True), repeat=2)) if boolean else pairs
        a, b = (torch.tensor(x) for x in zip(*given, strict=True))
        found = lookup(name).reference(a, b)
        assert found.tolist() == [function(x, y) for x, y in given], name
        swapped = lookup(name).reference(b, a) if name not in ("pow", "div", "remainder") else None
        same = swapped is not None and torch.equal(found, swapped)
        assert lookup(name).traits.commutative == same, name
    assert lookup("div").reference(torch.tensor([1.0, -3.0]), torch.tensor(2.0)).tolist() == [
        0.5, -1.5,
    ]  # fmt: skip
    assert lookup("logical_not").reference(torch.tensor([True, False])).tolist() == [False, True]


def test_which_operators_take_integers_and_truth_values() -> None:
    def takes(name: str, dtype: DType, count: int) -> bool:
        try:
            (result,) = lookup(name).infer([TensorType(dtype, (2, 3))] * count, {})
        except TypeMismatch:
            return False
        compares = (
            name in PYTHON and lookup(name).reference(*[torch.ones(1)] * 2).dtype is torch.bool
        )
        assert result == TensorType(DType.boolean if compares else dtype, (2, 3))
        return True

    assert {name for name in PYTHON if takes(name, DType.boolean, 2)} == SAME_FOR_BOOLEANS
    assert all(takes(name, DType.i64, 2) for name in PYTHON)
    unary = [n for n, d in registry().items()
             if d.traits.role is Role.POINTWISE and len(d.operands) == 1
             and n not in ("cast", "logical_not") and d.example == "f32[2,3]"]  # fmt: skip
    assert {n for n in unary if takes(n, DType.i64, 1)} == {"neg", "abs", "square", "relu"}
    assert not any(takes(n, DType.boolean, 1) for n in unary)
    assert all(takes(n, DType.bf16, 1) for n in unary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_of_16_bits_are_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.linspace(0.1, 3, 50).to(dtype)
    wide = x.double() if dtype is torch.float64 else x.float()
    for name, function in (("exp", torch.exp), ("square", lambda v: v * v), ("tanh", torch.tanh)):
        found = lookup(name).reference(x)
        assert torch.equal(found, function(wide).to(dtype))
    total = lookup("sum").reference(x, axes=(0,), keepdims=False)
    assert torch.equal(total, wide.sum(0).to(dtype))
    ints = lookup("sum").reference(torch.tensor([2**30, 2**30 + 1]), axes=(0,), keepdims=False)
    assert int(ints) == 2**31 + 1


def test_a_router_takes_numbers_up_to_its_bounds() -> None:
    x, w = TensorType(DType.f32, (5, 3)), TensorType(DType.f32, (8, 3))
    fits = {"score": "sigmoid", "top_k": 2, "normalise": True}

    def taken(**attrs: Any) -> bool:
        try:
            results = lookup("route").infer([x, w], {**fits, **attrs})
        except TypeMismatch:
            return False
        shape = (5, attrs.get("top_k", 2) + attrs.get("shared", 0))
        assert results == (TensorType(DType.i64, shape), TensorType(DType.f32, shape))
        return True

    assert taken(top_k=8)
    assert taken(top_k=1)
    assert taken(groups=8, keep=8)
    assert taken(groups=8, keep=7, group_score="max")
    assert taken(groups=4, keep=1)
    assert taken(groups=4, keep=2, top_k=4)
    assert taken(shared=1)
    assert not taken(top_k=9)
    assert not taken(top_k=0)
    assert not taken(groups=8, keep=7)
    assert not taken(groups=4, keep=1, top_k=3)
    assert not taken(groups=4, keep=5)
    assert not taken(groups=4, keep=0)
    assert not taken(groups=3)
    assert not taken(groups=0)
    assert not taken(shared=-1)
    assert not taken(score="tanh")
    assert not taken(group_score="mean")


# --- work -----------------------------------------------------------------------------------------

WORK: dict[str, tuple[str, str, Dim, Dim, Dim, Dim]] = {
    "matmul": ("%x: f32[B,5,7], @w: f32[7,3]", "matmul %x, @w",
               2 * B * 5 * 3 * 7, 4 * B * 35, 4 * B * 15, 4 * 21),
    "einsum": ("%x: f32[B,5,7], @w: f32[7,3]", 'einsum %x, @w {eq="bsd,dc->bsc"}',
               2 * B * 5 * 3 * 7, 4 * B * 35, 4 * B * 15, 4 * 21),
    "silu": ("%x: bf16[B,5]", "silu %x", B * 5, 2 * B * 5, 2 * B * 5, 0),
    "cumsum": ("%x: f32[B,5]", "cumsum %x {axis=1}", B * 5, 4 * B * 5, 4 * B * 5, 0),
    "take": ("%x: f32[90,5], %i: i64[B]", "take %x, %i {axis=0}",
             0, 8 * B + 4 * B * 5, 4 * B * 5, 0),
    "gather": ("%x: f32[90,5], %i: i64[3,5]", "gather %x, %i {axis=0}",
               0, 8 * 15 + 4 * 15, 4 * 15, 0),
    "append": ("%p: f32[B,9,5], %n: f32[B,S,5], %l: i64[B]", "append %p, %n, %l",
               0, 4 * B * 45 + 4 * B * S * 5 + 8 * B, 4 * B * (9 + S) * 5, 0),
    "concat": ("%x: f32[B,5], %z: f32[B,2]", "concat %x, %z {axis=1}",
               0, 4 * B * 7, 4 * B * 7, 0),
    "full": ("%x: f32[B,5]", "full {shape=[B,5], value=1.0, dtype=f32}", 0, 0, 4 * B * 5, 0),
    "split": ("%x: f32[B,5]", "reshape %x {shape=[5,B]}", 0, 0, 0, 0),
    "grouped_linear": ("%x: f32[6,5], @w: f32[4,3,5], %o: i64[5]", "grouped_linear %x, @w, %o",
                       2 * 6 * 5 * 3, 4 * 30 + 8 * 5, 4 * 18, 4 * 60),
    "a few rows of many groups": (
        "%x: f32[2,5], @w: f32[9,3,5], %o: i64[10]", "grouped_linear %x, @w, %o",
        2 * 2 * 5 * 3, 4 * 10 + 8 * 10, 4 * 6, 4 * 2 * 15),
    "combine": ("%x: f32[6,5], %o: i64[6], %w: f32[3,2]", "combine %x, %o, %w",
                2 * 30, 4 * 30 + 8 * 6 + 4 * 6, 4 * 15, 0),
    "attention": (
        "%q: f32[B,S,4,6], %k: f32[B,9,2,6], %v: f32[B,9,2,8]",
        "attention %q, %k, %v {scale=1.0, causal=false}",
        2 * B * S * 4 * 9 * (6 + 8), 4 * B * (S * 24 + 9 * 12 + 9 * 16), 4 * B * S * 32, 0),
    "pages": (
        "%q: f32[B,S,4,6], %r: f32[B,S,4,2], %c: f32[99,5,6], %k: f32[99,5,2], %n: i64[B],"
        " %t: i64[B,3]",
        "latent_attention %q, %r, %c, %k, %n, %t {scale=0.1}",
        2 * B * S * 4 * 15 * (6 + 6 + 2),
        4 * (B * S * 24 + B * S * 8 + B * 15 * 6 + B * 15 * 2) + 8 * B + 8 * 3 * B,
        4 * B * S * 24, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_work_is_what_is_counted_by_hand(name: str) -> None:
    inputs, line, flops, read, written, weights = WORK[name]
    (node,) = parse_graph(f"graph g({inputs}) {{ %y = {line} return %y }}").nodes
    found = cost(node)
    assert (found.flops, found.read, found.written, found.weights) == (
        flops, read, written, weights,
    )  # fmt: skip


def test_a_region_reads_what_its_operators_read() -> None:
    text = """graph g(%x: f32[90,5], %i: i64[B]) {
      %y, %z = fused %x, %i {body=graph b(%x: f32[90,5], %i: i64[B]) {
        %a = take %x, %i {axis=0} %b = take %x, %i {axis=0} %c = add %a, %b
        MORE return %c, %d }}
      return %y, %z
    }"""
    for more, elements in (
        ("%d = neg %c", 10 * B), ("%d = neg %x", 450), ("%d = reshape %x {shape=[450]}", 450),
    ):  # fmt: skip
        (node,) = parse_graph(text.replace("MORE", more)).nodes
        assert elements_read(node, 0) == elements
    (node,) = parse_graph(text.replace("MORE", "").replace("%d", "%x")).nodes
    assert elements_read(node, 0) == 450


def test_what_is_written_in_place_is_the_operand_and_what_moves_nothing_is_too() -> None:
    graph = parse_graph("""graph g(%c: f32[2,7,4], %n: f32[2,1,4], %l: i64[2], @w: f32[4]) {
      %v = reshape %c {shape=[2,28]}
      %t = permute %c {dims=[1,0,2]}
      %d = cache_write %c, %n, %l
      %a, %b = fused %n, %d, %l {body=graph i(%x: f32[2,1,4], %k: f32[2,7,4], %m: i64[2]) {
        %y = reshape %x {shape=[2,4]} %z = cache_write %k, %x, %m return %y, %z
      }}
      %u = reshape @w {shape=[2,2]}
      return %v, %t, %a, %b, %u
    }""")
    assert [aliases_of(n) for n in graph.nodes] == [{}, {}, {0: 0}, {1: 1}, {}]
    roots = {name: str(x) for name, x in written_roots(graph).items()}
    assert roots == {
        "c": "%c", "n": "%n", "l": "%l", "v": "%c", "t": "%t", "d": "%c", "a": "%a", "b": "%c",
        "u": "@w",
    }  # fmt: skip


def test_each_stage_is_made_of_operators_of_its_forms() -> None:
    legal = {
        "linear": (1, 1, 1, 1, 1), "sdpa": (1, 0, 0, 0, 0), "cache_write": (1, 0, 1, 1, 1),
        "fused": (1, 0, 0, 1, 1), "all_gather": (0, 0, 1, 1, 1), "scaled": (0, 0, 0, 0, 0),
        "no_such_operator": (0, 0, 0, 0, 0),
    }  # fmt: skip
    for name, stages in legal.items():
        assert tuple(map(int, (is_legal(name, stage) for stage in Stage))) == stages, name
    assert [int(stage) for stage in Stage] == [0, 1, 2, 3, 4]


# --- samples --------------------------------------------------------------------------------------

CAUSAL = """graph g(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B],
    %logits_at: i64[B,L], CACHE, @e: f32[50,4]) {
  %x = embedding %input_ids, @e
  return %x, %positions, %lengths, %logits_at
}"""


@pytest.mark.parametrize(
    ("cache", "sizes", "past"),
    [
        ("%p: f32[B,P,4]", {"P": 7}, 7),
        ("%p: f32[B,C,4]", {"C": 10}, 7),
        ("%p: f32[B,C,4]", {"C": 3}, 0),
        ("%p: f32[B,C,4]", {"C": 2}, 0),
        ("%p: f32[B,4]", {}, 0),
    ],
)
def test_a_sample_of_a_causal_step_has_its_past_behind_it(
    cache: str, sizes: dict[str, int], past: int
) -> None:
    graph = parse_graph(CAUSAL.replace("CACHE", cache))
    sizes = {"B": 2, "S": 3, "L": 40, **sizes}
    found = sample_inputs(graph, sizes)
    assert found["lengths"].tolist() == [past] * 2
    assert found["positions"].tolist() == [[past, past + 1, past + 2]] * 2
    assert set(found["logits_at"].unique().tolist()) == {0, 1, 2}
    assert found["input_ids"].shape == (2, 3)
    assert 0 <= int(found["input_ids"].min()) <= int(found["input_ids"].max()) < 50
    given = sample_inputs(graph, sizes, lengths=[1, 5])
    assert given["lengths"].tolist() == [1, 5]
    assert given["positions"].tolist() == [[1, 2, 3], [5, 6, 7]]


def test_a_sample_of_a_step_over_pages_fills_them() -> None:
    graph = parse_graph(
        """graph g(%input_ids: i64[B,S], %lengths: i64[B], %c: f32[N,4,3],
        %n: f32[B,S,3], %t: i64[B,M]) {
      %d = cache_write %c, %n, %lengths, %t return %d
    }""".replace("%t:", "%block_table:").replace("%lengths, %t", "%lengths, %block_table")
    )
    found = sample_inputs(graph, {"B": 2, "S": 3, "N": 6, "M": 3})
    assert found["lengths"].tolist() == [9, 9]
    assert sorted(found["block_table"].flatten().tolist()) == [0, 1, 2, 3, 4, 5]


def test_indices_of_a_sample_lie_where_all_that_read_them_look() -> None:
    graph = parse_graph("""graph g(%x: f32[40,3], %y: f32[9,3], %i: i64[80], %j: i32[80],
        %o: i64[7], %q: i64[8], %r: f32[20,3], %w: f32[6,2,3], %p: f32[8,3], %v: f32[4,2]) {
      %k = reshape %i {shape=[2,40]} %a = take %x, %k {axis=0} %b = take %y, %i {axis=0}
      %f = fused %x, %j {body=graph f(%x: f32[40,3], %j: i32[80]) {
        %c = cast %j {dtype=i64} %d = take %x, %c {axis=0} return %d }}
      %g = grouped_linear %r, %w, %o
      %h = combine %p, %q, %v
      return %a, %b, %f, %g, %h
    }""")
    found = sample_inputs(graph, {})
    assert set(found["i"].tolist()) == set(range(9))
    assert set(range(10, 40)) & set(found["j"].tolist())
    assert 0 <= int(found["j"].min()) <= int(found["j"].max()) <= 39
    assert (int(found["o"][0]), int(found["o"][-1])) == (0, 20)
    assert found["o"].tolist() == sorted(found["o"].tolist())
    assert sorted(found["q"].tolist()) == list(range(8))
    again, other = sample_inputs(graph, {}), sample_inputs(graph, {}, seed=1)
    assert all(torch.equal(x, again[name]) for name, x in found.items())
    assert not torch.equal(found["i"], other["i"])


# --- ranks ----------------------------------------------------------------------------------------

SHARDED = """
program "p" {stage=OPTIMIZED}
interface { mesh {ranks=2, parallel="tp"} }
weights {
  @a : f32[2,3] = slice(cast(stack(source "x" : f64[3], source "y" : f64[3], source "z" : f64[3],
    source "u" : f64[3])) {dtype=f32})
    {axis=0, start=2*rank, end=2*rank+2, step=1}
}
graph main(%x: f32[2,3]) { %y = mul %x, @a %z = all_reduce %y {ranks=2} return %z as "z" }
"""


def test_a_rank_reads_its_part_of_a_stack_alone() -> None:
    names = "xyzu"
    source = DictSource({k: torch.full((3,), float(i)).double() for i, k in enumerate(names)})
    program = parse_program(SHARDED, source)
    for rank in range(2):
        expr = at_rank(program, rank).weights["a"]
        assert evaluate(expr, source)[:, 0].tolist() == [2.0 * rank, 2.0 * rank + 1]
        assert str(expr).count("Source(") == 2
    made = interpreter(program)
    assert isinstance(made, RankedInterpreter)
    assert made.run("main", {"x": torch.ones(2, 3)})["z"][:, 0].tolist() == [2.0, 4.0]
    plain = parse_program('program "p" {stage=CANONICAL} graph main(%x: f32[2]) { return %x }')
    assert isinstance(interpreter(plain), Interpreter)


@pytest.mark.parametrize(
    ("attrs", "read"),
    [
        ("axis=0, start=rank, end=rank+2, step=1", 2),
        ("axis=0, start=rank, end=rank+3, step=2", 4),
        ("axis=1, start=rank, end=rank+2, step=1", 4),
    ],
)
def test_the_part_of_a_rank_is_the_slice_however_it_runs(attrs: str, read: int) -> None:
    source = DictSource({k: torch.arange(4.0) + 10 * i for i, k in enumerate("xyzu")})
    each = ", ".join(f'source "{k}" : f32[4]' for k in "xyzu")
    shape = "2,4" if "axis=0" in attrs else "4,2"
    text = (
        f'program "p" {{stage=OPTIMIZED}} interface {{ mesh {{ranks=2, parallel="tp"}} }} weights'
        f" {{ @a : f32[{shape}] = slice(stack({each})) {{{attrs}}} }}"
        f" graph main(%x: f32[{shape}]) {{ %y = mul %x, @a return %y }}"
    )
    whole = torch.arange(4.0) + 10 * torch.arange(4.0)[:, None]
    for rank in range(2):
        expr = at_rank(parse_program(text, source), rank).weights["a"]
        step = 2 if "step=2" in attrs else 1
        part = slice(rank, rank + 1 + step, step)
        assert torch.equal(
            evaluate(expr, source), whole[part] if "axis=0" in attrs else whole[:, part]
        )
        assert str(expr).count("Source(") == read, "of a stack, what a rank needs alone"


def test_one_alone_has_nobody_to_speak_to() -> None:
    alone = current()
    assert (alone.rank, alone.size) == (0, 1)
    x = {0: torch.ones(1)}
    assert Alone().exchange("sum", {}, {}) == {}
    for sent, wanted in ((x, {}), ({}, x), (x, x)):
        with pytest.raises(RankError, match="sum speaks to other ranks"):
            alone.exchange("sum", sent, wanted)


def test_ranks_exchange_letters_in_order_and_the_first_failure_ends_all() -> None:
    def shifted(rank: int) -> list[float]:
        group = current()
        assert (group.rank, group.size) == (rank, 3)
        after, before = (rank + 1) % 3, (rank - 1) % 3
        found = []
        for number in range(3):
            sent = torch.tensor([10.0 * rank + number])
            found.append(float(group.exchange("shift", {after: sent}, {before: sent})[before]))
        return found

    assert run_ranks(3, shifted) == [[20, 21, 22], [0, 1, 2], [10, 11, 12]]

    def failing(rank: int) -> None:
        if rank == 1:
            raise ValueError("one failed")
        current().exchange("wait", {}, {1: torch.ones(1)})

    with pytest.raises(ValueError, match="one failed"):
        run_ranks(2, failing)
    assert isinstance(current(), Alone)
