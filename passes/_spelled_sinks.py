"""Attention sinks as they are spelled out: one more column of scores, dropped after the softmax.

A sink is one logit a query head, which takes its share of the weights and adds nothing. It is
written as a column behind the scores; beside it some models subtract each row's largest score,
which changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.graph import Node, Operand
from dsc.ir.ops.shape import axis_of
from dsc.rewrite.scope import Scope

_SPREAD = frozenset({"expand", "reshape", "cast"})


@dataclass(frozen=True)
class Column:
    """What a softmax is taken of: scores, and the sinks in a column behind them, if there are."""

    scores: Operand
    sinks: Operand | None = None
    nodes: tuple[Node, ...] = ()


def with_sinks(scope: Scope, softmax: Node) -> Column:
    """The scores and sinks of a softmax over the last axis."""
    x = softmax.operands[0]
    whole = Column(x)
    last = x.type.rank - 1
    if axis_of(softmax.attrs["axis"], x.type.rank) != last:
        return whole
    x, above = _uncast(scope, x)
    x, shifts = _unshifted(scope, x)
    joined, casts = _uncast(scope, x)
    node = scope.producer(joined)
    nodes = (*casts, *shifts, *above)
    if node is None or node.op != "concat" or len(node.operands) != 2:
        return Column(joined, None, nodes) if shifts else whole
    scores, column = node.operands
    if axis_of(node.attrs["axis"], joined.type.rank) != last or column.type.shape[-1] != 1:
        return whole
    return Column(scores, _narrowest(scope, column), (node, *nodes))


def kept_columns(node: Node, column: Column) -> bool:
    """Whether a node keeps the columns of the scores, and drops that of the sinks."""
    if node.op != "slice" or column.sinks is None:
        return False
    rank, total = column.scores.type.rank, column.scores.type.shape[-1]
    last = axis_of(node.attrs["axis"], rank) == rank - 1
    return last and node.attrs["start"] == 0 and node.attrs["end"] == total


def _uncast(scope: Scope, x: Operand) -> tuple[Operand, tuple[Node, ...]]:
    """A value before it was cast, and the casts."""
    casts: tuple[Node, ...] = ()
    node = scope.producer(x)
    while node is not None and node.op == "cast":
        x, casts = node.operands[0], (node, *casts)
        node = scope.producer(x)
    return x, casts


def _unshifted(scope: Scope, x: Operand) -> tuple[Operand, tuple[Node, ...]]:
    """The scores before each row's largest was subtracted, and the nodes that do it."""
    node = scope.producer(x)
    if node is None or node.op != "sub":
        return x, ()
    scores, peak = node.operands
    found = scope.producer(peak)
    if found is None or found.op != "amax" or found.operands[0] != scores:
        return x, ()
    axes = {axis_of(a, scores.type.rank) for a in found.attrs["axes"]}
    if axes != {scores.type.rank - 1} or not found.attrs["keepdims"]:
        return x, ()
    return scores, (found, node)


def _narrowest(scope: Scope, x: Operand) -> Operand:
    """What a column was spread from: the value with the fewest elements on the way."""
    node = scope.producer(x)
    while node is not None and node.op in _SPREAD:
        x = node.operands[0]
        node = scope.producer(x)
    return x
