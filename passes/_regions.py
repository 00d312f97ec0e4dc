"""What may be one region: the grammar of fused bodies, by level and by what a backend takes.

Three forms are legal. *Row-wise*: no anchor; pointwise operators of one shape, and from level 2
norms, softmax, rope and writes into caches over the same rows; views only where values come in or
go out. *Epilogue*: a GEMM or the experts, and after it views and pointwise operators on what it
computed. *Attention*: with views only. What a kernel has to do for rows, and where views may stand,
is judged by the analysis that kernels are made from (`dsc.ir.region_steps`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dsc.ir.graph import Node, Value
from dsc.ir.region_steps import Body, NoKernel, Rows
from dsc.ir.regions import RegionLimits, is_anchor, role
from dsc.ir.traits import Role
from dsc.rewrite.regions import region_of

_LEVEL = {
    Role.REDUCTION: 2,
    Role.ROTATION: 2,
    Role.WRITE: 2,
    Role.PRODUCT: 2,
    Role.EXPERTS: 2,
    Role.ATTENTION: 3,
}


def refusal(nodes: Sequence[Node], kept: Collection[str], level: int, limits: RegionLimits) -> str:
    """Why nodes, in order, are no region; empty when they are one. `kept` values leave it."""
    for node in nodes:
        part = role(node)
        if part in (Role.OTHER, Role.CONSTANT):
            return f"{node.op} stands alone"
        if _LEVEL.get(part, 1) > level:
            return f"{node.op} is fused from level {_LEVEL[part]}"
        if part is Role.WRITE and not limits.codes and node.operands[0].type.format is not None:
            return f"{node.op} of rows that become codes stands alone"
    made = {v.name for n in nodes for v in n.outputs}
    operands = {x for n in nodes for x in n.operands if x.name not in made}
    if len(nodes) > limits.nodes or len(operands) > limits.operands:
        return f"{len(nodes)} operators of {len(operands)} operands are too many for a kernel"
    anchors = [n for n in nodes if is_anchor(n)]
    if len(anchors) > 1:
        return f"{anchors[0].op} and {anchors[1].op} are two anchors"
    if anchors and anchors[0].op not in limits.anchors:
        return f"the backend's kernel for {anchors[0].op} takes nothing else"
    if anchors and role(anchors[0]) is not Role.ATTENTION:
        return _epilogue(nodes, anchors[0], limits)
    return _mixed(nodes, limits) or _unplaced(nodes, kept)


def _mixed(nodes: Sequence[Node], limits: RegionLimits) -> str:
    """Why operators without a product are too different, or too many, for one kernel."""
    core = [n for n in nodes if role(n) is not Role.VIEW]
    attention = next((n for n in core if role(n) is Role.ATTENTION), None)
    if attention is not None:
        others = [n.op for n in core if n is not attention]
        return f"{others[0]} with {attention.op}" if others else ""
    if all(role(n) is Role.POINTWISE for n in core):
        if len({n.output.type.shape for n in core}) > 1:
            return "the pointwise operators have different shapes"
    reductions = sum(role(n) is Role.REDUCTION for n in core)
    if reductions > limits.reductions:
        return f"{reductions} reductions, the backend takes {limits.reductions} in a region"
    return ""


def _unplaced(nodes: Sequence[Node], kept: Collection[str]) -> str:
    """Why no kernel can take the operators row by row, or attention's operands as they lie."""
    region = region_of(nodes, set(kept), {})
    assert region.body is not None
    try:
        if any(is_anchor(n) for n in nodes):
            Body(region.body).results()
        else:
            Rows(region.body)
    except NoKernel as why:
        return str(why)
    return ""


def _epilogue(nodes: Sequence[Node], anchor: Node, limits: RegionLimits) -> str:
    """Why some operator cannot run on the tile that an anchor has computed."""
    derived = {v.name for v in anchor.outputs}
    for node in nodes:
        if node is anchor:
            continue
        inside = [x for x in node.operands if isinstance(x, Value) and x.name in derived]
        if not inside:
            return f"{node.op} is no prologue of {anchor.op}"
        if node.op not in limits.epilogue:
            return f"{node.op} is no epilogue of {anchor.op}"
        if role(node) is Role.VIEW and role(anchor) is not Role.PRODUCT and node.op != "reshape":
            return f"a {node.op} of what {anchor.op} computes"
        if role(node) is Role.POINTWISE:
            if {x.type.shape for x in inside} != {node.output.type.shape}:
                return f"{node.op} spreads what {anchor.op} computes"
        derived |= {v.name for v in node.outputs}
    return ""
