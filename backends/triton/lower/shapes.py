"""Views, joins and constants: what moves elements, or only says where they are."""

from __future__ import annotations

from dsc.backends.triton.blocks import ceil_div
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.prologue import Normed
from dsc.ir import views
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.region_steps import NoKernel, apply_view


def view(ctx: Context, node: Node) -> None:
    """The same elements under other strides: no launch, but a copy where these cannot say it.

    What keeps rows of a value that is not made yet is such a value too.
    """
    x = node.operands[0]
    later = ctx.later.get(x.name) if x.name not in ctx.views else None
    keeps = node.op == "reshape" and node.output.type.shape[-1:] == x.type.shape[-1:]
    if isinstance(later, Normed) and keeps:
        ctx.later[node.output.name] = later
        return
    source = ctx.view(x)
    try:
        made = apply_view(node, source)
    except NoKernel:
        made = apply_view(node, ctx.dense(source))
    ctx.set(node, *made)


def concat(ctx: Context, node: Node) -> None:
    """Each operand copied into its part of the result."""
    out = ctx.result(node)
    axis = node.attrs["axis"]
    start: Dim = 0
    for view in ctx.operands(node):
        extent = view.shape[axis]
        ctx.copy(view, views.narrow(out, axis, start, extent))
        start = start + extent


def stack(ctx: Context, node: Node) -> None:
    """Each operand copied into its leading slot of the result."""
    out = ctx.result(node)
    for slot, view in enumerate(ctx.operands(node)):
        ctx.copy(view, out.strided(out.shape[1:], out.strides[1:], out.strides[0] * slot))


def full(ctx: Context, node: Node) -> None:
    """A tensor of one value: a literal to pointwise kernels, written to memory for all others."""
    ctx.constants[node.output.name] = (node.attrs["value"], node.output.type)


def arange(ctx: Context, node: Node) -> None:
    """Consecutive integers."""
    n = node.output.type.numel
    tile = ctx.blocks.flat(ctx.limit(n), "arange")
    given: dict[str, Given] = {"y": ctx.result(node), "n": n, "START": node.attrs["start"]}
    ctx.launch("lookups:arange", (ceil_div(n, tile.rows),), given | {"BLOCK": tile.rows}, tile)
