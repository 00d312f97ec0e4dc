"""Weights stay in their format where each step ends at blocks and all readers take them so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc import pipeline
from dsc.backends import get
from dsc.ir.arrays import array_of, tensor_of
from dsc.ir.dims import Range
from dsc.ir.formats import WHOLE, Format, Packed
from dsc.ir.graph import Node
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.ranks import at_rank
from dsc.ir.regions import RegionLimits
from dsc.ir.stages import Stage
from dsc.ir.streams import blocks
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import WeightExpr, apply, evaluate, leaf, parts, random_source, sources
from dsc.passes._in_format import Dequantised, in_format
from dsc.passes.choose_formats import ChooseFormats
from dsc.rewrite.base import PassReport
from dsc.rewrite.verify import compare_programs
from dsc.targets import Target


def stored(
    name: str, *shape: int, block: tuple[int, int] = (4, 2), scales: DType = DType.f32
) -> WeightExpr:
    """What a weight in FP8 stands for."""
    t = TensorType(DType.f8e4m3, shape, Format(block, scales))
    return apply("dequantize", leaf(name, t), dtype=DType.bf16)


@st.composite
def expressions(draw: st.DrawFn) -> WeightExpr:
    """Weights in blocks of some kind under steps, of which about half end at blocks."""
    block = draw(st.sampled_from([(4, 2), (1, WHOLE), (WHOLE, WHOLE), (WHOLE, 2)]))
    shape = draw(st.sampled_from([8, 12, 10])), draw(st.sampled_from([4, 6]))
    made = stored("a", *shape, block=block)
    for number in range(draw(st.integers(1, 4))):
        made = _under(draw, made, number, block)
    return made


def _under(draw: st.DrawFn, expr: WeightExpr, number: int, block: tuple[int, int]) -> WeightExpr:
    shape = tuple(int(str(d)) for d in expr.type.shape)
    axis = draw(st.integers(0, len(shape) - 1))
    match draw(st.sampled_from(["slice", "concat", "stack", "permute", "reshape"])):
        case "slice":
            start = draw(st.integers(0, max(0, shape[axis] - 1)))
            start -= start % draw(st.sampled_from([1, 4]))
            end = draw(st.sampled_from([shape[axis], min(shape[axis], start + 4)]))
            return apply("slice", expr, axis=axis, start=start, end=end)
        case "concat" if len(shape) == 2:
            return apply("concat", expr, stored(f"b{number}", *shape, block=block), axis=axis)
        case "stack" if len(shape) < 4:
            return apply("stack", expr, expr)
        case "permute":
            dims = draw(st.permutations(range(len(shape))))
            return apply("permute", expr, dims=tuple(dims))
        case "reshape" if shape[axis] % 2 == 0:
            half = shape[axis] // 2
            cut = draw(st.sampled_from([(2, half), (half, 2), (1, shape[axis])]))
            return apply("reshape", expr, shape=(*shape[:axis], *cut, *shape[axis + 1 :]))
    return apply("reshape", expr, shape=(shape[0] * shape[1], *shape[2:]))


def _stays(expr: WeightExpr) -> bool:
    try:
        in_format(expr)
    except Dequantised:
        return False
    return True


@given(expressions().filter(_stays))
def test_a_weight_that_stays_in_its_format_stands_for_the_same_numbers(expr: WeightExpr) -> None:
    source = random_source({s.key: s.type for s in sources(expr)})
    found = in_format(expr)
    assert found.type.shape == expr.type.shape
    made = evaluate(found, source)
    assert isinstance(made, Packed)
    assert torch.equal(made.unpack(torch.bfloat16), evaluate(expr, source))


HEADS = {"671b": (128, 128, 128, 512), "tiny": (8, 32, 32, 128), "an odd v": (16, 128, 192, 512)}


@pytest.mark.parametrize("name", HEADS)
def test_halves_of_kv_b_stay_where_heads_are_whole_blocks(name: str) -> None:
    heads, nope, v, rank = HEADS[name]
    whole = stored("kv_b", heads * (nope + v), rank, block=(128, 128))
    per_head = apply("reshape", whole, shape=(heads, nope + v, rank))
    half = apply("slice", per_head, axis=1, start=0, end=nope)
    if name != "671b":
        with pytest.raises(Dequantised, match=f"reshape at {nope + v} cuts a block of 128"):
            in_format(half)
        return
    kept = in_format(half)
    assert str(kept.type) == "f8e4m3{128x128,f32}[128,128,512]"
    assert kept.args[1].type.shape == (128, 1, 4)


JOINED = {
    "rows one after another": ("concat", "a", "b", {"axis": 0}, ""),
    "rows behind a part of a block": ("concat", "c", "a", {"axis": 0}, "concat at 6 cuts a block"),
    "the last may be partial": ("concat", "a", "c", {"axis": 0}, ""),
    "a part that is stored otherwise": ("concat", "a", "p", {"axis": 0}, "stored as bf16[8,4]"),
    "blocks that differ": ("concat", "a", "d", {"axis": 0}, "in different formats"),
    "arithmetic": ("add", "a", "b", {}, "add computes with its numbers"),
    "blocks on other axes": ("permute", "e", "", {"dims": (1, 2, 0)}, "along other axes"),
    "rows in one axis": ("reshape", "f", "", {"shape": (32,)}, "reshape joins axes"),
    "matrices in one": ("reshape", "e", "", {"shape": (24, 4)}, "reshape joins axes"),
    "rows by head": ("reshape", "a", "", {"shape": (2, 4, 4)}, ""),
    "columns by head": ("reshape", "a", "", {"shape": (8, 2, 2)}, "along other axes"),
    "a block of one element": ("reshape", "g", "", {"shape": ()}, "reshape joins axes"),
    "scales that differ": ("concat", "a", "h", {"axis": 0}, "in different formats"),
    "the rest of the rows": ("slice", "c", "", {"axis": 0, "start": 4, "end": 6}, ""),
    "every second row": ("slice", "a", "", {"axis": 0, "start": 0, "end": 8, "step": 2}, "slice "),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_a_step_that_cuts_blocks_is_told(name: str) -> None:
    op, *operands, attrs, why = JOINED[name]
    given = {
        "a": stored("a", 8, 4), "b": stored("b", 8, 4), "c": stored("c", 6, 4),
        "d": stored("d", 8, 4, block=(2, 2)), "e": stored("e", 3, 8, 4),
        "f": stored("f", 8, 4, block=(1, 4)), "g": stored("g", 1, 1),
        "h": stored("h", 8, 4, scales=DType.bf16),
        "p": leaf("p", TensorType(DType.bf16, (8, 4))),
    }  # fmt: skip
    assert isinstance(attrs, dict)
    expr = apply(str(op), *(given[str(x)] for x in operands if x), **attrs)
    if not why:
        assert in_format(expr).type.shape == expr.type.shape
        return
    with pytest.raises(Dequantised) as caught:
        in_format(expr)
    assert str(why) in str(caught.value)


ROW, ALL = (1, WHOLE), (WHOLE, WHOLE)
WHOLE_AXES: dict[str, tuple[str, list[tuple[int, int]], dict[str, Any], str]] = {
    "half the columns of rows": ("slice", [ROW], {"axis": 1, "start": 0, "end": 3}, "1x*[8,3]"),
    "half the rows of one": ("slice", [ALL], {"axis": 0, "start": 3, "end": 8}, "*x*[5,4]"),
    "a row of one": ("reshape", [ALL], {"shape": (2, 4, 4)}, "*x*[2,4,4]"),
    "columns by head": ("reshape", [ROW], {"shape": (8, 2, 2)}, "*x*[8,2,2]"),
    "rows one after another": ("concat", [ROW, ROW], {"axis": 0}, "1x*[14,4]"),
    "one after another": ("concat", [ALL, ALL], {"axis": 0}, "1x*[14,4]"),
    "one after rows": ("concat", [ROW, ALL], {"axis": 0}, "1x*[14,4]"),
    "a stack": ("stack", [ALL, ALL], {}, "*x*[2,8,4]"),
    "columns after columns": ("concat", [ROW, ROW], {"axis": 1}, "a scale of its own"),
    "rows beside one": ("concat", [ROW, ALL], {"axis": 1}, "a scale of its own"),
}


@pytest.mark.parametrize("name", WHOLE_AXES)
def test_a_scale_of_a_whole_axis_goes_with_each_part_of_it(name: str) -> None:
    op, blocks, attrs, wanted = WHOLE_AXES[name]
    heights = (8, 6 if op == "concat" and attrs["axis"] == 0 else 8)
    expr = apply(
        op,
        *(stored(f"w{i}", heights[i], 4, block=block) for i, block in enumerate(blocks)),
        **attrs,
    )
    if "[" not in wanted:
        with pytest.raises(Dequantised, match=wanted):
            in_format(expr)
        return
    found = in_format(expr)
    assert str(found.type) == "f8e4m3{" + wanted.replace("[", ",f32}[")
    source = random_source({s.key: s.type for s in sources(expr)})
    assert torch.equal(evaluate(found, source).unpack(torch.bfloat16), evaluate(expr, source))


# --- the pass -------------------------------------------------------------------------------------


def program(body: str, dtype: str = "bf16", **weights: WeightExpr) -> Program:
    """A program over weights in FP8."""
    declared = ", ".join(f"@{name}: {expr.type}" for name, expr in weights.items())
    text = f"graph main(%x: {dtype}[N,4], {declared}) {{ {body} }}"
    made = parse_program(text, stages=(Stage.CANONICAL,))
    found = {s.key: s.type for expr in weights.values() for s in sources(expr)}
    made = replace(made, weights=weights, source=random_source(found), symbols={"N": Range(1, 9)})
    verify(made)
    return made


def chosen(made: Program, formats: tuple[str, ...] = ("f8e4m3",)) -> tuple[Program, list[str]]:
    """The program after the pass, and the reasons of those that are dequantised."""
    report = PassReport()
    after = ChooseFormats(formats).run(made, report)
    verify(after)
    assert compare_programs(made, after).ok
    return after, [reason for _, _, reason in report.missed]


LINEAR = "%y = linear %x, @w return %y"


def test_a_backend_that_takes_no_codes_gets_the_program_as_it_is() -> None:
    made = program(LINEAR, w=stored("w", 8, 4))
    after, why = chosen(made, ())
    assert after is made
    assert why == ["the backend takes no weights in f8e4m3"]
    kept, why = chosen(made)
    assert str(kept.weights["w"].type) == "f8e4m3{4x2,f32}[8,4]"
    assert why == []


def test_a_weight_given_in_a_format_is_dequantised_for_a_backend_without_it() -> None:
    text = "graph main(%x: bf16[N,4], @w: f8e4m3{4x2,f32}[8,4]) { %y = linear %x, @w return %y }"
    made = parse_program(text, stages=(Stage.CANONICAL,))
    after, _ = chosen(made, ())
    assert str(after.weights["w"].type) == "bf16[8,4]"
    assert chosen(made)[0] is made
    for name, kind in (("tvm", "bf16[8,4]"), ("null", "f8e4m3{4x2,f32}[8,4]")):
        done = pipeline.prepare(made, get(name), Target("cpu"), pipeline.PipelineOptions())
        assert str(done.program.weights["w"].type) == kind


def test_weights_given_in_a_format_keep_it_where_formats_are_all_that_is_chosen() -> None:
    text = "graph main(%x: bf16[N,4], @w: f8e4m3{4x2,f32}[8,4]) { %y = linear %x, @w return %y }"
    made = parse_program(text, stages=(Stage.CANONICAL,))
    done = pipeline.apply(made, pipeline.read("choose_formats", get))
    assert done.weight_types() == made.weight_types()


def test_weights_given_in_a_format_go_through_the_passes_before() -> None:
    """They are numbers until formats are chosen: here rows of two are joined, and kept joined."""
    text = """graph main(%x: bf16[N,4], @a: f8e4m3{4x2,f32}[8,4], @b: f8e4m3{4x2,f32}[4,4]) {
      %y = linear %x, @a
      %z = linear %x, @b
      return %y, %z
    }"""
    for stage in (Stage.TRACED, Stage.CANONICAL):
        made = parse_program(text, stages=(stage,))
        done = pipeline.prepare(made, get("null"), Target("cpu"), pipeline.PipelineOptions())
        assert list(map(str, done.program.weight_types().values())) == ["f8e4m3{4x2,f32}[12,4]"]
    merged = pipeline.apply(made, pipeline.read("merge_projections,choose_formats", get))
    assert merged.weights == done.program.weights
    whole = parse_program(text.replace("{4x2,", "{*x*,"), stages=(stage,))
    merged = pipeline.apply(whole, pipeline.read("merge_projections,choose_formats", get))
    assert list(map(str, merged.weight_types().values())) == ["f8e4m3{1x*,f32}[12,4]"]
    assert compare_programs(whole, merged).ok


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("%y = linear %x, @w %z = add @w, @w return %y, %z", "add: a is f8e4m3"),
        ("%y = linear %x, @w return %y, @w", "it is a result"),
    ],
)
def test_one_reader_that_takes_no_format_is_enough(body: str, why: str) -> None:
    after, reasons = chosen(program(body, w=stored("w", 8, 4)))
    assert str(after.weights["w"].type) == "bf16[8,4]"
    assert len(reasons) == 1
    assert why in reasons[0]


def test_rows_that_are_looked_up_in_codes_are_rounded_as_the_table_would_be() -> None:
    """Where a table in 16 bits would be rounded when it is packed, its rows are one by one."""
    body = "%i = full {shape=[2], value=1.0, dtype=i64} %y = embedding %i, @w return %y"
    after, why = chosen(program(body, w=stored("w", 8, 4)))
    assert why == []
    assert str(after.weights["w"].type) == "f8e4m3{4x2,f32}[8,4]"
    rows, y = after.entries["main"].nodes[1:]
    assert (rows.op, str(rows.output.type)) == ("embedding", "f32[2,4]")
    assert (y.op, y.output.name, str(y.output.type)) == ("cast", "y", "bf16[2,4]")
    text = "graph main(%i: i64[2], @w: f8e4m3{4x2,f32}[8,4]) { %y = embedding %i, @w return %y }"
    made = parse_program(text, stages=(Stage.CANONICAL,))
    assert [n.op for n in chosen(made)[0].entries["main"].nodes] == ["embedding"]


def test_ranks_share_weights_at_blocks() -> None:
    """Part r of a weight is codes and scales of its own, or is dequantised with a reason."""
    body = "%y = linear %x, @w %z = linear %x, @v return %y, %z"
    made = program(body, w=stored("w", 16, 4), v=stored("v", 12, 4))
    shared = pipeline.apply(made, pipeline.read("shard{ranks=2}", get))
    report = PassReport()
    after = ChooseFormats().run(shared, report)
    assert compare_programs(shared, after).ok
    kinds = {name: str(expr.type) for name, expr in after.weights.items()}
    assert kinds == {"w.shard_0": "f8e4m3{4x2,f32}[8,4]", "v.shard_0": "bf16[6,4]"}
    assert report.missed == [("keep", "v.shard_0", "slice at 6*rank cuts a block of 4")]
    for rank in range(2):
        part = evaluate(at_rank(after, rank).weights["w.shard_0"], after.source)
        codes = after.source.load("w")[8 * rank : 8 * rank + 8]
        assert torch.equal(part.parts[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(part.parts[1], after.source.load("w.scale")[2 * rank : 2 * rank + 2])


# --- rows side by side ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 32), (1, WHOLE), (32, 64), (WHOLE, WHOLE)])
@pytest.mark.parametrize("codes", ["f8e4m3", "i8", "i4"])
def test_rows_side_by_side_are_the_same_numbers_in_the_order_of_kernels(
    codes: str, block: tuple[int, int]
) -> None:
    """Stacks of matrices whose rows and columns end inside of tiles, written block by block."""
    t = TensorType(DType(codes), (41, 70), Format(block, DType.f16))
    stored = [[part for _, part in parts(name, leaf(name, t))] for name in "abc"]
    stack, scales = (apply("stack", *each) for each in zip(*stored, strict=True))
    plain = apply("dequantize", apply("scaled", stack, scales, block=block), dtype=DType.f32)
    text = "graph main(%x: f32[N,70], %o: i64[4]) {\n return %x }"
    made = parse_program(text, stages=(Stage.CANONICAL,))
    chosen = ChooseFormats(tile=16)._in_tiles(in_format(plain))
    source = random_source({s.key: s.type for s in sources(plain)})
    assert chosen.type.format is not None
    assert chosen.type.format.tile == 16
    assert torch.equal(evaluate(chosen, source).unpack(torch.float32), evaluate(plain, source))
    parsed = parse_program(print_program(made.with_weights({"w": chosen})))
    assert parsed.weights["w"] == chosen
    for part in chosen.args:
        whole = evaluate(part, source)
        streamed = [torch.as_tensor(tensor_of(np.ascontiguousarray(array_of(each))).reshape(-1))
                    for each in blocks(part, source, 200)]  # fmt: skip
        assert len(streamed) >= 3
        assert torch.equal(
            torch.cat(streamed).view(torch.uint8), whole.reshape(-1).view(torch.uint8)
        )
    codes_of = evaluate(chosen.args[0], source)[1]
    rows = evaluate(stack, source)[1].view(torch.uint8)
    assert codes_of.shape[0] == 3  # 41 rows
    first = codes_of[0].view(torch.uint8).reshape(-1, 16, 4)
    assert torch.equal(first[1, 5], rows[5, 4:8])
    assert not codes_of[2].view(torch.uint8).reshape(-1, 16, 4)[:, 9:].any()


def test_blocks_that_end_inside_of_a_tile_are_dequantised_with_the_reason() -> None:
    text = """graph main(%x: bf16[N,64], @a: f8e4m3{8x32,f32}[32,64], @b: i8{1x16,f32}[32,64]) {
      %y = linear %x, @a
      %z = linear %x, @b
      return %y, %z
    }"""
    made = parse_program(text, stages=(Stage.CANONICAL,))
    report = PassReport()
    done = ChooseFormats(tile=16).run(pipeline._in_numbers(made), report)
    assert all(t.format is None for t in done.weight_types().values())
    assert {miss.reason for miss in report.near} == {
        "16 rows side by side in blocks of [8, 32]", "16 rows side by side in blocks of [1, 16]",
    }  # fmt: skip
    again = ChooseFormats(tile=16).run(made, PassReport())
    kind = TensorType(DType.i8, (32, 64), Format((1, 32), DType.f16, tile=16))
    stored = {name: apply("dequantize", leaf(name, kind), dtype=DType.bf16) for name in "ab"}
    tiled = made.with_weights(stored)
    kept = ChooseFormats(tile=16).run(tiled, PassReport())
    assert all("tile=16" in str(t) for t in kept.weight_types().values())
    other = ChooseFormats(tile=8).run(tiled, report)
    assert all(t.format is None for t in other.weight_types().values())
    assert "16 of its rows lie side by side" in {miss.reason for miss in report.near}
    source = random_source({s.key: s.type for e in tiled.weights.values() for s in sources(e)})
    for expr in other.weights.values():
        streamed = [tensor_of(x) if isinstance(x, np.ndarray) else x for x in blocks(expr, source)]
        assert torch.equal(torch.cat([x.flatten() for x in streamed]),
                           evaluate(expr, source).flatten())  # fmt: skip
    assert again.weight_types() == done.weight_types()


def test_what_a_kernel_refuses_of_one_weight_all_of_its_weights_lose() -> None:
    """Experts whose kernel takes both weights in a format or none, beside a linear that may."""
    text = """graph main(%x: f32[N,32], %i: i64[N,2], %r: f32[N,2], @up: i8{1x32,f16}[4,64,32],
        @down: i8{1x32,f16}[4,32,32], @w: i8{1x32,f16}[16,32], @plain: f32[8,32]) {
      %y = experts %x, %i, %r, @up, @down
      %a = linear %y, @w
      %b = linear %y, @plain
      return %a, %b
    }"""
    made = pipeline._in_numbers(parse_program(text, stages=(Stage.CANONICAL,)))
    asked: list[tuple[str, int]] = []

    def accepts(node: Node) -> bool:
        stored = sum(x.type.format is not None for x in node.operands)
        asked.append((node.op, stored))
        return node.op == "linear"

    report = PassReport()
    done = ChooseFormats(limits=RegionLimits(accepts=accepts)).run(made, report)
    kept = {name for name, t in done.weight_types().items() if t.format is not None}
    assert kept == {"w"}
    assert {(miss.where, miss.reason) for miss in report.near} == {
        ("up", "no kernel of experts takes i8{1x32,f16}[4,64,32]"),
        ("down", "no kernel of experts takes i8{1x32,f16}[4,32,32]"),
    }
    assert ("experts", 2) in asked
    assert ("linear", 0) not in asked
    every = ChooseFormats(limits=RegionLimits(accepts=lambda node: True)).run(made, PassReport())
    assert sum(t.format is not None for t in every.weight_types().values()) == 3
