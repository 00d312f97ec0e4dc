"""Weights in a stored format (`dsc.ir.formats`): put together from their parts, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.formats import Format, Packed
from dsc.ir.op import TypeMismatch, op
from dsc.ir.sized import Sized
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import DType, TensorType


def _infer_scaled(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    codes, scales = types
    if len(attrs["block"]) != 2:
        raise TypeMismatch(f"blocks of {list(attrs['block'])}; rows and columns are due")
    made = TensorType(codes.dtype, codes.shape, Format(attrs["block"], scales.dtype))
    if scales != made.parts[1]:
        raise TypeMismatch(f"{scales} scales for {made}, {made.parts[1]} expected")
    return (made,)


def _whole_blocks(call: Sized) -> None:
    for extent, count, block in zip("nk", "pq", call.attrs["block"], strict=True):
        call.system.counted(call.dims[count], call.dims[extent], block)


def _scaled(codes: Any, scales: Any, block: tuple[int, int]) -> Packed:
    return Packed(codes, scales, Format(block, DType.of(scales.dtype)))


scaled = op(
    "scaled(codes: C[*e, n, k], scales: S[*e, p, q]; block: ints) -> C[*e, n, k]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_whole_blocks),
    reference=_scaled,
    doc="A matrix, or several, in a stored format: codes, one scale for each block of rows x"
    " columns; blocks at the ends may be partial. Checkpoints call the scales weight_scale_inv.",
    example="f8e4m3[5,7], f32[3,2] {block=[2,4]}",
    infer=_infer_scaled,
)
dequantize = op(
    "dequantize(x: any[*n]; dtype: dtype) -> dtype[*n]",
    Traits(Role.OTHER, Form.WEIGHT, stored=("x",)),
    reference=lambda x, dtype: x.to(dtype.torch),
    doc="The numbers that a tensor in a stored format stands for: codes times scales in fp32,"
    " rounded once.",
    example="f8e4m3{2x4,f32}[5,7] {dtype=bf16}",
)
