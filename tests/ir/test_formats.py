"""Stored formats: spelled in types, exact in bytes, bounded in error, taken where declared."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc.errors import CheckpointError, ParseError, VerificationError
from dsc.ir.analyses import cost
from dsc.ir.formats import CODINGS, Coding, Format, Packed, pack, pack_rows, pack_state
from dsc.ir.graph import Graph, Weight
from dsc.ir.interpreter import run_graph
from dsc.ir.op import TypeMismatch, infer, registry, type_of
from dsc.ir.ops.quant import activation_type
from dsc.ir.parser import parse_graph, parse_operands, parse_program, parse_verified
from dsc.ir.printer import print_graph, print_program
from dsc.ir.streams import blocks
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import (
    DictSource,
    apply,
    evaluate,
    leaf,
    random_source,
    random_tensor,
    sources,
)
from dsc.ir.weights import parts as parts_of
from dsc.passes._in_format import Dequantised, in_format
from tests.ir.test_operators import CASES, filled, operators

BLOCKS = st.tuples(st.integers(0, 9), st.integers(0, 9))
SHAPES = st.lists(st.integers(1, 12), min_size=2, max_size=3).map(tuple)
E4M3 = Format((2, 3), DType.f32)
BEHIND = Format((1, 4), DType.f32, behind=True)


def packed(t: TensorType, seed: str) -> Packed:
    """A random tensor in a format."""
    parts = (random_tensor(part, f"{seed}{i}") for i, (_, part) in enumerate(t.parts))
    return Packed(t, tuple(parts))


@given(SHAPES, BLOCKS, st.sampled_from([DType.f32, DType.bf16]), st.sampled_from([None, DType.i8]))
def test_a_type_in_a_format_is_text_and_counts_its_bytes(
    shape: tuple[int, ...], block: tuple[int, int], scales: DType, zeros: DType | None
) -> None:
    for name, coding in CODINGS.items():
        wide = (*shape[:-1], shape[-1] * coding.together)
        t = TensorType(DType(name), wide, Format(block, scales, zeros))
        text = f"graph g(%x: f32[N], @w: {t}) {{\n  return %x, @w\n}}\n"
        graph = parse_graph(text)
        assert graph.outputs[1].type == t
        assert parse_operands(str(t))[0] == [(t, None)]
        stored = packed(t, "w")
        blocks = math.prod(shape[:-2]) * math.prod(
            math.ceil(n / (size or n)) for n, size in zip(wide[-2:], block, strict=True)
        )
        assert [part.numel() for part in stored.parts[1:]] == [blocks] * (1 + (zeros is not None))
        exact = math.prod(wide) * t.dtype.bits // 8 + blocks * (
            scales.itemsize + (zeros is not None)
        )
        assert t.nbytes == sum(part.nbytes for part in stored.parts) == exact
        assert t.bytes_of(t.numel) == exact
        assert infer("scaled", [Weight("w", p) for _, p in t.parts], {"block": block}) == (t,)


SCALES = st.sampled_from([DType.f32, DType.f16, DType.bf16, DType.f8e8m0])


@given(SHAPES, BLOCKS, st.integers(0, 99), st.floats(-12, 12), SCALES, st.booleans())
def test_packing_stays_within_the_bound_of_its_codes(
    shape: tuple[int, ...],
    block: tuple[int, int],
    seed: int,
    magnitude: float,
    scales: DType,
    shifted: bool,
) -> None:
    if scales is DType.f16:  # what is too small for it is refused
        magnitude = max(magnitude, -4.0)
    generator = torch.Generator().manual_seed(seed)
    for name, coding in CODINGS.items():
        wide = (*shape[:-1], shape[-1] * coding.together)
        x = torch.randn(wide, generator=generator) * 2.0**magnitude
        zeros = DType.i8 if shifted and not DType(name).is_float else None
        t = TensorType(DType(name), wide, Format(block, scales, zeros))
        made = pack(x, t)
        assert tuple(type_of(part) for part in made.parts) == tuple(part for _, part in t.parts)
        ones = TensorType(DType.i8, wide, Format(block, scales))
        scale = Packed(ones, (torch.ones_like(x), made.parts[1])).unpack(torch.float32)
        bound = torch.maximum(x.abs() * coding.relative, scale * coding.absolute)
        bound = bound * 2 if zeros else bound
        assert torch.allclose(made.bound(x), bound, rtol=1e-6, atol=0)
        assert ((made.unpack(torch.float32) - x).abs() <= bound * (1 + 1e-5)).all()
        if scales is DType.f32 and zeros is None:  # the largest is the largest code
            biggest = (made.unpack(torch.float32).abs() / scale).amax()
            assert float(biggest) == pytest.approx(coding.largest, rel=1e-6)
        assert not pack(torch.zeros(wide), t).unpack(torch.float32).any()


@pytest.mark.parametrize("scales", [DType.f16, DType.f8e8m0])
def test_a_scale_is_rounded_up_so_that_no_code_is_cut_off(scales: DType) -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    made = pack(x, TensorType(DType.i8, (64, 32), Format((1, 32), scales)))
    assert (made.parts[1].float() * 127 >= x.amax(1, keepdim=True)).all()
    exact = x.amax(1, keepdim=True) / 127
    assert (made.parts[1].float() < exact * (2 if scales is DType.f8e8m0 else 1 + 2**-10)).all()


def test_a_scale_that_its_type_cannot_hold_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"1\.\d+e\+34, too large for f16"):
        pack(torch.full((2, 4), 2e36), TensorType(DType.i8, (2, 4), Format((1, 4), DType.f16)))


def test_scales_that_are_all_too_small_for_their_type_are_an_error() -> None:
    t = TensorType(DType.i8, (2, 4), Format((1, 4), DType.f16))
    x = torch.full((2, 4), 127 * 2.0**-20)
    assert torch.equal(pack(x, t).unpack(torch.float32), x)
    x[1] = 1e-9  # of a matrix that has larger ones: what is lost is next to nothing
    assert float((pack(x, t).unpack(torch.float32) - x).abs().amax()) < 1e-7
    with pytest.raises(CheckpointError, match=r"7\.8e-08, too small for f16"):
        pack(torch.full((2, 4), 127 * 7.8e-8), t)
    pack(torch.full((2, 4), 1e-9), TensorType(DType.i8, (2, 4), Format((1, 4), DType.bf16)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("codes", "zeros"),
    [(t, None) for t in (DType.i8, DType.i4, DType.f8e4m3)]
    + [(DType.i8, DType.i8), (DType.i4, DType.i8)],
)
def test_what_no_code_says_is_an_error(codes: DType, zeros: DType | None, value: float) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, value, 3.0, 4.0]])
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        pack(x, TensorType(codes, (2, 4), Format((1, 4), DType.f16, zeros)))


@pytest.mark.parametrize(("codes", "zeros"), [("f8e4m3", "i8"), ("i8", "i4"), ("i4", "u8")])
def test_zero_points_must_hold_every_code(codes: str, zeros: str) -> None:
    kind = Format((1, 4), DType.f32, DType(zeros))
    with pytest.raises(ValueError, match=f"zero points in {zeros} do not hold codes in {codes}"):
        pack(torch.ones(2, 4), TensorType(DType(codes), (2, 4), kind))


def test_two_small_codes_share_a_byte_the_first_in_its_low_half() -> None:
    t = TensorType(DType.i4, (1, 4), Format((1, 4), DType.f32))
    made = pack(torch.tensor([[-7.0, 0.0, 7.0, 3.0]]), t)
    assert made.parts[0].tolist() == [[0x81, 0xBF]]
    assert made.parts[1].tolist() == [[1.0]]
    eight = Packed(t, (torch.tensor([[0x0F, 0x70]], dtype=torch.uint8), torch.tensor([[0.5]])))
    assert eight.unpack(torch.float32).tolist() == [[3.5, -4.0, -4.0, -0.5]]


def test_zero_points_are_taken_off_before_the_scale_is_applied() -> None:
    t = TensorType(DType.i4, (1, 4), Format((1, 2), DType.f32, DType.i8))
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[-2, 7]], dtype=torch.int8)
    made = Packed(t, (torch.tensor([[0x3B, 0x0F]], dtype=torch.uint8), scales, zeros))
    assert made.unpack(torch.float32).tolist() == [[2.5, -1.5, 0.0, -30.0]]
    one_sided = torch.tensor([[4.0, 5.5, 1.0, 3.0]])
    found = pack(one_sided, t)
    assert found.parts[2].tolist() == [[-8, -8]], "a block above 0 begins at 0"
    assert ((found.unpack(torch.float32) - one_sided).abs() <= 5.5 / 15).all()


def test_unpacking_is_code_times_the_scale_of_its_block() -> None:
    stored = packed(TensorType(DType.f8e4m3, (2, 5, 7), E4M3), "a")
    made = stored.unpack(torch.float32)
    codes, scales = stored.parts
    for e, i, j in ((0, 0, 0), (0, 4, 6), (1, 1, 2), (1, 2, 3), (1, 3, 5)):
        assert made[e, i, j] == codes[e, i, j].float() * scales[e, i // 2, j // 3]
    assert torch.equal(stored.unpack(torch.bfloat16), made.bfloat16())


def test_what_was_unpacked_for_a_node_goes_with_it() -> None:
    stored = packed(TensorType(DType.f8e4m3, (4, 6), E4M3), "a")
    made = weakref.ref(stored.unpack(torch.float32))
    assert made() is None


def test_a_kind_of_codes_is_a_row_of_codings(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {**CODINGS, "f8e5m2": Coding(57344.0, -57344.0, 57344.0, 2.0**-3, 2.0**-17)}
    for module in ("formats", "types", "ops.quant"):
        monkeypatch.setattr(f"dsc.ir.{module}.CODINGS", more)
    t = TensorType(DType.f8e5m2, (5, 7), E4M3)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    made = pack(x, t)
    source = DictSource(dict(zip(("w", "w.scale"), made.parts, strict=True)))
    expr = apply("dequantize", leaf("w", t), dtype=DType.f32)
    assert torch.equal(evaluate(expr, source), made.unpack(torch.float32))
    assert ((made.unpack(torch.float32) - x).abs() <= x.abs() / 8).all()


@pytest.mark.parametrize("codes", [DType.f8e4m3, DType.i8, DType.i4], ids=str)
def test_all_parts_are_joined_sliced_and_streamed_together(codes: DType) -> None:
    kind = Format((2, 4), DType.f32, DType.i8)
    made = {
        name: apply("dequantize", leaf(name, TensorType(codes, (rows, 14), kind)), dtype=DType.f32)
        for name, rows in (("a", 4), ("b", 5))
    }
    source = random_source({s.key: s.type for expr in made.values() for s in sources(expr)})
    assert set(source.types) == {"a", "a.scale", "a.zero", "b", "b.scale", "b.zero"}
    joined = apply("concat", *made.values(), axis=0)
    expr = apply("slice", joined, axis=1, start=4, end=14)
    wanted = evaluate(expr, source)
    found = in_format(expr)
    assert torch.equal(evaluate(found, source).unpack(torch.float32), wanted)
    assert [name for name, _ in parts_of("w", found)] == ["w", "w.scale", "w.zero"]
    assert torch.equal(torch.cat(list(blocks(expr, source, 40))), wanted)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda w: apply("permute", w, dims=(1, 0)), "packed along another axis"),
        (lambda w: apply("slice", w, axis=1, start=1, end=5), "slice at 1 cuts a block of 2"),
    ],
)
def test_bytes_of_two_codes_are_not_torn(step: Any, words: str) -> None:
    t = TensorType(DType.i4, (4, 6), Format((1, 1), DType.f32))
    with pytest.raises(Dequantised, match=words):
        in_format(step(apply("dequantize", leaf("w", t), dtype=DType.f32)))


@pytest.mark.parametrize("codes", [DType.f8e4m3, DType.i8, DType.i4], ids=str)
@pytest.mark.parametrize("block", [(1, 4), (2, 4), (1, 0), (0, 0)])
def test_a_weight_expression_packs_as_pack_does(codes: DType, block: tuple[int, int]) -> None:
    x = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    source, given = DictSource({"w": x}), {"codes": codes, "block": block}
    numbers = leaf("w", source.types["w"])
    scales = apply("block_scales", numbers, **given, dtype=DType.f16)
    expr = apply("scaled", apply("block_codes", numbers, scales, **given), scales, block=block)
    wanted = pack(x, expr.type)
    found = evaluate(expr, source)
    assert all(map(torch.equal, found.parts, wanted.parts))
    for part, whole in zip(expr.args, wanted.parts, strict=True):
        streamed = [torch.as_tensor(b) for b in blocks(part, source, 16)]
        assert torch.equal(torch.cat(streamed), whole)


@given(st.integers(0, 3), st.integers(1, 300), st.integers(0, 140), st.floats(-100, 120))
def test_rows_with_scales_behind_them_are_bytes_that_stay_within_the_bound(
    rows: int, width: int, group: int, magnitude: float
) -> None:
    """Also what codes stood for once stays what it is, where scales are powers of two."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 2.0**magnitude
    for kind in (DType.f8e4m3, DType.i8):
        t = TensorType(kind, (rows, width), Format((1, group), DType.f32, behind=True))
        assert parse_operands(str(t))[0] == [(t, None)]
        made = pack_state(x, t)
        (held,) = made.parts
        groups = -(-width // group) if group else 1
        size = -(-width // 4) * 4 + 4 * groups
        assert type_of(held) == t.stored == TensorType(DType.u8, (rows, size))
        assert t.nbytes == t.bytes_of(t.numel) == rows * size
        numbers = made.unpack(torch.float32)
        assert ((numbers - x).abs() <= made.bound(x) * (1 + 1e-5)).all()
        if kind.is_float:
            assert torch.equal(pack_state(numbers, t).unpack(torch.bfloat16).float(), numbers)
    assert TensorType(DType.f8e4m3, (512,), Format((1, 128), DType.f32, behind=True)).nbytes == 528


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [DType.f8e4m3, DType.i8], ids=str)
def test_a_number_that_no_code_says_makes_its_group_nan_and_no_other(
    kind: DType, value: float
) -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    x[1, 5] = value
    found = pack_state(x, TensorType(kind, (3, 12), BEHIND)).unpack(torch.bfloat16).isnan()
    assert found[1, 4:8].all()
    assert found.sum() == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("i8{2x4,f32,behind}[4,8]", "scales lie behind"),
        ("i8{1x4,f32,i8,behind}[4,8]", "scales lie behind"),
        ("i8{1x4,f32,unsigned}[4,8]", "unsigned codes in blocks of 4"),
        ("i8{2x16,f32,unsigned}[4,8]", "share no scale"),
        ("f8e4m3{1x16,f32,unsigned}[4,8]", "unsigned codes in f8e4m3"),
        ("i8{1x4,f32,tile=4,behind}[4,8]", "} expected"),
        ("f8e4m3{0x4,f32}[5,7]", "128x128"),
        ("f8e4m3{4x00,f32}[5,7]", "128x128"),
        ("f8e4m3{4,f32}[5,7]", "128x128"),
        ("f8e4m3{4x", "128x128"),
        ("f8e4m3{4y4,f32}[5,7]", "128x128"),
        ("f8e4m3{4x4}[5,7]", "128x128"),
        ("f8e4m3{4x4,i8}[5,7]", "a float type is due"),
        ("f8e4m3{4x4,f33}[5,7]", "unknown element type"),
        ("i4{4x4,f32,i9}[5,8]", "unknown element type"),
        ("i4{4x4,f32,f32}[5,8]", "an integer type is due"),
        ("i4{4x4,f32}[5,7]", "rows of 7; 2 codes of i4 share a byte"),
        ("f8e4m3{4x4,f32}[7]", "along 1 axes"),
        ("bf16{4x4,f32}[5,7]", "no stored format of bf16"),
    ],
)
def test_what_is_no_format_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ParseError, match=words) as caught:
        parse_graph(f"graph g(@w: {text}) {{ return @w }}")
    assert "line 1, column" in str(caught.value)


# --- who takes operands in a format ---------------------------------------------------------------


def calls(name: str) -> list[tuple[list[TensorType], dict[str, Any]]]:
    texts = [registry()[name].example, *(filled(t, 3) for t in CASES[name])]
    parsed = [parse_operands(text) for text in texts]
    return [([t for t, _ in operands], attrs) for operands, attrs in parsed]


def test_an_operator_takes_a_format_where_it_says_so_and_nowhere_else() -> None:
    """Of every operator and operand: what is not declared is refused, in words."""
    taken = set()
    for name in operators(with_operands=True):
        definition = registry()[name]
        for types, attrs in calls(name):
            for index, t in enumerate(types):
                declared = definition.operands[min(index, len(definition.operands) - 1)].name
                if t.rank < 2 or t.format is not None:
                    continue
                placed = declared in definition.traits.into.values()
                stored = TensorType(DType.f8e4m3, t.shape, BEHIND if placed else E4M3)
                given = [*types[:index], stored, *types[index + 1 :]]
                operands = [Weight(f"w{i}", each) for i, each in enumerate(given)]
                if declared in definition.traits.stored:
                    (made, *more) = infer(name, operands, attrs)
                    (plain, *rest) = definition.infer(types, attrs)
                    assert made == (stored.with_shape(plain.shape) if placed else plain)
                    assert more == rest
                    taken.add((name, declared))
                else:
                    with pytest.raises(TypeMismatch, match=f"{declared} is f8e4m3.*no stored for"):
                        infer(name, operands, attrs)
    assert taken == {
        ("linear", "weight"), ("grouped_linear", "weight"), ("embedding", "weight"),
        ("experts", "gate_up"), ("experts", "down"), ("einsum", "xs"),
        ("mla_attention", "kv_b"), ("mla_attention", "latent"), ("latent_attention", "latent"),
        ("append", "past"), ("cache_write", "cache"),
    }  # fmt: skip


READ = """graph main(%x: {t}[2,5], %idx: i64[2,2], %w: f32[2,2], @w: f8e4m3{{2x3,f32}}[4,5],
  @gu: f8e4m3{{2x3,f32}}[3,8,5], @dn: f8e4m3{{2x3,f32}}[3,5,4], @h: f8e4m3{{2x3,f32}}[2,5,6]) {{
  %y = linear %x, @w
  %e = experts %x, %idx, %w, @gu, @dn
  %z = einsum %x, @h {{eq="bc,bcd->bd"}}
  return %y, %e, %z
}}"""


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16])
def test_the_interpreter_unpacks_to_the_type_that_is_computed_in(dtype: DType) -> None:
    graph = parse_graph(READ.format(t=dtype))
    plain = parse_graph(READ.format(t=dtype).replace("f8e4m3{2x3,f32}", str(dtype)))
    stored = {
        x.name: packed(x.type, x.name)
        for node in graph.nodes
        for x in node.operands
        if isinstance(x, Weight)
    }
    inputs = [
        random_tensor(TensorType(dtype, (2, 5)), "x"),
        torch.tensor([[0, 2], [2, 1]]),
        torch.rand(2, 2, generator=torch.Generator().manual_seed(0)),
    ]
    made = run_graph(graph, inputs, stored.__getitem__)
    wanted = run_graph(plain, inputs, lambda name: stored[name].unpack(dtype.torch))
    assert [x.dtype for x in made] == [dtype.torch] * 3
    assert all(map(torch.equal, made, wanted))


def test_a_node_reads_the_bytes_that_are_stored() -> None:
    linear, experts, _ = parse_graph(READ.format(t="bf16")).nodes
    assert cost(linear).weights == 4 * 5 + 4 * (2 * 2)
    assert cost(experts).weights == 3 * (8 * 5 + 4 * 4 * 2) + 3 * (5 * 4 + 4 * 3 * 2)
    direct = parse_graph(READ.format(t="bf16").replace("i64[2,2]", "i64[2,1]").replace(
        "%w: f32[2,2]", "%w: f32[2,1]")).nodes[1]  # fmt: skip
    assert cost(direct).weights == 2 * (8 * 5 + 4 * 4 * 2) + 2 * (5 * 4 + 4 * 3 * 2)


def test_only_weights_have_a_format() -> None:
    for text in (
        "graph g(%x: f8e4m3{2x3,f32}[4,5]) { return %x }",
        "graph g(%x: f32[N], @w: f8e4m3{2x3,f32}[4,5]) { return @w }",
    ):
        with pytest.raises(ParseError, match="only weights have a stored format"):
            parse_verified(text)
    unpacked = "graph g(@w: f8e4m3{2x3,f32}[4,5]) { %y = dequantize @w {dtype=f32} return %y }"
    with pytest.raises((ParseError, VerificationError), match="dequantize is not legal"):
        parse_verified(unpacked)


def test_a_weight_in_a_format_is_put_together_from_its_parts() -> None:
    t = TensorType(DType.f8e4m3, (4, 5), E4M3)
    stored = packed(t, "w")
    source = DictSource(dict(zip(("w", "w.scale"), stored.parts, strict=True)))
    expr = apply("dequantize", leaf("w", t), dtype=DType.bf16)
    assert torch.equal(evaluate(expr, source), stored.unpack(torch.bfloat16))
    program = parse_program(READ.format(t="bf16"))
    again = parse_program(print_program(program))
    assert again == program
    assert {k for k in program.source.types if k.startswith("w")} == {"w", "w.scale"}
    graph: Graph = program.entries["main"]
    assert parse_graph(print_graph(graph)) == graph


ROWS = TensorType(DType.f32, (2, 64))


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("i8:32", "i8{1x32,f32}[2,64]"),
        ("f8e4m3:128", "f8e4m3{1x128,f32}[2,64]"),
        ("i8:999999999", "i8{1x999999999,f32}[2,64]"),
        ("f8e4m3:128:f8e8m0", "f8e4m3{1x128,f8e8m0}[2,64]"),
    ],
)
def test_activations_are_codes_and_columns(told: str, found: str) -> None:
    assert str(activation_type(ROWS, told)) == found


def test_scales_of_rows_may_be_powers_of_two() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)) * 100
    x[1, :32] = 0
    x[2, 40] = torch.inf
    _, scales = pack_rows(
        x, activation_type(TensorType(DType.f32, (3, 70)), "f8e4m3:32:f8e8m0")
    ).parts
    least = x.unflatten(0, (3,))[:, :64].unflatten(1, (2, 32)).abs().amax(-1) / 448
    finite = scales[:, :2].isfinite()
    assert torch.equal(scales[:2].log2(), scales[:2].log2().round())
    assert ((scales[:, :2] >= least) & (scales[:, :2] < 2 * least))[finite & (least > 0)].all()
    assert scales[1, 0] == 1
    assert not scales[2, 1].isfinite()


@pytest.mark.parametrize(
    "told",
    [
        "",
        "i8",
        "i8:",
        ":32",
        "x8:32",
        "i4:32",
        "i8:0",
        "i8:032",
        "i8:-1",
        "i8:x",
        "i8:1000000000",
        "i8:32:",
        "i8:32:f16",
    ],
)
def test_other_activations_are_refused(told: str) -> None:
    with pytest.raises(TypeMismatch, match=f"activations '{told}'; codes and columns are due"):
        activation_type(ROWS, told)
