"""Block-scaled weights: what an FP8 checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.op import TypeMismatch, op
from dsc.ir.sized import Sized
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import TensorType


def _infer_dequantize(
    types: Sequence[TensorType], attrs: Mapping[str, Any]
) -> tuple[TensorType, ...]:
    w, scale = types
    if len(attrs["block"]) != 2 or min(attrs["block"]) < 1:
        raise TypeMismatch(f"blocks of {list(attrs['block'])}; rows and columns")
    for extent, block, blocks in zip(w.shape, attrs["block"], scale.shape, strict=True):
        if -(-extent // block) != blocks:
            raise TypeMismatch(f"{scale} scales for {w} in blocks of {attrs['block']}")
    return (TensorType(attrs["dtype"], w.shape),)


def _whole_blocks(call: Sized) -> None:
    for extent, count, block in zip("nk", "pq", call.attrs["block"], strict=True):
        call.system.counted(call.dims[count], call.dims[extent], block)


def _dequantize(w: Any, scale: Any, block: tuple[int, int], dtype: Any) -> Any:
    rows, columns = w.shape
    wide = scale.float().repeat_interleave(block[0], 0)[:rows]
    wide = wide.repeat_interleave(block[1], 1)[:, :columns]
    return (w.float() * wide).to(dtype.torch)


dequantize_block = op(
    "dequantize_block(w: Q[n, k], scale: f32[p, q]; block: ints, dtype: dtype) -> dtype[n, k]",
    Traits(Role.OTHER, Form.TRACED, demand=_whole_blocks),
    reference=_dequantize,
    doc="w * scale, one scale for each block of rows x columns; edge blocks may be partial. The"
    " checkpoints call that scale weight_scale_inv.",
    example="f8e4m3[5,7], f32[3,2] {block=[2,4], dtype=bf16}",
    infer=_infer_dequantize,
)
