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

Rows of few are made codes where they are multiplied; rows of many once, by a launch before.

Cost      as of `codes`; rows made ahead cost their bytes twice, and half of that to be read.
Legality  a scale of the weight's covers the columns of a row's, and there are no zero points; other
          weights are numbers, in the type of x, by codes of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsc.backends.triton.blocks import Tile, ceil_div, clamp_power
from dsc.backends.triton.codes import Loader, nearest_e4m3
from dsc.backends.triton.context import Context, Given, template
from dsc.backends.triton.pointwise import TYPES
from dsc.backends.triton.slots import Slot, Slots, written
from dsc.ir.formats import CODINGS
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

FEW = 64
"""Rows that a product makes codes of by itself."""
_MULTIPLIED = {"e4m3fn": DType.f8e4m3, "e4m3fnuz": DType.f8e4m3fnuz, "": DType.f16}
"""What codes in e4m3 are multiplied in, by what the target's units take."""


def rows_reason(activations: str) -> str | None:
    """Why no kernel takes rows as such codes, or `None`."""
    codes, _, columns = activations.partition(":")
    if codes != "f8e4m3":
        return f"rows as codes in {codes}"
    if int(columns) < 16 or int(columns) > 256 or int(columns) & int(columns) - 1:
        return f"rows as codes of {columns} columns each; 16, 32, 64, 128 or 256 are due"
    return None


@dataclass(frozen=True)
class RowCodes:
    """How a product of `rows` rows at most takes them: codes, a scale for so many columns each."""

    columns: int
    rows: int
    fp8: str

    @staticmethod
    def of(ctx: Context, activations: str, rows: int) -> RowCodes:
        """What `f8e4m3:128` asks for, for the target."""
        return RowCodes(int(activations.partition(":")[2]), rows, ctx.blocks.fp8)

    @property
    def multiplied(self) -> DType:
        """The element type that codes are multiplied in."""
        return _MULTIPLIED[self.fp8]

    @property
    def ahead(self) -> bool:
        """Whether rows become codes in a launch of their own."""
        return self.rows > FEW

    def tile(self, tile: Tile) -> Tile:
        """The tile whose steps along k are what shares a scale.

        In f16 codes take twice the registers, and both sums of a tile of 128 x 128 spill.
        """
        return replace(tile, k=self.columns, n=tile.n if self.fp8 else min(tile.n, 64))

    def made(self, ctx: Context, x: View) -> tuple[View, View]:
        """Codes [rows, k] and scales f32[rows, blocks] of rows, made once for all their readers."""
        known = ctx.row_codes.get((x, self.columns))
        if known is not None:
            return known
        view, rows, stride = ctx.rows(x)
        width = view.shape[-1]
        groups = ceil_div(width, self.columns)
        codes = ctx.make(TensorType(self.multiplied, (rows, width)))
        scales = ctx.make(TensorType(DType.f32, (rows, groups)))
        slots = Slots(sum=Slot(str(self.multiplied), {"codes": self.lines()}))
        name, text = written(template("quantise"), "quantise_rows", slots)
        ctx.sources.setdefault(name, text)
        height = clamp_power(ctx.limit(rows), 1, 512 if ctx.blocks.interprets else 32)
        given: dict[str, Given] = {"a": view, "c": codes, "scales": scales, "M": rows, "K": width}
        given |= {"a_m": stride, "groups": groups, "BLOCK_M": height, "BLOCK_K": self.columns}
        ctx.launch(f"{name}:{name}", (ceil_div(rows, height), groups), given)
        ctx.row_codes[x, self.columns] = codes, scales
        return codes, scales

    def lines(self) -> list[str]:
        """From x [rows, BLOCK_K] to `codes`, in the type that is multiplied, and `row_scale`."""
        largest = CODINGS["f8e4m3"].largest
        half = " * 0.5" if self.fp8 == "e4m3fnuz" else ""
        return [
            "wide = x.to(tl.float32)",
            "peak = tl.max(tl.abs(wide), axis=1)",
            f"row_scale = tl.where(peak == 0.0, 1.0, tl.div_rn(peak, peak * 0.0 + {largest}))",
            "inverse = tl.minimum(tl.div_rn(row_scale * 0.0 + 1.0, row_scale), 3.0e38)",
            f"wide = wide * inverse[:, None]{half}",
            *(nearest_e4m3("wide") if not self.fp8 else ()),
            f"codes = wide.to({TYPES[self.multiplied]})",
        ]

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
        if not codes.shares(self.columns):
            lines.append('part = tl.dot(codes.to(x.dtype), w, input_precision="ieee")')
            lines.append("acc += part * row_scale[:, None]")
            return codes.slot(), Slot(title, {"sum": lines}, arguments)
        loaded = [*codes.apart("coded", self.multiplied), "w = tl.trans(coded)"]
        whole = " * 4.0" if self.fp8 == "e4m3fnuz" else ""
        lines.append("part = tl.dot(codes, w)")
        lines.append(f"acc += part * (row_scale{whole})[:, None] * coded_scales[None, :]")
        loader = Slot(f"{codes.view.dtype}", {"w": loaded}, codes.arguments())
        return loader, Slot(title, {"sum": lines}, arguments)
