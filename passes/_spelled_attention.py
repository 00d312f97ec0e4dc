"""Attention that is spelled out: softmax(q k^T * scale + mask) v by matmul or einsum, in letters.

Both products are read as equations over letters, so that one reading serves every order of axes:
the scores' letters are the batch's, the heads' that keys lack (multi-query), s and t; keys and
values have the batch's letters and t. What is found here is a guess; `raise_attention` proves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsc.ir.graph import Node, Operand, Value
from dsc.ir.ops.core import einsum_terms
from dsc.ir.ops.shape import axis_of
from dsc.passes._masks import HIDDEN
from dsc.passes._spelled_parts import (
    Spelling,
    factors,
    without_casts,
    without_factors,
    without_permutes,
    without_repeats,
)
from dsc.passes._spelled_sinks import kept_columns, with_sinks
from dsc.rewrite.rule import Reject, reject
from dsc.rewrite.scope import Scope

SCORES = frozenset({"cast", "mul", "div", "add", "where", "tanh"})
"""What may lie between the product of queries and keys and the softmax."""
_LETTERS = "abcdef"
"""For the leading axes of a tensor of the highest rank that there is."""
_Equation = tuple[tuple[str, str], str]
"""The letters of a product's two operands and of its result."""


@dataclass(frozen=True)
class _Scores:
    """The way from the softmax's operand back to a product, and what it met."""

    product: Node
    equation: _Equation
    nodes: tuple[Node, ...] = ()
    scale: float = 1.0
    mask: Operand | None = None
    inverse: bool = False
    capped: float | None = None
    """The factor before a tanh; `scale` is then the one after it."""


def whole(scope: Scope, node: Node) -> Spelling | Reject:
    """An sdpa node: axes are in order as they are. Keys may have fewer heads than queries."""
    q, k, v, *mask = node.operands
    if len({x.type.rank for x in (q, k, v)}) > 1:
        return reject("queries, keys and values differ in rank", q, k, v)
    if len({x.type.shape[:-3] for x in (q, k, v)}) > 1:
        return reject("queries, keys and values differ in their batch axes", q, k, v)
    order = tuple(range(q.type.rank))
    found = Spelling(
        node, (node,), q, k, v, (order, order, order), order, scale=node.attrs["scale"],
        mask=mask[0] if mask else None, causal=node.attrs["causal"],
    )  # fmt: skip
    return without_repeats(scope, found)


def spelled_out(scope: Scope, softmax: Node) -> Spelling | Reject | None:
    """The attention around a softmax; `None` where there is none."""
    column = with_sinks(scope, softmax)
    after: list[Node] = []
    out = softmax.output
    readers = scope.consumers(out)
    while len(readers) == 1 and (readers[0].op == "cast" or kept_columns(readers[0], column)):
        after.append(readers[0])
        out = readers[0].output
        readers = scope.consumers(out)
    result = _equation(readers[0]) if len(readers) == 1 else None
    if result is None:
        return None
    root = readers[0]
    scores = _scores(scope, column.scores)
    if scores is None or isinstance(scores, Reject):
        return scores
    if scores.capped is not None and scores.scale <= 0:
        return reject("scores are capped to a negative number", out)
    shape = column.scores.type.shape
    if any(n.output.type.shape != shape for n in (scores.product, *scores.nodes)):
        return reject("a mask or a factor widens the scores", softmax.output)
    if out.type.shape != shape:
        return reject("the sinks are not dropped after the softmax", softmax.output)
    axis = axis_of(softmax.attrs["axis"], len(shape))
    nodes = (scores.product, *scores.nodes, *column.nodes, softmax, *after, root)
    found = _in_letters(scope, scores, axis, out, result, nodes)
    return found if isinstance(found, Reject) else replace(found, sinks=column.sinks)


def _in_letters(
    scope: Scope, scores: _Scores, axis: int, p: Value, second: _Equation, nodes: tuple[Node, ...]
) -> Spelling | Reject:
    """Read both products, `second` being the last of the nodes, as one attention; or why not."""
    first, root = scores.equation, nodes[-1]
    t = first[1][axis]
    sides = list(zip(first[0], scores.product.operands, strict=True))
    (k_term, k), *others = [x for x in sides if t in x[0]]
    if others:
        return reject("queries and keys share the axis of the softmax", p)
    q_term, q = sides[1 - sides.index((k_term, k))]
    alone = [c for c in first[1] if c in q_term and c not in k_term]
    summed = set(q_term) & set(k_term) - set(first[1])
    own = {*k_term} - {*q_term}
    if not alone or len(summed) != 1 or own != {t} or {*q_term} - {*first[1]} != summed:
        return reject("the scores are no product of queries and keys", q, k)
    s, (d,) = alone[-1], summed
    batch = [c for c in first[1] if c in q_term and c in k_term]
    place = 0 if root.operands[0] == p else 1
    names = dict(zip(second[0][place], first[1], strict=True))
    if root.operands[1 - place] == p or names.keys() & set(second[1]) != {
        c for c in names if names[c] != t
    }:
        return reject("the softmax in front of a product is not over the axis that it sums", p)
    v, v_term = root.operands[1 - place], second[0][1 - place]
    values = [names.get(c, f"{c} of v") for c in v_term]
    new = [c for c in values if len(c) > 1]
    if len(new) != 1 or {*values} != {*batch, t, *new}:
        return reject("keys and values differ in their batch axes", k, v)
    result = [names.get(c, f"{c} of v") for c in second[1]]
    order = [*batch, *alone[:-1], s, *new]
    if scores.mask is not None and (first[1][-2:] != s + t or [*first[1][:-2]] != order[:-2]):
        return reject("the mask is over scores in another order", scores.mask)
    found = Spelling(
        root, nodes, q, k, v,
        (
            tuple(q_term.index(c) for c in (*order[:-1], d)),
            tuple(k_term.index(c) for c in (*batch, t, d)),
            tuple(values.index(c) for c in (*batch, t, *new)),
        ),
        tuple(order.index(c) for c in result),
        len(alone) - 1, scores.scale, scores.mask, scores.inverse,
    )  # fmt: skip
    if scores.capped is not None:
        found = replace(found, scale=scores.scale * scores.capped, softcap=scores.scale)
    found = without_casts(scope, without_factors(scope, without_permutes(scope, found)))
    return without_repeats(scope, found)


def _equation(node: Node) -> _Equation | None:
    """A product of two operands as terms and result; `None` for another node."""
    if node.op == "einsum":
        terms, result = einsum_terms(str(node.attrs["eq"]))
        plain = len(terms) == 2 and all(len({*t}) == len(t) for t in terms)
        return ((terms[0], terms[1]), result) if plain else None
    if node.op != "matmul":
        return None
    a, b = (x.type.shape for x in node.operands)
    if a[:-2] != b[:-2]:
        return None
    lead = _LETTERS[: len(a[:-2])]
    return (lead + "mk", lead + "kn"), lead + "mn"


def _scores(scope: Scope, operand: Operand) -> _Scores | Reject | None:
    """The product that an operand is made of, through factors, casts and one mask."""
    node = scope.producer(operand)
    if node is None:
        return None
    equation = _equation(node)
    if equation is not None:
        return _Scores(node, equation)
    if node.op not in SCORES:
        return None
    for x, factor, mask, inverse in _steps(scope, node):
        found = _scores(scope, x)
        if found is None or isinstance(found, Reject):
            if found is not None:
                return found
            continue
        if node.op == "tanh":
            return _capped(found, node)
        if mask is not None and found.mask is not None:
            return reject("the scores are masked twice", mask)
        if found.mask is not None and factor <= 0:
            return reject("the mask is multiplied by a negative number", found.mask)
        nodes = (*found.nodes, node)
        found = replace(found, nodes=nodes, scale=found.scale * factor)
        return found if mask is None else replace(found, mask=mask, inverse=inverse)
    return None


def _capped(found: _Scores, tanh: Node) -> _Scores | Reject:
    """Scores up to a tanh, of which there is one, and before the mask."""
    if found.mask is not None:
        return reject("the scores are capped after the mask", found.mask)
    if found.capped is not None:
        return reject("the scores are capped twice", tanh.output)
    return replace(found, nodes=(*found.nodes, tanh), scale=1.0, capped=found.scale)


_Step = tuple[Operand, float, Operand | None, bool]


def _steps(scope: Scope, node: Node) -> Iterator[_Step]:
    """What a node may be to the scores: which operand they are, its factor, its mask."""
    a, *rest = node.operands
    match node.op:
        case "cast" | "tanh":
            yield a, 1.0, None, False
        case "mul" | "div":
            yield from ((x, f, None, False) for x, f in factors(scope, node))
        case "add":
            yield a, 1.0, rest[0], False
            yield rest[0], 1.0, a, False
        case "where":
            for i in (0, 1):  # what is shown where the mask is true, or where it is false
                fill = scope.constant(rest[1 - i])
                if fill is not None and fill <= HIDDEN:
                    yield rest[i], 1.0, a, i == 1


def leaves(found: Spelling) -> Sequence[Operand]:
    """What the attention reads."""
    return [*found.operands, *([found.mask] if found.mask is not None else [])]
