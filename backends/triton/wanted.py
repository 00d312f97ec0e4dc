"""Which values products want as codes, so that what computes them makes codes at once.

A norm, or swiglu, whose rows only products of many rows read writes codes and their scales, and no
numbers: a launch less, and instead of six bytes a number (written, read, written and read as codes)
two.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.backends.triton.coded_rows import RowCodes
from dsc.backends.triton.context import Context
from dsc.ir.dims import product
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.regions import anchor_of
from dsc.ir.views import View


@dataclass(frozen=True)
class Wanted:
    """How products want a value's rows, and whether they are all who read it."""

    rows: RowCodes
    only: bool


@dataclass(frozen=True)
class CodedTarget:
    """A region's result as codes and scales, and as numbers too unless products alone read it."""

    rows: RowCodes
    codes: View
    scales: View
    only: bool


def wanted(ctx: Context, graph: Graph) -> dict[str, Wanted]:
    """By name the values of which products want codes that are made before."""
    origins: dict[str, Value] = {}
    found: dict[str, list[RowCodes | None]] = {}
    for node in graph.nodes:
        moved = _same_rows(node)
        if moved is not None:
            origins[node.outputs[0].name] = origins.get(moved.name, moved)
        for x in node.operands:
            if isinstance(x, Value) and x is not moved:
                origin = origins.get(x.name, x)
                found.setdefault(origin.name, []).append(_asked(ctx, node, x, origin))
    results = {origins[x.name].name if x.name in origins else x.name for x in graph.outputs
               if isinstance(x, Value)}  # fmt: skip
    made = {}
    for name, asked in found.items():
        kinds = {rows for rows in asked if rows is not None}
        if len(kinds) == 1:
            made[name] = Wanted(kinds.pop(), only=None not in asked and name not in results)
    return made


def _same_rows(node: Node) -> Value | None:
    """The operand whose rows the first result has, in another order or of other leading axes."""
    if node.op not in ("dispatch", "reshape"):
        return None
    x = node.operands[0]
    same = x.type.shape[-1:] == node.outputs[0].type.shape[-1:]
    return x if same and isinstance(x, Value) else None


def _asked(ctx: Context, node: Node, x: Value, origin: Value) -> RowCodes | None:
    """The codes that a node takes rows of `x` as, if that is all it does with it."""
    inner, name = node, x.name
    if node.body is not None:
        anchor = anchor_of(node.body.nodes)
        places = [v.name for v, y in zip(node.body.inputs, node.operands, strict=True) if y is x]
        if anchor is None or len(places) != 1:
            return None
        inner, (name,) = anchor, places
        if any(y.name == name for n in node.body.nodes if n is not anchor for y in n.operands):
            return None
    activations = inner.attrs.get("activations")
    if not activations or [y.name for y in inner.operands].count(name) != 1:
        return None
    if inner.op not in ("linear", "grouped_linear") or inner.operands[0].name != name:
        return None
    rows = ctx.limit(product(origin.type.shape[:-1]))
    codes = RowCodes.of(ctx, activations, rows)
    taken = codes.ahead and codes.shares(inner.operands[1].type)
    return codes if taken and isinstance(x.type.shape[-1], int) else None
