"""The parts of an attention that is spelled out, and what may lie around its operands.

Queries, keys and values are looked for before they were permuted, scaled, widened, or repeated for
the heads that share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsc.ir.dims import Dim
from dsc.ir.graph import Node, Operand
from dsc.passes._spelled_heads import Shape, before_repeats
from dsc.rewrite.scope import Scope


@dataclass(frozen=True)
class Spelling:
    """The parts of an attention, and the axes of each in the order batch, heads, rows, columns.

    `heads`: leading axes that queries have and keys lack. `inverse`: the mask tells what is hidden.
    `shapes`: those under which keys and values have these axes, where their own differ. `softcap`:
    what scores are capped to, or 0. `sinks`: one logit a head, in any shape.
    `result` brings the axes of the result from that order into the one that `root` has.
    """

    root: Node
    nodes: tuple[Node, ...]
    q: Operand
    k: Operand
    v: Operand
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    result: tuple[int, ...]
    heads: int = 0
    scale: float = 1.0
    mask: Operand | None = None
    inverse: bool = False
    causal: bool = False
    softcap: float = 0.0
    sinks: Operand | None = None
    shapes: tuple[Shape | None, Shape | None] = (None, None)

    def extents(self, part: int) -> tuple[Dim, ...]:
        """Extents of queries (0), keys (1) or values (2) in the order batch, heads, rows, width."""
        given = (None, *self.shapes)[part]
        shape = (self.q, self.k, self.v)[part].type.shape if given is None else given
        return tuple(shape[a] for a in self.axes[part])

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What the attention reads, beside its mask."""
        sinks = () if self.sinks is None else (self.sinks,)
        return (self.q, self.k, self.v, *sinks)


def factors(scope: Scope, node: Node) -> Iterator[tuple[Operand, float]]:
    """The operand of mul or div that is no constant, and the factor that the other is."""
    a, b = node.operands
    for x, other in ((a, b), (b, a)) if node.op == "mul" else ((a, b),):
        factor = scope.constant(other)
        if factor and x.type.shape == node.output.type.shape:
            yield x, factor if node.op == "mul" else 1 / factor


def without_permutes(scope: Scope, found: Spelling) -> Spelling:
    """Queries, keys and values before they were permuted."""
    parts: list[Operand] = []
    axes: list[tuple[int, ...]] = []
    for x, order in zip((found.q, found.k, found.v), found.axes, strict=True):
        node = scope.producer(x)
        while node is not None and node.op == "permute":
            order = tuple(node.attrs["dims"][a] for a in order)
            x = node.operands[0]
            node = scope.producer(x)
        parts.append(x)
        axes.append(order)
    q, k, v = parts
    return replace(found, q=q, k=k, v=v, axes=(axes[0], axes[1], axes[2]))


def without_repeats(scope: Scope, found: Spelling) -> Spelling:
    """Keys and values before each head was written down once a query head that shares it."""
    seen = [before_repeats(scope, x, order) for x, order in zip(
        (found.k, found.v), found.axes[1:], strict=True)]  # fmt: skip
    k, v = seen
    if k is None or v is None or k.axis != v.axis or found.heads:
        return found
    return replace(found, k=k.x, v=v.x, shapes=(k.shape, v.shape))


def without_factors(scope: Scope, found: Spelling) -> Spelling:
    """Constant factors of queries and of keys as part of the scale."""
    parts, scale = [found.q, found.k], found.scale
    for i, x in enumerate(parts):
        node = scope.producer(x)
        for inner, factor in factors(scope, node) if node and node.op in ("mul", "div") else ():
            parts[i], scale = inner, scale * factor
            break
    if parts == [found.q, found.k]:
        return found
    return without_permutes(scope, replace(found, q=parts[0], k=parts[1], scale=scale))


def without_casts(scope: Scope, found: Spelling) -> Spelling:
    """Operands before they were widened, where the result is narrowed again to their type."""
    parts = [_narrow(scope, x) for x in (found.q, found.k, found.v)]
    readers = scope.consumers(found.root.output)
    narrow = parts[0].type.dtype
    if {x.type.dtype for x in parts} != {narrow} or narrow is found.q.type.dtype:
        return found
    if found.root.output.type.dtype is narrow:
        root, nodes = found.root, found.nodes
    elif len(readers) == 1 and readers[0].op == "cast" and _dtype(readers[0]) is narrow:
        root, nodes = readers[0], (*found.nodes, readers[0])
        if any(x == found.root.output for x in scope.graph.outputs):
            return found
    else:
        return found
    q, k, v = parts
    return without_permutes(scope, replace(found, q=q, k=k, v=v, root=root, nodes=nodes))


def _narrow(scope: Scope, x: Operand) -> Operand:
    node = scope.producer(x)
    if node is None or node.op != "cast":
        return x
    source = node.operands[0]
    wider = source.type.dtype.is_float and source.type.dtype.itemsize < x.type.dtype.itemsize
    return source if wider else x


def _dtype(node: Node) -> object:
    return node.output.type.dtype
