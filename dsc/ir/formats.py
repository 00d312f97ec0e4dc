"""Stored formats: numbers as narrow codes, with a scale for each block of the last two axes.

A type spells its format behind the element type of the codes: `f8e4m3{128x128,f32}[N,K]` is N x K
codes in f8e4m3 and an f32 scale for each 128 rows x 128 columns; blocks at the ends may be partial,
leading axes are matrices of their own. `*` is the whole axis: `{1x*,f32}` has a scale a row,
`{*x*,f32}` one in all. A tensor of such a type stands for codes * scales, which `Packed.unpack` and
`pack` say. All else takes what is stored as `Format.parts` lists it; what a kind of codes can say
is a row of `CODINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from dsc.ir.dims import Dim, terms
from dsc.ir.lazy import torch

if TYPE_CHECKING:
    from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Coding:
    """What codes of an element type can say.

    `largest` is the code of a block's largest magnitude. A number and what its code stands for
    differ by at most `relative` times the number or `absolute` times the scale, whichever is more.
    """

    largest: float
    relative: float
    absolute: float


CODINGS: Mapping[str, Coding] = MappingProxyType({"f8e4m3": Coding(448.0, 2.0**-4, 2.0**-10)})
"""By the element type of the codes."""
WHOLE = 0
"""The extent of a block that is the whole axis, however long."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is stored: its name behind the weight's, and an element a block."""

    suffix: str
    dtype: DType
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Format:
    """Blocks of rows x columns that share a scale, and the element type of scales."""

    block: tuple[int, int]
    scales: DType

    def __post_init__(self) -> None:
        if min(self.block) < 0:
            raise ValueError(f"blocks of {list(self.block)}; rows and columns are due")
        if not self.scales.is_float:
            raise ValueError(f"scales in {self.scales}; a float type is due")

    def __str__(self) -> str:
        rows, columns = ("*" if size == WHOLE else size for size in self.block)
        return f"{{{rows}x{columns},{self.scales}}}"

    def parts(self, codes: DType) -> tuple[Part, ...]:
        """What is stored of a tensor, in order."""
        return Part("", codes, (1, 1)), Part(".scale", self.scales, self.block)


def along(block: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The extents of a block along all axes of a tensor: 1 before the last two."""
    return (1,) * (rank - len(block)) + block[-rank:]


def grid(shape: tuple[Dim, ...], block: tuple[int, ...]) -> tuple[Dim, ...]:
    """How many blocks there are along each axis."""
    cut = zip(shape, along(block, len(shape)), strict=True)
    return tuple(1 if size == WHOLE else -(-extent // size) for extent, size in cut)


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
        codes, scales = self.parts
        return (codes.float() * _spread(scales, self.type)).to(dtype)


def pack(x: torch.Tensor, type: TensorType) -> Packed:
    """The tensor in the format of `type`: the nearest codes, the largest of each block full."""
    assert type.format is not None
    coding = CODINGS[type.dtype]
    largest = x.float().abs()
    for axis, size in _axes(type):
        blocks = torch.nn.functional.pad(largest.movedim(axis, -1), (0, -x.shape[axis] % size))
        largest = blocks.unflatten(-1, (-1, size)).amax(-1).movedim(-1, axis)
    scales = torch.where(largest > 0, largest / coding.largest, 1.0).to(type.format.scales.torch)
    wide = x.float() / _spread(scales, type)
    codes = wide if type.dtype.is_float else wide.round()
    return Packed(type, (codes.to(type.dtype.torch), scales))


def _axes(type: TensorType) -> list[tuple[int, int]]:
    """The axes that blocks lie along, from the end, and the extents of blocks."""
    assert type.format is not None
    sizes = {axis: type.format.block[axis] for axis in range(-min(2, type.rank), 0)}
    extents = {axis: max(1, _number(type.shape[axis])) for axis in sizes}
    return [(axis, min(size or extents[axis], extents[axis])) for axis, size in sizes.items()]


def _spread(scales: torch.Tensor, type: TensorType) -> torch.Tensor:
    """Each element's scale, in fp32."""
    wide = scales.float()
    for axis, size in _axes(type):
        extent = _number(type.shape[axis])
        wide = wide.repeat_interleave(size, axis).narrow(axis, 0, extent)
    return wide


def _number(extent: Dim) -> int:
    """An extent of a tensor that is there."""
    assert isinstance(extent, int), f"the extent {extent} of a tensor"
    return extent
