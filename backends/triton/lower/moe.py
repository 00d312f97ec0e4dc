"""Mixture of experts: the router, the whole expert layer, and its grouped parts."""

from __future__ import annotations

from dsc.backends.triton.blocks import ceil_div, next_power
from dsc.backends.triton.context import Context, Gather, Given
from dsc.backends.triton.lower.contract import router_logits
from dsc.backends.triton.rows import elementwise
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.region_steps import Literal
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View


def route(ctx: Context, node: Node) -> None:
    """Router logits by a GEMM in fp32, then one kernel that scores, limits and picks."""
    x, weight = ctx.view(node.inputs[0]), ctx.view(node.inputs[1])
    biases = (node.get("bias"), node.get("logit_bias"))
    bias, shift = (None if b is None else ctx.dense(ctx.view(b)) for b in biases)
    attrs = node.attrs
    logits = router_logits(ctx, x, weight)
    experts, rows = int(weight.shape[0]), logits.shape[0]  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(rows), experts)
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
    ctx.launch("moe:route", (ceil_div(rows, tile.rows),), given, tile.warps)


def sort_entries(ctx: Context, index: View, experts: int) -> tuple[View, View, View]:
    """Sort (token, slot) entries by expert: offsets, order and place (order's inverse)."""
    index = ctx.dense(index)
    total = product(index.shape)
    offsets = ctx.make(TensorType(DType.i64, (experts + 1,)))
    order = ctx.make(TensorType(DType.i64, (total,)))
    place = ctx.make(TensorType(DType.i32, (total,)))
    lanes = ctx.blocks.lanes(experts + 1)
    block = ctx.blocks.scan(ctx.limit(total), lanes)
    given: dict[str, Given] = {"index": index, "offsets": offsets, "order": order, "place": place}
    given |= {"total": total, "EXPERTS": experts, "BLOCK_EXPERTS": lanes, "BLOCK": block}
    ctx.launch("moe:sort_by_expert", (ceil_div(experts + 1, lanes),), given)
    return offsets, order, place


def experts(ctx: Context, node: Node) -> None:
    """The direct form: gate, up and activation of each pair, then each token's weighted sum.

    Two launches; no host ever learns who was chosen. For many tokens `lower_moe_dispatch` replaces
    the operator by its grouped form.
    """
    x, index, weights, gate_up, down = ctx.operands(node)
    x, _, row_stride = ctx.rows(x)
    index, weights = ctx.dense(index), ctx.dense(weights)
    gate_up, down = ctx.dense(gate_up), ctx.dense(down)
    width, inner = (int(d) for d in down.shape[1:])  # type: ignore[arg-type]
    slots = int(index.shape[-1])  # type: ignore[arg-type]
    pairs = product(index.shape)
    hidden = ctx.make(x.type.with_shape((pairs, inner)))
    tile = ctx.blocks.gemv(inner, width)
    given: dict[str, Given] = {"x": x, "index": index, "gate_up": gate_up, "hidden": hidden}
    given |= {"x_row": row_stride, "D": width, "INNER": inner, "TOP_K": slots}
    given |= {"ACT": node.attrs["act"]}
    given |= {"BLOCK_N": tile.n, "BLOCK_K": tile.k}
    ctx.launch("moe:experts_hidden", (pairs, ceil_div(inner, tile.n)), given, tile.warps)
    tile = ctx.blocks.gemv(width, inner)
    given = {"hidden": hidden, "index": index, "weights": weights, "down": down}
    given |= {"out": ctx.result(node), "D": width, "INNER": inner, "TOP_K": slots}
    given |= {"BLOCK_N": tile.n, "BLOCK_K": tile.k}
    grid = (product(index.shape[:-1]), ceil_div(width, tile.n))
    ctx.launch("moe:experts_output", grid, given, tile.warps)


def dispatch(ctx: Context, node: Node) -> None:
    """Sort the entries. Grouped GEMMs gather rows as they read them; others get a copy."""
    x, index = ctx.operands(node)
    slots = int(index.shape[1])  # type: ignore[arg-type]
    offsets, order, _ = sort_entries(ctx, index, node.attrs["experts"])
    rows, *sorted_by = node.outputs

    def copied(ctx: Context) -> View:
        token = ctx.make(order.type)
        elementwise("div", [order, Literal(slots)], token).launch(ctx)
        out = ctx.make(rows.type)
        take_rows(ctx, x, token, out)
        return out

    ctx.gathers[rows.name] = Gather(x, order, slots, copied)
    ctx.views |= {v.name: y for v, y in zip(sorted_by, (offsets, order), strict=True)}


def combine(ctx: Context, node: Node) -> None:
    """Invert the order, then sum each token's slots."""
    y, order, weights = ctx.operands(node)
    order = ctx.dense(order)
    total = order.shape[0]
    place = ctx.make(order.type.with_dtype(DType.i32))
    block = ctx.blocks.flat(ctx.limit(total))
    given: dict[str, Given] = {"order": order, "place": place, "total": total, "BLOCK": block}
    ctx.launch("moe:invert_order", (ceil_div(total, block),), given)
    slots = int(weights.shape[1])  # type: ignore[arg-type]
    _combine(ctx, ctx.dense(y), place, ctx.dense(weights), slots, ctx.result(node))


def _combine(ctx: Context, y: View, place: View, weights: View, slots: int, out: View) -> None:
    width = out.shape[-1]
    rows = product(out.shape[:-1])
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width))
    given: dict[str, Given] = {"y": y, "place": place, "weights": weights, "out": out}
    given |= {"rows": rows, "D": width, "TOP_K": slots}
    given |= {"BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows}
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    ctx.launch("moe:combine_rows", grid, given, tile.warps)


def take_rows(
    ctx: Context, table: View, index: View, out: View, per_batch: Dim = 1, batch_rows: Dim = 0
) -> None:
    """out[p] = table[(p // per_batch) * batch_rows + index[p]] over rows of the last axis."""
    table, count, stride = ctx.rows(table)
    width = table.shape[-1]
    rows = product(index.shape)
    if batch_rows != 0:
        count = batch_rows
    tile = ctx.blocks.copy(ctx.limit(rows), ctx.limit(width))
    given: dict[str, Given] = {"table": table, "index": ctx.dense(index), "y": out}
    given |= {"rows": rows, "D": width, "table_row": stride, "LIMIT": count}
    given |= {"per_batch": per_batch, "batch_rows": batch_rows}
    given |= {"BLOCK_D": tile.columns, "BLOCK_ROWS": tile.rows}
    grid = (ceil_div(rows, tile.rows), ceil_div(width, tile.columns))
    ctx.launch("lookups:take_rows", grid, given, tile.warps)
