"""Weight expressions: their values, their checks, and the sources they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc.errors import UsageError
from dsc.ir import weights
from dsc.ir.op import OpDef, TypeMismatch
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import (
    DictSource,
    LayeredSource,
    MetaSource,
    Source,
    apply,
    evaluate,
    random_source,
    random_tensor,
    sources,
)

A, C = torch.arange(12.0).reshape(3, 4), torch.arange(8.0).reshape(2, 4) + 100
TENSORS = DictSource({"a": A, "c": C})
SOURCE_A, SOURCE_C = (Source(k, TENSORS.types[k]) for k in "ac")


def test_slices_concat_and_stack() -> None:
    rows = apply("slice", SOURCE_A, axis=0, start=1, end=3)
    assert torch.equal(evaluate(rows, TENSORS), A[1:3])
    columns = apply("slice", SOURCE_A, axis=-1, start=0, end=4, step=2)
    assert torch.equal(evaluate(columns, TENSORS), A[:, ::2])
    joined = apply("concat", SOURCE_A, SOURCE_C, axis=0)
    assert joined.type == TensorType(DType.f32, (5, 4))
    assert torch.equal(evaluate(joined, TENSORS), torch.cat([A, C]))
    stacked = apply("stack", rows, SOURCE_C)
    assert torch.equal(evaluate(stacked, TENSORS), torch.stack([A[1:3], C]))
    assert [s.key for s in sources(stacked)] == ["a", "c"]


def test_kv_b_splits_per_head_into_nope_and_value_rows() -> None:
    kv_b = torch.randn(2 * (3 + 5), 4)
    expr = Source("kv", TensorType(DType.f32, (16, 4)))
    per_head = apply("reshape", expr, shape=(2, 8, 4))
    value = apply("slice", per_head, axis=1, start=3, end=8)
    made = evaluate(value, DictSource({"kv": kv_b}))
    assert torch.equal(made[1], kv_b[8 + 3 : 16])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_dequantising_blocks_is_right_at_partial_edges(n: int, k: int, p: int, q: int) -> None:
    generator = torch.Generator().manual_seed(n * 1000 + k * 100 + p * 10 + q)
    w = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // p), -(-k // q), generator=generator)
    tensors = DictSource({"w": w, "s": scale})
    stored = apply("scaled", *(Source(x, tensors.types[x]) for x in "ws"), block=(p, q))
    expr = apply("dequantize", stored, dtype=DType.f32)
    made = evaluate(expr, tensors)
    for i in range(n):
        for j in range(k):
            assert made[i, j] == w[i, j].float() * scale[i // p, j // q]


def test_09_partial_fp8_blocks() -> None:
    """kv_a of V3 has 576 = 4.5 blocks of 128 rows."""
    w = torch.ones(576, 256).to(torch.float8_e4m3fn)
    scale = torch.arange(10.0).reshape(5, 2)
    tensors = DictSource({"w": w, "s": scale})
    stored = apply("scaled", *(Source(x, tensors.types[x]) for x in "ws"), block=(128, 128))
    expr = apply("dequantize", stored, dtype=DType.bf16)
    made = evaluate(expr, tensors)
    assert made.dtype == torch.bfloat16
    assert made[511, 0] == 6
    assert (made[512:, :128] == 8).all()
    assert (made[512:, 128:] == 9).all()


def test_a_tensor_of_another_type_is_refused() -> None:
    for declared in (TensorType(DType.f32, (4, 3)), TensorType(DType.bf16, (3, 4))):
        with pytest.raises(TypeMismatch, match="source a is"):
            evaluate(Source("a", declared), TENSORS)


def test_expressions_are_typed_when_made() -> None:
    with pytest.raises(TypeMismatch, match="differ"):
        apply("concat", SOURCE_A, SOURCE_C, axis=1)
    with pytest.raises(TypeMismatch, match="2 results"):
        apply("split", SOURCE_A, sizes=(1, 3))
    with pytest.raises(TypeMismatch, match="unknown operator"):
        apply("frobnicate", SOURCE_A)


def test_sources_know_types_and_layer() -> None:
    meta = MetaSource({"a": TensorType(DType.bf16, (9,)), "z": TensorType(DType.i8, (1,))})
    both = LayeredSource((TENSORS, meta))
    assert sorted(both.types) == ["a", "c", "z"]
    assert both.types["a"] == TensorType(DType.f32, (3, 4))
    assert both.types["z"] == TensorType(DType.i8, (1,))
    assert torch.equal(both.load("c"), C)
    with pytest.raises(UsageError, match="no weight values"):
        both.load("z")
    with pytest.raises(KeyError):
        both.types["q"]


@pytest.mark.parametrize("dtype", [d for d in DType if d is not DType.i4])
def test_random_tensors_are_seeded_finite_and_of_their_type(dtype: DType) -> None:
    t = TensorType(dtype, (40, 3))
    made, again = random_tensor(t, "a"), random_tensor(t, "a")
    assert made.dtype == dtype.torch
    wide = made.float()
    assert wide.isfinite().all()
    assert torch.equal(wide, again.float())
    assert len(wide.unique()) > 1
    assert not torch.equal(wide, random_tensor(t, "b").float())


def test_a_random_tensor_depends_on_its_key_alone() -> None:
    t = TensorType(DType.f32, (3,))
    one, two = random_source({"a": t}), random_source({"b": t, "a": t})
    assert torch.equal(one.load("a"), two.load("a"))


def test_random_tensors_are_of_half_a_unit_or_small_numbers_or_powers_of_two() -> None:
    floats = random_tensor(TensorType(DType.f32, (4000,)), "a")
    assert abs(float(floats.std()) - 0.5) < 0.02
    assert abs(float(floats.mean())) < 0.03
    assert len(floats.unique()) > 3000
    whole = TensorType(DType.i64, (400,))
    assert set(random_tensor(whole, "a").tolist()) == {0, 1}
    assert set(random_tensor(whole, "a", 3).tolist()) == {0, 1, 2}
    powers = random_tensor(TensorType(DType.f8e8m0, (400,)), "a").float()
    assert set(powers.tolist()) == {0.25, 0.5, 1.0, 2.0, 4.0}
    again = random_source({"k": whole, "l": whole}, seed=3)
    assert torch.equal(again.load("k"), random_source({"k": whole}, seed=3).load("k"))
    assert not torch.equal(again.load("k"), again.load("l"))
    assert not torch.equal(again.load("k"), random_source({"k": whole}, seed=4).load("k"))


def test_the_type_of_the_same_expression_is_inferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of experts; another type, or other attributes, are inferred for themselves."""
    asked: list[Any] = []
    infer = OpDef.infer

    def counted(self: OpDef, types: Any, attrs: Any) -> Any:
        asked.append(types)
        return infer(self, types, attrs)

    monkeypatch.setattr(OpDef, "infer", counted)
    monkeypatch.setattr(weights, "_RESULTS", {})
    kinds = [TensorType(DType.bf16, (8, 6)), TensorType(DType.bf16, (4, 6))]
    for kind in kinds:
        found = {apply("permute", Source(f"e.{n}", kind), dims=(1, 0)).type for n in range(9)}
        assert found == {kind.with_shape(kind.shape[::-1])}
    assert apply("permute", Source("e", kinds[0]), dims=(0, 1)).type == kinds[0]
    assert len(asked) == 3
    monkeypatch.setattr(weights, "KEPT", 2)
    for kind in kinds * 2:
        assert apply("cast", Source("e", kind), dtype=DType.f32).type == kind.with_dtype(DType.f32)
    assert len(weights._RESULTS) <= 2
