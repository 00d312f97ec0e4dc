"""Tokens chosen from logits: what is left out of a row, the best of its parts, the best of all."""

from __future__ import annotations

from dsc.backends.triton.blocks import next_power
from dsc.backends.triton.context import Context, Given
from dsc.ir.choosing import LEAST
from dsc.ir.graph import Node
from dsc.ir.types import DType


def sample(ctx: Context, node: Node) -> None:
    """Append the three launches; limits are looked for only where a sequence has some."""
    logits, sampling, seeds = ctx.operands(node)
    logits, rows, stride = ctx.rows(logits)
    width, each = int(logits.shape[-1]), node.output.type.shape[1]  # type: ignore[arg-type]
    kind = logits.type.with_shape((rows,))
    block = min(ctx.blocks.flat(width), next_power(width))
    parts = -(-width // block)
    limits, first = ctx.make(kind.with_dtype(DType.f32)), ctx.make(kind.with_dtype(DType.i32))
    shape = (rows, parts)
    best = ctx.make(kind.with_dtype(DType.f32).with_shape(shape))
    place = ctx.make(kind.with_dtype(DType.i32).with_shape(shape))
    row: dict[str, Given] = {"logits": logits, "sampling": ctx.dense(sampling), "L": each}
    row |= {"l_row": stride, "V": width, "LEAST": LEAST, "limits": limits, "first": first}
    walk = ctx.blocks.loop(ctx.limit(rows), width).columns
    ctx.launch("sample:sample_limits", (rows,), {**row, "BLOCK": walk}, warps=8)
    given = {**row, "seeds": ctx.dense(seeds), "best": best, "place": place, "BLOCK": block}
    ctx.launch("sample:sample_parts", (rows, parts), given)
    last: dict[str, Given] = {"best": best, "place": place, "ids": ctx.result(node)}
    last |= {"PARTS": parts, "PADDED": next_power(parts)}
    ctx.launch("sample:sample_best", (rows,), last)
