"""Element and tensor types."""

from __future__ import annotations

import pytest
import torch

from dsc.ir.dims import symbol
from dsc.ir.types import DType, TensorType

B, S = symbol("B"), symbol("S")


@pytest.mark.parametrize("dtype", [d for d in DType if d is not DType.i4])
def test_a_torch_dtype_maps_there_and_back(dtype: DType) -> None:
    assert DType.of(dtype.torch) is dtype
    assert torch.empty(3, dtype=dtype.torch).element_size() == dtype.itemsize


def test_an_element_type_is_its_name() -> None:
    assert str(DType.boolean) == f"{DType.boolean}" == "bool"
    assert DType("f8e8m0") is DType.f8e8m0
    assert [d for d in DType if d.is_float and d.is_int] == []
    assert DType.bf16.is_float
    assert not DType.boolean.is_float
    assert DType.u8.is_int


def test_i4_is_packed() -> None:
    assert TensorType(DType.i4, (3,)).nbytes == 2
    with pytest.raises(ValueError, match="packed"):
        _ = DType.i4.itemsize
    with pytest.raises(KeyError):
        _ = DType.i4.torch


def test_an_unknown_torch_dtype_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="complex64"):
        DType.of(torch.complex64)


def test_sizes_are_symbolic() -> None:
    t = TensorType(DType.bf16, (B, S, 7168))
    assert str(t) == "bf16[B,S,7168]"
    assert t.numel == B * S * 7168
    assert t.nbytes == B * S * 14336
    assert t.symbols == {"B", "S"}
    assert t.substitute({"S": 1}) == TensorType(DType.bf16, (B, 1, 7168))
    assert not t.is_static
    assert TensorType(DType.f32, ()).numel == 1


@pytest.mark.parametrize("shape", [(1,) * 9, (-1,), (2, 2**63)])
def test_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rank|dimension"):
        TensorType(DType.f32, shape)
