"""Weights in a stored format (`dsc.ir.formats`): put together from their parts, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc.ir.dims import Dim
from dsc.ir.extents import Extent
from dsc.ir.formats import CODINGS, WHOLE, Format, Packed, along, codes_of, scales_of
from dsc.ir.op import TypeMismatch, op, type_of
from dsc.ir.sized import Shape, Sized
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import DType, TensorType


def _infer_scaled(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    if len(types) < 2:
        raise TypeMismatch(f"{types[0]} alone; codes and scales are due")
    made = _stored(types, attrs["block"])
    wanted = [part for _, part in made.parts]
    if list(types) != wanted:
        found, expected = (", ".join(map(str, each)) for each in (types, wanted))
        raise TypeMismatch(f"{found} for {made}, {expected} expected")
    return (made,)


def _stored(parts: Sequence[TensorType], block: tuple[int, int]) -> TensorType:
    """The type that is stored so: bytes hold codes that are smaller."""
    codes, scales, *zeros = parts
    kind, shape = codes.dtype, codes.shape
    for name, coding in CODINGS.items():
        if coding.together > 1 and kind is DType.u8:
            kind, shape = DType(name), (*shape[:-1], shape[-1] * coding.together)
    return _in_blocks(kind, shape, block, scales.dtype, *(z.dtype for z in zeros[:1]))


def _in_blocks(
    codes: DType, shape: Sequence[Dim], block: tuple[int, ...], *kinds: DType
) -> TensorType:
    """A type in a format of these blocks, scales and zero points. Raises `TypeMismatch`."""
    if len(block) != 2:
        raise TypeMismatch(f"blocks of {list(block)}; rows and columns are due")
    try:
        return TensorType(codes, tuple(shape), Format(block, *kinds))
    except ValueError as problem:
        raise TypeMismatch(str(problem)) from None


def _whole_blocks(call: Sized) -> None:
    (stored,), (extents,) = call.results, call.outs
    assert stored.format is not None
    codes, *shared = zip(stored.format.parts(stored.dtype), call.given(), strict=True)
    _count_codes(call, codes[1][1], extents, stored.dtype)
    for part, (_, counts) in shared:
        _count(call, counts, extents, part.block)


def _count(call: Sized, counts: Shape, extents: Shape, block: tuple[int, int]) -> None:
    """There is one of `counts` for each block of what has `extents`."""
    for count, extent, size in zip(counts, extents, along(block, len(extents)), strict=True):
        if size == 1:
            call.system.equate(count, extent)
        elif size != WHOLE:
            call.system.counted(count, extent, size)


def _count_codes(call: Sized, stored: Shape, extents: Shape, codes: DType) -> None:
    """What is stored of codes holds `Coding.together` of them, none fewer."""
    call.same(stored[:-1], extents[:-1])
    call.system.equate(Extent.number(CODINGS[codes].together) * stored[-1], extents[-1])


def _demand_scales(call: Sized) -> None:
    _count(call, call.outs[0], call["x"], call.attrs["block"])


def _demand_codes(call: Sized) -> None:
    _count(call, call["scales"], call["x"], call.attrs["block"])
    _count_codes(call, call.outs[0], call["x"], call.attrs["codes"])


def _scaled(*parts: Any, block: tuple[int, int]) -> Packed:
    (type,) = _infer_scaled([type_of(part) for part in parts], {"block": block})
    return Packed(type, parts)


def _packed_type(x: TensorType, attrs: Mapping[str, Any], scales: DType) -> TensorType:
    """The type of `x` in a format. Raises `TypeMismatch`."""
    codes, block = attrs["codes"], attrs["block"]
    if codes not in CODINGS or not x.dtype.is_float:
        raise TypeMismatch(f"codes in {codes} for numbers in {x.dtype}")
    return _in_blocks(codes, x.shape, block, scales)


def _infer_scales(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    _, (_, scales) = _packed_type(types[0], attrs, attrs["dtype"]).parts
    return (scales,)


def _infer_codes(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    x, given = types
    (_, codes), (_, scales) = _packed_type(x, attrs, given.dtype).parts
    if given != scales:
        raise TypeMismatch(f"scales {given}, {scales} expected")
    return (codes,)


def _block_scales(x: Any, codes: DType, block: tuple[int, int], dtype: DType) -> Any:
    return scales_of(x, _packed_type(type_of(x), {"codes": codes, "block": block}, dtype))


def _block_codes(x: Any, scales: Any, codes: DType, block: tuple[int, int]) -> Any:
    kind = DType.of(scales.dtype)
    return codes_of(x, scales, _packed_type(type_of(x), {"codes": codes, "block": block}, kind))


scaled = op(
    "scaled(parts: any[...]...; block: ints) -> any[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_whole_blocks),
    reference=_scaled,
    doc="A matrix, or several, in a stored format: its parts, which are codes and for each block of"
    " rows x columns a scale, and a zero point where a third part is given; blocks at the ends may"
    " be partial, 0 is the whole axis. Bytes hold two 4-bit codes, the first in the low half.",
    example="f8e4m3[5,7], f32[3,2] {block=[2,4]}",
    infer=_infer_scaled,
)
dequantize = op(
    "dequantize(x: any[*n]; dtype: dtype) -> dtype[*n]",
    Traits(Role.OTHER, Form.WEIGHT, stored=("x",)),
    reference=lambda x, dtype: x.to(dtype.torch),
    doc="The numbers that a tensor in a stored format stands for: codes, less their zero points,"
    " times scales in fp32, rounded once.",
    example="f8e4m3{2x4,f32}[5,7] {dtype=bf16}",
)
block_scales = op(
    "block_scales(x: T[...]; codes: dtype, block: ints, dtype: dtype) -> any[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_demand_scales),
    reference=_block_scales,
    doc="For each block of rows x columns the least scale with which its largest magnitude is the"
    " largest code, rounded up to dtype; of a block of zeros 1.",
    example="f32[4,6] {block=[2,4], codes=i8, dtype=f16}",
    infer=_infer_scales,
)
block_codes = op(
    "block_codes(x: T[...], scales: any[...]; codes: dtype, block: ints) -> any[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_demand_codes),
    reference=_block_codes,
    doc="The codes nearest to numbers over the scales of their blocks, as they are stored.",
    example="f32[4,6], f16[2,2] {block=[2,4], codes=i8}",
    infer=_infer_codes,
)
