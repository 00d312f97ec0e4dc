"""Products of codes by codes: rows of x become codes too, and sums are promoted block by block.

Of each `columns` of a row the largest magnitude becomes the largest code (DeepSeek-V3, section
3.3.2: 1 x 128 beside 128 x 128). A step of the walk along k is as long: its products are summed by
the matrix units, and that sum, times the scales of the rows and of the weight, is added to acc in
fp32. So what a unit's own sums lose (14 bits on Hopper) is lost over 128 products, not over all.

Codes are multiplied in e4m3 where the target's units take it: tiles of 64 rows and more by wgmma on
sm_90, by tcgen05 on sm_100, by mfma on gfx950, and on gfx942 as e4m3fnuz: codes there stand for
half as much, so both sides are halved, exactly, and minus zero, which is NaN there, becomes zero.
Tiles of 16 rows, and targets without such units, multiply in f16: it holds every code, and products
of two are exact in fp32, so the numbers are the same; a step of few rows waits for the weights, and
those are read as bytes either way.

What computes rows makes codes of them where it can (`wanted`), and then stores no numbers that
nobody else reads. Else rows of few are made codes where they are multiplied, those of many once, by
a launch of their own.

Cost      as of `codes`; rows made ahead cost their bytes twice, and half of that to be read.
Legality  a scale of the weight's covers the columns of a row's, and there are no zero points; other
          weights are numbers, in the type of x, by codes of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.backends.triton.blocks import Tile, ceil_div
from dsc.backends.triton.codes import Loader, nearest_e4m3, power_of_two, shares
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.pointwise import TYPES
from dsc.backends.triton.slots import Slot, Slots
from dsc.ir.dims import product
from dsc.ir.formats import CODINGS
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

CODED_ROWS = 64
"""Rows that a product makes codes of by itself."""

_MULTIPLIED = {"e4m3fn": DType.f8e4m3, "e4m3fnuz": DType.f8e4m3fnuz, "": DType.f16}
"""What codes in e4m3 are multiplied in, by what the target's units take."""


def rows_reason(activations: str) -> str | None:
    """Why no kernel takes rows as such codes, or `None`."""
    columns = activations.split(":")[1]
    if int(columns) < 16 or int(columns) > 256 or int(columns) & int(columns) - 1:
        return f"rows as codes of {columns} columns each; 16, 32, 64, 128 or 256 are due"
    return None


@dataclass(frozen=True)
class RowCodes:
    """How a product of `rows` rows at most takes them: codes, a scale for so many columns each.

    `fp8` is the kind of e4m3 that the target multiplies; a `vector` is multiplied in fp32, without
    matrix units. Scales are `powers` of two, or any.
    """

    codes: DType
    columns: int
    rows: int
    fp8: str
    vector: bool = False
    powers: bool = False

    @staticmethod
    def of(ctx: Context, activations: str, rows: int, vector: bool = False) -> RowCodes:
        """What `f8e4m3:128` asks for, for the target."""
        codes, columns, *scales = activations.split(":")
        fp8 = ctx.blocks.fp8 if not vector or ctx.blocks.fp8 == "e4m3fn" else ""
        fp8 = fp8 if codes == DType.f8e4m3 else ""
        return RowCodes(DType(codes), int(columns), rows, fp8, vector, bool(scales))

    @property
    def multiplied(self) -> DType:
        """The element type that codes are multiplied in."""
        if self.vector and not self.fp8:
            return DType.f32
        return _MULTIPLIED[self.fp8] if self.codes.is_float else self.codes

    @property
    def ahead(self) -> bool:
        """Whether rows become codes in a launch of their own."""
        return self.rows > CODED_ROWS

    def tile(self, ctx: Context, tile: Tile) -> Tile:
        """The tile whose steps along k are what shares a scale."""
        if self.vector:
            return ctx.blocks.vector_of_codes(tile, self.columns, bool(self.fp8))
        return ctx.blocks.of_codes(tile, self.columns, self.multiplied is DType.f16)

    def made(self, ctx: Context, x: View) -> tuple[View, View]:
        """Codes [rows, k] and scales f32[rows, blocks] of rows, made once for all their readers."""
        known = ctx.row_codes.get(self._key(x))
        if known is not None:
            return known
        view, rows, stride = ctx.rows(x)
        codes, scales = self.room(ctx, x)
        width, groups = codes.shape[1], scales.shape[1]
        slots = Slots(sum=Slot(str(self.multiplied), {"codes": self.lines()}))
        of = f"quantise {x.dtype} {self.codes}:{self.columns} columns={width}"
        tile = ctx.blocks.quantised(ctx.limit(rows), of)
        given: dict[str, Given] = {"a": view, "c": codes, "scales": scales, "M": rows, "K": width}
        given |= {"a_m": stride, "groups": groups, "BLOCK_M": tile.rows, "BLOCK_K": self.columns}
        grid = (ceil_div(rows, tile.rows), groups)
        ctx.launch("quantise:quantise_rows", grid, given, tile, slots=slots)
        return codes, scales

    def known(self, ctx: Context, x: View) -> bool:
        """Whether rows are codes already, for matrix units."""
        return not self.vector and self._key(x) in ctx.row_codes

    def room(self, ctx: Context, x: View) -> tuple[View, View]:
        """Buffers for the codes and the scales of rows, which whoever asks for them finds."""
        rows, width = product(x.shape[:-1]), x.shape[-1]
        codes = ctx.make(TensorType(self.multiplied, (rows, width)))
        scales = ctx.make(TensorType(DType.f32, (rows, ceil_div(width, self.columns))))
        ctx.row_codes[self._key(x)] = codes, scales
        return codes, scales

    def _key(self, x: View) -> tuple[object, ...]:
        """What tells rows from others: a view of other leading axes has the same."""
        where = (x.buffer, x.offset, x.shape[-1]) if x.is_dense else (x,)
        return (*where, self.codes, self.columns, self.powers)

    def lines(self, axis: int = 1) -> list[str]:
        """From x, whose columns from `axis` on share a scale, to `codes`, and to `row_scale`.

        Codes are of the type that is multiplied.
        """
        half = " * 0.5" if self.fp8 == "e4m3fnuz" else ""
        each = "[:, None]" if axis == 1 else "[:, :, None]"
        lines = [
            "wide = x.to(tl.float32)",
            f"peak = tl.max(tl.abs(wide), axis={axis}) + tl.sum(wide - wide, axis={axis})",
            f"row_scale = tl.div_rn(peak, peak * 0.0 + {CODINGS[self.codes].largest})",
            *(power_of_two("row_scale", "peak") if self.powers else ()),
            "row_scale = tl.where(peak == 0.0, 1.0, row_scale)",
            "inverse = tl.minimum(tl.div_rn(row_scale * 0.0 + 1.0, row_scale), 3.0e38)",
            f"wide = wide * inverse{each}{half}",
        ]
        if not self.codes.is_float:
            lines.append("wide = wide + 12582912.0 - 12582912.0")
        elif not self.fp8:
            lines += nearest_e4m3("wide")
        return [*lines, f"codes = wide.to({TYPES[self.multiplied]})"]

    def shares(self, weight: TensorType) -> bool:
        """Whether codes multiply codes, and the scales of both their sum."""
        return weight.dtype.is_float == self.codes.is_float and shares(weight, self.columns)

    def slots(self, codes: Loader, scales: View | None, row: str) -> tuple[Slot, Slot]:
        """The loader and the sum of a product over a weight in codes.

        `scales` are those of rows that were made ahead, of which `row` is the number.
        """
        lines, arguments = self.lines(), dict[str, Given]()
        if scales is not None:
            at = f"row_scales + {row} * row_groups + start // {self.columns}"
            lines = [f"row_scale = tl.load({at}, mask=live, other=0.0)", "codes = x"]
            arguments = {"row_scales": scales, "row_groups": scales.shape[1]}
        title = f"rows_{self.columns}{'_ahead' if scales is not None else ''}"
        if self.shares(codes.view.type):
            loaded = [*codes.apart("coded", self.multiplied), "w = tl.trans(coded)"]
            loader = Slot(f"{codes.view.dtype}", {"w": loaded}, codes.arguments())
            whole = " * 4.0" if self.fp8 == "e4m3fnuz" else ""
            shared = f"(row_scale{whole})[:, None] * coded_scales[None, :]"
        else:
            whole = " * 2.0" if self.fp8 == "e4m3fnuz" else ""
            loader, shared = codes.slot(), f"(row_scale{whole})[:, None]"
            lines.append("codes = codes.to(x.dtype)")
        if self.vector:
            product = "tl.sum(tl.trans(codes).to(tl.float32) * w.to(tl.float32), axis=0)[None, :]"
            return loader, Slot(title, {"part": [*lines, f"part = {product} * {shared}"]})
        lines.append('part = tl.dot(codes, w, input_precision="ieee").to(tl.float32)')
        return loader, Slot(title, {"sum": [*lines, f"acc += part * {shared}"]}, arguments)
