"""Stored formats: numbers as narrow codes, with a scale for each block of the last two axes.

A type spells its format behind the element type of the codes: `f8e4m3{128x128,f32}[N,K]` is N x K
codes in f8e4m3 and an f32 scale for each 128 rows x 128 columns; blocks at the ends may be partial,
leading axes are matrices of their own. `*` is the whole axis: `{1x*,f32}` has a scale a row,
`{*x*,f32}` one in all. A third word is the element type of zero points: `i4{1x32,f16,i8}` has a
scale and a zero point for each 32 columns of a row. A tensor of such a type stands for
(codes - zero points) * scales, which `Packed.unpack` and `pack` say. All else takes what is stored
as `Format.parts` lists it; what a kind of codes can say is a row of `CODINGS`.

Row after row is how checkpoints store a matrix. Where products go 16 columns of a result at a time,
`i8{1x32,f16,tile=16}[N,K]` has 16 rows side by side (`side_by_side`): of each four bytes of codes,
then the next four; a scale of each, then the next (where a row has scales of its own). Rows and
columns of codes are padded with zeros to whole tiles, and to a multiple of `STEP`.

ONNX Runtime's products take all codes as bytes above the least, zero points too, of rows that are
filled up to whole blocks of 16 columns or a larger power of two: `i8{1x32,f32,unsigned}[N,K]`.

What outlives a step (`dsc.ir.interface`) grows row by row, so `f8e4m3{1x128,f32,behind}[B,C,512]`
is one tensor of bytes, u8[B,C,528]: of each row its codes, filled up to whole words, and then its
scales. A row moves as a whole, and whoever only moves rows needs to know nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dsc.errors import CheckpointError
from dsc.ir.dims import Dim, terms
from dsc.ir.lazy import torch

if TYPE_CHECKING:
    from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Coding:
    """What codes of an element type can say.

    `largest` is the code of a block's largest magnitude where there are no zero points, `least`
    and `most` are all that a code may be. A number and what its code stands for differ by at most
    `relative` times the number or `absolute` times the scale, whichever is more; beside zero
    points, which are rounded as well, by twice that. `together` codes along a row share a byte,
    the first in its lowest bits, each as how far it lies above `least`.
    """

    largest: float
    least: float
    most: float
    relative: float
    absolute: float
    together: int = 1


CODINGS: Mapping[str, Coding] = MappingProxyType({
    "f8e4m3": Coding(448.0, -448.0, 448.0, 2.0**-4, 2.0**-10),
    "i8": Coding(127.0, -128.0, 127.0, 0.0, 0.5),
    "i4": Coding(7.0, -8.0, 7.0, 0.0, 0.5, together=2),
})  # fmt: skip
"""By the element type of the codes."""
ROWS: Mapping[str, str] = MappingProxyType(
    {"i8": "i8:32", "i4": "i8:32", "f8e4m3": "f8e4m3:128"}
)  # fmt: skip
"""What products take their rows as beside weights of such codes: codes, and columns of a scale."""
SCALE_FMT, UE8M0 = "scale_fmt", "ue8m0"
"""The key of a program's meta that says how scales of FP8 were made in training, and that they, and
those of rows, were powers of two (DeepSeek-V3.1, which stores them in fp32)."""
CACHED = ("f8e4m3", "i8")
"""Codes that caches are kept in (`pack_state`)."""
WHOLE = 0
"""The extent of a block that is the whole axis, however long."""
STEP = 32
"""Rows side by side are padded to a multiple of so many columns."""
UNSIGNED = 16
"""Columns of the smallest block of unsigned codes."""
WORD = 4
"""Bytes of codes of a row that lie side by side with those of the others."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is stored: its name behind the weight's, and an element a block.

    Of `tile` rows side by side `width` elements of each lie together, and their number is a
    multiple of `step`. With `behind` elements are bytes: those of a row's codes, and `behind` more
    for each block.
    """

    suffix: str
    dtype: DType
    block: tuple[int, int]
    tile: int = 1
    width: int = 1
    step: int = 1
    behind: int = 0

    def shape(self, whole: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The extents of what is stored of a tensor."""
        cut = grid(whole, self.block)
        if self.behind:
            return (*whole[:-1], code_bytes(whole[-1], self.step) + cut[-1] * self.behind)
        return cut if self.tile == self.step == 1 else tiled(cut, self.tile, self.step)


@dataclass(frozen=True, slots=True)
class Format:
    """Blocks of rows x columns that share a scale; element types of scales and of zero points.

    With a `tile` so many rows lie side by side; where scales lie `behind` the codes of their row, a
    row is bytes. `unsigned` codes and zero points are how far they lie above the least.
    """

    block: tuple[int, int]
    scales: DType
    zeros: DType | None = None
    tile: int = 1
    behind: bool = False
    unsigned: bool = False

    def __post_init__(self) -> None:
        if min(self.block) < 0:
            raise ValueError(f"blocks of {list(self.block)}; rows and columns are due")
        if not self.scales.is_float:
            raise ValueError(f"scales in {self.scales}; a float type is due")
        if self.zeros is not None and not self.zeros.is_int:
            raise ValueError(f"zero points in {self.zeros}; an integer type is due")
        if self.tile < 1:
            raise ValueError(f"{self.tile} rows side by side")
        rows, columns = self.block
        if self.tile > 1 and (columns % STEP or (rows > 1 and rows % self.tile)):
            raise ValueError(f"{self.tile} rows side by side in blocks of {list(self.block)}")
        if self.behind and (rows != 1 or self.zeros is not None or self.tile > 1):
            raise ValueError("scales lie behind the codes of a row that shares none, and no more")
        if self.unsigned and (rows != 1 or self.tile > 1 or self.behind):
            raise ValueError("unsigned codes are of rows that share no scale, one after another")
        if self.unsigned and (columns < UNSIGNED or columns & columns - 1):
            raise ValueError(f"unsigned codes in blocks of {columns}; 16, 32, 64 or so are due")

    def __str__(self) -> str:
        rows, columns = ("*" if size == WHOLE else size for size in self.block)
        more = f",{self.zeros}" if self.zeros else ""
        more += f",tile={self.tile}" if self.tile > 1 else ""
        more += ",behind" if self.behind else ""
        more += ",unsigned" if self.unsigned else ""
        return f"{{{rows}x{columns},{self.scales}{more}}}"

    @property
    def step(self) -> int:
        """Rows of codes are filled up to a multiple of so many columns, if to any."""
        if self.unsigned:
            return self.block[1]
        return STEP if self.tile > 1 else 0

    def parts(self, codes: DType) -> tuple[Part, ...]:
        """What is stored of a tensor, in order."""
        together = CODINGS[codes].together
        if self.behind:
            size = self.scales.itemsize
            return (Part("", type(codes).u8, self.block, 1, 1, together, size),)
        if self.unsigned:
            byte, columns = type(codes).u8, self.block[1]
            filled = Part("", byte, (1, together), step=self.step // together)
            zeros = [Part(".zero", byte, (1, columns * together))] * (self.zeros is not None)
            return (filled, Part(".scale", self.scales, self.block), *zeros)
        kind = codes if together == 1 else type(codes).u8  # a byte, whose class is above here
        shared = [(".scale", self.scales), (".zero", self.zeros)]
        tile = self.tile if self.block[0] == 1 else 1
        return (
            Part("", kind, (1, together), self.tile, WORD, self.step // together or 1),
            *(Part(end, each, self.block, tile) for end, each in shared if each is not None),
        )


def along(block: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The extents of a block along all axes of a tensor: 1 before the last two."""
    return (1,) * (rank - len(block)) + block[-rank:]


def grid(shape: tuple[Dim, ...], block: tuple[int, ...]) -> tuple[Dim, ...]:
    """How many blocks there are along each axis."""
    cut = zip(shape, along(block, len(shape)), strict=True)
    return tuple(1 if size == WHOLE else -(-extent // size) for extent, size in cut)


def code_bytes(columns: Dim, together: int) -> Dim:
    """Bytes of the codes of a row with scales behind them: whole words."""
    return -(-columns // (WORD * together)) * WORD


def tiled(shape: tuple[Dim, ...], tile: int, step: int) -> tuple[Dim, ...]:
    """The extents of a matrix, or several, of which `tile` rows lie side by side."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // tile), -(-columns // step) * step * tile)


def one_by_one(x: torch.Tensor, part: Part, whole: tuple[int, ...]) -> torch.Tensor:
    """A part of a tensor of these extents, of which rows may lie side by side, row after row."""
    if part.tile == 1:
        return x if part.step == 1 else x[..., : _number(grid(whole, part.block)[-1])]
    apart = x.unflatten(-1, (-1, part.tile, part.width)).transpose(-3, -2)
    rows, columns = (_number(extent) for extent in grid(whole, part.block)[-2:])
    found: torch.Tensor = apart.flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return found


def is_whole(extent: Dim, size: int) -> bool:
    """Whether an extent is so many of `size`, whatever its symbols are."""
    return all(coefficient % size == 0 for coefficient in terms(extent).values())


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor in a format: what is stored of it, in the order of its type's parts."""

    type: TensorType
    parts: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Of the tensor, whatever its parts have."""
        return self.type.shape

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers: products in fp32, rounded once."""
        codes, scales, *zeros = self.in_rows
        found = _apart(codes, self.type)
        for each in zeros:
            found = found - _spread(self._zeros(each, scales.shape[-1]), self.type)
        return (found * _spread(scales, self.type)).to(dtype)

    def _zeros(self, stored: torch.Tensor, count: int) -> torch.Tensor:
        """Zero points as numbers, one a block; unsigned ones share bytes as codes do."""
        assert self.type.format is not None
        return _apart(stored, self.type)[..., :count] if self.type.format.unsigned else stored

    @property
    def in_rows(self) -> tuple[torch.Tensor, ...]:
        """What is stored, row after row."""
        assert self.type.format is not None
        if self.type.format.behind:
            return _parted(self.parts[0], self.type)
        extents = tuple(map(_number, self.type.shape))
        kinds = self.type.format.parts(self.type.dtype)
        return tuple(
            one_by_one(x, part, extents) for x, part in zip(self.parts, kinds, strict=True)
        )

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """How far the numbers may lie from those of `x`, of which the nearest codes are these."""
        coding = CODINGS[self.type.dtype]
        _, scales, *zeros = self.in_rows
        steps = _spread(scales, self.type) * coding.absolute
        return torch.maximum(x.float().abs() * coding.relative, steps) * (1 + len(zeros))


def pack(x: torch.Tensor, type: TensorType) -> Packed:
    """The tensor in the format of `type`: the nearest codes.

    Raises `ValueError` for zero points of a type that does not hold every code.
    """
    assert type.format is not None
    zero = type.format.zeros
    if zero is None:
        scales = scales_of(x, type)
        return Packed(type, (codes_of(x, scales, type), scales))
    if type.dtype.is_float or zero.bits < type.dtype.bits or zero.value.startswith("u"):
        raise ValueError(f"zero points in {zero} do not hold codes in {type.dtype}")
    coding, wide = CODINGS[type.dtype], x.float()
    most, least = _largest(wide, type), -_largest(-wide, type)
    scales = _rounded_up((most - least) / (coding.most - coding.least), type.format.scales)
    zeros = (coding.least - least / scales.float()).round().clamp(coding.least, coding.most)
    kept = zeros.to(zero.torch)
    return Packed(type, (codes_of(x, scales, type, kept), scales, kept))


def scales_of(x: torch.Tensor, type: TensorType) -> torch.Tensor:
    """Scales with which the largest magnitude of each block is the largest code."""
    assert type.format is not None
    return _rounded_up(_least_scales(x, type), type.format.scales)


def pack_rows(x: torch.Tensor, type: TensorType) -> Packed:
    """As `pack`, of activations: scales in fp32; a block with NaN or infinity becomes NaN.

    Where the type has powers of two they are the next that is none smaller.
    """
    scales = _least_scales(x, type)
    if type.format is not None and type.format.scales.value == "f8e8m0":
        scales = torch.where(scales.isfinite(), _power_of_two(scales), scales)
    scales = torch.where(scales == 0, 1.0, scales)
    return Packed(type, (codes_of(x, scales, type), scales))


def pack_state(x: torch.Tensor, type: TensorType) -> Packed:
    """As `pack_rows`, with scales behind the codes of each row.

    Those of floats are powers of two, as in DeepSeek-V3.2's cache, so that a number that was a
    code's stays what it is, in 16 bits too.
    """
    scales = _least_scales(x, type)
    if type.dtype.is_float:
        scales = torch.where(scales.isfinite(), _power_of_two(scales), scales)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = codes_of(x, scales, type).view(torch.uint8)
    width = code_bytes(x.shape[-1], CODINGS[type.dtype].together)
    filled = torch.nn.functional.pad(codes, (0, _number(width) - codes.shape[-1]))
    behind = torch.empty_like(scales, memory_format=torch.contiguous_format).copy_(scales)
    return Packed(type, (torch.cat([filled, behind.view(torch.uint8)], -1),))


def _parted(rows: torch.Tensor, type: TensorType) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows of bytes."""
    assert type.format is not None
    together = CODINGS[type.dtype].together
    at = _number(code_bytes(type.shape[-1], together))
    kind = type.dtype.torch if together == 1 else torch.uint8
    codes = rows[..., : -(-_number(type.shape[-1]) // together)].contiguous().view(kind)
    return codes, rows[..., at:].clone().view(type.format.scales.torch)


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below each positive number."""
    return (x.view(torch.int32) + 0x7FFFFF).bitwise_and(~0x7FFFFF).view(torch.float32)


def _least_scales(x: torch.Tensor, type: TensorType) -> torch.Tensor:
    return _largest(x.abs().float(), type) / CODINGS[type.dtype].largest


def codes_of(
    x: torch.Tensor, scales: torch.Tensor, type: TensorType, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes nearest to a tensor's numbers, as they are stored."""
    coding = CODINGS[type.dtype]
    apart, wide = _by_block(x.float(), scales, type)
    codes = apart / wide
    if zeros is not None:
        codes += _by_block(x, zeros, type)[1]
    codes = (codes if type.dtype.is_float else codes.round_()).clamp_(coding.least, coding.most)
    codes = codes.reshape(x.shape)
    if coding.together == 1:
        return codes.to(type.dtype.torch)
    unsigned = codes.sub_(coding.least).to(torch.int8)  # to bytes would take ten times as long
    return in_pairs(unsigned)


def in_pairs(x: torch.Tensor) -> torch.Tensor:
    """Two 4-bit numbers a byte, neighbours in a row, the first in the low half."""
    pairs = x.contiguous().view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8)


def _apart(codes: torch.Tensor, type: TensorType) -> torch.Tensor:
    """What codes say, in fp32, one an element."""
    coding = CODINGS[type.dtype]
    if type.dtype.is_float and codes.is_cpu:  # four times as fast as `codes.float()`
        numbers = _numbers(codes.dtype)
        return torch.from_numpy(np.take(numbers, codes.view(torch.uint8).numpy()))
    if coding.together == 1:
        assert type.format is not None
        return codes.float() + (coding.least if type.format.unsigned else 0.0)
    bits = 8 // coding.together
    shape = (*codes.shape[:-1], codes.shape[-1] * coding.together)
    apart = torch.empty(shape, dtype=torch.float32, device=codes.device)
    for place in range(coding.together):
        apart[..., place :: coding.together] = (codes >> place * bits) & ((1 << bits) - 1)
    return apart.add_(coding.least)


@cache
def _numbers(dtype: torch.dtype) -> Any:
    """The number of each code of a type of 8 bits."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


def _rounded_up(scales: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Scales in their element type, none smaller than given, so that no code is beyond the last.

    Raises `CheckpointError` where one is too large for it or all are too small, or a block holds
    NaN or infinity, which no code says. A block of zeros has the scale 1.
    """
    empty = scales == 0
    scales = torch.where(empty, 1.0, scales)
    made = scales.to(dtype.torch)
    if dtype.bits < 32:
        integers = torch.int16 if dtype.bits == 16 else torch.uint8
        next_one = (made.view(integers) + 1).view(dtype.torch)
        made = torch.where(made.float() < scales, next_one, made)
    if not made.float().isfinite().all():
        most = scales.amax()
        what = f"a scale of {most:g}, too large for {dtype}"
        raise CheckpointError(
            what if most.isfinite() else "a weight to quantise holds NaN or infinity",
            hint="mend the checkpoint; a compile can leave the weight as it is: --keep, keep=",
        )
    _check_small(torch.where(empty, 0.0, scales), made, dtype)
    return made


def _check_small(scales: torch.Tensor, made: torch.Tensor, dtype: DType) -> None:
    """Raise `CheckpointError` where a quarter of the codes is lost even to the largest scale.

    That is of what is packed at a time. Smaller ones beside larger ones may lose all: what they say
    is next to nothing then. Scales that are powers of two may be up to twice as large.
    """
    if dtype.bits < 16 or not scales.numel():
        return
    at = scales.argmax()
    most = float(scales.flatten()[at])
    if 0 < most < 0.75 * float(made.flatten()[at]):
        raise CheckpointError(
            f"a scale of {most:g}, too small for {dtype}",
            hint="a compile can leave the weight as it is (--keep, keep=), or take --quant fp8",
        )


def _largest(x: torch.Tensor, type: TensorType) -> torch.Tensor:
    """The largest element of each block, at least 0."""
    for axis, size in _axes(type):
        more = -x.shape[axis] % size
        if more:
            x = torch.nn.functional.pad(x, (0, more) if axis == -1 else (0, 0, 0, more))
        x = x.unflatten(axis, (-1, size)).amax(axis)
    return x.clamp(min=0)


def _axes(type: TensorType) -> list[tuple[int, int]]:
    """The axes along which several share a scale, from the end, and the extents of blocks."""
    assert type.format is not None
    sizes = {axis: type.format.block[axis] for axis in range(-min(2, type.rank), 0)}
    extents = {axis: max(1, _number(type.shape[axis])) for axis in sizes}
    found = [(axis, min(size or extents[axis], extents[axis])) for axis, size in sizes.items()]
    return [(axis, size) for axis, size in found if size > 1]


def _spread(scales: torch.Tensor, type: TensorType) -> torch.Tensor:
    """Each element's scale, in fp32."""
    wide = scales.float()
    for axis, size in _axes(type):
        extent = _number(type.shape[axis])
        after = wide.dim() + axis + 1
        spread = wide.unsqueeze(after).expand(*wide.shape[:after], size, *wide.shape[after:])
        wide = spread.flatten(after - 1, after).narrow(axis, 0, extent)
    return wide


def _by_block(
    x: torch.Tensor, scales: torch.Tensor, type: TensorType
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor with axes of its blocks, where they are whole, and fp32 scales that fit it."""
    axes = _axes(type)
    if any(x.shape[axis] % size for axis, size in axes):
        return x, _spread(scales, type)
    wide = scales.float()
    rank = x.dim()
    for axis, size in axes[::-1]:  # the last first: those before it stay where they are
        x = x.unflatten(rank + axis, (-1, size))
        wide = wide.unsqueeze(rank + axis + 1)
    return x, wide


def _number(extent: Dim) -> int:
    """An extent of a tensor that is there."""
    assert isinstance(extent, int), f"the extent {extent} of a tensor"
    return extent
