"""Lookups by index, scans along rows, grown caches: what no region takes."""

from __future__ import annotations

from dataclasses import replace

from dsc.backends.triton.blocks import DOT_MINIMUM, ceil_div
from dsc.backends.triton.codes import loader
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.lower.moe import take_rows
from dsc.backends.triton.prologue import Taken
from dsc.backends.triton.slots import Slot, Slots
from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.views import View


def cumsum(ctx: Context, node: Node) -> None:
    """Running sum along an axis, which is brought innermost first."""
    x = ctx.view(node.inputs[0])
    order = _innermost(len(x.shape), node.attrs["axis"])
    moved = views.permute(x, order)
    out = ctx.make(moved.type)
    _along_rows(ctx, "cumsum", moved, out)
    ctx.set(node, views.permute(out, [order.index(a) for a in range(len(order))]))


def argmax(ctx: Context, node: Node) -> None:
    """Index of the first largest element of an axis."""
    x = ctx.view(node.inputs[0])
    moved = views.permute(x, _innermost(len(x.shape), node.attrs["axis"]))
    _along_rows(ctx, "argmax_rows", moved, ctx.result(node))


def _along_rows(ctx: Context, function: str, x: View, y: View) -> None:
    """Append a kernel that walks along rows of any length."""
    x, rows, stride = ctx.rows(x)
    width = x.shape[-1]
    tile = ctx.blocks.loop(ctx.limit(rows), ctx.limit(width), function)
    given: dict[str, Given] = {
        "x": x, "y": y, "rows": rows, "D": width, "x_row": stride,
        "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch(f"lookups:{function}", (ceil_div(rows, tile.rows),), given, tile)


def _innermost(rank: int, axis: int) -> list[int]:
    """The order of axes that has `axis` last."""
    return [a for a in range(rank) if a != axis % rank] + [axis % rank]


def topk(ctx: Context, node: Node) -> None:
    """The k largest of each row, largest first."""
    x, rows, stride = ctx.rows(ctx.view(node.inputs[0]))
    width, k = int(x.shape[-1]), node.attrs["k"]  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(rows), width, "topk")
    given: dict[str, Given] = {
        "x": x, "values": ctx.result(node, 0), "index": ctx.result(node, 1), "rows": rows,
        "x_row": stride, "D": width, "K": k, "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("lookups:topk_rows", (ceil_div(rows, tile.rows),), given, tile)


def embedding(ctx: Context, node: Node) -> None:
    """Rows of a table by id, of one in codes as numbers."""
    ids, table = ctx.operands(node)
    if table.type.format is None:
        take_rows(ctx, table, ids, ctx.result(node))
        return
    rows, (count, width) = product(ids.shape), table.shape
    part = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width), f"take_coded {table.type.spelled}")
    tile = replace(part, columns=max(DOT_MINIMUM, part.columns))
    codes = loader(ctx, table, tile.columns)
    slots = Slots(loader=Slot(f"{table.dtype}", {"w": codes.tile("coded")}, codes.arguments()))
    given: dict[str, Given] = {
        "b": codes.codes, "index": ctx.dense(ids), "c": ctx.result(node), "rows": rows,
        "N": count, "K": width, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns,
    }  # fmt: skip
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    ctx.launch("lookups:take_coded", grid, given, tile, slots=slots)


def select_rows(ctx: Context, node: Node) -> None:
    """Rows of each sequence by index: the only one there is, or those that a product may take."""
    x, index = ctx.operands(node)
    if x.shape[1] == index.shape[1] == 1:
        ctx.set(node, x)
        return
    x, index, out = ctx.dense(x), ctx.dense(index), node.output.type

    def copied(ctx: Context) -> View:
        made = ctx.make(out)
        take_rows(ctx, x, index, made, index.shape[1], x.shape[1])
        return made

    ctx.later[node.output.name] = Taken(x, index, copied)


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
    tile = ctx.blocks.flat(ctx.limit(n), "lookup")
    given: dict[str, Given] = {
        "x": ctx.dense(x), "index": ctx.dense(index), "y": ctx.result(node), "n": n,
        "extent": extent, "wanted": wanted, "inner": inner, "SHARED": shared, "BLOCK": tile.rows,
    }  # fmt: skip
    taken = {"x": n * x.dtype.itemsize}
    ctx.launch("lookups:lookup", (ceil_div(n, tile.rows),), given, tile, touched=taken)


def append(ctx: Context, node: Node) -> None:
    """A grown copy of the cache."""
    past, new, lengths = ctx.operands(node)
    new, _, stride = ctx.rows(new)
    b, total, width = node.output.type.shape
    rows = b * total
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width), "append")
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    given: dict[str, Given] = {
        "past": ctx.dense(past), "new": new, "lengths": ctx.dense(lengths),
        "y": ctx.result(node), "rows": rows, "P": past.shape[1], "S": new.shape[1], "D": width,
        "new_row": stride, "BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows,
    }  # fmt: skip
    ctx.launch("lookups:append", grid, given, tile)
