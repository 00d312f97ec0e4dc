"""Weights in a stored format (`dsc.ir.formats`): put together from their parts, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.formats import WHOLE, Format, Packed, along
from dsc.ir.op import TypeMismatch, op, type_of
from dsc.ir.sized import Sized
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import TensorType


def _infer_scaled(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    if len(types) < 2:
        raise TypeMismatch(f"{types[0]} alone; codes and scales are due")
    if len(attrs["block"]) != 2:
        raise TypeMismatch(f"blocks of {list(attrs['block'])}; rows and columns are due")
    codes, scales = types[:2]
    made = TensorType(codes.dtype, codes.shape, Format(attrs["block"], scales.dtype))
    wanted = [part for _, part in made.parts]
    if list(types) != wanted:
        found, expected = (", ".join(map(str, each)) for each in (types, wanted))
        raise TypeMismatch(f"{found} for {made}, {expected} expected")
    return (made,)


def _whole_blocks(call: Sized) -> None:
    (stored,), (extents,) = call.results, call.outs
    assert stored.format is not None
    for part, (_, counts) in zip(stored.format.parts(stored.dtype), call.given(), strict=True):
        sizes = along(part.block, stored.rank)
        for count, extent, size in zip(counts, extents, sizes, strict=True):
            if size == 1:
                call.system.equate(count, extent)
            elif size != WHOLE:
                call.system.counted(count, extent, size)


def _scaled(*parts: Any, block: tuple[int, int]) -> Packed:
    (type,) = _infer_scaled([type_of(part) for part in parts], {"block": block})
    return Packed(type, parts)


scaled = op(
    "scaled(parts: any[...]...; block: ints) -> any[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_whole_blocks),
    reference=_scaled,
    doc="A matrix, or several, in a stored format: its parts, which are codes and a scale for each"
    " block of rows x columns; blocks at the ends may be partial, 0 is the whole axis. Checkpoints"
    " call the scales weight_scale_inv.",
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
