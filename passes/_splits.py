"""Rules over splits and what amounts to one: slices that part an axis, writes that cover one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from dsc.ir.graph import Node, Value
from dsc.ir.ops.shape import axis_of
from dsc.rewrite import pattern as patterns
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, at, reject
from dsc.rewrite.scope import Scope


class SplitBeforePermute(Rule):
    """split(permute(x))  ==>  permute(split(x)), part by part."""

    examples = (
        "graph g(%x: f32[B,S,2,6]) { %y = permute %x {dims=[0,2,1,3]}\n"
        " %a, %b = split %y {sizes=[4,2]}\n return %a, %b }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the split operand is reshaped": "graph g(%x: f32[4,6]) { %y = reshape %x {shape=[2,2,6]}\n"
        " %a, %b = split %y {sizes=[4,2]}\n return %a, %b }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """A split of a permuted value, which may have other readers."""
        return p.split(p.permute(p.x).may_be_shared().named("permuted"))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Split the axis that becomes the split axis, then permute each part."""
        dims = m.permuted.attrs["dims"]
        axis = dims[axis_of(m.root.attrs["axis"], len(dims))]
        axis = -1 if axis == len(dims) - 1 else axis
        attrs = {"sizes": m.root.attrs["sizes"]} | ({} if axis == -1 else {"axis": axis})
        parts = b.call("split", m.x, **attrs)
        return tuple(b.call("permute", part, dims=dims)[0] for part in parts)


class SplitOfLastAxis(Rule):
    """split(x) {axis=rank-1}  ==>  split(x), one spelling."""

    anchors = frozenset({"split"})
    examples = (
        "graph g(%x: f32[B,6]) { %a, %b = split %x {axis=1, sizes=[4,2]}\n return %a, %b }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "another axis is split": "graph g(%x: f32[6,B]) { %a, %b = split %x {axis=0, sizes=[4,2]}\n"
        " return %a, %b }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """The axis is written out and is the last."""
        x = node.inputs[0]
        last = x is not None and node.attrs["axis"] == x.type.rank - 1
        return at(scope, node, x=x) if last else None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The same split with the axis left out."""
        return b.call("split", m.x, sizes=m.root.attrs["sizes"])


class SlicesToSplit(Rule):
    """slice(x, 0, n), slice(x, n, end)  ==>  split(x), when the slices part an axis in two."""

    anchors = frozenset({"slice"})
    examples = (
        "graph g(%x: f32[B,6]) { %a = slice %x {axis=1, start=0, end=4}\n"
        " %b = slice %x {axis=-1, start=4, end=6}\n return %b, %a }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the slices overlap": "graph g(%x: f32[B,6]) { %a = slice %x {axis=1, start=0, end=4}\n"
        " %b = slice %x {axis=1, start=3, end=6}\n return %a, %b }",
        "every second element is taken": "graph g(%x: f32[B,6]) {"
        " %a = slice %x {axis=1, start=0, end=6, step=2}\n"
        " %b = slice %x {axis=1, start=1, end=6, step=2}\n return %a, %b }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """`node` starts the axis; a sibling goes on where it ends."""
        x = node.inputs[0]
        if not isinstance(x, Value) or node.attrs["start"] != 0 or node.attrs["step"] != 1:
            return None
        axis = axis_of(node.attrs["axis"], x.type.rank)
        for other in _slices(scope, x, axis):
            rest = (other.attrs["start"], other.attrs["end"])
            if other is not node and rest == (node.attrs["end"], x.type.shape[axis]):
                both = (node.output, other.output)
                first = min(node, other, key=lambda n: scope.position[n.output.name])
                sizes = tuple(v.type.shape[axis] for v in both)
                return Match(
                    {"x": x, "axis": axis, "sizes": sizes}, (node, other), both, first, scope
                )
        return None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One split; the last axis is not written out."""
        last = m.axis == m.x.type.rank - 1
        return b.call("split", m.x, sizes=m.sizes, **({} if last else {"axis": m.axis}))


def _slices(scope: Scope, x: Value, axis: int) -> Iterator[Node]:
    for other in scope.consumers(x):
        same = other.op == "slice" and other.attrs["step"] == 1
        if same and axis_of(other.attrs["axis"], x.type.rank) == axis:
            yield other


class ScatterToConcat(Rule):
    """slice_scatter(slice_scatter(_, a, 0..n), b, n..end)  ==>  concat(a, b)."""

    examples = (
        "graph g(%a: f32[B,4], %b: f32[B,2]) { %e = full {shape=[B,6], value=0.0, dtype=f32}\n"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=4}\n"
        " %d = slice_scatter %c, %b {axis=1, start=4, end=6}\n return %d }",
        "graph g(%e: f32[B,6], %a: f32[B,4], %b: f32[B,2]) {"
        " %c = slice_scatter %e, %b {axis=1, start=4, end=6}\n"
        " %d = slice_scatter %c, %a {axis=1, start=0, end=4}\n return %d }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "a gap keeps what was there": "graph g(%e: f32[B,6], %a: f32[B,3], %b: f32[B,2]) {"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=3}\n"
        " %d = slice_scatter %c, %b {axis=1, start=4, end=6}\n return %d }",
        "the front keeps what was there": "graph g(%e: f32[B,6], %a: f32[B,3], %b: f32[B,2]) {"
        " %c = slice_scatter %e, %a {axis=1, start=1, end=4}\n"
        " %d = slice_scatter %c, %b {axis=1, start=4, end=6}\n return %d }",
        "the end keeps what was there": "graph g(%e: f32[B,6], %a: f32[B,3], %b: f32[B,2]) {"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=3}\n"
        " %d = slice_scatter %c, %b {axis=1, start=3, end=5}\n return %d }",
        "the same range is written twice": "graph g(%e: f32[B,6], %a: f32[B,4], %b: f32[B,4]) {"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=4}\n"
        " %d = slice_scatter %c, %b {axis=1, start=0, end=4}\n return %d }",
        "the writes overlap": "graph g(%e: f32[B,6], %a: f32[B,4], %b: f32[B,3]) {"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=4}\n"
        " %d = slice_scatter %c, %b {axis=1, start=3, end=6}\n return %d }",
        "the axes differ": "graph g(%e: f32[6,6], %a: f32[3,6], %b: f32[6,3]) {"
        " %c = slice_scatter %e, %a {axis=0, start=0, end=3}\n"
        " %d = slice_scatter %c, %b {axis=1, start=3, end=6}\n return %d }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """Two writes, one after the other."""
        return p.slice_scatter(p.slice_scatter(p.target, p.a).named("first"), p.b)

    def check(self, m: Match) -> Facts | Reject:
        """Together they cover one axis."""
        first, second = m.first.attrs, m.root.attrs
        rank = m.target.type.rank
        axis = axis_of(first["axis"], rank)
        if axis != axis_of(second["axis"], rank):
            return reject("the writes are along different axes", m.a, m.b)
        spans = [(first["start"], first["end"], m.a), (second["start"], second["end"], m.b)]
        low, high = sorted(spans, key=lambda s: s[0] != 0)
        if low[0] != 0 or low[1] != high[0] or high[1] != m.target.type.shape[axis]:
            return reject("the writes do not cover the axis", m.target)
        return {"axis": axis, "later": spans[0] is high}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The parts one after another; what was there before is gone."""
        first, second = (m.b, m.a) if facts["later"] else (m.a, m.b)
        return b.call("concat", first, second, axis=facts["axis"])


class WriteToConcat(Rule):
    """slice_scatter(x, part, start..end)  ==>  concat(x[:start], part, x[end:])."""

    examples = (
        "graph g(%x: f32[B,6], %a: f32[B,2]) {"
        " %d = slice_scatter %x, %a {axis=1, start=3, end=5}\n return %d }",
        "graph g(%x: f32[B,P], %a: f32[2,P]) {"
        " %d = slice_scatter %x, %a {axis=0, start=0, end=2}\n return %d }",
        "graph g(%x: f32[B,6], %a: f32[B,5]) {"
        " %d = slice_scatter %x, %a {axis=1, start=1, end=6}\n return %d }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "the whole axis is written": "graph g(%x: f32[B,2], %a: f32[B,2]) {"
        " %d = slice_scatter %x, %a {axis=1, start=0, end=2}\n return %d }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """Any write of a range."""
        return p.slice_scatter(p.target, p.part)

    def check(self, m: Match) -> Facts | Reject:
        """Something of what was there stays."""
        axis = axis_of(m.root.attrs["axis"], m.target.type.rank)
        size = m.target.type.shape[axis]
        if (m.root.attrs["start"], m.root.attrs["end"]) == (0, size):
            return reject("nothing stays of what was there", m.target)
        return {"axis": axis, "size": size}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """What is before, the part, what comes after."""
        axis, size = facts["axis"], facts["size"]
        start, end = m.root.attrs["start"], m.root.attrs["end"]
        parts = [m.part]
        if start != 0:
            parts.insert(0, b.slice(m.target, axis=axis, start=0, end=start, step=1))
        if end != size:
            parts.append(b.slice(m.target, axis=axis, start=end, end=size, step=1))
        return b.call("concat", *parts, axis=axis)
