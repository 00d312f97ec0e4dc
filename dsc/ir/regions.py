"""Fused regions: what part an operator plays in one, what kind of kernel a body is, its name.

A region is a `fused` node: a body with at most one anchor (a GEMM, an attention, the experts), and
the operators that ride along with it. Nothing about it is stored: `classify` reads the kind off the
body, so a body that a pass changes is never of the wrong kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.lanes import moves_nothing
from dsc.ir.op import lookup, named, traits_of
from dsc.ir.ops.shape import axis_of
from dsc.ir.traits import Form, Role


class Kind(StrEnum):
    """What kind of kernel runs a body."""

    POINTWISE = "pointwise"
    ROWWISE = "rowwise"
    MOVEMENT = "movement"
    GEMM = "gemm"
    SPARSE = "sparse"
    ATTENTION = "attention"
    SINGLE = "single"
    MIXED = "mixed"


FUSION_LEVELS = range(4)
"""0: a kernel an operator; 1: pointwise chains; 2: into GEMMs; 3: all of `passes/fuse.py`."""
_ANCHORS = {
    Role.PRODUCT: Kind.GEMM,
    Role.EXPERTS: Kind.SPARSE,
    Role.ATTENTION: Kind.ATTENTION,
}
"""Roles of operators that others may join, and the kernel that runs them."""
_JOINING = frozenset({Role.VIEW, Role.POINTWISE, Role.REDUCTION, Role.ROTATION, Role.WRITE})
"""Roles of operators that may join others. Those of neither stand alone: the router, lookups."""


def _anchors() -> frozenset[str]:
    return named(*_ANCHORS)


def _epilogue() -> frozenset[str]:
    return named(Role.POINTWISE) | {"rope", "reshape", "split"}


@dataclass(frozen=True)
class RegionLimits:
    """What a backend's kernels take, as data for the pass that fuses.

    `anchors`: operators that others may join. `epilogue`: operators that may follow a GEMM (and the
    experts) in its kernel, on the tile that it computed. `reductions`: norms and the like in one
    region, at most. `operands` and `nodes` bound a region.
    `codes`: writes that make rows codes may be in one. `free`: which views cost nothing on their
    own, so that no region takes them in at its border.
    `accepts` has the last word on a finished region: one that it refuses is put back as it was;
    `of` is the backend whose kernels these are, as pass options name it.
    """

    anchors: frozenset[str] = field(default_factory=_anchors)
    epilogue: frozenset[str] = field(default_factory=_epilogue)
    reductions: int = 4
    operands: int = 24
    nodes: int = 32
    codes: bool = False
    free: Callable[[Node], bool] = field(default=moves_nothing)
    accepts: Callable[[Node], bool] | None = field(default=None, compare=False)
    of: str = ""


def role(node: Node) -> Role:
    """The part that a node can play in a region: its operator's, or `OTHER` where it stands alone.

    Constants of one element are literals. A reduction takes part along rows, a write in
    place, a rotation by the positions of tokens.
    """
    traits = traits_of(node.op)
    match traits.role:
        case Role.CONSTANT:
            return Role.CONSTANT if is_literal(node) else Role.OTHER
        case Role.REDUCTION if not _along_rows(node):
            return Role.OTHER
        case Role.WRITE if not traits.writes:
            return Role.OTHER
        case Role.ROTATION if not lookup(node.op).has_operand("positions"):
            return Role.OTHER
    return traits.role if traits.role in _JOINING or traits.role in _ANCHORS else Role.OTHER


def is_literal(node: Node) -> bool:
    """Whether a node is a number that a kernel writes out."""
    return node.op == "full" and node.output.type.numel == 1


def axes_of(node: Node) -> list[int]:
    """The axes that a reduction runs along, in order: those it names, or the last."""
    declared, rank = lookup(node.op), node.operands[0].type.rank
    if declared.attr("axes") is not None:
        return sorted(axis_of(a, rank) for a in node.attrs["axes"])
    return [axis_of(node.attrs["axis"] if declared.attr("axis") else -1, rank)]


def _along_rows(node: Node) -> bool:
    """Whether a reduction is over the last axis, so that each row has its own result."""
    rank = node.operands[0].type.rank
    return rank > 0 and axes_of(node) == [rank - 1]


def classify(body: Graph) -> Kind:
    """The kind of kernel that runs a body, read off its operators."""
    roles = Counter(role(node) for node in body.nodes)
    anchors = [r for r in roles.elements() if r in _ANCHORS]
    if len(anchors) > 1 or (roles[Role.OTHER] and sum(roles.values()) > 1):
        return Kind.MIXED
    if anchors:
        return _ANCHORS[anchors[0]]
    if roles[Role.OTHER]:
        return Kind.SINGLE
    if roles[Role.REDUCTION] or roles[Role.ROTATION] or roles[Role.WRITE]:
        return Kind.ROWWISE
    return Kind.POINTWISE if roles[Role.POINTWISE] else Kind.MOVEMENT


def is_anchor(node: Node) -> bool:
    """Whether others may join a node."""
    return role(node) in _ANCHORS


def anchor_of(nodes: Iterable[Node]) -> Node | None:
    """The GEMM, attention or experts that the others join, if there is one."""
    return next(filter(is_anchor, nodes), None)


def is_free(node: Node, limits: RegionLimits) -> bool:
    """Whether a node costs no kernel: a free view or a literal."""
    return is_literal(node) or (role(node) is Role.VIEW and limits.free(node))


def name_of(node: Node) -> str:
    """A short name for people: `q_b_proj + rope`, `2 rms_norm + rope + 2 cache_write`."""
    if node.body is None:
        return _label(node, node.inputs)
    weights = {v.name: x for v, x in zip(node.body.inputs, node.operands, strict=True)}
    labels: Counter[str] = Counter()
    for inner in node.body.nodes:
        if role(inner) not in (Role.VIEW, Role.CONSTANT):
            read = [weights.get(x.name, x) for x in inner.operands]
            labels[_label(inner, read)] += 1
    return " + ".join(label if n == 1 else f"{n} {label}" for label, n in labels.items())


def _label(node: Node, operands: Sequence[Value | Weight | None]) -> str:
    weight = operands[1] if len(operands) > 1 else None
    traits = traits_of(node.op)
    plain = traits.role is Role.PRODUCT and traits.form is Form.MODEL
    if not plain or not isinstance(weight, Weight):
        return node.op
    parts = [p for p in weight.name.split(".") if p != "weight"]
    if not parts:  # the program is one bare layer
        return node.op
    return ".".join(parts[-2:]) if len(parts[-1]) == 1 else parts[-1]
