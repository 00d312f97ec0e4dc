"""Weights in blocks are the weights: every way an expression is cut into runs of elements."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.op import TypeMismatch, concrete, registry
from dsc.ir.safetensors import open_safetensors
from dsc.ir.samples import sample_inputs
from dsc.ir.streams import blocks, rows
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Apply, DictSource, Source, WeightExpr, apply, evaluate
from dsc.models.configs import TINY_CHECKPOINT
from tests.ir.strategies import call_graph
from tests.ir.test_operators import CASES, filled


class Counting(DictSource):
    """Counts the elements of the largest piece that was asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.seen = [0]

    def load(self, key: str) -> torch.Tensor:
        """The tensor, noted."""
        self.seen.append(self.tensors[key].numel())
        return super().load(key)

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """Rows, noted."""
        found = array_of(self.tensors[key])[rows]
        self.seen.append(found.size)
        return found


@st.composite
def expressions(draw: st.DrawFn) -> tuple[WeightExpr, DictSource]:
    """A matrix or two from a checkpoint under a few operators."""
    n, k = draw(st.integers(1, 4)) * 4, draw(st.integers(1, 4)) * 2
    block = (draw(st.integers(0, 5)), draw(st.integers(0, 5)))  # 0: a scale for all
    generator = torch.Generator().manual_seed(n * 100 + k)
    tensors = {
        "a": torch.randn(n, k, generator=generator),
        "b": torch.randn(n, k, generator=generator),
        "q": torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn),
        "s": torch.rand(-(-n // (block[0] or n)), -(-k // (block[1] or k)), generator=generator),
    }
    tensors["experts"] = torch.randn(3, n, k, generator=generator).to(torch.float8_e4m3fn)
    tensors["scales"] = torch.stack([tensors["s"], tensors["s"] + 1, tensors["s"] * 3])
    source = DictSource(tensors)

    def leaf(key: str) -> WeightExpr:
        return Source(key, source.types[key])

    def weight(codes: str, scales: str) -> WeightExpr:
        stored = apply("scaled", leaf(codes), leaf(scales), block=block)
        return apply("dequantize", stored, dtype=DType.f32)

    found: list[WeightExpr] = [
        leaf("a"),
        leaf("b"),
        weight("q", "s"),
        weight("experts", "scales"),
    ]
    expr = draw(st.sampled_from(found))
    for _ in range(draw(st.integers(0, 4))):
        expr = _under(draw, expr, found)
    return expr, source


def _under(draw: st.DrawFn, expr: WeightExpr, leaves: list[WeightExpr]) -> WeightExpr:
    shape = tuple(int(d) for d in expr.type.shape)  # type: ignore[arg-type]
    kind = draw(st.sampled_from(["cast", "stack", "concat", "slice", "permute", "reshape"]))
    if kind == "cast":
        return apply("cast", expr, dtype=draw(st.sampled_from([DType.f32, DType.bf16])))
    if kind == "stack" and len(shape) < 4:
        return apply("stack", *[expr] * draw(st.integers(1, 3)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if kind == "concat":
        return apply("concat", expr, expr, axis=axis)
    if kind == "slice":
        start = draw(st.integers(0, shape[axis] - 1))
        end = draw(st.integers(start + 1, shape[axis]))
        return apply("slice", expr, axis=axis, start=start, end=end)
    if kind == "permute":
        return apply("permute", expr, dims=tuple(draw(st.permutations(range(len(shape))))))
    cut = draw(st.sampled_from([d for d in range(1, shape[0] + 1) if shape[0] % d == 0]))
    split = (cut, shape[0] // cut, *shape[1:])
    joined = (shape[0] * shape[1], *shape[2:]) if len(shape) > 1 else shape
    return apply("reshape", expr, shape=draw(st.sampled_from([split, joined])))


@given(expressions(), st.integers(1, 300))
def test_blocks_are_the_elements_in_order(made: tuple[WeightExpr, DictSource], size: int) -> None:
    expr, source = made
    whole = evaluate(expr, source)
    parts = [_tensor(b).reshape(-1) for b in blocks(expr, source, size)]
    assert torch.equal(torch.cat(parts), whole.reshape(-1))


@given(expressions(), st.data())
def test_rows_are_rows(made: tuple[WeightExpr, DictSource], data: st.DataObject) -> None:
    expr, source = made
    if _dequantises(expr):  # rows of those start where a block starts
        return
    height = int(expr.type.shape[0])  # type: ignore[arg-type]
    start = data.draw(st.integers(0, height))
    stop = data.draw(st.integers(start, height))
    assert torch.equal(_tensor(rows(expr, source, start, stop)), evaluate(expr, source)[start:stop])


def _tensor(x: Any) -> torch.Tensor:
    return tensor_of(x) if isinstance(x, np.ndarray) else x


def _dequantises(expr: WeightExpr) -> bool:
    return isinstance(expr, Apply) and (
        expr.op == "dequantize" or any(map(_dequantises, expr.args))
    )


def test_a_stack_of_experts_is_read_one_piece_at_a_time() -> None:
    tensors = {f"{p}{e}": torch.randn(8, 16) for p in ("gate", "up") for e in range(4)}
    source = Counting(tensors)
    experts = [
        apply(
            "concat", *(Source(f"{p}{e}", source.types[f"{p}{e}"]) for p in ("gate", "up")), axis=0
        )
        for e in range(4)
    ]
    stacked = apply("cast", apply("stack", *experts), dtype=DType.bf16)
    found = torch.cat([_tensor(b).reshape(-1) for b in blocks(stacked, source, size=64)])
    expected = torch.stack([torch.cat([tensors[f"gate{e}"], tensors[f"up{e}"]]) for e in range(4)])
    assert torch.equal(found, expected.bfloat16().reshape(-1))
    assert max(source.seen) <= 8 * 16
    assert sum(source.seen) == 4 * 2 * 8 * 16


def _moved(op: str, *args: WeightExpr, **attrs: Any) -> WeightExpr:
    return apply(op, *args, **attrs)


MOVES: dict[str, tuple[Any, int]] = {
    "itself": (lambda a, b: a, 8),
    "rows of it": (lambda a, b: _moved("slice", a, axis=0, start=3, end=11), 8),
    "rows of it, counted from behind": (
        lambda a, b: _moved("slice", a, axis=-2, start=3, end=11), 8),
    "every second row": (lambda a, b: _moved("slice", a, axis=0, start=1, end=12, step=2), 48),
    "columns": (lambda a, b: _moved("slice", a, axis=1, start=1, end=4, step=2), 16),
    "columns side by side": (lambda a, b: _moved("concat", a, b, axis=1), 4),
    "one on the other": (lambda a, b: _moved("concat", a, b, axis=-2), 8),
    "turned": (lambda a, b: _moved("permute", a, dims=(1, 0)), 48),
    "not turned": (lambda a, b: _moved("cast", _moved("permute", a, dims=(0, 1)),
                                       dtype=DType.bf16), 16),
    "rows in pairs, columns of them": (
        lambda a, b: _moved("slice", _moved("reshape", a, shape=(6, 8)), axis=1, start=1, end=8),
        8),
    "rows that part": (
        lambda a, b: _moved("slice", _moved("reshape", a, shape=(24, 2)), axis=1, start=1, end=2),
        48),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_no_more_rows_are_read_at_once_than_a_block_needs(name: str) -> None:
    """Blocks of 32 bytes over a matrix of 12 rows of 4 floats."""
    make, most = MOVES[name]
    tensors = {k: torch.arange(48.0).reshape(12, 4) + i for i, k in enumerate("ab")}
    source = Counting(tensors)
    expr = make(*(Source(k, source.types[k]) for k in "ab"))
    found = [_tensor(x).reshape(-1) for x in blocks(expr, source, 32)]
    assert max(source.seen) == most
    assert torch.equal(torch.cat(found), evaluate(expr, DictSource(tensors)).reshape(-1))


@pytest.mark.parametrize("block", [(3, 2), (0, 2)], ids=["blocks", "all rows"])
def test_the_scales_of_a_block_stay_with_it(block: tuple[int, int]) -> None:
    w = torch.randn(10, 4).to(torch.float8_e4m3fn)
    s = torch.rand(4 if block[0] else 1, 2)
    source = DictSource({"w": w, "s": s})
    leaves = (Source(k, source.types[k]) for k in "ws")
    expr = apply("dequantize", apply("scaled", *leaves, block=block), dtype=DType.f32)
    cut = list(blocks(expr, source, size=40))
    assert len(cut) == (4 if block[0] else 5)
    assert torch.equal(torch.cat(cut), evaluate(expr, source))


MADE = [
    ((64,), DType.i8, (1, 32)), ((64,), DType.i4, (1, 32)),
    *(((5, 64), codes, block) for codes in (DType.i8, DType.i4, DType.f8e4m3)
      for block in ((1, 32), (3, 16), (0, 32))),
    *(((3, 5, 70), codes, (1, 32)) for codes in (DType.i8, DType.i4)),
    ((3, 5, 70), DType.f8e4m3, (2, 32)),
]  # fmt: skip
"""A shape, codes and the blocks that share a scale."""


@pytest.mark.parametrize(("shape", "codes", "block"), MADE, ids=str)
@pytest.mark.parametrize("size", [8, 100, 1 << 20])
def test_codes_made_piece_by_piece_are_those_made_at_once(
    shape: tuple[int, ...], codes: DType, block: tuple[int, int], size: int
) -> None:
    source = DictSource({"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))})
    x = Source("x", source.types["x"])
    scales = apply("block_scales", x, codes=codes, block=block, dtype=DType.f16)
    packed = apply("block_codes", x, scales, codes=codes, block=block)
    numbers = apply("dequantize", apply("scaled", packed, scales, block=block), dtype=DType.f32)
    for expr in (scales, packed, numbers):
        found = torch.cat([_tensor(part).reshape(-1) for part in blocks(expr, source, size)])
        assert torch.equal(found, evaluate(expr, source).reshape(-1))


@pytest.mark.parametrize("what", ["scales", "codes"])
def test_no_more_is_read_to_make_codes_than_a_row_of_blocks(what: str) -> None:
    source = Counting({"x": torch.randn(1000, 40)})
    x = Source("x", source.types["x"])
    how = {"codes": DType.f8e4m3, "block": (128, 16)}
    made = apply("block_scales", x, **how, dtype=DType.f32)
    if what == "codes":
        made = apply("block_codes", x, made, **how)
    assert sum(len(part) for part in blocks(made, source, 4096)) == made.type.shape[0]
    assert max(source.seen) == 128 * 40


def test_a_source_of_another_type_is_an_error() -> None:
    source = DictSource({"a": torch.zeros(4, 2)})
    with pytest.raises(TypeMismatch, match="bf16"):
        list(blocks(Source("a", TensorType(DType.bf16, (4, 2))), source))


@pytest.mark.parametrize("name", [n for n, o in registry().items() if o.traits.arrays is not None])
@pytest.mark.parametrize("dtype", [t for t in DType if t.bits >= 8], ids=str)
def test_what_moves_elements_moves_those_of_arrays_alike(name: str, dtype: DType) -> None:
    definition = registry()[name]
    for text in (definition.example, *(filled(t, seed) for t in CASES[name] for seed in range(3))):
        graph = call_graph(name, text)
        given = sample_inputs(graph, {}, seed=len(text)).values()
        tensors = [(8 * x).to(torch.int8).to(dtype.torch) for x in given]
        attrs = concrete(graph.nodes[0].attrs, {})
        expected = definition.run(tensors, attrs)
        assert definition.traits.arrays is not None
        found = definition.traits.arrays(*map(array_of, tensors), **attrs)
        assert DType.of(found.dtype) is dtype
        assert found.tobytes() == array_of(expected.contiguous()).tobytes()


def test_weights_that_are_moved_are_packed_without_torch() -> None:
    """One under every operator that the stacks of a mixture of experts are made with."""
    reader = f"""
import sys
from dsc.ir.safetensors import open_safetensors
from dsc.ir.streams import blocks
from dsc.ir.weights import Source, apply
source = open_safetensors({str(TINY_CHECKPOINT)!r})
head = Source("lm_head.weight", source.types["lm_head.weight"])
rows, columns = head.type.shape
turned = apply("permute", head, dims=(1, 0))
part = apply("slice", head, axis=0, start=4, end=rows)
expr = apply("stack", *[apply("concat", turned, apply("permute", part, dims=(1, 0)), axis=1)] * 2)
flat = apply("reshape", expr, shape=(2 * columns * (2 * rows - 4),))
print(sum(block.nbytes for block in blocks(flat, source, 4096)), "torch" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", reader], stdout=subprocess.PIPE, check=True)
    rows, columns = open_safetensors(TINY_CHECKPOINT).types["lm_head.weight"].shape
    assert told.stdout.decode() == f"{2 * 2 * columns * (2 * rows - 4)} False\n"
