"""Write new rows into preallocated caches instead of growing copies of them.

What           cache inputs of P rows become caches of capacity C, append becomes cache_write, and
               attention runs over all C rows, of which `lengths` says how many are seen.
Why it pays    a decode step no longer copies the past, and no shape grows from step to step.
Preconditions  stage CANONICAL or OPTIMIZED; in all entries P is the extent of declared caches
               alone, each read by one append, and the grown rows go row by row into attention that
               masks by lengths, or out as the cache: a sum would count rows past the end.
Before         graph main(%past: f32[B,P,4], %new: f32[B,S,4], %n: i64[B]) {
                 %c = append %past, %new, %n : f32[B,P+S,4]
                 return %c as "present" updates %past
               }
After          graph main(%past: f32[B,C,4], %new: f32[B,S,4], %n: i64[B]) {
                 %c = cache_write %past, %new, %n : f32[B,C,4]
                 return %c as "present" updates %past
               }
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dsc.ir.dims import Dim, Range, Sym, free_symbols, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.interface import Storage
from dsc.ir.op import named, traits_of
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

PAST, CAPACITY = "P", "C"
ROW_BY_ROW = named(Role.POINTWISE, Role.VIEW) | {"concat", "linear", "rms_norm"}


@dataclass(frozen=True)
class AppendCacheInPlace(Pass):
    """Turn every append on a declared cache into cache_write; `slack` rows take padding."""

    slack: int = option(512, least=0)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # attention sums over C rows where it summed over P + S

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite the entries that have caches: all, or none."""
        graphs = program.entries.values()
        if not any(appends_of(g) for g in graphs):
            return program.at(Stage.OPTIMIZED)
        for graph in graphs:
            for node, why in _obstacles(graph):
                report.miss("append", node.loc or graph.name, why, [v.name for v in node.outputs])
                return program.at(Stage.OPTIMIZED)
        entries = {n: self._in_place(g, report) for n, g in program.entries.items()}
        symbols = {k: r for k, r in program.symbols.items() if k != PAST}
        symbols[CAPACITY] = Range(1, program.symbols[PAST].hi + self.slack)
        interface = program.interface.fitted(entries.values(), Storage.CONTIGUOUS)
        return replace(
            program,
            entries=entries,
            symbols=symbols,
            stage=Stage.OPTIMIZED,
            interface=interface,
        )

    def _in_place(self, graph: Graph, report: PassReport) -> Graph:
        found = appends_of(graph)
        if not found:
            return graph
        capacity: Dim = symbol(CAPACITY)
        new = found[0].operands[1].type.shape[1]
        caches = set(map(_cache, found))
        moved = graph.substitute({PAST: capacity - new})
        inputs = [
            Value(v.name, v.type.with_shape((v.type.shape[0], capacity, *v.type.shape[2:])))
            if v.name in caches
            else v
            for v in moved.inputs
        ]

        def write(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            if node.op != "append" or _cache(node) not in caches:
                return None
            report.fire("append")
            b.taken.discard(node.output.name)
            return b.call("cache_write", *operands, hint=node.output.name)

        return rebuild(moved, write, inputs)


def appends_of(graph: Graph) -> list[Node]:
    """The nodes that grow a declared cache."""
    caches = {graph.inputs[i].name for _, i in graph.aliases}
    return [n for n in graph.nodes if n.op == "append" and _cache(n) in caches]


def _cache(node: Node) -> str:
    return node.operands[0].name


def _obstacles(graph: Graph) -> Iterator[tuple[Node, str]]:
    """Nodes that would compute something else over C rows than over P + S, and why."""
    grown = {n.output.name: n for n in appends_of(graph)}
    caches = Counter(map(_cache, grown.values()))
    extents = {n.operands[1].type.shape[1] for n in grown.values()}
    readers = Counter(x.name for n in graph.nodes for x in n.operands)
    rows: set[str] = set()
    updates = {graph.outputs[o].name for o, _ in graph.aliases}
    outputs = {x.name for x in graph.outputs}
    for node in graph.nodes:
        names = {v.name for v in node.outputs}
        if names & grown.keys():
            past, new = node.operands[:2]
            if str(past.type.shape[1]) != PAST or len(extents) > 1 or new.name in rows:
                yield node, f"{past} has not {PAST} rows, or its new rows are not like the others"
            if readers[past.name] > 1 or caches[past.name] > 1 or past.name in outputs:
                yield node, f"{past} is read elsewhere as well"
        else:
            why = _obstacle(node, rows, caches)
            if why:
                yield node, why
            if not _holds(node.outputs):
                continue
        rows |= names
        if names & outputs - (updates & grown.keys()):
            yield node, "rows of a cache are an output of their own"


def _obstacle(node: Node, rows: Collection[str], caches: Collection[str]) -> str:
    """Why a node that appends nothing is in the way; empty when it is not."""
    grown = [i for i, x in enumerate(node.inputs) if x is not None and x.name in rows]
    if not grown:
        reads = any(x.name in caches for x in node.operands)
        has = reads or _holds(node.outputs) or PAST in _symbols(node.attrs.values())
        return f"{node.op} has to do with {PAST} rows and is no append" if has else ""
    masked = {node[name].name for name in traits_of(node.op).masked}
    if masked:
        hidden = all(node.inputs[i] is not None and node.operands[i].name in masked for i in grown)
        done = node.get("lengths") is not None and hidden and not _holds(node.outputs)
        return "" if done else f"{node.op} does not mask rows past the end"
    along = "axis" in node.attrs and any(
        _holds_at(x, node.attrs["axis"]) for x in (*node.operands, *node.outputs)
    )
    if node.op not in ROW_BY_ROW or along or not all(_holds([v]) for v in node.outputs):
        return f"{node.op} reads rows of a cache, also those past the end"
    return ""


def _holds(values: Iterable[Operand]) -> bool:
    """Whether a value has as many rows as the past, and more."""
    return any(PAST in v.type.symbols for v in values)


def _holds_at(x: Operand, axis: int) -> bool:
    return PAST in free_symbols(x.type.shape[axis])


def _symbols(values: Iterable[object]) -> set[str]:
    """Symbols of attributes."""
    found: set[str] = set()
    for value in values:
        inner = value if isinstance(value, tuple) else (value,)
        found |= {s for d in inner if isinstance(d, Sym) for s in free_symbols(d)}
    return found
