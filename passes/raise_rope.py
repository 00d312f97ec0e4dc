"""Recognise the rotary position embedding, in any of its layouts.

What           everything between x, the positions and the frequencies on one side and the rotated
               value on the other becomes rope. The region is proposed by structure (products with
               a table of sines and cosines) and proved by running it against each layout. Where
               only the first columns of a head turn and the others are put behind them again, all
               of that is the one operator.
Why it pays    one kernel reads x once and needs no table; which layout the cached keys have, and
               that YaRN scales cos and sin, is then written in the program instead of implied.
Preconditions  stage TRACED; the frequencies are a weight [r/2], the positions i64[b,s].
Before         graph main(%x: f32[B,S,4], %p: i64[B,S], @inv_freq: f32[2]) {
                 %a = reshape %p {shape=[B,S,1]} : i64[B,S,1]
                 %b = cast %a {dtype=f32} : f32[B,S,1]
                 %c = mul %b, @inv_freq : f32[B,S,2]
                 %cos = cos %c : f32[B,S,2]
                 %sin = sin %c : f32[B,S,2]
                 %even = slice %x {axis=2, end=3, start=0, step=2} : f32[B,S,2]
                 %odd = slice %x {axis=2, end=4, start=1, step=2} : f32[B,S,2]
                 %d = mul %even, %cos : f32[B,S,2]
                 %e = mul %odd, %sin : f32[B,S,2]
                 %f = sub %d, %e : f32[B,S,2]
                 %g = mul %odd, %cos : f32[B,S,2]
                 %h = mul %even, %sin : f32[B,S,2]
                 %i = add %g, %h : f32[B,S,2]
                 %y = concat %f, %i {axis=2} : f32[B,S,4] loc "rope"
                 return %y
               }
After          graph main(%x: f32[B,S,4], %p: i64[B,S], @inv_freq: f32[2]) {
                 %y = rope %x, %p, @inv_freq {layout="deinterleave", scale=1.0} : f32[B,S,4]
                   loc "rope"
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dsc.ir.graph import Node, Value, Weight
from dsc.ir.op import named
from dsc.ir.ops.shape import normalised_dims
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.passes._rotations import emit, prove
from dsc.passes._views import VIEW_RULES
from dsc.rewrite import lift
from dsc.rewrite.driver import RaisePass
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject
from dsc.rewrite.scope import VIEWS, Scope

_TABLE = named(Role.POINTWISE) | VIEWS | {"concat", "matmul"}
"""What a table of sines and cosines is computed with."""
_JOIN = VIEWS | {"cast", "concat", "add", "sub", "slice_scatter", "neg"}
"""What brings the rotated parts together."""
_SOURCE = VIEWS | {"cast", "concat", "neg"}

_ROTATED = """graph g(%x: f32[B,{head}S,4], %p: i64[B,S], @inv_freq: f32[2]) {{
  %a = reshape %p {{shape=[B,1,S,1]}}
  %b = cast %a {{dtype=f32}}
  %c = mul %b, @inv_freq
  %t = concat %c, %c {{axis=3}}
  %cos = cos %t
  %m = full {{shape=[], value=1.25, dtype=f32}}
  %k = mul %cos, %m
  %sin = sin %t
  %l = mul %sin, %m
  %u = slice %x {{axis=3, start=0, end=2}}
  %v = slice %x {{axis=3, start=2, end=4}}
  %n = neg %v
  %h = concat %n, %u {{axis=3}}
  %d = mul %x, %k
  %e = mul %h, {second}
  %y = add %d, %e
  return %y
}}"""
_PARTIAL = (
    _ROTATED.replace("%x: f32[B,{head}S,4]", "%w: f32[B,{head}S,6]")
    .replace("  %a =", "  %x = slice %w {{axis=3, start=0, end=4}}\n  %a =")
    .replace(
        "  return %y", "  %r = slice %w {{axis=3, start={rest}}}\n"
        "  %z = concat %y, %r {{axis=3}}\n  return %z"
    )
)  # fmt: skip
"""The first four columns of six turn."""


class Rope(Rule):
    """x turned by cos and sin of positions * inv_freq  ==>  rope(x, positions, inv_freq)."""

    tolerance = 1e-5
    examples = (
        _ROTATED.format(head="3,", second="%l"),
        _ROTATED.format(head="1,", second="%l"),
        _PARTIAL.format(head="3,", second="%l", rest="4, end=6"),
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the second product has the cosine too": _ROTATED.format(head="3,", second="%k"),
    }

    def find(self, scope: Scope) -> Iterator[Match | Reject]:
        """One proposal for each value that a product with a table leads to."""
        tables = _tables(scope)
        seen: set[str] = set()
        for node in scope.graph.nodes:
            x = _rotated_operand(node, tables)
            if x is None or node.output.name in seen:
                continue
            found = _join(scope, node, x, tables)
            if isinstance(found, Match):
                seen |= {v.name for n in found.nodes for v in n.outputs}
                wider = _with_the_rest(scope, found)
                if wider is not None:
                    yield wider
            yield found

    def check(self, m: Match) -> Facts | Reject:
        """Prove one of the layouts, and read the scale off position 0."""
        key = ("rope", m.region.key, m.region.leaves.index(m.x))
        found = lift.proven(m.scope, key, lambda: prove(m))
        return reject(found, m.x) if isinstance(found, str) else found

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """rope on [b,s,h,r] or [b,s,r], between the views that lead there and back."""
        shape = m.root.output.type.shape
        return emit(b, m.x, m.positions, m.inv_freq, facts["layout"], facts["scale"], shape)


def _tables(scope: Scope) -> set[str]:
    """Values computed from integers and weights alone that hold sines or cosines."""
    plain: set[str] = {v.name for v in scope.graph.inputs if v.type.dtype.is_int}
    trigonometric: set[str] = set()
    for node in scope.graph.nodes:
        values = [x.name for x in node.operands if isinstance(x, Value)]
        if node.op in ("arange", "full"):
            plain.add(node.output.name)
        elif all(v in plain for v in values) and node.op in _TABLE:
            plain.update(v.name for v in node.outputs)
            if node.op in ("cos", "sin") or any(v in trigonometric for v in values):
                trigonometric.update(v.name for v in node.outputs)
    return trigonometric


def _rotated_operand(node: Node, tables: set[str]) -> Value | None:
    """The operand of a product that is not the table."""
    if node.op != "mul" or node.output.name in tables:
        return None
    a, b = node.inputs
    for x, table in ((a, b), (b, a)):
        if isinstance(x, Value) and isinstance(table, Value) and table.name in tables:
            return x if x.name not in tables else None
    return None


def _join(scope: Scope, node: Node, start: Value, tables: set[str]) -> Match | Reject:
    """The first value after `node` that turns one whole x, as a match."""
    origins = [x for x in scope.viewed(start, _SOURCE) if isinstance(x, Value)]
    nearly: Match | None = None
    for later in scope.forward(node.output, limit=16):
        found = _turned(scope, later, origins)
        nearly = nearly or found
        if found is not None and _fits(found):
            return _beyond_cast(scope, found, origins)
    return nearly or reject(
        "products with sines and cosines that form no rotation of one value", start
    )


def _turned(scope: Scope, node: Node, origins: list[Value]) -> Match | None:
    """`node` as the rotation of one of `origins`."""
    if node.op not in _JOIN or len(node.outputs) != 1:
        return None
    for x in origins:
        if x.type.rank in (3, 4) and _alike(x, node.output):
            found = _match(scope, node, x)
            if found is not None:
                return found
    return None


def _with_the_rest(scope: Scope, found: Match) -> Match | None:
    """The rotation with the columns that it leaves alone, where they are put behind it again."""
    value, node = found.root.output, _only_reader(scope, found.root)
    while node is not None and node.op in VIEWS and len(node.outputs) == 1:
        value, node = node.output, _only_reader(scope, node)
    if node is None or node.op != "concat" or node.inputs[0] != value:
        return None
    whole = [x for x in scope.viewed(found.x, VIEWS | {"cast"}) if isinstance(x, Value)]
    wider = _turned(scope, node, whole)
    if wider is None:
        return None
    wider = _beyond_cast(scope, wider, whole)
    # Of two proposals that hold one rotation, the first that is proved claims it.
    return replace(wider, shared=wider.shared - {id(found.root)})


def _only_reader(scope: Scope, node: Node) -> Node | None:
    """The node that alone reads a result."""
    (reader, _), *others = scope.uses[node.output.name] or [(None, 0)]
    return None if others else reader


def _fits(found: Match) -> bool:
    """Whether there is one frequency a pair of channels."""
    same: bool = found.x.type.shape[-1] == found.inv_freq.type.shape[0] * 2
    return same


def _beyond_cast(scope: Scope, found: Match, origins: list[Value]) -> Match:
    """The rotation up to a cast back to the element type of x, where one follows."""
    node = found.root
    while len(readers := scope.consumers(node.output)) == 1:
        node = readers[0]
        if node.op not in ("cast", "reshape", "permute"):
            break
        further = _turned(scope, node, origins) if node.op == "cast" else None
        if further is not None and further.x.type.shape[-1] == found.x.type.shape[-1]:
            return further
    return found


def _alike(x: Value, y: Value) -> bool:
    """Whether two values have one type but for axes of extent 1 and the order of the others."""
    *a, last = x.type.shape
    *b, final = y.type.shape
    rows, others = (sorted(map(str, normalised_dims(tuple(s)))) for s in (a, b))
    return rows == others and last == final and x.type.dtype == y.type.dtype


def _match(scope: Scope, root: Node, x: Value) -> Match | None:
    """The region from x to `root`, if besides x it reads positions and frequencies alone."""
    region = lift.cut(scope, [root.output], lambda v: v.name == x.name)
    if region is None or x not in region.leaves:
        return None
    others = [v for v in region.leaves if v != x]
    positions = [v for v in others if isinstance(v, Value) and v.type.dtype is DType.i64]
    inv_freq = [v for v in others if isinstance(v, Weight) and v.type.rank == 1]
    if len(positions) != 1 or len(inv_freq) != 1 or len(others) != 2:
        return None
    if positions[0].type.rank != 2 or not inv_freq[0].type.dtype.is_float:
        return None
    inside = {"x": x, "positions": positions[0], "inv_freq": inv_freq[0], "region": region}
    own = tuple(n for n in region.nodes if any(v.name != x.name for v in n.outputs))
    shared = frozenset(id(n) for n in own if n is not root)
    return Match(inside, own, root.outputs, root, scope, shared)


@dataclass(frozen=True)
class RaiseRope(RaisePass):
    """Raise every rotation, then merge the views around it: before, they are the table's."""

    rules = (Rope(),)
    then = VIEW_RULES
