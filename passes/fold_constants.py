"""Compute what depends on constants alone once, when compiling or packing.

What           a number computed from numbers becomes full; a small tensor computed from ranges and
               numbers becomes a weight whose expression is that computation. With `weights`, so
               does what is computed from weights (a transposed or converted one).
Why it pays    the work is done once instead of in every step, and later rules see a number as a
               number.
Preconditions  results without symbols, of at most `limit` elements. Plain ranges and fills stay.
Before         graph main(%x: f32[B,2]) {
                 %a = full {dtype=f32, shape=[], value=16.0} : f32[]
                 %b = sqrt %a : f32[]
                 %r = arange {dtype=f32, end=2, start=0} : f32[2]
                 %e = exp %r : f32[2]
                 %y = mul %x, %b : f32[B,2]
                 %z = mul %y, %e : f32[B,2]
                 return %z
               }
After          graph main(%x: f32[B,2], @constant.e: f32[2]) {
                 %b = full {dtype=f32, shape=[], value=4.0} : f32[]
                 %y = mul %x, %b : f32[B,2]
                 %z = mul %y, @constant.e : f32[B,2]
                 return %z
               }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.ir.analyses import live
from dsc.ir.dims import Sym
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.ir.traits import Role
from dsc.ir.weights import Apply, MetaSource, WeightExpr, apply, evaluate, sources
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

_NOTHING = MetaSource({})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constant numbers and tensors; with `weights`, what is computed from weights too."""

    weights: bool = False
    limit: int = option(1 << 22, least=0)

    tolerance = 1e-6

    def run(self, program: Program, report: PassReport) -> Program:
        """One forward walk an entry."""
        added: dict[str, WeightExpr] = {}
        entries = {
            name: _Fold(self, program, added, report).graph(graph)
            for name, graph in program.entries.items()
        }
        if all(entries[name] is graph for name, graph in program.entries.items()):
            return program
        return replace(program, entries=entries).with_weights(added)


@dataclass
class _Fold:
    """One walk: the expressions of the values that are constant so far."""

    options: FoldConstants
    program: Program
    added: dict[str, WeightExpr]
    report: PassReport

    def graph(self, graph: Graph) -> Graph:
        """The graph with every constant that somebody reads folded; itself when there is none."""
        known: dict[str, WeightExpr] = {}
        for node in graph.nodes:
            expr = self._expr(node, known)
            if expr is not None:
                known[node.output.name] = expr
        wanted = _read_by_others(graph, known)

        def fold(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            name = node.outputs[0].name
            expr = known.get(name)
            if expr is None or name not in wanted or not _worth(expr):
                return None
            self.report.fire("folded")
            number = _number(expr)
            if number is None:
                return (self._weight(node.output, expr),)
            b.taken.discard(name)
            t = node.output.type
            return b.call("full", shape=t.shape, value=number, dtype=t.dtype, hint=name)

        folded = rebuild(graph, fold)
        return graph if folded is graph else live(folded)

    def _expr(self, node: Node, known: Mapping[str, WeightExpr]) -> WeightExpr | None:
        """The expression of a node that depends on constants alone."""
        if len(node.outputs) != 1 or _is_never(node) or not _is_static(node):
            return None
        numel = node.output.type.numel
        if not isinstance(numel, int) or numel > self.options.limit:
            return None
        args: list[WeightExpr] = []
        for operand in node.inputs:
            found = self._operand(operand, known)
            if found is None:
                return None
            args.append(found)
        if not args and traits_of(node.op).role is not Role.CONSTANT:
            return None
        return apply(node.op, *args, **node.attrs)

    def _operand(
        self, operand: Operand | None, known: Mapping[str, WeightExpr]
    ) -> WeightExpr | None:
        if isinstance(operand, Weight):
            return self.program.weights.get(operand.name) if self.options.weights else None
        return known.get(operand.name) if operand is not None else None

    def _weight(self, value: Value, expr: WeightExpr) -> Weight:
        """A name for the expression: after the weight it is made of, or after the value."""
        first = next(sources(expr), None)
        op = expr.op if isinstance(expr, Apply) else "folded"
        base = f"constant.{value.name}" if first is None else f"{first.key}.{op}"
        taken = self.program.weights.keys() | self.added.keys()
        name = GraphBuilder(taken=set(taken)).fresh(base)
        for other, same in self.added.items():
            if same == expr:
                name = other
        self.added[name] = expr
        return Weight(name, expr.type)


def _is_never(node: Node) -> bool:
    """Whether a node is no constant whatever it reads: regions, caches, what other ranks say."""
    definition = lookup(node.op)
    cached = definition.traits.role is Role.WRITE and definition.has_operand("lengths")
    return cached or definition.traits.role in (Role.REGION, Role.COLLECTIVE)


def _is_static(node: Node) -> bool:
    """Whether neither the result's type nor an attribute, as `arange`'s start, has a symbol."""
    given = [x for v in node.attrs.values() for x in (v if isinstance(v, tuple) else (v,))]
    return node.output.type.is_static and not any(isinstance(x, Sym) for x in given)


def _read_by_others(graph: Graph, known: Mapping[str, WeightExpr]) -> set[str]:
    """Constants that something which is not constant reads."""
    wanted = {x.name for x in graph.outputs if x.name in known}
    for node in graph.nodes:
        if node.outputs[0].name not in known:
            wanted |= {x.name for x in node.operands if isinstance(x, Value) and x.name in known}
    return wanted


def _worth(expr: WeightExpr) -> bool:
    """Whether an expression is more than a range, a fill or a view of those."""
    if not isinstance(expr, Apply):
        return True
    cheap = expr.op == "cast" or traits_of(expr.op).role in (Role.VIEW, Role.CONSTANT)
    return not cheap or any(_worth(a) for a in expr.args)


def _number(expr: WeightExpr) -> float | None:
    """The value of a constant of one element that reads no weight, where fp64 holds it."""
    if expr.type.numel != 1 or any(True for _ in sources(expr)):
        return None
    number = evaluate(expr, _NOTHING).item()
    return None if isinstance(number, int) and float(number) != number else float(number)
