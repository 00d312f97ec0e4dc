"""Rules that move views behind what works on each row: for the end of raising, when all is known.

Passes that raise read the spelling of the tracer; moving its views earlier would give them another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dsc.ir.dims import Dim
from dsc.ir.graph import Node, Operand, Value, Weight
from dsc.ir.op import named
from dsc.ir.traits import Role
from dsc.rewrite import pattern as patterns
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, at, reject
from dsc.rewrite.scope import Scope


class ConcatBeforePermute(Rule):
    """concat(permute(x), permute(y))  ==>  permute(concat(x, y))."""

    anchors = frozenset({"concat"})
    examples = (
        "graph g(%x: f32[2,3,B], %y: f32[2,3,4]) { %p = permute %x {dims=[1,0,2]}\n"
        " %q = permute %y {dims=[1,0,2]}\n %z = concat %p, %q {axis=-1}\n return %z }",
        "graph g(%x: f32[2,3,4], %y: f32[5,3,4]) { %p = permute %x {dims=[2,0,1]}\n"
        " %q = permute %y {dims=[2,0,1]}\n %z = concat %p, %q {axis=1}\n return %z }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the axes are permuted in two ways": "graph g(%x: f32[2,2,4], %y: f32[2,2,4]) {"
        " %p = permute %x {dims=[1,0,2]}\n %q = permute %y {dims=[0,1,2]}\n"
        " %z = concat %p, %q {axis=2}\n return %z }",
        "one of them is as it came": "graph g(%x: f32[2,2,4], %y: f32[2,2,4]) {"
        " %p = permute %x {dims=[1,0,2]}\n %z = concat %p, %y {axis=2}\n return %z }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """All operands are permuted alike."""
        made = [scope.producer(x) for x in node.operands]
        if len(made) < 2 or any(n is None or n.op != "permute" for n in made):
            return None
        orders = {tuple(n.attrs["dims"]) for n in made if n is not None}
        if len(orders) != 1:
            return None
        xs = tuple(n.operands[0] for n in made if n is not None)
        return at(scope, node, xs=xs, dims=orders.pop())

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The same parts side by side, along the axis that theirs was."""
        axis = m.dims[m.root.attrs["axis"] % len(m.dims)]
        (joined,) = b.call("concat", *m.xs, axis=axis)
        return b.call("permute", joined, dims=m.dims)


class NormBeforePermute(Rule):
    """norm(permute(x))  ==>  permute(norm(x)), where the last axis stays the last."""

    tolerance = 1e-6
    examples = (
        "graph g(%x: f32[B,S,2,4], @w: f32[4]) { %p = permute %x {dims=[0,2,1,3]}\n"
        " %y = rms_norm %p, @w {eps=1e-06}\n return %y }",
        "graph g(%x: f32[B,S,2,4], @w: f32[4], @b: f32[4]) { %p = permute %x {dims=[0,2,1,3]}\n"
        " %y = layer_norm %p, @w, @b {eps=1e-06}\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "another axis is normed": "graph g(%x: f32[B,4,S], @w: f32[4]) {"
        " %p = permute %x {dims=[0,2,1]}\n %y = rms_norm %p, @w {eps=1e-06}\n return %y }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The permuted value may have other readers: it costs nothing."""
        view = p.permute(p.x).may_be_shared().named("view")
        layer_norms = p.layer_norm(view, p.gain), p.layer_norm(view, p.gain, p.bias)
        return p.either(p.rms_norm(view, p.gain), *layer_norms)

    def check(self, m: Match) -> Facts | Reject:
        """Rows stay rows."""
        dims = m.view.attrs["dims"]
        return {} if dims[-1] == len(dims) - 1 else reject("another axis is normed", m.x)

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The norm of the rows where they lie."""
        (y,) = b.call(m.root.op, m.x, *m.root.operands[1:], **m.root.attrs)
        return b.call("permute", y, dims=m.view.attrs["dims"])


class ReshapeAfterRows(Rule):
    """f(reshape(x))  ==>  reshape(f(x)), where rows alone are counted anew and f takes each."""

    anchors = named(Role.POINTWISE) | {"linear"}
    tolerance = 1e-6
    examples = (
        "graph g(%x: f32[B,S,4], @w: f32[3,4]) { %r = reshape %x {shape=[B*S,4]}\n"
        " %y = linear %r, @w\n return %y }",
        "graph g(%x: f32[B,S,4], %g: f32[B,S,1]) { %r = reshape %x {shape=[B*S,4]}\n"
        " %s = reshape %g {shape=[B*S,1]}\n %y = mul %r, %s\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the last axis changes": "graph g(%x: f32[B,S,4], @w: f32[3,2]) {"
        " %r = reshape %x {shape=[2*B*S,2]}\n %y = linear %r, @w\n return %y }",
        "rows of another operand are as they were": "graph g(%x: f32[B,S,4], %z: f32[B*S,4]) {"
        " %r = reshape %x {shape=[B*S,4]}\n %y = add %r, %z\n return %y }",
        "the rows came in two shapes": "graph g(%x: f32[2,6,4], %z: f32[3,4,4]) {"
        " %r = reshape %x {shape=[12,4]}\n %s = reshape %z {shape=[12,4]}\n"
        " %y = add %r, %s\n return %y }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | Reject | None:
        """Every operand with rows is some x [*rows,d] as [n,d]."""
        behind = [_rows(scope, x) for x in node.operands]
        leads = {x.type.shape[:-1] for x in behind if isinstance(x, Value) and x.type.rank}
        moved = any(x is not y for x, y in zip(behind, node.operands, strict=True))
        if None in behind or len(leads) != 1 or not moved or len(node.outputs) != 1:
            return None
        return at(scope, node, xs=tuple(behind))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The operator on rows as they came."""
        (y,) = b.call(m.root.op, *m.xs, **m.root.attrs)
        return b.call("reshape", y, shape=m.root.output.type.shape)


def _rows(scope: Scope, x: Operand) -> Operand | None:
    """What rows [n,d] were before they were counted as one axis; `None` if they never were."""
    if isinstance(x, Weight) or x.type.rank == 0:
        return x
    made = scope.producer(x)
    if made is None or made.op != "reshape" or x.type.rank != 2:
        return None
    before: Operand = made.operands[0]
    rows: tuple[Dim, ...] = before.type.shape
    return before if len(rows) > 2 and rows[-1] == x.type.shape[-1] else None


MOVED_VIEWS: tuple[Rule, ...] = (ConcatBeforePermute(), NormBeforePermute(), ReshapeAfterRows())
