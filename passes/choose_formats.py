"""Keep weights in the format they are stored in, where all that reads them takes it.

What           a weight that would be dequantised when it is packed stays codes and scales: what is
               done to it (slices, stacks, rows one after another) is done to both. One that is in
               a format and is not taken so is dequantised.
Why it pays    FP8 weights reach the artifact bit for bit, in half the bytes of bf16.
Preconditions  there are no regions yet. Each reader's operator declares the operand as one that
               may be stored so, and keeps its result's type; `formats` names the codes that the
               backend takes and, where its kernels want `tile` rows side by side, their blocks
               end at whole tiles; where they want unsigned codes, blocks are of one row and a
               power of two columns, `unsigned` at most; `limits` says what kernels there are. No
               step of the weight's expression cuts a block. Rows of a table that are looked up are
               numbers in fp32, and a cast behind them rounds them as the table would have been.
Before         program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @a : f32[6,8] = dequantize(scaled(source "a" : f8e4m3[6,8],
                   source "a.s" : f32[2,2]) {block=[4,4]}) {dtype=f32}
                 @b : f32[3,8] = slice(dequantize(scaled(source "b" : f8e4m3[6,8],
                   source "b.s" : f32[2,2]) {block=[4,4]}) {dtype=f32}) {axis=0, start=3, end=6}
               }
               graph main(%x: f32[N,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = linear %x, @b : f32[N,3]
                 return %y, %z
               }
After          graph main(%x: f32[N,8], @a: f8e4m3{4x4,f32}[6,8], @b: f32[3,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = linear %x, @b : f32[N,3]
                 return %y, %z
               }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsc.ir.analyses import Use, call_of, weight_uses
from dsc.ir.formats import CODINGS, Part
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Weight
from dsc.ir.op import TypeMismatch, lookup, traits_of
from dsc.ir.ops.moe import plain_experts
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Apply, WeightExpr, apply, scaled, stored_type
from dsc.passes._in_format import Dequantised, in_format
from dsc.passes._unsigned import as_unsigned, each_matrix
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

RULE = "keep"


@dataclass(frozen=True)
class ChooseFormats(Pass):
    """Decide for every weight that is stored in a format."""

    formats: tuple[str, ...] = option(tuple(CODINGS), among=CODINGS)
    tile: int = option(1, least=1)
    unsigned: int = option(0, least=0)
    limits: RegionLimits = field(default_factory=RegionLimits, metadata={"of": "regions"})

    needs = frozenset({Stage.TRACED, Stage.CANONICAL, Stage.OPTIMIZED})

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk over the weights; the report has the reason for each that is dequantised."""
        read = weight_uses(program.entries.values())
        kept: dict[str, WeightExpr] = {}
        why: dict[str, str] = {}
        for name, readers in read.items():
            expr = program.weights[name]
            stored = stored_type(expr)
            if stored is None:
                continue
            try:
                kept[name] = self._kept(expr, stored, readers)
            except Dequantised as problem:
                why[name] = str(problem)
        why |= self._without_kernel(read, kept)
        chosen = {name: expr for name, expr in kept.items() if name not in why}
        for name in chosen:
            report.fire(RULE, places=[name])
        for name, reason in why.items():
            report.miss(RULE, name, reason, [name])
            expr = program.weights[name]
            if expr.type.format is not None:
                chosen[name] = apply("dequantize", expr, dtype=_computed(*read[name][0]))
        if all(program.weights[name] == expr for name, expr in chosen.items()):
            return program

        def operand(x: Operand) -> Operand:
            changed = isinstance(x, Weight) and x.name in chosen
            return Weight(x.name, chosen[x.name].type) if changed else x

        def graph(g: Graph) -> Graph:
            return rebuild(g.mapped(operand), _rounded)

        return program.map_entries(graph).with_weights(chosen)

    def _kept(self, expr: WeightExpr, stored: TensorType, readers: Sequence[Use]) -> WeightExpr:
        """The weight in its format. Raises `Dequantised`."""
        if stored.dtype not in self.formats:
            raise Dequantised(f"the backend takes no weights in {stored.dtype}")
        found = in_format(expr)
        most = self.unsigned
        found = as_unsigned(found, most) if most else self._in_tiles(found)
        for node, index in readers:
            if node is None:
                raise Dequantised("it is a result")
            types = [None if x is None else x.type for x in node.inputs]
            types[index] = found.type
            try:
                made = lookup(node.op).infer(types, node.attrs)
            except TypeMismatch as problem:
                raise Dequantised(f"{node.op}: {problem}") from None
            if made != tuple(v.type for v in node.outputs) and not _is_lookup(node):
                raise Dequantised(f"{node.op} would give {made[0]}")
        return found

    def _in_tiles(self, expr: Apply) -> Apply:
        """The weight with its rows side by side, if kernels want that. Raises `Dequantised`."""
        before = expr.type.format
        assert before is not None
        if self.tile == before.tile:
            return expr
        if before.tile > 1:
            raise Dequantised(f"{before.tile} of its rows lie side by side")
        try:
            format = replace(before, tile=self.tile)
            made = replace(expr.type, format=format)
        except ValueError as problem:
            raise Dequantised(str(problem)) from None
        parts = zip(expr.args, format.parts(made.dtype), strict=True)
        return scaled((_tiled(arg, part) for arg, part in parts), made)

    def _without_kernel(
        self, read: Mapping[str, Sequence[Use]], kept: Mapping[str, WeightExpr]
    ) -> dict[str, str]:
        """Why no kernel takes some of the weights that are to be kept, by name.

        A kernel may take several, and all of them or none: what one of them loses, all lose.
        """
        accepts, lost = self.limits.accepts, dict[str, str]()
        if accepts is None:
            return lost
        readers = {id(node): node for name in kept for node, _ in read[name] if node is not None}
        changed = True
        while changed:
            changed = False
            for node in readers.values():
                stored = {
                    x.name: kept[x.name].type for x in node.operands
                    if isinstance(x, Weight) and x.name in kept and x.name not in lost
                }  # fmt: skip
                if not stored:
                    continue
                inputs = tuple(
                    Weight(x.name, stored[x.name]) if isinstance(x, Weight) and x.name in stored
                    else x for x in node.inputs
                )  # fmt: skip
                if not accepts(plain_experts(replace(node, inputs=inputs))):
                    told = {name: f"no kernel of {node.op} takes {t}" for name, t in stored.items()}
                    lost, changed = lost | told, True
        return lost


def _is_lookup(node: Node) -> bool:
    """Whether results are rows of a table, which may as well be rounded one by one."""
    return traits_of(node.op).role is Role.LOOKUP


def _rounded(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
    """Rows of a table in codes, which are looked up in fp32, in the element type that they had."""
    if not _is_lookup(node) or all(x.type.format is None for x in node.operands):
        return None
    name, dtype = node.output.name, node.output.type.dtype
    if dtype is DType.f32:
        return None
    (wide,) = b.call(node.op, *operands, hint=f"{name}_f32", **node.attrs)
    b.taken.discard(name)
    return b.call("cast", wide, dtype=dtype, hint=name)


def _tiled(expr: WeightExpr, part: Part) -> WeightExpr:
    """Rows side by side."""
    if part.tile == 1:
        return expr

    def tiled(one: WeightExpr) -> WeightExpr:
        return apply("tiled", one, tile=part.tile, width=part.width, step=part.step)

    return each_matrix(expr, tiled)


def _computed(node: Node | None, index: int) -> DType:
    """The element type that an operand in a format is unpacked to."""
    if node is None:
        return DType.f32
    name = lookup(node.op).operand_names(len(node.inputs))[index]
    return call_of(node)[name].dtype
