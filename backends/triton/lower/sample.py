"""Tokens chosen from logits: what is left out of rows, the best of their parts, the best of all."""

from __future__ import annotations

from dsc.backends.triton.blocks import next_power
from dsc.backends.triton.context import Context, Given
from dsc.ir.choosing import LEAST
from dsc.ir.graph import Node
from dsc.ir.types import DType

UNIT = 2.0**-17
"""What kernels have scores in: the largest logit by `LEAST` is below the largest float of them."""


def sample(ctx: Context, node: Node) -> None:
    """Append the four launches; limits are looked for only where a sequence has some."""
    logits, sampling, seeds = ctx.operands(node)
    logits, rows, stride = ctx.rows(logits)
    width, each = int(logits.shape[-1]), node.output.type.shape[1]  # type: ignore[arg-type]
    kind = logits.type.with_shape((rows,))
    tile, walk = ctx.blocks.parts(width), ctx.blocks.limits(width)
    block, parts = tile.columns, -(-width // tile.columns)
    limits, first = ctx.make(kind.with_dtype(DType.f32)), ctx.make(kind.with_dtype(DType.i32))
    shape = (rows, parts)
    best = ctx.make(kind.with_dtype(DType.f32).with_shape(shape))
    place = ctx.make(kind.with_dtype(DType.i32).with_shape(shape))
    row: dict[str, Given] = {"logits": logits, "sampling": ctx.dense(sampling), "L": each}
    row |= {"l_row": stride, "V": width, "LEAST": LEAST, "UNIT": UNIT}
    kept: dict[str, Given] = {"limits": limits, "first": first}
    whole = kind.with_dtype(DType.i32)
    few: dict[str, Given] = {"places": ctx.make(whole.with_shape((rows, walk.columns)))}
    few |= {"listed": ctx.make(whole), "BLOCK": walk.columns}
    few |= {"facts": ctx.make(kind.with_dtype(DType.f32).with_shape((rows, 2)))}
    ctx.launch("sample:sample_shortlist", (rows,), {**row, **few}, walk)
    ctx.launch("sample:sample_limits", (rows,), {**row, **few, **kept}, walk)
    given = {**row, **kept, "seeds": ctx.dense(seeds), "best": best, "place": place, "BLOCK": block}
    ctx.launch("sample:sample_parts", (rows, parts), given, tile)
    last: dict[str, Given] = {"best": best, "place": place, "ids": ctx.result(node)}
    last |= {"PARTS": parts, "PADDED": next_power(parts)}
    ctx.launch("sample:sample_best", (rows,), last)
