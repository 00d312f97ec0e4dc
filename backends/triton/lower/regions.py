"""Regions, and operators that are one alone: which kernel is generated for a body.

A linear with pointwise operators after it becomes a GEMM that finishes its tiles, all else a kernel
over rows, which are elements where all operators are pointwise. Each is one launch; what neither
can do is refused with a reason, and the pass that fuses puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.backends.triton.context import Context
from dsc.backends.triton.epilogue import Epilogue
from dsc.backends.triton.lower.contract import emit_gemm, linear_product
from dsc.backends.triton.pointwise import FLOAT_ONLY, TYPES, has_formula
from dsc.backends.triton.rows import ALONG_ROWS, RowKernel
from dsc.backends.triton.slots import Slots
from dsc.backends.triton.wanted import CodedTarget
from dsc.ir.analyses import aliases_of
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import kernel_of, traits_of
from dsc.ir.region_columns import Columns
from dsc.ir.region_steps import Literal, NoKernel, Place, Rows, alone
from dsc.ir.regions import anchor_of
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.views import View

LowerNode = Callable[[Context, Node], None]
_BY_FORMULA = (Role.POINTWISE, Role.REDUCTION, Role.ROTATION)


def lower(ctx: Context, node: Node) -> None:
    """Append the launch of a region, or of an operator that is one alone."""
    body = node.body or alone(node)
    places = [_place(ctx, x) for x in node.operands]
    updated = aliases_of(node)
    targets = [
        ctx.view(node.operands[updated[i]]) if i in updated else ctx.make(v.type)
        for i, v in enumerate(node.outputs)
    ]
    coded = _coded(ctx, node, body, places, targets)
    try:
        kernel = kernel_for(body, places, targets, coded)
    except NoKernel:  # a view of a constant, or of a strided operand that would move elements
        places = [ctx.dense(ctx.view(x)) for x in node.operands]
        kernel = kernel_for(body, places, targets, coded)
    ctx.set(node, *targets)
    kernel.launch(ctx)


def _coded(
    ctx: Context, node: Node, body: Graph, places: Sequence[Place], targets: Sequence[View]
) -> Mapping[int, CodedTarget] | None:
    """By their buffers the results that the kernel is to write as codes, or `None`."""
    asked = [(targets[i], ctx.wanted[v.name]) for i, v in enumerate(node.outputs)
             if v.name in ctx.wanted]  # fmt: skip
    if not asked or anchor_of(body.nodes) is not None:
        return None
    try:
        kernel = kernel_for(body, places, targets, {})
    except NoKernel:
        return None
    assert isinstance(kernel, RowKernel), "a body without a product"
    return {
        view.buffer: each.target(ctx, view)
        for view, each in asked
        if view.shape[-1] == each.width and kernel.holds(view, each.rows.columns)
    } or None  # fmt: skip


def _place(ctx: Context, operand: Operand) -> Place:
    if isinstance(operand, Value) and operand.name in ctx.constants:
        return Literal(ctx.constants[operand.name][0])
    return ctx.view(operand)


def kernel_for(
    body: Graph,
    places: Sequence[Place] | None = None,
    targets: Sequence[View] | None = None,
    coded: Mapping[int, CodedTarget] | None = None,
) -> Gemm | RowKernel:
    """The kernel of a body. Raises `NoKernel` with the reason when there is none.

    With `coded` it is one over rows, which writes results in those buffers as codes.
    """
    for node in body.nodes:
        known = node.op in ALONG_ROWS or has_formula(node.op)
        if traits_of(node.op).role in _BY_FORMULA and not known:
            raise NoKernel(f"no Triton kernel for {node.op}")
    anchor = anchor_of(body.nodes)
    if anchor is not None:
        return _gemm(Columns(body, anchor, places, targets), anchor)
    beside = {Role.POINTWISE, Role.VIEW, Role.CONSTANT}
    single = all(traits_of(node.op).role in beside for node in body.nodes)
    found = Rows(body, places, targets, single and coded is None)
    return RowKernel(found.steps, found.rows, coded or {})


def reason(node: Node) -> str | None:
    """Why a region, or an operator that is one alone, has no kernel, or `None`."""
    try:
        kernel_for(node.body or alone(node))
    except NoKernel as why:
        return str(why)
    return None


@dataclass(frozen=True)
class Gemm:
    """A linear, its operands in order, with pointwise operators on its tiles."""

    operands: list[View]
    epilogue: Epilogue
    activations: str

    def launch(self, ctx: Context) -> None:
        """Append the launch."""
        x, weight, *bias = self.operands
        product = linear_product(ctx, x, weight, self.epilogue.out)
        product = replace(product, out_strides=(0, *self.epilogue.out_strides))
        slots = Slots(epilogue=self.epilogue.slot)
        shift = ctx.dense(bias[0]) if bias else None
        emit_gemm(ctx, product, shift, slots=slots, activations=self.activations)


def _gemm(found: Columns, anchor: Node) -> Gemm:
    if anchor.op != "linear":
        raise NoKernel(f"a region around {anchor.op}")
    family, *others = found.families()
    if others:
        raise NoKernel("an epilogue on other columns than a tile's")
    operands = [found.given[x.name] for x in anchor.operands]
    epilogue = Epilogue(family, found.m, anchor.output.type.dtype)
    return Gemm(operands, epilogue, anchor.attrs["activations"])


def pointwise_reason(node: Node) -> str | None:
    """Why a pointwise node cannot be generated, or `None`."""
    odd_attrs = [n for n, value in node.attrs.items() if not isinstance(value, int | float)]
    if isinstance(kernel_of(node.op, "triton"), str) and odd_attrs:
        return f"the Triton expression of {node.op} takes numbers, and {odd_attrs[0]} is none"
    types = [x.type.dtype for x in node.operands] + [v.type.dtype for v in node.outputs]
    odd = [t for t in types if t not in TYPES]
    if odd:
        return f"element type {odd[0]}"
    if node.op in FLOAT_ONLY and not types[0].is_float:
        return f"{node.op} of {types[0]}"
    if node.op in ("div", "remainder", "neg") and types[0] is DType.boolean:
        return f"{node.op} of {types[0]}"
    return None
