"""Stored formats: numbers as narrow codes, with a scale for each block of the last two axes.

A type spells its format behind the element type of the codes: `f8e4m3{128x128,f32}[N,K]` is N x K
codes in f8e4m3 and an f32 scale for each 128 rows x 128 columns; blocks at the ends may be partial,
leading axes are matrices of their own. A tensor of such a type stands for codes * scales. Formats
differ in data alone: what a kind of codes can say is a row of `CODINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dsc.ir.dims import Dim, terms
from dsc.ir.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from dsc.ir.types import DType, TensorType
else:
    torch = LazyModule("torch")


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
SCALE = ".scale"
"""What the scales of a weight are called behind its name."""


@dataclass(frozen=True, slots=True)
class Format:
    """Blocks of rows x columns that share a scale, and the element type of scales."""

    block: tuple[int, int]
    scales: DType

    def __post_init__(self) -> None:
        if min(self.block) < 1:
            raise ValueError(f"blocks of {list(self.block)}; rows and columns are due")
        if not self.scales.is_float:
            raise ValueError(f"scales in {self.scales}; a float type is due")

    def __str__(self) -> str:
        return f"{{{self.block[0]}x{self.block[1]},{self.scales}}}"

    def grid(self, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The shape of the scales of a tensor."""
        cut = zip(shape[-2:], self.block, strict=True)
        return (*shape[:-2], *(-(-extent // size) for extent, size in cut))


def is_whole(extent: Dim, size: int) -> bool:
    """Whether an extent is so many of `size`, whatever its symbols are."""
    return all(coefficient % size == 0 for coefficient in terms(extent).values())


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor in a format: its codes, and the scales of its blocks.

    What was unpacked once is kept, since a weight is read in every step.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: Format
    _unpacked: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """Of the codes, which is that of the tensor."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.codes.dtype

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers: products in fp32, rounded once."""
        if dtype not in self._unpacked:
            wide = self.codes.float() * _spread(self.scales, self.shape, self.format)
            self._unpacked[dtype] = wide.to(dtype)
        return self._unpacked[dtype]


def pack(x: torch.Tensor, type: TensorType) -> Packed:
    """The tensor in the format of `type`: the nearest codes, the largest of each block full."""
    assert type.format is not None
    coding, (rows, columns) = CODINGS[type.dtype], type.format.block
    wide = x.float()
    padding = (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows)
    blocks = torch.nn.functional.pad(wide.abs(), padding)
    blocks = blocks.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    largest = blocks.amax((-3, -1))
    scales = torch.where(largest > 0, largest / coding.largest, 1.0).to(type.format.scales.torch)
    codes = (wide / _spread(scales, x.shape, type.format)).to(type.dtype.torch)
    return Packed(codes, scales, type.format)


def _spread(scales: torch.Tensor, shape: Any, format: Format) -> torch.Tensor:
    """Each element's scale, in fp32."""
    wide = scales.float()
    for axis in (-2, -1):
        size = min(format.block[axis], max(1, shape[axis]))
        wide = wide.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return wide
