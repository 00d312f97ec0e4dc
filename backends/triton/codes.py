"""Weights in stored formats (`dsc.ir.formats`) as kernels read them: numbers as they are loaded.

A `Loader` writes the text that gives a tile of a weight, BLOCK_N rows of a product's columns by
BLOCK_K along which it sums: codes, less their zero points, times the scales of their blocks, in
fp32. Rounded to the type of x those are the numbers that the interpreter unpacks, bit for bit.

Cost      the bytes of codes, scales and zero points, once a tile of rows; a conversion and a
          product a code in registers, for which a step of few rows has time while memory is read.
Legality  codes in e4m3, or in 8 or 4 bits with or without zero points, row after row; scales for
          blocks of any extents. Of an einsum the columns and the sum each go along one axis of the
          last two. Codes of e4m3 are converted by the target where it can, else by their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc.backends.triton.pointwise import TYPES
from dsc.backends.triton.slots import Slot
from dsc.ir.formats import CODINGS, WHOLE
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

if TYPE_CHECKING:
    from dsc.backends.triton.context import Context, Given

WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "grouped_linear": ("weight",),
    "einsum": ("xs",),
    "experts": ("gate_up", "down"),
    "mla_attention": ("kv_b",),
    "embedding": ("weight",),
}
"""Operands that kernels read as weights in codes."""


def weight_reason(t: TensorType) -> str | None:
    """Why no kernel reads a weight of this type, or `None`."""
    format = t.format
    if format is None:
        return None
    if format.behind or format.unsigned or format.tile > 1:
        return f"a weight in {t.dtype}{format}, which is not stored row after row"
    return None


def shares(weight: TensorType, columns: int) -> bool:
    """Whether a scale covers so many columns of each row, and there are no zero points."""
    if weight.format is None or weight.format.zeros is not None:
        return False
    block = weight.format.block[1]
    return block == WHOLE or block % columns == 0


@dataclass(frozen=True)
class Loader:
    """The tiles of a coded weight: `n` and `k` are the axes of the product's columns and its sum.

    `block_k` is what the kernel sums at a time; `fp8` whether the target converts e4m3 by itself.
    """

    view: View
    parts: tuple[View, ...]
    n: int
    k: int
    block_k: int
    fp8: bool

    @property
    def codes(self) -> View:
        """What is stored of the codes, as bytes where the target does not know their type."""
        stored = self.parts[0]
        as_bytes = stored.dtype.is_float and not self.fp8
        return _as_bytes(stored) if as_bytes else stored

    @property
    def _together(self) -> int:
        return CODINGS[self.view.dtype].together

    def arguments(self) -> dict[str, Given]:
        """The kernel's parameters for all but the codes themselves, by name."""
        codes, scales, *zeros = self.parts
        exponents = scales.dtype is DType.f8e8m0
        given: dict[str, Given] = {"scales": _as_bytes(scales) if exponents else scales}
        given |= {"zeros": zeros[0]} if zeros else {}
        for name, part in (("codes", codes), ("scales", scales)):
            leading = part.strides[-3] if len(part.strides) > 2 else 0
            given[f"{name}_matrix"] = leading
            given[f"{name}_n"], given[f"{name}_k"] = part.strides[self.n], part.strides[self.k]
        return given

    def tile(self, name: str) -> list[str]:
        """`name` f32[BLOCK_N, BLOCK_K]: the numbers of columns n of `matrix`, from `start` on."""
        return [*self._places(name), *self._codes(name), *self._scaled(name)]

    def apart(self, name: str, multiplied: DType) -> list[str]:
        """`name` [BLOCK_N, BLOCK_K]: codes as elements of a type; `{name}_scales` f32[BLOCK_N]."""
        codes = self._codes(name, multiplied)
        return [*self._places(name), *codes, f"{name}_scales = {self._shared('scales', name)}"]

    def _places(self, name: str) -> list[str]:
        """Where codes of columns n begin, and which scales are theirs."""
        rows = f"(n // {self._together})" if self._shifts else "n"
        block = self._block(self.n)
        own = "n * 0" if block == WHOLE else f"(n // {block}) * scales_n"
        shift = [f"{name}_shift = n % {self._together} * 4"] if self._shifts else []
        return [
            f"{name}_at = b + matrix * codes_matrix + {rows}.to(tl.int64) * codes_n",
            f"{name}_block = matrix * scales_matrix + {own}",
            *shift,
        ]

    @property
    def _shifts(self) -> bool:
        """Whether neighbours among the columns share a byte."""
        return self._together > 1 and self.n == -1

    def _block(self, axis: int) -> int:
        assert self.view.type.format is not None
        return self.view.type.format.block[axis]

    def _codes(self, name: str, kind: DType = DType.f32) -> list[str]:
        """The codes as numbers of a type."""
        to = f"{name} = {name}.to({TYPES[kind]})" if kind is not self.codes.dtype else ""
        if self._together > 1 and not self._shifts:
            pairs = f"{name}_pairs = start // 2 + tl.arange(0, {self.block_k // 2})"
            loaded = (
                f"{name} = tl.load({name}_at[:, None] + {name}_pairs[None, :],"
                f" mask=fits[:, None] & ({name}_pairs[None, :] * 2 < K), other=0)"
            )
            return [pairs, loaded, f"{name} = tl.interleave({name} & 15, {name} >> 4)", *_less(to)]
        address = f"{name}_at[:, None] + k[None, :].to(tl.int64) * codes_k"
        none = "0.0" if self.codes.dtype.is_float else "0"
        keep = "fits[:, None] & (k[None, :] < K)"
        loaded = f"{name} = tl.load({address}, mask={keep}, other={none})"
        if self._shifts:
            return [loaded, f"{name} = ({name} >> {name}_shift[:, None]) & 15", *_less(to)]
        if self.codes.dtype is DType.u8:
            made = e4m3fnuz(name) if kind is DType.f8e4m3fnuz else e4m3_bits(name)
            return [loaded, *made, *([to] if kind is DType.f32 else ())]
        return [loaded, *([to] if to else ())]

    def _scaled(self, name: str) -> list[str]:
        """Codes less their zero points, times the scales of their blocks."""
        lines = []
        for part in ("zeros", "scales")[2 - len(self.parts[1:]) :]:
            lines += self._spread(name, part)
            value = f"{name}_{part}"
            lines.append(f"{name} = {name} {'*' if part == 'scales' else '-'} {value}")
        return lines

    def _spread(self, name: str, part: str) -> list[str]:
        """`{name}_{part}` f32, for each element of the tile, or one for all of a row."""
        block, value, at = self._block(self.k), f"{name}_{part}", f"{part} + {name}_block"
        if block == WHOLE or block % self.block_k == 0:
            return [f"{value} = {self._shared(part, name)}[:, None]"]
        if self.block_k % block or block == 1:
            keep = "fits[:, None] & (k[None, :] < K)"
            at = f"({at})[:, None] + (k[None, :] // {block}) * scales_k"
            return [f"{value} = {self._wide(part, f'tl.load({at}, mask={keep}, other=0)')}"]
        count, groups = self.block_k // block, f"{name}_groups"
        keep = f"fits[:, None] & ({groups}[None, :] * {block} < K)"
        at = f"({at})[:, None] + {groups}[None, :] * scales_k"
        wide = f"{value}[:, :, None], (BLOCK_N, {count}, {block})"
        return [
            f"{groups} = start // {block} + tl.arange(0, {count})",
            f"{value} = {self._wide(part, f'tl.load({at}, mask={keep}, other=0)')}",
            f"{value} = tl.reshape(tl.broadcast_to({wide}), (BLOCK_N, {self.block_k}))",
        ]

    def _shared(self, part: str, name: str) -> str:
        """A scale, or zero point, of each row for all columns of a tile: f32[BLOCK_N]."""
        block = self._block(self.k)
        along = "" if block == WHOLE else f" + start // {block} * scales_k"
        return self._wide(part, f"tl.load({part} + {name}_block{along}, mask=fits, other=0)")

    def _wide(self, part: str, loaded: str) -> str:
        """What is loaded of scales or zero points, in fp32; of e8m0 it is the exponent."""
        if part == "zeros" or self.parts[1].dtype is not DType.f8e8m0:
            return f"{loaded}.to(tl.float32)"
        bits = f"tl.maximum({loaded}.to(tl.int32) << 23, {1 << 22})"
        return f"{bits}.to(tl.float32, bitcast=True)"

    def slot(self) -> Slot:
        """The loader of a product whose weight is `b`."""
        title = f"{self.view.dtype}_{'rows' if self.n == -2 else 'columns'}"
        lines = [*self.tile("coded"), "w = tl.trans(coded).to(x.dtype)"]
        return Slot(title, {"w": lines}, self.arguments())


def _less(to: str) -> list[str]:
    """4-bit codes, which are stored as how far they lie above the least."""
    name = to.partition(" ")[0]
    return [f"{name} = {name}.to(tl.int8) - 8", to]


def e4m3_bits(name: str) -> list[str]:
    """Codes in e4m3 u8 as fp16, by their bits: moved by one they are 2^-8 of the number."""
    bits = f"(({name} & 127).to(tl.uint16) << 7) | (({name} & 128).to(tl.uint16) << 8)"
    return [
        f"{name}_bits = {name}",
        f"{name} = ({bits}).to(tl.float16, bitcast=True) * 256.0",
        f'{name} = tl.where(({name}_bits & 127) == 127, float("nan"), {name})',
    ]


def e4m3fnuz(name: str) -> list[str]:
    """Codes in e4m3 u8 as e4m3fnuz of half the number: its minus zero is NaN, and NaN a number."""
    return [
        f"{name} = tl.where({name} == 128, 0, tl.where(({name} & 127) == 127, 128, {name}))",
        f"{name} = {name}.to(tl.uint8).to(tl.float8e4b8, bitcast=True)",
    ]


def power_of_two(name: str, peak: str) -> list[str]:
    """fp32 numbers as the next powers of two, where `peak`, that they are made of, is finite."""
    bits = f"({name}.to(tl.int32, bitcast=True) + 0x7FFFFF & -0x800000)"
    up = f"{bits}.to(tl.float32, bitcast=True)"
    return [f'{name} = tl.where({peak} < float("inf"), {up}, {name})']


def nearest_e4m3(name: str) -> list[str]:
    """fp32 numbers to the nearest of e4m3, to even, in fp32: three bits, or steps of 2^-9."""
    bits = f"{name}_bits"
    return [
        f"{bits} = {name}.to(tl.uint32, bitcast=True)",
        f"{bits} = ({bits} + 0x7FFFF + (({bits} >> 20) & 1)) & 0xFFF00000",
        f"{name} = tl.where(tl.abs({name}) < 0.015625, {name} + 24576.0 - 24576.0,"
        f" {bits}.to(tl.float32, bitcast=True))",
    ]


def loader(ctx: Context, weight: View, block_k: int, n: int = -2, k: int = -1) -> Loader:
    """The loader of a weight in codes, which is read whole."""
    return Loader(weight, ctx.stored(weight), n, k, block_k, ctx.blocks.fp8 == "e4m3fn")


def einsum_axes(letters: str, n: str, k: str) -> tuple[int, int] | None:
    """Which of the last two axes of a coded operand are a product's columns and its sum.

    `None` where they are not one axis each.
    """
    last = letters[-2:]
    if len(n) != 1 or len(k) != 1 or {n, k} != set(last):
        return None
    return (-2, -1) if last[0] == n else (-1, -2)


def _as_bytes(part: View) -> View:
    return View(part.buffer, part.type.with_dtype(DType.u8), part.strides)
