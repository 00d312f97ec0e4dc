"""What may be one region: the grammar of fused bodies, by level and by what a backend takes.

Three forms are legal. *Row-wise*: no anchor; pointwise operators of one shape, and from level 2
norms, softmax, rope and writes into caches over the same rows; views only where values come in or
go out. *Epilogue*: a GEMM or the experts, and after it views and pointwise operators on what it
computed; in front of a GEMM a norm, where there are few rows. *Attention*: with views only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dsc.ir.dims import Range, bounds, product
from dsc.ir.graph import Node, Value
from dsc.ir.regions import RegionLimits, is_anchor, role, rows
from dsc.ir.traits import Role

_LEVEL = {
    Role.REDUCTION: 2,
    Role.ROTATION: 2,
    Role.WRITE: 2,
    Role.PRODUCT: 2,
    Role.EXPERTS: 2,
    Role.ATTENTION: 3,
}


def refusal(
    nodes: Sequence[Node],
    kept: Collection[str],
    level: int,
    limits: RegionLimits,
    ranges: Mapping[str, Range],
) -> str:
    """Why nodes, in order, are no region; empty when they are one. `kept` values leave it."""
    for node in nodes:
        part = role(node)
        if part in (Role.OTHER, Role.CONSTANT):
            return f"{node.op} stands alone"
        if _LEVEL.get(part, 1) > level:
            return f"{node.op} is fused from level {_LEVEL[part]}"
    made = {v.name for n in nodes for v in n.outputs}
    operands = {x for n in nodes for x in n.operands if x.name not in made}
    if len(nodes) > limits.nodes or len(operands) > limits.operands:
        return f"{len(nodes)} operators of {len(operands)} operands are too many for a kernel"
    anchors = [n for n in nodes if is_anchor(n)]
    if not anchors:
        return _rowwise(nodes, kept, limits)
    if len(anchors) > 1:
        return f"{anchors[0].op} and {anchors[1].op} are two anchors"
    if anchors[0].op not in limits.anchors:
        return f"the backend's kernel for {anchors[0].op} takes nothing else"
    if role(anchors[0]) is Role.ATTENTION:
        others = [n.op for n in nodes if n is not anchors[0] and role(n) is not Role.VIEW]
        return f"{others[0]} with {anchors[0].op}" if others else _bordered(nodes, kept)
    return _epilogue(nodes, anchors[0], kept, limits, ranges)


def _rowwise(nodes: Sequence[Node], kept: Collection[str], limits: RegionLimits) -> str:
    core = [n for n in nodes if role(n) is not Role.VIEW]
    if not core:
        return "there are views only"
    if all(role(n) is Role.POINTWISE for n in core):
        if len({n.output.type.shape for n in core}) > 1:
            return "the pointwise operators have different shapes"
    elif len({rows(n) for n in core}) > 1:
        return "the operators work on different rows"
    reductions = sum(role(n) is Role.REDUCTION for n in core)
    if reductions > limits.reductions:
        return f"{reductions} reductions, the backend takes {limits.reductions} in a region"
    return _bordered(nodes, kept)


def _bordered(nodes: Sequence[Node], kept: Collection[str]) -> str:
    """Why views stand elsewhere than where values come in or go out."""
    computed: set[str] = set()
    viewed: set[str] = set()
    for node in nodes:
        names = {v.name for v in node.outputs}
        read = {x.name for x in node.operands if isinstance(x, Value)}
        if role(node) is not Role.VIEW:
            if read & viewed:
                return "a view lies between two operators"
            computed |= names
        elif read & (computed | viewed):
            if not _keeps_all(node):
                return f"a {node.op} of what the region computes"
            viewed |= names
        elif names & set(kept):
            return f"what the {node.op} gives is also read elsewhere"
    return ""


def _keeps_all(view: Node) -> bool:
    """Whether a view gives every element once."""
    return len(view.outputs) == 1 and view.output.type.numel == view.operands[0].type.numel


def _epilogue(
    nodes: Sequence[Node],
    anchor: Node,
    kept: Collection[str],
    limits: RegionLimits,
    ranges: Mapping[str, Range],
) -> str:
    made = {v.name for n in nodes for v in n.outputs}
    derived = {v.name for v in anchor.outputs}
    for node in nodes:
        if node is anchor:
            continue
        inside = [x for x in node.operands if isinstance(x, Value) and x.name in made]
        if not any(x.name in derived for x in inside):
            why = _prologue(node, anchor, kept, limits, ranges)
        elif not all(x.name in derived for x in inside):
            why = "the epilogue reads what the prologue computes"
        elif node.op not in limits.epilogue:
            why = f"{node.op} is no epilogue of {anchor.op}"
        else:
            why = _on_the_tile(node, anchor, inside)
            derived |= {v.name for v in node.outputs}
        if why:
            return why
    return ""


def _on_the_tile(node: Node, anchor: Node, inside: Sequence[Value]) -> str:
    """Why an operator after an anchor needs more than the tile that was computed."""
    if role(node) is Role.VIEW and role(anchor) is not Role.PRODUCT and node.op != "reshape":
        return f"a {node.op} of what {anchor.op} computes"
    if role(node) is Role.POINTWISE:
        shapes = {x.type.shape for x in inside}
        if shapes != {node.output.type.shape}:
            return f"{node.op} spreads what {anchor.op} computes"
    return ""


def _prologue(
    node: Node,
    anchor: Node,
    kept: Collection[str],
    limits: RegionLimits,
    ranges: Mapping[str, Range],
) -> str:
    """Why an operator in front of an anchor cannot be computed by each of its tiles."""
    if role(anchor) is not Role.PRODUCT or role(node) is not Role.REDUCTION:
        return f"{node.op} is no prologue of {anchor.op}"
    if any(v.name in kept for v in node.outputs):
        return f"what {node.op} gives is also read elsewhere"
    if anchor.inputs[0] != node.output:
        return f"{node.op} is not what {anchor.op} contracts"
    count = product(node.output.type.shape[:-1])
    if bounds(count, ranges).hi > limits.prologue_rows:
        return f"{count} rows are too many to compute {node.op} in every tile"
    return ""
