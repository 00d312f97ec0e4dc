"""Operators over rows: norms, softmax, reductions, rope, lookups and cache writes."""

from __future__ import annotations

from dsc.backends.triton.blocks import next_power
from dsc.backends.triton.context import Context, Given, ceil_div
from dsc.backends.triton.lower.moe import take_rows
from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.views import View


def rms_norm(ctx: Context, node: Node) -> None:
    """Root-mean-square norm of each row."""
    x, rows, stride = ctx.rows(ctx.view(node.inputs[0]))
    width = int(x.shape[-1])  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(rows), width)
    given: dict[str, Given] = {
        "x": x, "weight": ctx.dense(ctx.view(node.inputs[1])), "y": ctx.result(node),
        "rows": rows, "x_row": stride, "eps": float(node.attrs["eps"]), "D": width,
        "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("rows:rms_norm", (ceil_div(rows, tile.rows),), given, tile.warps)


def softmax(ctx: Context, node: Node) -> None:
    """Softmax along an axis, which is brought innermost first."""
    axis = node.attrs["axis"]
    _along_last(ctx, node, axis, "rows:softmax", {})


def cumsum(ctx: Context, node: Node) -> None:
    """Running sum along an axis."""
    _along_last(ctx, node, node.attrs["axis"], "rows:cumsum", {})


def _along_last(ctx: Context, node: Node, axis: int, kernel: str, extra: dict[str, Given]) -> None:
    x = ctx.view(node.inputs[0])
    order = _innermost(len(x.shape), (axis,))
    moved = views.permute(x, order)
    source, rows, stride = ctx.rows(moved)
    out = ctx.make(moved.type)
    width = moved.shape[-1]
    tile = ctx.blocks.loop(ctx.limit(rows), ctx.limit(width))
    given: dict[str, Given] = {
        "x": source, "y": out, "rows": rows, "D": width, "x_row": stride,
        "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
        **extra,
    }  # fmt: skip
    ctx.launch(kernel, (ceil_div(rows, tile.rows),), given, tile.warps)
    ctx.set(node, views.permute(out, [order.index(a) for a in range(len(order))]))


def _innermost(rank: int, axes: tuple[int, ...]) -> list[int]:
    """The order of axes that has `axes` last."""
    last = [a % rank for a in axes]
    return [a for a in range(rank) if a not in last] + last


def reduction(ctx: Context, node: Node) -> None:
    """sum, mean, amax, amin over any axes."""
    x = ctx.view(node.inputs[0])
    axes = tuple(node.attrs["axes"]) or tuple(range(len(x.shape)))
    _reduce(ctx, node, x, axes, node.op)


def argmax(ctx: Context, node: Node) -> None:
    """Index of the first largest element of an axis."""
    _reduce(ctx, node, ctx.view(node.inputs[0]), (node.attrs["axis"],), "argmax")


def _reduce(ctx: Context, node: Node, x: View, axes: tuple[int, ...], kind: str) -> None:
    moved = views.permute(x, _innermost(len(x.shape), axes))
    kept = len(moved.shape) - len(axes)
    width = product(moved.shape[kept:])
    flat = ctx.reshaped(moved, (*moved.shape[:kept], width))
    source, rows, stride = ctx.rows(flat)
    tile = ctx.blocks.loop(ctx.limit(rows), ctx.limit(width))
    function = "argmax_rows" if kind == "argmax" else "reduce_rows"
    extra: dict[str, Given] = {} if kind == "argmax" else {"KIND": kind}
    given: dict[str, Given] = {
        "x": source, "y": ctx.result(node), "rows": rows, "D": width, "x_row": stride,
        "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
        **extra,
    }  # fmt: skip
    ctx.launch(f"rows:{function}", (ceil_div(rows, tile.rows),), given, tile.warps)


def topk(ctx: Context, node: Node) -> None:
    """The k largest of each row, largest first."""
    x, rows, stride = ctx.rows(ctx.view(node.inputs[0]))
    width, k = int(x.shape[-1]), node.attrs["k"]  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(rows), width)
    given: dict[str, Given] = {
        "x": x, "values": ctx.result(node, 0), "index": ctx.result(node, 1), "rows": rows,
        "x_row": stride, "D": width, "K": k, "BLOCK_K": next_power(k), "BLOCK_D": tile.columns,
        "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("rows:topk_rows", (ceil_div(rows, tile.rows),), given, tile.warps)


def rope(ctx: Context, node: Node) -> None:
    """Rotary embedding of [b, s, r] or [b, s, h, r]."""
    x, rows, stride = ctx.rows(ctx.view(node.inputs[0]))
    positions, inv_freq = (ctx.dense(ctx.view(v)) for v in node.inputs[1:3])
    width = int(x.shape[-1])  # type: ignore[arg-type]
    heads: Dim = x.shape[2] if len(x.shape) == 4 else 1
    half = next_power(width // 2)
    tile = ctx.blocks.rows(ctx.limit(rows), half)
    scale = node.attrs["scale"]
    given: dict[str, Given] = {
        "x": x, "positions": positions, "inv_freq": inv_freq, "y": ctx.result(node),
        "rows": rows, "heads": heads, "x_row": stride, "scale": float(scale), "R": width,
        "LAYOUT": node.attrs["layout"], "BLOCK_HALF": half, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("rows:rope", (ceil_div(rows, tile.rows),), given, tile.warps)


def embedding(ctx: Context, node: Node) -> None:
    """Rows of a table by id."""
    ids, table = ctx.operands(node)
    take_rows(ctx, table, ids, ctx.result(node))


def select_rows(ctx: Context, node: Node) -> None:
    """Rows of each sequence by index."""
    x, index = ctx.operands(node)
    x = ctx.dense(x)
    take_rows(ctx, x, index, ctx.result(node), index.shape[1], x.shape[1])


def take(ctx: Context, node: Node) -> None:
    """Slices of an axis by index, the same for all outer rows."""
    x, index = ctx.operands(node)
    axis = node.attrs["axis"] % len(x.shape)
    _lookup(ctx, node, x, index, product(x.shape[:axis]), x.shape[axis],
            product(index.shape), product(x.shape[axis + 1 :]), shared=True)  # fmt: skip


def gather(ctx: Context, node: Node) -> None:
    """Elements of an axis by an index of their own."""
    x, index = ctx.operands(node)
    axis = node.attrs["axis"] % len(x.shape)
    _lookup(ctx, node, x, index, product(x.shape[:axis]), x.shape[axis],
            index.shape[axis], product(x.shape[axis + 1 :]), shared=False)  # fmt: skip


def gather_reason(node: Node) -> str | None:
    """Why a gather cannot be emitted, or `None`."""
    x, index = (v.type.shape for v in node.operands)
    axis = node.attrs["axis"] % len(x)
    if any(a != b for i, (a, b) in enumerate(zip(x, index, strict=True)) if i != axis):
        return "gather by an index that is smaller than the operand outside of the gathered axis"
    return None


def _lookup(
    ctx: Context,
    node: Node,
    x: View,
    index: View,
    outer: Dim,
    extent: Dim,
    wanted: Dim,
    inner: Dim,
    shared: bool,
) -> None:
    n = product((outer, wanted, inner))
    block = ctx.blocks.flat(ctx.limit(n))
    given: dict[str, Given] = {
        "x": ctx.dense(x), "index": ctx.dense(index), "y": ctx.result(node), "n": n,
        "extent": extent, "wanted": wanted, "inner": inner, "SHARED": shared, "BLOCK": block,
    }  # fmt: skip
    ctx.launch("rows:lookup", (ceil_div(n, block),), given)


def cache_write(ctx: Context, node: Node) -> None:
    """Write new rows into the cache; the result is the cache's own buffer."""
    cache, new, lengths = ctx.operands(node)
    new, rows, stride = ctx.rows(new)
    _, capacity, width = cache.shape
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width))
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    given: dict[str, Given] = {
        "new": new, "lengths": ctx.dense(lengths), "cache": cache, "rows": rows,
        "S": new.shape[1], "capacity": capacity, "D": width, "new_row": stride,
        "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("rows:cache_write", grid, given, tile.warps)
    ctx.set(node, cache)


def append(ctx: Context, node: Node) -> None:
    """A grown copy of the cache."""
    past, new, lengths = ctx.operands(node)
    new, _, stride = ctx.rows(new)
    b, total, width = node.output.type.shape
    rows = b * total
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width))
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    given: dict[str, Given] = {
        "past": ctx.dense(past), "new": new, "lengths": ctx.dense(lengths),
        "y": ctx.result(node), "rows": rows, "P": past.shape[1], "S": new.shape[1], "D": width,
        "new_row": stride, "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("rows:append", grid, given, tile.warps)
