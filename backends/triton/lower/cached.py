"""Caches in codes where attention reads them: by the tile, or all rows of a step at once."""

from __future__ import annotations

from dsc.backends.triton.blocks import ceil_div, next_power
from dsc.backends.triton.coded_cache import parts_of, to_numbers
from dsc.backends.triton.context import Context, Given, template
from dsc.backends.triton.slots import Slot, Slots, written
from dsc.ir.dims import Dim
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View


def reader(ctx: Context, cache: View, kind: DType) -> tuple[View, Slot]:
    """A kernel's pointer to a cache, and the slot that makes numbers of a type of its rows."""
    codes, scales = parts_of(cache)
    given: dict[str, Given] = {"scales": scales}
    given |= {"scales_batch": scales.strides[0], "scales_row": scales.strides[1]}
    title = f"{cache.dtype}_cache"
    return codes, Slot(title, {"values": to_numbers(cache.type, kind, ctx.blocks.fp8)}, given)


def widened(ctx: Context, cache: View, dtype: DType, lengths: View, new_rows: Dim) -> View:
    """The numbers of all rows that a step of so many new ones sees."""
    codes, slot = reader(ctx, cache, dtype)
    b, t, width = cache.shape
    made = ctx.make(TensorType(dtype, (b, t, width)))
    name, text = written(template("coded_cache"), "widen_rows", Slots(loader=slot))
    ctx.sources.setdefault(name, text)
    padded = next_power(int(width))  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(t), padded)
    given: dict[str, Given] = {"latent": codes, "lengths": lengths, "out": made, "T": t}
    given |= {"new_rows": new_rows, "l_batch": codes.strides[0], "l_row": codes.strides[1]}
    given |= {"C": width, "BLOCK_C": padded, "BLOCK_T": tile.rows, **slot.arguments}
    ctx.launch(f"{name}:{name}", (ceil_div(t, tile.rows), b), given, tile.warps)
    return made
