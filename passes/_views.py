"""Rules over views, shared by the passes that leave views behind: fewer, and in one order."""

from __future__ import annotations

from collections.abc import Iterator

from dsc.ir.graph import Node, Operand, Value
from dsc.ir.ops.shape import axis_of
from dsc.rewrite import pattern as patterns
from dsc.rewrite.rule import (
    Facts,
    Match,
    Reject,
    Result,
    RewriteBuilder,
    Rule,
    at,
    reject,
)
from dsc.rewrite.scope import Scope

_NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}
_ONE_SIDED = frozenset({"div", "sub"})


def _is_identity(node: Node) -> bool:
    """Whether a view or cast returns its operand as it is."""
    x = node.inputs[0]
    if x is None or len(node.outputs) != 1 or node.output.type != x.type:
        return False
    match node.op:
        case "permute":
            return tuple(node.attrs["dims"]) == tuple(range(x.type.rank))
        case "slice":
            return node.attrs.get("step", 1) == 1
        case "concat":
            return len(node.inputs) == 1
    return True


class DropIdentity(Rule):
    """view(x)  ==>  x, when the view changes nothing"""

    anchors = frozenset({"cast", "reshape", "permute", "expand", "slice", "split", "concat"})
    examples = (
        "graph g(%x: f32[2,3]) { %y = reshape %x {shape=[2,3]}\n return %y }",
        "graph g(%x: f32[2,3]) { %y = cast %x {dtype=f32}\n return %y }",
        "graph g(%x: f32[2,3]) { %y = slice %x {axis=1, start=0, end=3}\n return %y }",
        "graph g(%x: f32[2,B]) { %y = permute %x {dims=[0,1]}\n return %y }",
        "graph g(%x: f32[2,B]) { %y = concat %x {axis=0}\n return %y }",
    )
    near_misses = {
        "axes of equal size change places": "graph g(%x: f32[3,3]) {"
        " %y = permute %x {dims=[1,0]}\n return %y }",
        "the element type changes": "graph g(%x: f32[2,3]) { %y = cast %x {dtype=bf16}\n return %y }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """Any view whose result is its operand."""
        return at(scope, node, x=node.inputs[0]) if _is_identity(node) else None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The operand."""
        x: Operand = m.x
        return x


class DropNeutral(Rule):
    """x * 1, x / 1, x + 0, x - 0  ==>  x"""

    anchors = frozenset(_NEUTRAL)
    examples = (
        "graph g(%x: f32[B,3]) { %one = full {shape=[], value=1.0, dtype=f32}\n"
        " %y = mul %one, %x\n return %y }",
        "graph g(%x: f32[B,3]) { %zero = full {shape=[3], value=0.0, dtype=f32}\n"
        " %y = sub %x, %zero\n return %y }",
    )
    near_misses = {
        "0 - x is no x": "graph g(%x: f32[3]) { %zero = full {shape=[], value=0.0, dtype=f32}\n"
        " %y = sub %zero, %x\n return %y }",
        "the constant widens the shape": "graph g(%x: f32[1]) {"
        " %one = full {shape=[3], value=1.0, dtype=f32}\n %y = mul %x, %one\n return %y }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """One operand is the neutral element and the other has the result's type."""
        a, b = node.inputs
        orders = [(a, b)] if node.op in _ONE_SIDED else [(a, b), (b, a)]
        for x, other in orders:
            neutral = scope.constant(other) == _NEUTRAL[node.op]
            if neutral and x is not None and x.type == node.output.type:
                return at(scope, node, x=x)
        return None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The other operand."""
        x: Operand = m.x
        return x


class MergeReshapes(Rule):
    """reshape(reshape(x))  ==>  reshape(x)"""

    examples = (
        "graph g(%x: f32[2,3,B]) { %y = reshape %x {shape=[6,B]}\n"
        " %z = reshape %y {shape=[3,2,B]}\n return %z }",
    )
    near_misses = {
        "a permute lies between": "graph g(%x: f32[2,3]) { %y = reshape %x {shape=[3,2]}\n"
        " %p = permute %y {dims=[1,0]}\n %z = reshape %p {shape=[6]}\n return %z }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The inner reshape may have other readers; it costs nothing."""
        return p.reshape(p.reshape(p.x).may_be_shared())

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One reshape to the final shape."""
        return b.call("reshape", m.x, shape=m.root.output.type.shape)


class MergePermutes(Rule):
    """permute(permute(x))  ==>  permute(x)"""

    examples = (
        "graph g(%x: f32[2,3,B]) { %y = permute %x {dims=[2,0,1]}\n"
        " %z = permute %y {dims=[2,1,0]}\n return %z }",
    )
    near_misses = {
        "there is one permute": "graph g(%x: f32[2,3]) { %y = permute %x {dims=[1,0]}\n return %y }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The inner permute may have other readers."""
        return p.permute(p.permute(p.x).may_be_shared().named("inner"))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The composition: axis i of the result is axis inner[outer[i]] of x."""
        inner = m.inner.attrs["dims"]
        return b.call("permute", m.x, dims=tuple(inner[d] for d in m.root.attrs["dims"]))


class PermuteToReshape(Rule):
    """permute(x)  ==>  reshape(x), when only axes of extent 1 move"""

    examples = (
        "graph g(%x: f32[B,1,S,4]) { %y = permute %x {dims=[0,2,1,3]}\n return %y }",
    )
    near_misses = {
        "two longer axes change places": "graph g(%x: f32[B,2,S,4]) {"
        " %y = permute %x {dims=[0,2,1,3]}\n return %y }",
    }
    anchors = frozenset({"permute"})

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """The axes longer than 1 keep their order."""
        x = node.inputs[0]
        assert x is not None
        kept = [d for d in node.attrs["dims"] if x.type.shape[d] != 1]
        return at(scope, node, x=x) if kept == sorted(kept) else None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The same elements in the same order."""
        return b.call("reshape", m.x, shape=m.root.output.type.shape)


class SplitBeforePermute(Rule):
    """split(permute(x))  ==>  permute(split(x)), part by part"""

    examples = (
        "graph g(%x: f32[B,S,2,6]) { %y = permute %x {dims=[0,2,1,3]}\n"
        " %a, %b = split %y {sizes=[4,2]}\n return %a, %b }",
    )
    near_misses = {
        "the split operand is reshaped": "graph g(%x: f32[4,6]) { %y = reshape %x {shape=[2,2,6]}\n"
        " %a, %b = split %y {sizes=[4,2]}\n return %a, %b }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """A split of a permuted value, which may have other readers."""
        return p.split(p.permute(p.x).may_be_shared().named("permuted"))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Split the axis that becomes the split axis, then permute each part."""
        dims = m.permuted.attrs["dims"]
        axis = dims[axis_of(m.root.attrs.get("axis", -1), len(dims))]
        axis = -1 if axis == len(dims) - 1 else axis
        attrs = {"sizes": m.root.attrs["sizes"]} | ({} if axis == -1 else {"axis": axis})
        parts = b.call("split", m.x, **attrs)
        return tuple(b.call("permute", part, dims=dims)[0] for part in parts)


class SplitOfLastAxis(Rule):
    """split(x) {axis=rank-1}  ==>  split(x), one spelling"""

    anchors = frozenset({"split"})
    examples = (
        "graph g(%x: f32[B,6]) { %a, %b = split %x {axis=1, sizes=[4,2]}\n return %a, %b }",
    )
    near_misses = {
        "another axis is split": "graph g(%x: f32[6,B]) { %a, %b = split %x {axis=0, sizes=[4,2]}\n"
        " return %a, %b }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """The axis is written out and is the last."""
        x = node.inputs[0]
        last = x is not None and node.attrs.get("axis", -1) == x.type.rank - 1
        return at(scope, node, x=x) if last else None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The same split with the axis left out."""
        return b.call("split", m.x, sizes=m.root.attrs["sizes"])


class SlicesToSplit(Rule):
    """slice(x, 0, n), slice(x, n, end)  ==>  split(x), when the slices part an axis in two"""

    anchors = frozenset({"slice"})
    examples = (
        "graph g(%x: f32[B,6]) { %a = slice %x {axis=1, start=0, end=4}\n"
        " %b = slice %x {axis=-1, start=4, end=6}\n return %b, %a }",
    )
    near_misses = {
        "the slices overlap": "graph g(%x: f32[B,6]) { %a = slice %x {axis=1, start=0, end=4}\n"
        " %b = slice %x {axis=1, start=3, end=6}\n return %a, %b }",
        "every second element is taken": "graph g(%x: f32[B,6]) {"
        " %a = slice %x {axis=1, start=0, end=6, step=2}\n"
        " %b = slice %x {axis=1, start=1, end=6, step=2}\n return %a, %b }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """`node` starts the axis; a sibling goes on where it ends."""
        x = node.inputs[0]
        if not isinstance(x, Value) or node.attrs["start"] != 0 or node.attrs.get("step", 1) != 1:
            return None
        axis = axis_of(node.attrs["axis"], x.type.rank)
        for other in _slices(scope, x, axis):
            rest = (other.attrs["start"], other.attrs["end"])
            if other is not node and rest == (node.attrs["end"], x.type.shape[axis]):
                both = (node.output, other.output)
                first = min(node, other, key=lambda n: scope.position[n.output.name])
                sizes = tuple(v.type.shape[axis] for v in both)
                return Match({"x": x, "axis": axis, "sizes": sizes}, (node, other), both, first, scope)
        return None

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """One split; the last axis is not written out."""
        last = m.axis == m.x.type.rank - 1
        return b.call("split", m.x, sizes=m.sizes, **({} if last else {"axis": m.axis}))


def _slices(scope: Scope, x: Value, axis: int) -> Iterator[Node]:
    for other in scope.consumers(x):
        same = other.op == "slice" and other.attrs.get("step", 1) == 1
        if same and axis_of(other.attrs["axis"], x.type.rank) == axis:
            yield other


class ScatterToConcat(Rule):
    """slice_scatter(slice_scatter(_, a, 0..n), b, n..end)  ==>  concat(a, b)"""

    examples = (
        "graph g(%a: f32[B,4], %b: f32[B,2]) { %e = full {shape=[B,6], value=0.0, dtype=f32}\n"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=4}\n"
        " %d = slice_scatter %c, %b {axis=1, start=4, end=6}\n return %d }",
    )
    near_misses = {
        "a gap keeps what was there": "graph g(%e: f32[B,6], %a: f32[B,3], %b: f32[B,2]) {"
        " %c = slice_scatter %e, %a {axis=1, start=0, end=3}\n"
        " %d = slice_scatter %c, %b {axis=1, start=4, end=6}\n return %d }",
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
        spans = {(first["start"], first["end"]): "a", (second["start"], second["end"]): "b"}
        low, high = sorted(spans, key=lambda s: s[0] != 0)
        if low[0] != 0 or low[1] != high[0] or high[1] != m.target.type.shape[axis]:
            return reject("the writes do not cover the axis", m.target)
        return {"axis": axis, "order": (spans[low], spans[high])}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The parts one after another; what was there before is gone."""
        first, second = (m.values[name] for name in facts["order"])
        return b.call("concat", first, second, axis=facts["axis"])


class CastBackAndForth(Rule):
    """cast(cast(x))  ==>  x, when the type between holds every value of x"""

    examples = (
        "graph g(%x: bf16[B]) { %y = cast %x {dtype=f32}\n %z = cast %y {dtype=bf16}\n return %z }",
        "graph g(%x: bool[B]) { %y = cast %x {dtype=f32}\n %z = cast %y {dtype=bool}\n return %z }",
    )
    near_misses = {
        "the type between rounds": "graph g(%x: f32[B]) { %y = cast %x {dtype=bf16}\n"
        " %z = cast %y {dtype=f32}\n return %z }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """Two casts; the first may have other readers."""
        return p.cast(p.cast(p.x).may_be_shared().named("inner"))

    def check(self, m: Match) -> Facts | Reject:
        """There and back without loss."""
        x, between = m.x.type.dtype, m.inner.attrs["dtype"]
        if m.root.attrs["dtype"] != x:
            return reject("the casts do not lead back", m.x)
        wide = x.value == "bool" or (x.is_float and between.is_float and between.bits > x.bits)
        return {} if wide else reject(f"{between} does not hold every {x}", m.x)

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """What was cast."""
        x: Operand = m.x
        return x


VIEW_RULES: tuple[Rule, ...] = (
    DropIdentity(),
    DropNeutral(),
    CastBackAndForth(),
    MergeReshapes(),
    ScatterToConcat(),
    SlicesToSplit(),
    SplitOfLastAxis(),
    SplitBeforePermute(),
    MergePermutes(),
    PermuteToReshape(),
)
