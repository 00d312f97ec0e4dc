"""Views, joins and constants: what moves elements, or only says where they are."""

from __future__ import annotations

from dsc.backends.triton import pointwise
from dsc.backends.triton.context import Context
from dsc.backends.triton.pointwise import Region, Step
from dsc.ir import views
from dsc.ir.dims import Dim
from dsc.ir.graph import Node


def reshape(ctx: Context, node: Node) -> None:
    """Another shape over the same elements, a copy only for strided operands."""
    ctx.set(node, ctx.reshaped(ctx.view(node.inputs[0]), node.attrs["shape"]))


def permute(ctx: Context, node: Node) -> None:
    """Axes in another order: no launch."""
    ctx.set(node, views.permute(ctx.view(node.inputs[0]), node.attrs["dims"]))


def expand(ctx: Context, node: Node) -> None:
    """Broadcast: stride 0, no launch."""
    ctx.set(node, views.expand(ctx.view(node.inputs[0]), node.attrs["shape"]))


def slice_(ctx: Context, node: Node) -> None:
    """Part of an axis: no launch."""
    attrs = node.attrs
    axis = attrs["axis"]
    extent = node.output.type.shape[axis]
    view = ctx.view(node.inputs[0])
    ctx.set(node, views.narrow(view, axis, attrs["start"], extent, attrs["step"]))


def split(ctx: Context, node: Node) -> None:
    """Consecutive parts of an axis: no launch."""
    axis = node.attrs["axis"]
    view = ctx.view(node.inputs[0])
    parts, start = [], 0 * view.shape[axis]
    for size in node.attrs["sizes"]:
        parts.append(views.narrow(view, axis, start, size))
        start = start + size
    ctx.set(node, *parts)


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
    step = Step("iota", (), node.output.type.dtype, node.attrs["start"])
    pointwise.emit(ctx, Region((), (step,), (0,)), [], [ctx.result(node)])
