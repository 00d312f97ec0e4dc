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
from dsc.backends.triton.epilogue import Epilogue, tile_operands
from dsc.backends.triton.lower.contract import emit_linear
from dsc.backends.triton.pointwise import FLOAT_ONLY, Region, Step
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import kernel_of, named, traits_of
from dsc.ir.traits import Role
from dsc.ir.types import DType

LowerNode = Callable[[Context, Node], None]
REGISTERED = named(Role.POINTWISE)


def single(ctx: Context, node: Node) -> None:
    """One pointwise operator as a kernel of its own."""
    run(ctx, [node], [node.output.name])


def run(ctx: Context, nodes: Sequence[Node], wanted: Iterable[str]) -> None:
    """A run of pointwise nodes of one iteration shape as one kernel; `wanted` values are stored."""
    region, inputs, keep = region_of(ctx, nodes, wanted)
    sources = [ctx.view(x) for x in inputs]
    targets = [ctx.make(v.type) for v in keep]
    pointwise.emit(ctx, region, sources, targets)
    ctx.views.update({v.name: t for v, t in zip(keep, targets, strict=True)})


def region_of(
    ctx: Context, nodes: Sequence[Node], wanted: Iterable[str]
) -> tuple[Region, list[Operand], list[Value]]:
    """A run as a region, the operands it reads from memory, and the values it stores."""
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
    return region, inputs, keep


def with_epilogue(ctx: Context, node: Node, nodes: Sequence[Node], wanted: list[str]) -> bool:
    """Lower a linear and the run after it as one GEMM, where the run is an epilogue of it.

    It is when it reads the product, stores one value, and its other operands fold to rows.
    """
    product = node.output
    if len(wanted) != 1 or not any(product in n.operands for n in nodes):
        return False
    region, inputs, (result,) = region_of(ctx, nodes, wanted)
    others = [ctx.view(x) for x in inputs if x != product]
    operands = tile_operands(others, product.type.shape)
    if operands is None or result.type.shape != product.type.shape:
        return False
    ctx.loc = node.loc or ctx.loc
    out = ctx.make(result.type)
    emit_linear(ctx, node, out, Epilogue(region, inputs.index(product), operands))
    ctx.views[result.name] = out
    return True


def pointwise_reason(node: Node) -> str | None:
    """Why a pointwise node cannot be generated, or `None`."""
    own = kernel_of(node.op, "triton")
    if node.op not in pointwise.EXPRESSIONS and node.op != "cast" and not isinstance(own, str):
        return f"no Triton kernel for {node.op}"
    if own is not None and node.attrs:
        return f"the Triton expression of {node.op} takes no attributes"
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
    together is decided by the passes, not here. Literals are lowered first: they cost nothing.
    """
    literals = [n for n in graph.nodes if n.op == "full"]
    nodes = [n for n in graph.nodes if n.op != "full"]
    for node in literals:
        lower(ctx, node)
    at = 0
    while at < len(nodes):
        start = at + 1 if nodes[at].op == "linear" else at
        end = _run_end(nodes, start)
        chain = nodes[start:end]
        if start > at:
            wanted = _read_outside(graph, nodes[at:end])
            if chain and with_epilogue(ctx, nodes[at], chain, wanted):
                at = end
                continue
            end = at
        if end == at:
            lower(ctx, nodes[at])
            at += 1
            continue
        ctx.loc = chain[0].loc or ctx.loc
        run(ctx, chain, _read_outside(graph, chain))
        at = end


def _read_outside(graph: Graph, nodes: Sequence[Node]) -> list[str]:
    """The results of `nodes` that are returned or that other nodes read."""
    inside = {id(n) for n in nodes}
    read = {x.name for n in graph.nodes if id(n) not in inside for x in n.operands}
    read |= {x.name for x in graph.outputs}
    return [v.name for n in nodes for v in n.outputs if v.name in read]


def _is_pointwise(node: Node) -> bool:
    return traits_of(node.op).role is Role.POINTWISE


def _run_end(nodes: Sequence[Node], start: int) -> int:
    """Where the run of pointwise nodes of one shape that begins at `start` ends."""
    shape: tuple[Dim, ...] | None = None
    end = start
    while end < len(nodes):
        node = nodes[end]
        joins = _is_pointwise(node) and (shape is None or node.output.type.shape == shape)
        if not joins:
            break
        shape = node.output.type.shape
        end += 1
    return end


def fused(ctx: Context, node: Node, lower: LowerNode) -> None:
    """Lower a fused region by its body, in the scope of its operands."""
    body = node.body
    assert body is not None, "a fused node has a body"
    inner = replace(ctx, views={}, constants={}, gathers={}, loc=node.loc)
    for value, operand in zip(body.inputs, node.operands, strict=True):
        if isinstance(operand, Value) and operand.name in ctx.constants:
            inner.constants[value.name] = ctx.constants[operand.name]
        elif isinstance(operand, Value) and operand.name in ctx.gathers:
            inner.gathers[value.name] = ctx.gathers[operand.name]
        else:
            inner.views[value.name] = ctx.view(operand)
    lower_nodes(inner, body, lower)
    ctx.set(node, *(inner.view(x) for x in body.outputs))
