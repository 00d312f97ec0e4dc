"""Store the weights of products as 8-bit or 4-bit integers, with a scale for each group of columns.

What           a weight that linears or experts multiply by becomes the nearest codes and a scale in
               fp16 for each `group` columns of a row; that of a product which is a result, as
               logits are, has codes of its own, `head`, and what `wide` names has 8-bit codes. A
               table whose rows are looked up has those of `table`, and so has a head tied to it.
Why it pays    a decoded token costs the time to read the weights it uses: half, or a quarter.
Preconditions  linears, experts and lookups alone read the tensors that it is made of: a router's
               weights and what absorbed attention reads stay, in prefill too. It is stored in no
               codes of `stays` yet, those that the backend reads as they are, and no pattern of
               `keep` names it or such a tensor. What a backend does not read as it is stored,
               `choose_formats` dequantises.
Before         program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @a : f32[6,8] = source "a" : f32[6,8]
               }
               graph main(%x: f32[N,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = silu %y : f32[N,6]
                 return %z
               }
After          program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @a : f32[6,8] = dequantize(scaled(block_codes(source "a" : f32[6,8],
                   block_scales(source "a" : f32[6,8]) {block=[1,32], codes=i8, dtype=f16})
                   {block=[1,32], codes=i8}, block_scales(source "a" : f32[6,8])
                   {block=[1,32], codes=i8, dtype=f16}) {block=[1,32]}) {dtype=f32}
               }
               graph main(%x: f32[N,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = silu %y : f32[N,6]
                 return %z
               }
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from dsc.errors import UsageError
from dsc.ir.analyses import Use, uses, weight_uses
from dsc.ir.formats import CODINGS, is_whole
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.weights import (
    Apply,
    Source,
    WeightExpr,
    WeightSource,
    apply,
    evaluate,
    sources,
    stored_type,
)
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.verify import WIDEST, weight_elements
from dsc.rewrite.widen import runnable

RULE = "quantise"
NONE = "none"
INTEGERS = ("i8", "i4")
PRODUCTS = frozenset({Role.PRODUCT, Role.EXPERTS})
TABLES = frozenset({Role.LOOKUP})
SCALES = DType.f16
ROUNDING = 2.0**-14
"""What fp32 may add to a bound, as a share of it: codes to 128 are of quotients, and multiplied."""


class Kept(Exception):
    """Why a weight stays as it is."""


@dataclass(frozen=True)
class Kind:
    """What a weight becomes: codes, blocks, and the element type of scales."""

    codes: DType
    block: tuple[int, int]
    scales: DType


@dataclass(frozen=True)
class Quantising(Pass):
    """Decide for every weight that is read so (`chosen`), but for those that `keep` names.

    What is stored in codes of `stays` stays so; other codes are numbers, as any are.
    """

    keep: tuple[str, ...] = ()
    stays: tuple[str, ...] = option(tuple(CODINGS), among=CODINGS)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})

    @property
    def patterns(self) -> tuple[str, ...]:
        """What names weights in the options."""
        return self.keep

    @property
    def chosen(self) -> frozenset[Role]:
        """What operators are whose weights become codes."""
        return PRODUCTS

    def kind(self, names: Sequence[str], is_head: bool, is_table: bool = False) -> Kind:
        """What a weight that is called so becomes. Raises `Kept` for one that stays."""
        raise NotImplementedError

    def run(self, program: Program, report: PassReport) -> Program:
        """One walk over the weights; the report has the reason for each that products keep."""
        made: dict[str, WeightExpr] = {}
        heads = {name for graph in program.entries.values() for name in _heads(graph)}
        read = weight_uses(program.entries.values())
        others: dict[str, str] = {}
        tables: set[str] = set()
        for name, readers in read.items():
            roles = [(_role(n, i), "a result" if n is None else n.op) for n, i in readers]
            told = [op for role, op in roles if role not in PRODUCTS | self.chosen]
            keys = _keys(program.weights[name])
            others |= dict.fromkeys(keys, min(told)) if told else {}
            tables |= {*keys} if any(r in TABLES & self.chosen for r, _ in roles) else set()
        self._check_patterns(program)
        for name, readers in read.items():
            expr = program.weights[name]
            is_table = not tables.isdisjoint(_keys(expr))
            taken = self.chosen | PRODUCTS if is_table else self.chosen
            if taken.isdisjoint(_role(*reader) for reader in readers):
                continue
            try:
                kind = self.kind([name, *_keys(expr)], name in heads, is_table)
                self._check(name, expr, kind.codes, others)
            except Kept as why:
                report.miss(RULE, name, str(why), [name])
                continue
            made[name] = quantised(expr, kind)
            report.fire(RULE, places=[name])
            codes = str(kind.codes)
            report.facts[codes] = report.facts.get(codes, 0) + 1
        return replace(program, weights={**program.weights, **made}) if made else program

    def comparable(self, before: Program, after: Program) -> Program:
        """With the numbers of before where codes say them within their bound: all else is exact.

        Of a program too wide to interpret its small twin is looked at.
        """
        if weight_elements(before) > WIDEST:
            return replace(after, weights=before.weights)
        source = runnable(before, widen=False).source
        near = {
            name: expr for name, expr in before.weights.items()
            if after.weights[name] is expr or _is_near(after.weights[name], expr, source)
        }  # fmt: skip
        return after.with_weights(near)

    def _check_patterns(self, program: Program) -> None:
        """Raise `UsageError` for a pattern that names no weight."""
        every = {key for expr in program.weights.values() for key in _keys(expr)}
        every |= program.weights.keys()
        for pattern in self.patterns:
            if not _named(pattern, every):
                parts = [key for key in every if pattern in key.split(".")]
                near = sorted(parts)[:1] or get_close_matches(pattern, every, 1)
                near = near or sorted(every, key=lambda key: (not key.endswith(".weight"), key))
                hint = f"names are the checkpoint's, such as {near[0]}" if near else "leave it out"
                raise UsageError(f"no weight is called {pattern!r}", hint=hint)

    def _check(self, name: str, expr: WeightExpr, codes: DType, others: Mapping[str, str]) -> None:
        """Raise `Kept` unless a weight may be quantised; `others`: who else reads a tensor."""
        key = next((key for key in _keys(expr) if key in others), None)
        if key is not None:
            raise Kept(f"{others[key]} reads {key} too")
        found = stored_type(expr)
        if found is not None and found.dtype in self.stays:
            raise Kept(f"it is stored as {found.dtype} already")
        if not expr.type.dtype.is_float:
            raise Kept(f"it holds {expr.type.dtype}")
        together = CODINGS[codes].together
        if not is_whole(expr.type.shape[-1], together):
            raise Kept(f"{expr.type.shape[-1]} columns, and {together} codes share a byte")
        pattern = next((p for p in self.keep if _named(p, [name, *_keys(expr)])), None)
        if pattern is not None:
            raise Kept(f"{pattern} is kept")


@dataclass(frozen=True)
class QuantizeWeights(Quantising):
    """Integers in groups of columns, those of the head and of tables by options of their own."""

    codes: str = option("i8", among=(*INTEGERS, NONE))
    head: str = option("i8", among=INTEGERS)
    table: str = option(NONE, among=(*INTEGERS, NONE))
    group: int = option(32, least=2)
    wide: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those that 8-bit codes are asked for too."""
        return (*self.keep, *self.wide)

    @property
    def chosen(self) -> frozenset[Role]:
        """Products unless `codes` is none, and lookups where there are codes for a `table`."""
        asked = ((self.codes, PRODUCTS), (self.table, TABLES))
        return frozenset().union(*(roles for codes, roles in asked if codes != NONE))

    def kind(self, names: Sequence[str], is_head: bool, is_table: bool = False) -> Kind:
        """Codes with a scale for each group of a row's columns."""
        codes = self.table if is_table else self.head if is_head else self.codes
        if any(_named(pattern, names) for pattern in self.wide):
            codes = "i8"
        return Kind(DType(codes), (1, self.group), SCALES)


def quantised(expr: WeightExpr, kind: Kind) -> WeightExpr:
    """The numbers that a weight's codes stand for, in its own element type."""
    stored = apply("scaled", *_packed(expr, kind), block=kind.block)
    return apply("dequantize", stored, dtype=expr.type.dtype)


def _is_near(made: WeightExpr, expr: WeightExpr, source: WeightSource) -> bool:
    """Whether codes stand for numbers within the bound of their format."""
    if isinstance(made, Source) or made.op != "dequantize" or made.type != expr.type:
        return False
    stored, exact = evaluate(made.args[0], source), evaluate(expr, source).float()
    off = (stored.unpack(exact.dtype) - exact).abs()
    return bool((off <= stored.bound(exact) * (1 + ROUNDING)).all())


def _packed(expr: WeightExpr, kind: Kind) -> Sequence[WeightExpr]:
    """Codes and scales; those of a stack are stacks, so that they can be made piece by piece."""
    codes, block = kind.codes, kind.block
    if isinstance(expr, Apply) and (expr.op == "stack" or _joins_blocks(expr, block[0])):
        pieces = [_packed(arg, kind) for arg in expr.args]
        return [apply(expr.op, *each, **expr.attrs) for each in zip(*pieces, strict=True)]
    scales = apply("block_scales", expr, codes=codes, block=block, dtype=kind.scales)
    return apply("block_codes", expr, scales, codes=codes, block=block), scales


def _joins_blocks(expr: Apply, high: int) -> bool:
    """Whether rows follow rows, whole blocks of them."""
    axis, rank = expr.attrs.get("axis", 0) % expr.type.rank, expr.type.rank
    if expr.op != "concat" or axis == rank - 1:
        return False
    return axis < rank - 2 or all(is_whole(arg.type.shape[axis], high) for arg in expr.args[:-1])


def _role(node: Node | None, index: int) -> Role | None:
    """The role of a reader that may get a weight in codes, else `None`."""
    if node is None:
        return None
    traits, name = traits_of(node.op), lookup(node.op).operand_names(len(node.inputs))[index]
    return traits.role if name in traits.stored else None


def _heads(graph: Graph) -> Iterable[str]:
    """Names of the weights of products that are results, or of which only a view or a cast is."""
    readers = uses(graph)
    for node in graph.nodes:
        for index, x in enumerate(node.inputs):
            if isinstance(x, Weight) and _role(node, index) in PRODUCTS:
                if {*_ends(node.output, readers)} == {True}:
                    yield x.name


def _ends(value: Value, readers: Mapping[str, Sequence[Use]]) -> Iterator[bool]:
    """For each way that a value goes, whether nothing is computed with it on its way out.

    Ranks that have a part of the rows each put them side by side.
    """
    for node, _ in readers[value.name]:
        if node is not None and (node.op == "all_gather" or _moves(node)):
            for each in node.outputs:
                yield from _ends(each, readers)
        else:
            yield node is None


def _moves(node: Node) -> bool:
    return node.op == "cast" or traits_of(node.op).role is Role.VIEW


def _keys(expr: WeightExpr) -> list[str]:
    return [source.key for source in sources(expr)]


def _named(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern is one of these names, the beginning of one up to a dot, or fits one."""
    return any(
        name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
        for name in names
    )
