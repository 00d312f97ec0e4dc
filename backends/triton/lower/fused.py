"""Pointwise operators and fused regions.

A run of pointwise operators becomes one generated kernel. A `fused` node is lowered by its body:
its anchors (GEMM, attention, norms) keep their templates, and the pointwise operators between them
are gathered into runs, so a region never costs more launches than it has anchors and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dsc.backends.triton import pointwise
from dsc.backends.triton.context import Context
from dsc.backends.triton.pointwise import FLOAT_ONLY, Region, Step
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.ops.pointwise import POINTWISE
from dsc.ir.types import DType

LowerNode = Callable[[Context, Node], None]
REGISTERED = POINTWISE | {"swiglu"}


def single(ctx: Context, node: Node) -> None:
    """One pointwise operator as a kernel of its own."""
    run(ctx, [node], [node.output.name])


def run(ctx: Context, nodes: Sequence[Node], wanted: Iterable[str]) -> None:
    """A run of pointwise nodes of one iteration shape as one kernel; `wanted` values are stored."""
    made = {str(v) for n in nodes for v in n.outputs}
    used = {str(x): x for n in nodes for x in n.operands if str(x) not in made}
    literals = {k: x for k, x in used.items() if k[0] == "%" and x.name in ctx.constants}
    inputs = [x for k, x in used.items() if k not in literals]
    numbers = {str(x): at for at, x in enumerate(inputs)}
    steps: list[Step] = []
    for name, operand in literals.items():
        numbers[name] = len(inputs) + len(steps)
        value, type = ctx.constants[operand.name]
        steps.append(Step("full", (), type.dtype, value))
    for node in nodes:
        args = tuple(numbers[str(x)] for x in node.operands)
        numbers[str(node.output)] = len(inputs) + len(steps)
        steps.append(Step(node.op, args, node.output.type.dtype))
    keep = [n.output for n in nodes if n.output.name in set(wanted)]
    region = Region(
        tuple(x.type.dtype for x in inputs), tuple(steps), tuple(numbers[str(v)] for v in keep)
    )
    sources = [ctx.view(x) for x in inputs]
    targets = [ctx.make(v.type) for v in keep]
    pointwise.emit(ctx, region, sources, targets)
    ctx.views.update({v.name: t for v, t in zip(keep, targets, strict=True)})


def pointwise_reason(node: Node) -> str | None:
    """Why a pointwise node cannot be generated, or `None`."""
    types = [x.type.dtype for x in node.operands] + [v.type.dtype for v in node.outputs]
    odd = [t for t in types if t not in pointwise.TYPES]
    if odd:
        return f"element type {odd[0]}"
    if node.op in FLOAT_ONLY and not types[0].is_float:
        return f"{node.op} of {types[0]}"
    if node.op in ("div", "remainder", "neg") and types[0] is DType.boolean:
        return f"{node.op} of {types[0]}"
    return None


def lower_nodes(ctx: Context, graph: Graph, lower: LowerNode) -> None:
    """Lower a graph's nodes in order, gathering adjacent pointwise nodes of a shape into runs.

    Only neighbours in program order join, and only inside a fused body: which operators belong
    together is decided by the passes, not here.
    """
    uses: dict[str, set[int]] = {}
    for at, node in enumerate(graph.nodes):
        for operand in node.operands:
            uses.setdefault(operand.name, set()).add(at)
    returned = {x.name for x in graph.outputs}
    at = 0
    while at < len(graph.nodes):
        end = _run_end(graph.nodes, at)
        if end == at:
            lower(ctx, graph.nodes[at])
            at += 1
            continue
        nodes = graph.nodes[at:end]
        inside = set(range(at, end))
        names = [v.name for n in nodes for v in n.outputs]
        wanted = [n for n in names if n in returned or uses.get(n, set()) - inside]
        ctx.loc = nodes[0].loc or ctx.loc
        run(ctx, nodes, wanted)
        at = end


def _run_end(nodes: Sequence[Node], start: int) -> int:
    """Where the run of pointwise nodes of one shape that begins at `start` ends."""
    shape: tuple[Dim, ...] | None = None
    end = start
    while end < len(nodes):
        node = nodes[end]
        joins = node.op in REGISTERED and (shape is None or node.output.type.shape == shape)
        if not joins:
            break
        shape = node.output.type.shape
        end += 1
    return end


def fused(ctx: Context, node: Node, lower: LowerNode) -> None:
    """Lower a fused region by its body, in the scope of its operands."""
    body = node.body
    assert body is not None, "a fused node has a body"
    inner = replace(ctx, views={}, constants={}, loc=node.loc)
    for value, operand in zip(body.inputs, node.operands, strict=True):
        if isinstance(operand, Value) and operand.name in ctx.constants:
            inner.constants[value.name] = ctx.constants[operand.name]
        else:
            inner.views[value.name] = ctx.view(operand)
    lower_nodes(inner, body, lower)
    ctx.set(node, *(inner.view(x) for x in body.outputs))
