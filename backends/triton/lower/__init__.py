"""How each operator becomes launches: one function an operator, `lower(ctx, node)`.

`TABLE` is the literal list of what stands in no region, `lowering` knows the rest, `reason` says
why a node cannot be emitted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dsc.backends.triton.coded_cache import CACHES, cache_reason
from dsc.backends.triton.coded_rows import rows_reason
from dsc.backends.triton.codes import WEIGHTS, weight_reason
from dsc.backends.triton.context import Context
from dsc.backends.triton.launch import POINTER_TYPES
from dsc.backends.triton.lower import attend, contract, lookups, moe, outside, regions, shapes
from dsc.backends.triton.lower.cached import pages_reason
from dsc.backends.triton.lower.sample import sample
from dsc.backends.triton.pointwise import has_formula
from dsc.backends.triton.rows import ALONG_ROWS
from dsc.ir.graph import Node, Operand
from dsc.ir.kernels import Lowering, Triton
from dsc.ir.op import brings_none, kernel_of, lookup, named
from dsc.ir.ops.moe import is_plain
from dsc.ir.traits import Role
from dsc.ir.types import DType

Lower = Callable[[Context, Node], None]
Reason = Callable[[Node], str | None]

TABLE: dict[str, Lower] = {
    "linear": contract.linear,
    "matmul": contract.matmul,
    "einsum": contract.einsum,
    "grouped_linear": contract.grouped_linear,
    "attention": attend.attention,
    "mla_attention": attend.mla_attention,
    "latent_attention": attend.latent_attention,
    "route": moe.route,
    "experts": moe.experts,
    "dispatch": moe.dispatch,
    "combine": moe.combine,
    "cumsum": lookups.cumsum,
    "argmax": lookups.argmax,
    "topk": lookups.topk,
    "embedding": lookups.embedding,
    "select_rows": lookups.select_rows,
    "take": lookups.take,
    "gather": lookups.gather,
    "append": lookups.append,
    "sample": sample,
    "concat": shapes.concat,
    "stack": shapes.stack,
    "full": shapes.full,
    "arange": shapes.arange,
    **dict.fromkeys(sorted(named(Role.VIEW)), shapes.view),
}

FIXED_OPERANDS = {
    "attention": ("q", "v"), "latent_attention": ("q_latent", "q_rope"),
    "mla_attention": ("q_nope", "q_rope"), "route": ("weight",), "experts": ("gate_up", "down"),
    "grouped_linear": ("weight",), "sample": ("logits",),
}  # fmt: skip


def lower(ctx: Context, node: Node) -> None:
    """Append the launches of one node."""
    ctx.loc = node.loc or ctx.loc
    own = lowering(node.op)
    assert own is not None, f"{node.op} was refused by `reason`"
    own(ctx, node)


def lowering(op: str) -> regions.LowerNode | None:
    """What lowers an operator: what it brings along, its expression, or the table's function."""
    own = kernel_of(op, "triton")
    if isinstance(own, Lowering):
        return own.function
    if isinstance(own, Triton):
        return partial(outside.lower, kernel=own)
    in_regions = has_formula(op) or op in ALONG_ROWS or op == "fused"
    return regions.lower if in_regions else TABLE.get(op)


def reason(node: Node) -> str | None:
    """Why a node cannot be emitted, or `None` when it can."""
    if node.op == "fused":
        assert node.body is not None, "a fused node has a body"
        inside = (reason(inner) for inner in node.body.nodes)
        return next((r for r in inside if r is not None), None) or regions.reason(node)
    if lowering(node.op) is None:
        return f"no Triton kernel for {node.op}{brings_none(node.op, 'triton')}"
    unread = next((why for why in map(partial(_coded_reason, node), node.operands) if why), None)
    if unread is not None:
        return unread
    if node.attrs.get("activations") and (why := rows_reason(node.attrs["activations"])):
        return why
    plain = (v.type for v in (*node.operands, *node.outputs) if v.type.format is None)
    strange = [t.dtype for t in plain]
    strange = [t for t in strange if t not in POINTER_TYPES or t is DType.f64]
    if strange:
        return f"{node.op} with elements of type {strange[0]}"
    for operand in FIXED_OPERANDS.get(node.op, ()):
        shape = node[operand].type.shape
        inner = shape[-2:] if node.op == "latent_attention" else shape[-1:]
        fixed = shape if node.op in ("experts", "grouped_linear") else inner
        if not all(isinstance(d, int) for d in fixed):
            return f"{node.op} with symbolic extents in {node[operand].type}"
    own = kernel_of(node.op, "triton")
    if isinstance(own, Triton):
        return outside.reason(node, own)
    special = regions.pointwise_reason if has_formula(node.op) else _SPECIAL.get(node.op)
    return special(node) if special is not None else None


def _coded_reason(node: Node, operand: Operand) -> str | None:
    """Why no kernel of the operator reads an operand in codes, or `None`."""
    t = operand.type
    if t.format is None:
        return None
    names = lookup(node.op).operand_names(len(node.inputs))
    name = next(names[i] for i, x in enumerate(node.inputs) if x is operand).partition("[")[0]
    if name in WEIGHTS.get(node.op, ()):
        return weight_reason(t)
    if name in CACHES.get(node.op, ()):
        return cache_reason(t)
    return f"{node.op} of {name} in {t.dtype}{t.format}"


def _topk_reason(node: Node) -> str | None:
    last = node.operands[0].type.shape[-1]
    if isinstance(last, int) and last <= 1 << 15:
        return None
    return f"topk over a last axis of {last}; it must be fixed and at most 32768"


def _arange_reason(node: Node) -> str | None:
    return None if isinstance(node.attrs["start"], int) else "arange from a symbolic start"


def _experts_reason(node: Node) -> str | None:
    if len(node.operands) == 5 and is_plain(node.attrs):
        return None
    return "experts with biases, or with limits of what they gate; `lower_moe_dispatch` takes them"


_SPECIAL: dict[str, Reason] = {
    "experts": _experts_reason,
    "einsum": contract.einsum_reason,
    "gather": lookups.gather_reason,
    "arange": _arange_reason,
    "topk": _topk_reason,
    **dict.fromkeys(("attention", "latent_attention", "mla_attention"), pages_reason),
    **dict.fromkeys(sorted(ALONG_ROWS), regions.reason),
}
