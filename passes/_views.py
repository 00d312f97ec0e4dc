"""Rules over views, shared by the passes that leave views behind: fewer, and in one order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dsc.ir.graph import Node, Operand
from dsc.passes._splits import ScatterToConcat, SlicesToSplit, SplitBeforePermute, SplitOfLastAxis
from dsc.rewrite import pattern as patterns
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, at, reject
from dsc.rewrite.scope import Scope

_NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}
_ONE_SIDED = frozenset({"div", "sub"})


def _is_identity(node: Node) -> bool:
    """Whether a view or cast returns its operand as it is."""
    x = node.inputs[0]
    if x is None or len(node.outputs) != 1 or node.output.type != x.type:
        return False
    return node.op != "permute" or tuple(node.attrs["dims"]) == tuple(range(x.type.rank))


class _ToOperand:
    """What becomes of a node is its operand `x`."""

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The operand."""
        x: Operand = m.x
        return x


class DropIdentity(_ToOperand, Rule):
    """view(x)  ==>  x, when the view changes nothing."""

    anchors = frozenset({"cast", "reshape", "permute", "expand", "slice", "split", "concat"})
    examples = (
        "graph g(%x: f32[2,3]) { %y = reshape %x {shape=[2,3]}\n return %y }",
        "graph g(%x: f32[2,3]) { %y = cast %x {dtype=f32}\n return %y }",
        "graph g(%x: f32[2,3]) { %y = slice %x {axis=1, start=0, end=3}\n return %y }",
        "graph g(%x: f32[2,B]) { %y = permute %x {dims=[0,1]}\n return %y }",
        "graph g(%x: f32[2,B]) { %y = concat %x {axis=0}\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "axes of equal size change places": "graph g(%x: f32[3,3]) {"
        " %y = permute %x {dims=[1,0]}\n return %y }",
        "the element type changes": "graph g(%x: f32[2,3]) {\n"
        " %y = cast %x {dtype=bf16}\n return %y }",
    }

    def propose(self, scope: Scope, node: Node) -> Match | None:
        """Any view whose result is its operand."""
        return at(scope, node, x=node.inputs[0]) if _is_identity(node) else None


class DropNeutral(_ToOperand, Rule):
    """x * 1, x / 1, x + 0, x - 0  ==>  x."""

    anchors = frozenset(_NEUTRAL)
    examples = (
        "graph g(%x: f32[B,3]) { %one = full {shape=[], value=1.0, dtype=f32}\n"
        " %y = mul %one, %x\n return %y }",
        "graph g(%x: f32[B,3]) { %zero = full {shape=[3], value=0.0, dtype=f32}\n"
        " %y = sub %x, %zero\n return %y }",
        "graph g(%x: f32[B,3]) { %one = full {shape=[], value=1.0, dtype=f32}\n"
        " %y = div %x, %one\n return %y }",
        "graph g(%x: f32[B,3]) { %zero = full {shape=[], value=0.0, dtype=f32}\n"
        " %y = add %zero, %x\n return %y }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "0 - x is no x": "graph g(%x: f32[3]) { %zero = full {shape=[], value=0.0, dtype=f32}\n"
        " %y = sub %zero, %x\n return %y }",
        "1 / x is no x": "graph g(%x: f32[3]) { %one = full {shape=[], value=1.0, dtype=f32}\n"
        " %y = div %one, %x\n return %y }",
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


class MergeReshapes(Rule):
    """reshape(reshape(x))  ==>  reshape(x)."""

    examples = (
        "graph g(%x: f32[2,3,B]) { %y = reshape %x {shape=[6,B]}\n"
        " %z = reshape %y {shape=[3,2,B]}\n return %z }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
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
    """permute(permute(x))  ==>  permute(x)."""

    examples = (
        "graph g(%x: f32[2,3,B]) { %y = permute %x {dims=[2,0,1]}\n"
        " %z = permute %y {dims=[2,1,0]}\n return %z }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
        "there is one permute": "graph g(%x: f32[2,3]) {"
        " %y = permute %x {dims=[1,0]}\n return %y }",
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The inner permute may have other readers."""
        return p.permute(p.permute(p.x).may_be_shared().named("inner"))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """The composition: axis i of the result is axis inner[outer[i]] of x."""
        inner = m.inner.attrs["dims"]
        return b.call("permute", m.x, dims=tuple(inner[d] for d in m.root.attrs["dims"]))


class PermuteToReshape(Rule):
    """permute(x)  ==>  reshape(x), when only axes of extent 1 move."""

    examples = ("graph g(%x: f32[B,1,S,4]) { %y = permute %x {dims=[0,2,1,3]}\n return %y }",)
    near_misses: ClassVar[Mapping[str, str]] = {
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


class CastBackAndForth(_ToOperand, Rule):
    """cast(cast(x))  ==>  x, when the type between holds every value of x."""

    examples = (
        "graph g(%x: bf16[B]) { %y = cast %x {dtype=f32}\n %z = cast %y {dtype=bf16}\n return %z }",
        "graph g(%x: bool[B]) { %y = cast %x {dtype=f32}\n %z = cast %y {dtype=bool}\n return %z }",
    )
    near_misses: ClassVar[Mapping[str, str]] = {
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
