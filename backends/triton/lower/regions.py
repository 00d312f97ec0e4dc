"""Regions, and operators that are one alone: which kernel is generated for a body.

A linear with pointwise operators after it becomes a GEMM that finishes its tiles, all else a kernel
over rows, which are elements where all operators are pointwise. Each is one launch; what neither
can do is refused with a reason, and the pass that fuses puts it back: rope behind a product, rope
of what the region computes, rows of symbolic width between operators, and rows of more elements
than a program can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.backends.triton.context import Context, Gather
from dsc.backends.triton.epilogue import NOTHING, Epilogue
from dsc.backends.triton.lower.contract import (
    Form,
    emit_gemm,
    emit_grouped,
    linear_product,
    rows_of,
)
from dsc.backends.triton.lower.moe import emit_combine, emit_experts
from dsc.backends.triton.pointwise import FLOAT_ONLY, TYPES, has_formula
from dsc.backends.triton.prologue import NORMED_ROWS, Normed, Taken, Turned
from dsc.backends.triton.rows import ALONG_ROWS, RowKernel
from dsc.backends.triton.slots import PLAIN, Slots
from dsc.backends.triton.wanted import CodedTarget, Wanted
from dsc.ir.analyses import aliases_of
from dsc.ir.dims import product
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import kernel_of, traits_of
from dsc.ir.region_columns import Columns
from dsc.ir.region_steps import Literal, NoKernel, Place, Rows, alone, dense
from dsc.ir.regions import anchor_of, role
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.views import View

LowerNode = Callable[[Context, Node], None]
NOWHERE = -1
"""Stands for the buffer of a value that its reader makes."""
_BY_FORMULA = (Role.POINTWISE, Role.REDUCTION, Role.ROTATION)


def lower(ctx: Context, node: Node) -> None:
    """Append the launch of a region, or of an operator that is one alone; a product may be it."""
    if (node.op == "rms_norm" and _waits(ctx, node)) or (node.op == "rope" and _turns(ctx, node)):
        return
    body = node.body or alone(node)
    later = _later(ctx, node, body)
    taken = _taken(ctx, node, body)
    absent = {name: NOWHERE - 1 - i for i, name in enumerate(taken)}
    rows = {absent[name]: each for name, each in taken.items()}
    if later is not None:
        absent[later.name] = NOWHERE
    places = [dense(x, absent[x.name]) if isinstance(x, Value) and x.name in absent
              else _place(ctx, x) for x in node.operands]  # fmt: skip
    updated = aliases_of(node)
    targets = [
        ctx.view(node.operands[updated[i]]) if i in updated else ctx.make(v.type)
        for i, v in enumerate(node.outputs)
    ]
    coded = _coded(ctx, node, body, places, targets)
    try:
        kernel = kernel_for(body, places, targets, coded, rows)
    except NoKernel:  # a view of a constant, or of a strided operand that would move elements
        places = [y if x is later else ctx.dense(ctx.view(x))
                  for x, y in zip(node.operands, places, strict=True)]  # fmt: skip
        kernel = kernel_for(body, places, targets, coded)
    ctx.set(node, *targets)
    if isinstance(kernel, RowKernel):
        kernel.launch(ctx)
    else:
        kernel.launch(ctx, later, ctx.wanted.get(node.output.name))


def _waits(ctx: Context, node: Node) -> bool:
    """Leave a norm of few rows to the product that reads them first, where there is one."""
    shared, shape = ctx.merges.get(node.output.name), node.output.type.shape
    if (
        shared is None
        or not isinstance(shape[-1], int)
        or ctx.limit(product(shape[:-1])) > NORMED_ROWS
    ):
        return False
    rows, gain = ctx.operands(node)
    rows, gain = ctx.rows(rows)[0], ctx.dense(gain)
    copied = _launching(node, (rows, gain))
    ctx.later[node.output.name] = Normed(rows, gain, node.attrs["eps"], shared, copied)
    return True


def _turns(ctx: Context, node: Node) -> bool:
    """Leave rope to the absorbed attention that alone reads it."""
    (x, positions, frequencies), width = node.operands, node.output.type.shape[-1]
    if ctx.merges.get(node.output.name) is not False or node.attrs["dims"] not in (0, width):
        return False
    queries = ctx.unit_rows(ctx.view(x))
    angles = ctx.dense(ctx.view(positions)), ctx.dense(ctx.view(frequencies))
    copied = _launching(node, (queries, *angles))
    layout, scale = node.attrs["layout"], node.attrs["scale"]
    ctx.later[node.output.name] = Turned(queries, *angles, layout, scale, copied)
    return True


def _launching(node: Node, places: Sequence[View]) -> Callable[[Context], View]:
    """What makes the result of an operator over rows by a launch after all."""

    def copied(ctx: Context) -> View:
        reader, ctx.node = ctx.node, node
        out = ctx.make(node.output.type)
        kernel = kernel_for(alone(node), places, [out])
        assert isinstance(kernel, RowKernel), "an operator over rows"
        kernel.launch(ctx)
        ctx.node = reader
        return out

    return copied


def _later(ctx: Context, node: Node, body: Graph) -> Operand | None:
    """The operand whose rows a region's product reads as they come, and nothing else reads."""
    anchor = anchor_of(body.nodes)
    if anchor is None:
        return None
    rows, *_ = anchor.operands
    read = [x.name for n in body.nodes for x in n.operands].count(rows.name)
    given = dict(zip((v.name for v in body.inputs), node.operands, strict=True))
    outer = given.get(rows.name)
    if outer is None or outer.name in ctx.views or read != 1:
        return None
    known = ctx.later.get(outer.name)
    return outer if isinstance(known, _READS.get(anchor.op, ())) else None


_READS: Mapping[str, type | tuple[type, ...]] = {
    "linear": (Normed, Taken), "grouped_linear": Gather,
}  # fmt: skip
"""Values that products read as they come, where no launch has made them."""


def _taken(ctx: Context, node: Node, body: Graph) -> dict[str, Taken]:
    """By name the operands of which a linear's epilogue takes rows."""
    anchor = anchor_of(body.nodes)
    if anchor is None or anchor.op != "linear":
        return {}
    own = [x.name for x in anchor.operands]
    met = (y.name for x, y in zip(body.inputs, node.operands, strict=True) if x.name not in own)
    found = {name: ctx.later.get(name) for name in met if name not in ctx.views}
    return {name: each for name, each in found.items() if isinstance(each, Taken)}


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
    taken: Mapping[int, Taken] = NOTHING,
) -> Anchored | RowKernel:
    """The kernel of a body. Raises `NoKernel` with the reason when there is none.

    With `coded` it is one over rows, which writes results in those buffers as codes. `taken` are
    rows that an epilogue takes, by the buffers that stand for them.
    """
    for node in body.nodes:
        known = node.op in ALONG_ROWS or has_formula(node.op)
        if traits_of(node.op).role in _BY_FORMULA and not known:
            raise NoKernel(f"no Triton kernel for {node.op}")
    anchor = anchor_of(body.nodes)
    if anchor is not None:
        return _anchored(Columns(body, anchor, places, targets), anchor, taken)
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
class Anchored:
    """A product or the experts, operands in order, with pointwise operators on what they give."""

    anchor: Node
    operands: list[View]
    epilogue: Epilogue

    def launch(self, ctx: Context, later: Operand | None, asked: Wanted | None) -> None:
        """Append the launches.

        `later` is the operand of rows that are not made yet, `asked` how the result is wanted.
        """
        _EMIT[self.anchor.op](ctx, self, later, asked)


def _linear(ctx: Context, of: Anchored, later: Operand | None, asked: Wanted | None) -> None:
    x, weight, *bias = of.operands
    shift, rows = ctx.dense(bias[0]) if bias else None, of.anchor.attrs["activations"]
    lead = x.shape[:-1]
    x, prologue = (x, PLAIN) if later is None else rows_of(ctx, later, rows)
    product = linear_product(ctx, x, weight, of.epilogue.out, lead)
    product = replace(product, out_strides=(0, *of.epilogue.out_strides))
    slots = Slots(prologue, epilogue=of.epilogue.slot)
    emit_gemm(ctx, product, shift, Form(slots, rows, asked))


def _grouped(ctx: Context, of: Anchored, later: Operand | None, asked: Wanted | None) -> None:
    x, weight, offsets = of.operands
    end, rows = of.epilogue, of.anchor.attrs["activations"]
    form = Form(Slots(epilogue=end.slot), rows, asked)
    emit_grouped(ctx, later or x, weight, offsets, end.out, form, end.out_strides)


def _experts(ctx: Context, of: Anchored, later: Operand | None, asked: Wanted | None) -> None:
    end = of.epilogue
    emit_experts(ctx, of.operands, of.anchor.attrs, end.out, end.out_strides, end.slot)


def _combine(ctx: Context, of: Anchored, later: Operand | None, asked: Wanted | None) -> None:
    end = of.epilogue
    emit_combine(ctx, of.operands, end.out, end.out_strides, end.slot)


_EMIT: Mapping[str, Callable[[Context, Anchored, Operand | None, Wanted | None], None]] = {
    "linear": _linear, "grouped_linear": _grouped, "experts": _experts, "combine": _combine,
}  # fmt: skip
ANCHORS = frozenset(_EMIT)
"""Operators whose kernels take pointwise operators behind them."""


def _anchored(found: Columns, anchor: Node, taken: Mapping[int, Taken]) -> Anchored:
    if anchor.op not in ANCHORS:
        raise NoKernel(f"a region around {anchor.op}")
    family, *others = found.families()
    if others:
        raise NoKernel("an epilogue on other columns than a tile's")
    if family.shifts and role(anchor) is Role.EXPERTS:
        raise NoKernel(f"columns of {anchor.op} that meet others")
    operands = [found.given[x.name] for x in anchor.operands]
    return Anchored(anchor, operands, Epilogue(family, found.m, anchor.output.type.dtype, taken))


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
