"""Weights in a stored format (`dsc.ir.formats`): put together from their parts, and unpacked.

Four operators rearrange integers that a checkpoint packs another way, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.dims import Dim
from dsc.ir.extents import Extent
from dsc.ir.formats import (
    CODINGS,
    WHOLE,
    Format,
    Packed,
    along,
    codes_of,
    in_pairs,
    is_whole,
    pack_rows,
    scales_of,
    tiled,
)
from dsc.ir.graph import Node
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op, type_of
from dsc.ir.sized import Shape, Sized
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr


def _infer_scaled(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    if len(types) < 2:
        raise TypeMismatch(f"{types[0]} alone; codes and scales are due")
    made = _stored(types, attrs)
    wanted = [part for _, part in made.parts]
    if list(types) != wanted:
        found, expected = (", ".join(map(str, each)) for each in (types, wanted))
        raise TypeMismatch(f"{found} for {made}, {expected} expected")
    return (made,)


def _stored(parts: Sequence[TensorType], attrs: Mapping[str, Any]) -> TensorType:
    """The type that is stored so: bytes hold codes that are smaller; tiles hide the extents."""
    codes, scales, *zeros = parts
    kind, shape = codes.dtype, codes.shape
    zero = zeros[0].dtype if zeros else None
    if attrs["unsigned"]:
        shape = (*shape[:-1], attrs["columns"])
        return _in_blocks(
            _coded(attrs["unsigned"]), shape, attrs["block"], scales.dtype, zero, unsigned=True
        )
    for name, coding in CODINGS.items():
        if coding.together > 1 and kind is DType.u8:
            kind, shape = DType(name), (*shape[:-1], shape[-1] * coding.together)
    if attrs["tile"] > 1:
        shape = (*shape[:-2], attrs["rows"], attrs["columns"])
    return _in_blocks(kind, shape, attrs["block"], scales.dtype, zero, attrs["tile"])


def _coded(name: str) -> DType:
    """The element type of codes that is called so. Raises `TypeMismatch`."""
    if name not in CODINGS:
        raise TypeMismatch(f"codes in {name!r}; one of {', '.join(CODINGS)}")
    return DType(name)


def _in_blocks(
    codes: DType,
    shape: Sequence[Dim],
    block: tuple[int, ...],
    scales: DType,
    zeros: DType | None = None,
    tile: int = 1,
    unsigned: bool = False,
) -> TensorType:
    """A type in a format of these blocks, scales and zero points. Raises `TypeMismatch`."""
    if len(block) != 2:
        raise TypeMismatch(f"blocks of {list(block)}; rows and columns are due")
    try:
        return TensorType(codes, tuple(shape), Format(block, scales, zeros, tile, False, unsigned))
    except ValueError as problem:
        raise TypeMismatch(str(problem)) from None


def _whole_blocks(call: Sized) -> None:
    (stored,), (extents,) = call.results, call.outs
    assert stored.format is not None
    if stored.format.unsigned:
        _filled_blocks(call, extents, CODINGS[stored.dtype].together, stored.format.block[1])
        return
    if stored.format.step:
        return  # its extents are attributes
    codes, *shared = zip(stored.format.parts(stored.dtype), call.given(), strict=True)
    _count_codes(call, codes[1][1], extents, stored.dtype)
    for part, (_, counts) in shared:
        _count(call, counts, extents, part.block)


def _filled_blocks(call: Sized, extents: Shape, together: int, block: int) -> None:
    """Codes fill whole blocks, so many columns each; zero points share bytes as codes do."""
    (*rows, columns), (codes, scales, *zeros) = extents, call.ins.values()
    for part in (codes, scales, *zeros):
        call.same(part[:-1], rows)
    call.system.equate(call.extents["columns"], columns)
    call.system.counted(scales[-1], columns, block)
    call.system.equate(Extent.number(together) * codes[-1], Extent.number(block) * scales[-1])
    for part in zeros:
        call.system.counted(part[-1], columns, together * block)


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


def _scaled(*parts: Any, **attrs: Any) -> Packed:
    (type,) = _infer_scaled([type_of(part) for part in parts], attrs)
    return Packed(type, parts)


def _infer_tiled(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    (x,), (tile, width, step) = types, (attrs[name] for name in ("tile", "width", "step"))
    if x.rank < 2 or tile < 1 or width < 1 or step < 1 or step % width:
        raise TypeMismatch(f"{width} elements of {tile} rows, {step} columns at a time, of {x}")
    return (x.with_shape(tiled(x.shape, tile, step)),)


def _tiled(x: Array, tile: int, width: int, step: int) -> Array:
    *leading, rows, columns = x.shape
    pads = [(0, 0)] * len(leading) + [(0, -rows % tile), (0, -columns % step)]
    padded = np.pad(x, pads) if any(end for _, end in pads) else x
    if width > 1 and width * x.itemsize == 4:  # a word at a time is ten times as fast
        words = np.ascontiguousarray(padded).view(np.uint32)
        return _tiled(words, tile, 1, step // width).view(x.dtype)
    tiles = padded.reshape(*leading, -1, tile, padded.shape[-1] // width, width)
    return tiles.swapaxes(-3, -2).reshape(*leading, padded.shape[-2] // tile, -1)


def _demand_tiled(call: Sized) -> None:
    """Rows make whole tiles, and columns whole steps."""
    tile, step = call.attrs["tile"], call.attrs["step"]
    (rows, columns), (tiles, wide) = call["x"][-2:], call.outs[0][-2:]
    call.same(call["x"][:-2], call.outs[0][:-2])
    call.system.counted(tiles, rows, tile)
    steps = call.system.extent(-(-call.operands["x"].shape[-1] // step))
    call.system.counted(steps, columns, step)
    call.system.equate(Extent.number(tile * step) * steps, wide)


def activation_type(x: TensorType, activations: str) -> TensorType:
    """The type of rows that a product takes in codes, as `i8:32`. Raises `TypeMismatch`.

    A third word, `f8e4m3:128:f8e8m0`, says that scales are powers of two (DeepSeek-V3.1).
    """
    codes, _, sizes = activations.partition(":")
    columns, _, scales = sizes.partition(":")
    sized = re.fullmatch("[1-9][0-9]{0,8}", columns)
    said = scales == DType.f8e8m0 or not sizes.partition(":")[1]
    if codes not in CODINGS or CODINGS[codes].together > 1 or sized is None or not said:
        raise TypeMismatch(f"activations {activations!r}; codes and columns are due, as in i8:32")
    kind = DType(scales) if scales else DType.f32
    return _in_blocks(DType(codes), x.shape, (1, int(columns)), kind)


def takes_codes(node: Node) -> bool:
    """Whether a product, or one in a region, is told to take its rows as codes."""
    if node.body is not None:
        return any(map(takes_codes, node.body.nodes))
    return bool(node.attrs.get("activations"))


def makes_codes(expr: WeightExpr) -> bool:
    """Whether a weight, or a part of it, is rounded to codes by its expression.

    One that a checkpoint stores as codes is not: those are put together and moved.
    """
    if isinstance(expr, Source):
        return False
    return expr.op == block_codes.name or any(map(makes_codes, expr.args))


def product_of(x: Any, weight: Any, bias: Any = None, activations: str = "") -> Any:
    """x @ weight^T + bias; of rows in codes in fp32, rounded once."""
    if not activations:
        return torch.nn.functional.linear(x, weight, bias)
    rows = pack_rows(x, activation_type(type_of(x), activations)).unpack(torch.float32)
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(rows, weight.float(), bias).to(x.dtype)


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


WORD = 32
"""Bits of a word that checkpoints pack codes into."""


def _bytes_of(x: Any) -> Any:
    """Without a copy where words of a row lie side by side; one word alone may say otherwise."""
    if x.stride(-1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def _infer_fields(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    (x,), order = types, attrs["order"]
    if len(order) not in (4, 8, 16, 32) or sorted(order) != list(range(len(order))):
        raise TypeMismatch(f"{list(order)} is no order of 4, 8, 16 or 32 fields")
    if not x.rank:
        raise TypeMismatch("rows of words are due")
    return (TensorType(DType.u8, (x.shape[0] * len(order), *x.shape[1:])),)


def _demand_fields(call: Sized) -> None:
    (x,), (out,) = call.ins.values(), call.outs
    call.same(x[1:], out[1:])
    call.system.equate(Extent.number(len(call.attrs["order"])) * x[0], out[0])


def _fields(x: Any, order: Sequence[int]) -> Any:
    """Byte by byte: eight bits at a time are faster than one number of each word."""
    bits, a_byte = WORD // len(order), len(order) // 4
    apart = x.contiguous().unsqueeze(-1).view(torch.uint8)
    found = torch.empty((x.shape[0], len(order), *x.shape[1:]), dtype=torch.uint8)
    for place, row in enumerate(order):
        if place % a_byte == 0:
            part = apart[..., place // a_byte].contiguous()
        found[:, row] = (part >> place % a_byte * bits) & ((1 << bits) - 1)
    return found.flatten(0, 1)


def _infer_joined(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    (x,) = types
    if not x.rank or not is_whole(x.shape[-1], 2):
        raise TypeMismatch(f"{x}: an even number of columns is due")
    return (x.with_shape((*x.shape[:-1], x.shape[-1] // 2)),)


def _demand_joined(call: Sized) -> None:
    (x,), (out,) = call.ins.values(), call.outs
    call.same(x[:-1], out[:-1])
    call.system.equate(x[-1], Extent.number(2) * out[-1])


def _infer_centred(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    if not 1 <= attrs["bits"] <= 8:
        raise TypeMismatch(f"numbers of {attrs['bits']} bits, 1 to 8 are due")
    return (TensorType(DType.i8, types[0].shape),)


def _infer_above(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    if not 1 <= attrs["bits"] <= 8:
        raise TypeMismatch(f"numbers of {attrs['bits']} bits, 1 to 8 are due")
    return (TensorType(DType.u8, types[0].shape),)


def _centred(x: Any, bits: int, add: int) -> Any:
    wrapped = (x.to(torch.int16) + add) % (1 << bits)
    return (wrapped - (1 << bits - 1)).to(torch.int8)


scaled = op(
    "scaled(parts: any[...]...; block: ints, tile: extent = 1, rows: extent = 0,"
    ' columns: extent = 0, unsigned: str = "") -> any[...]',
    Traits(Role.OTHER, Form.WEIGHT, demand=_whole_blocks),
    reference=_scaled,
    doc="A matrix, or several, in a stored format: its parts, which are codes and for each block of"
    " rows x columns a scale, and a zero point where a third part is given; blocks at the ends may"
    " be partial, 0 is the whole axis. Bytes hold two 4-bit codes, the first in the low half. With"
    " a tile so many rows lie side by side, as `tiled` makes them, of these rows and columns."
    " Unsigned codes of the named type are bytes above the least, of so many columns.",
    example="f8e4m3[5,7], f32[3,2] {block=[2,4]}",
    infer=_infer_scaled,
)
tiled_rows = op(
    "tiled(x: T[...]; tile: extent, width: extent = 1, step: extent = 1) -> T[...]",
    Traits(Role.OTHER, Form.WEIGHT, arrays=_tiled, demand=_demand_tiled),
    reference=lambda x, **attrs: tensor_of(_tiled(array_of(x), **attrs)),
    doc="`width` elements of each of `tile` rows, then the next of each; rows are padded with zeros"
    " to whole tiles, and columns to a multiple of `step`.",
    example="f32[5,6] {tile=4, width=2, step=4}",
    infer=_infer_tiled,
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
word_bytes = op(
    "word_bytes(x: i32[*n, w]) -> u8[*n, 4*w]",
    Traits(Role.OTHER, Form.WEIGHT),
    reference=_bytes_of,
    doc="The bytes of 32-bit words, the lowest first: 4-bit codes that are packed from the lowest"
    " bits of a word are so stored two a byte.",
    example="i32[5,3]",
)
bit_fields = op(
    "bit_fields(x: i32[...]; order: ints) -> u8[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_demand_fields),
    reference=_fields,
    doc="The unsigned numbers that rows of 32-bit words are packed of, a row for each of as many a"
    " word as order has: number i of a word, from its lowest bits, is in its row order[i].",
    example="i32[5,3] {order=[0,2,4,6,1,3,5,7]}",
    infer=_infer_fields,
)
join_nibbles = op(
    "join_nibbles(x: u8[...]) -> u8[...]",
    Traits(Role.OTHER, Form.WEIGHT, demand=_demand_joined),
    reference=in_pairs,
    doc="Two 4-bit numbers a byte, neighbours in a row, the first in the low half.",
    example="u8[5,6]",
    infer=_infer_joined,
)
above_least = op(
    "above_least(x: i8[*n]; bits: int) -> u8[*n]",
    Traits(Role.OTHER, Form.WEIGHT),
    reference=lambda x, bits: (x.to(torch.int16) + (1 << bits - 1)).to(torch.uint8),
    doc="Signed numbers of so many bits as how far they lie above the least of them.",
    example="i8[5,3] {bits=8}",
    infer=_infer_above,
)
centre = op(
    "centre(x: u8[*n]; bits: int, add: int = 0) -> i8[*n]",
    Traits(Role.OTHER, Form.WEIGHT),
    reference=_centred,
    doc="Unsigned numbers of so many bits, plus add modulo their range, as how far they lie above"
    " the middle of it.",
    example="u8[5,3] {bits=4, add=1}",
    infer=_infer_centred,
)
