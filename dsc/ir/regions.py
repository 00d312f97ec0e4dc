"""Fused regions: what part an operator plays in one, what kind of kernel a body is, its name.

A region is a `fused` node: a body with at most one anchor (a GEMM, an attention, the experts), and
the operators that ride along with it. Nothing about it is stored: `classify` reads the kind off the
body, so a body that a pass changes is never of the wrong kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.ops.pointwise import POINTWISE
from dsc.ir.ops.shape import VIEWS, axis_of


class Role(StrEnum):
    """The part that an operator can play in a region."""

    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    ROTATION = "rotation"
    WRITE = "write"
    VIEW = "view"
    LITERAL = "literal"
    GEMM = "gemm"
    SPARSE = "sparse"
    ATTENTION = "attention"
    ALONE = "alone"


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


GEMMS = frozenset({"linear", "matmul", "einsum", "grouped_linear"})
SPARSE = frozenset({"experts", "combine"})
ATTENTION = frozenset({"attention", "mla_attention", "latent_attention"})
ANCHORS = GEMMS | SPARSE | ATTENTION
"""Operators that other operators may join. Those of no role (`route`, `topk`) stand alone."""

_POINTWISE = POINTWISE | {"swiglu"}
_REDUCTIONS = frozenset({"rms_norm", "softmax", "sum", "mean", "amax", "amin"})
_ROLES: dict[str, Role] = {
    **dict.fromkeys(_POINTWISE, Role.POINTWISE),
    **dict.fromkeys(_REDUCTIONS, Role.REDUCTION),
    **dict.fromkeys(VIEWS, Role.VIEW),
    **dict.fromkeys(GEMMS, Role.GEMM),
    **dict.fromkeys(SPARSE, Role.SPARSE),
    **dict.fromkeys(ATTENTION, Role.ATTENTION),
    "rope": Role.ROTATION,
    "cache_write": Role.WRITE,
}


@dataclass(frozen=True)
class RegionLimits:
    """What a backend's kernels take, as data for the pass that fuses.

    `anchors`: operators that others may join. `epilogue`: operators that may follow a GEMM (and the
    experts) in its kernel, on the tile that it computed. `reductions`: norms and the like in one
    region, at most. `prologue_rows`: a norm in front of a GEMM is computed again by each of its
    tiles where there are at most so many rows; 0 never. `operands` and `nodes` bound a region.
    `free`: views that cost nothing on their own, so no region takes them in at its border.
    `accepts` has the last word on a finished region: one that it refuses is put back as it was.
    """

    anchors: frozenset[str] = ANCHORS
    epilogue: frozenset[str] = _POINTWISE | {"rope", "reshape", "split"}
    reductions: int = 4
    prologue_rows: int = 0
    operands: int = 24
    nodes: int = 32
    free: frozenset[str] = frozenset({"reshape"})
    accepts: Callable[[Node], bool] | None = None


def role(node: Node) -> Role:
    """The part that a node can play in a region."""
    if node.op == "full":
        return Role.LITERAL if node.output.type.numel == 1 else Role.ALONE
    found = _ROLES.get(node.op, Role.ALONE)
    if found is Role.REDUCTION and not _along_rows(node):
        return Role.ALONE
    return found


def _along_rows(node: Node) -> bool:
    """Whether a reduction is over the last axis, so that each row has its own result."""
    rank = node.operands[0].type.rank
    if node.op == "rms_norm":
        return True
    axes = node.attrs["axes"] if "axes" in node.attrs else (node.attrs["axis"],)
    return rank > 0 and tuple(axis_of(a, rank) for a in axes) == (rank - 1,)


def rows(node: Node) -> Dim:
    """The rows that a row-wise operator works on: all axes but the last of what it reads.

    A row of rope is a token with all of its heads: they share its angles.
    """
    if role(node) is Role.ROTATION:
        return node.operands[1].type.numel
    if role(node) is Role.WRITE:
        shape = node.operands[1].type.shape
    elif role(node) is Role.REDUCTION:
        shape = node.operands[0].type.shape
    else:
        shape = node.output.type.shape
    return product(shape[:-1])


def classify(body: Graph) -> Kind:
    """The kind of kernel that runs a body, read off its operators."""
    roles = Counter(role(node) for node in body.nodes)
    anchors = roles[Role.GEMM] + roles[Role.SPARSE] + roles[Role.ATTENTION]
    if anchors > 1 or (roles[Role.ALONE] and sum(roles.values()) > 1):
        return Kind.MIXED
    if anchors:
        (found,) = (r for r in (Role.GEMM, Role.SPARSE, Role.ATTENTION) if roles[r])
        return Kind(found.value)
    if roles[Role.ALONE]:
        return Kind.SINGLE
    if roles[Role.REDUCTION] or roles[Role.ROTATION] or roles[Role.WRITE]:
        return Kind.ROWWISE
    return Kind.POINTWISE if roles[Role.POINTWISE] else Kind.MOVEMENT


def anchor_of(nodes: Iterable[Node]) -> Node | None:
    """The GEMM, attention or experts that the others join, if there is one."""
    return next((n for n in nodes if n.op in ANCHORS), None)


def is_free(node: Node, limits: RegionLimits) -> bool:
    """Whether a node costs no kernel: a free view or a literal."""
    return node.op in limits.free or role(node) is Role.LITERAL


def name_of(node: Node) -> str:
    """A short name for people: `q_b_proj + rope`, `2 rms_norm + rope + 2 cache_write`."""
    if node.body is None:
        return _label(node, node.inputs)
    weights = {v.name: x for v, x in zip(node.body.inputs, node.operands, strict=True)}
    labels: Counter[str] = Counter()
    for inner in node.body.nodes:
        if role(inner) not in (Role.VIEW, Role.LITERAL):
            read = [weights.get(x.name, x) for x in inner.operands]
            labels[_label(inner, read)] += 1
    return " + ".join(label if n == 1 else f"{n} {label}" for label, n in labels.items())


def _label(node: Node, operands: Sequence[Value | Weight | None]) -> str:
    weight = operands[1] if len(operands) > 1 else None
    if node.op not in ("linear", "einsum") or not isinstance(weight, Weight):
        return node.op
    parts = [p for p in weight.name.split(".") if p != "weight"]
    if not parts:  # the program is one bare layer
        return node.op
    return ".".join(parts[-2:]) if len(parts[-1]) == 1 else parts[-1]
