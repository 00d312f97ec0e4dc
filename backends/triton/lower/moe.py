"""Mixture of experts: the router, the whole expert layer, and its grouped parts."""

from __future__ import annotations

from collections.abc import Sequence

from dsc.backends.triton.blocks import ceil_div, next_power, spelled
from dsc.backends.triton.coded_rows import RowCodes
from dsc.backends.triton.context import Context, Gather, Given
from dsc.backends.triton.lower.contract import in_codes, router_logits
from dsc.backends.triton.rows import elementwise
from dsc.backends.triton.slots import ALL_PLAIN, PLAIN, Slot, Slots
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Attrs, Node
from dsc.ir.region_steps import Literal
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View


def route(ctx: Context, node: Node) -> None:
    """Router logits by a GEMM in fp32, then one kernel that scores, limits and picks."""
    x, weight = node.operands[0], ctx.view(node.inputs[1])
    biases = (node.get("bias"), node.get("logit_bias"))
    bias, shift = (None if b is None else ctx.dense(ctx.view(b)) for b in biases)
    attrs = node.attrs
    logits = router_logits(ctx, x, weight)
    experts, rows = int(weight.shape[0]), logits.shape[0]  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(rows), experts, "route")
    groups = attrs["groups"] if attrs["keep"] < attrs["groups"] else 1
    given: dict[str, Given] = {"logits": logits, "bias": bias, "shift": shift, "rows": rows}
    given |= {"index": ctx.result(node, 0), "weights": ctx.result(node, 1)}
    given |= {"scale": float(attrs["scale"]), "E": experts, "BLOCK_E": next_power(experts)}
    given |= {"SCORE": attrs["score"], "HAS_BIAS": bias is not None, "GROUPS": groups}
    given |= {"HAS_SHIFT": shift is not None}
    given |= {"BLOCK_G": next_power(groups), "KEEP": attrs["keep"]}
    given |= {"GROUP_SCORE": attrs["group_score"], "FILL": float(attrs["fill"])}
    width = next_power(attrs["top_k"] + attrs["shared"])
    given |= {"TOP_K": attrs["top_k"], "SHARED": attrs["shared"], "BLOCK_K": width}
    given |= {"NORMALISE": attrs["normalise"], "BLOCK_ROWS": tile.rows}
    ctx.launch("moe:route", (ceil_div(rows, tile.rows),), given, tile)


def sort_entries(ctx: Context, index: View, experts: int) -> tuple[View, View, View]:
    """Sort (token, slot) entries by expert: offsets, order and place (order's inverse)."""
    index = ctx.dense(index)
    total = product(index.shape)
    offsets = ctx.make(TensorType(DType.i64, (experts + 1,)))
    order = ctx.make(TensorType(DType.i64, (total,)))
    place = ctx.make(TensorType(DType.i32, (total,)))
    tile = ctx.blocks.sort(ctx.limit(total), experts + 1)
    given: dict[str, Given] = {"index": index, "offsets": offsets, "order": order, "place": place}
    given |= {"total": total, "EXPERTS": experts, "BLOCK_EXPERTS": tile.columns}
    given["BLOCK"] = tile.rows
    ctx.launch("moe:sort_by_expert", (ceil_div(experts + 1, tile.columns),), given, tile)
    return offsets, order, place


def experts(ctx: Context, node: Node) -> None:
    """The direct form: gate, up and activation of each pair, then each token's weighted sum.

    Two launches; no host ever learns who was chosen. For many tokens `lower_moe_dispatch` replaces
    the operator by its grouped form.
    """
    out = ctx.result(node)
    emit_experts(ctx, ctx.operands(node), node.attrs, out, (out.shape[-1], 1))


def emit_experts(
    ctx: Context,
    operands: Sequence[View],
    attrs: Attrs,
    out: View,
    out_strides: tuple[Dim, Dim],
    epilogue: Slot = PLAIN,
) -> None:
    """Append the direct form, whose products may take rows as codes; `epilogue` is the second's."""
    x, index, weights, gate_up, down = operands
    x, _, row_stride = ctx.rows(x)
    index, weights = ctx.dense(index), ctx.dense(weights)
    gate_up, down = ctx.dense(gate_up), ctx.dense(down)
    width, inner = (int(d) for d in down.shape[1:])  # type: ignore[arg-type]
    slots = int(index.shape[-1])  # type: ignore[arg-type]
    pairs = product(index.shape)
    hidden = ctx.make(x.type.with_shape((pairs, inner)))
    activations = attrs["activations"]
    rows = RowCodes.of(ctx, activations, 1, vector=True) if activations else None
    of = spelled("experts_hidden", gate_up.type.spelled, activations)
    tile = ctx.blocks.gemv(inner, width, gate_up.dtype.bits, of)
    tile = tile if rows is None else rows.tile(ctx, tile)
    _, codes, slots_of = in_codes(ctx, x, gate_up, tile, ALL_PLAIN, rows=rows)
    given: dict[str, Given] = {"a": x, "index": index, "b": codes, "c": hidden}
    given |= {"N": 2 * inner, "K": width, "a_m": row_stride, "TOP_K": slots}
    given["ACT"] = attrs["act"]
    given |= {"BLOCK_N": 2 * tile.n, "BLOCK_K": tile.k}
    grid = (pairs, ceil_div(inner, tile.n))
    flops = 4 * pairs * inner * width
    ctx.launch("moe:experts_hidden", grid, given, tile, flops, slots=slots_of)
    of = spelled("experts_output", down.type.spelled, activations, epilogue.title)
    tile = ctx.blocks.gemv(width, inner, down.dtype.bits, of)
    tile = tile if rows is None else rows.tile(ctx, tile)
    _, codes, slots_of = in_codes(ctx, hidden, down, tile, Slots(epilogue=epilogue), rows=rows)
    given = {"a": hidden, "index": index, "weights": weights, "b": codes, "c": out}
    given |= {"N": width, "K": inner, "TOP_K": slots}
    given |= dict(zip(("c_m", "c_n"), out_strides, strict=True))
    given |= {"BLOCK_N": tile.n, "BLOCK_K": tile.k}
    grid = (product(index.shape[:-1]), ceil_div(width, tile.n))
    ctx.launch("moe:experts_output", grid, given, tile, flops // 2, slots=slots_of)


def dispatch(ctx: Context, node: Node) -> None:
    """Sort the entries. Grouped GEMMs gather rows as they read them; others get a copy."""
    x, index = ctx.operands(node)
    slots = int(index.shape[1])  # type: ignore[arg-type]
    offsets, order, place = sort_entries(ctx, index, node.attrs["experts"])
    rows, *sorted_by = node.outputs
    ctx.places[order.buffer] = place

    def copied(ctx: Context) -> View:
        token = ctx.make(order.type)
        elementwise("div", [order, Literal(slots)], token).launch(ctx)
        out = ctx.make(rows.type)
        take_rows(ctx, x, token, out)
        return out

    ctx.later[rows.name] = Gather(x, order, slots, copied)
    ctx.views |= {v.name: y for v, y in zip(sorted_by, (offsets, order), strict=True)}


def combine(ctx: Context, node: Node) -> None:
    """Each token's weighted sum over its slots, at the places that the sort gave them."""
    out = ctx.result(node)
    emit_combine(ctx, ctx.operands(node), out, (out.shape[-1], 1))


def emit_combine(
    ctx: Context,
    operands: Sequence[View],
    out: View,
    out_strides: tuple[Dim, Dim],
    epilogue: Slot = PLAIN,
) -> None:
    """Append the sum; an order that `dispatch` did not make is inverted before."""
    y, order, weights = operands
    place = ctx.places.get(order.buffer)
    if place is None:
        place = _inverse(ctx, ctx.dense(order))
    shares = ctx.dense(weights)
    rows, width = shares.shape[0], out.shape[-1]
    of = spelled("combine", epilogue.title)
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width), of)
    given: dict[str, Given] = {"y": ctx.dense(y), "place": place, "weights": shares}
    given |= {"c": out, "M": rows, "N": width, "TOP_K": int(shares.shape[1])}  # type: ignore[arg-type]
    given |= dict(zip(("c_m", "c_n"), out_strides, strict=True))
    given |= {"BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows}
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    ctx.launch("moe:combine_rows", grid, given, tile, slots=Slots(epilogue=epilogue))


def _inverse(ctx: Context, order: View) -> View:
    """Where each entry of an order stands in it."""
    total = order.shape[0]
    place = ctx.make(order.type.with_dtype(DType.i32))
    tile = ctx.blocks.flat(ctx.limit(total), "invert_order")
    given: dict[str, Given] = {"order": order, "place": place, "total": total}
    given["BLOCK"] = tile.rows
    ctx.launch("moe:invert_order", (ceil_div(total, tile.rows),), given, tile)
    return place


def take_rows(
    ctx: Context, table: View, index: View, out: View, per_batch: Dim = 1, batch_rows: Dim = 0
) -> None:
    """out[p] = table[(p // per_batch) * batch_rows + index[p]] over rows of the last axis."""
    table, count, stride = ctx.rows(table)
    width = table.shape[-1]
    rows = product(index.shape)
    if batch_rows != 0:
        count = batch_rows
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width), "take_rows")
    given: dict[str, Given] = {"table": table, "index": ctx.dense(index), "y": out}
    given |= {"rows": rows, "D": width, "table_row": stride, "LIMIT": count}
    given |= {"per_batch": per_batch, "batch_rows": batch_rows}
    given |= {"BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows}
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    taken = {"table": product((rows, width)) * table.dtype.itemsize}
    ctx.launch("lookups:take_rows", grid, given, tile, touched=taken)
