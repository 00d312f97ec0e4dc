"""Write new rows into preallocated caches instead of growing copies of them.

What           cache inputs of P rows become caches of capacity C, append becomes cache_write, and
               attention runs over all C rows, of which `lengths` says how many are seen. With
               `page`, caches are pages [N,page,w] that sequences take as they grow: row t of
               sequence b is in page block_table[b,t/page], one table [B,M] for all caches.
Why it pays    a decode step no longer copies the past, and no shape grows from step to step. With
               pages memory goes to tokens that are there, not to max_context rows a sequence.
Preconditions  stage CANONICAL or OPTIMIZED; in all entries P is the extent of declared caches
               alone, each read by one append, and the grown rows go row by row into attention that
               masks by lengths, or out as the cache: a sum would count rows past the end. Pages
               are read by attention that takes a block table, rows seen as heads or as they are,
               and by nothing else. Otherwise the program stays as it is.
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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.ir.dims import Dim, Range, Sym, free_symbols, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.interface import Storage
from dsc.ir.limits import BATCH, BLOCKS, CAPACITY, PAGES, PAST
from dsc.ir.op import operand_index, traits_of
from dsc.ir.paging import BLOCK_TABLE, takes_pages
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

RULE = "append"
ROW_BY_ROW = frozenset({"concat", "linear", "rms_norm", "layer_norm"})
"""What works on rows one by one, beside pointwise operators and views."""
Obstacle = tuple[str, str, tuple[str, ...]]
"""Where something is in the way, why, and the values to blame."""


@dataclass(frozen=True)
class AppendCacheInPlace(Pass):
    """Turn every append on a declared cache into cache_write; `slack` rows take padding."""

    slack: int = option(512, least=0)
    page: int = option(0, least=0)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # attention sums over all rows that there are where it summed over P + S

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite the entries that have caches: all, or none."""
        graphs = program.entries.values()
        if not any(map(appends_of, graphs)):
            return program.at(Stage.OPTIMIZED)
        obstacles = [each for graph in graphs for each in _obstacles(graph, self.page > 0)]
        added = self._sizes(program)
        taken = added.keys() & program.symbols.keys()
        obstacles += [("", f"the symbol {s} has another meaning here", ()) for s in sorted(taken)]
        for where, why, culprits in obstacles:
            report.miss(RULE, where, why, culprits)
        if obstacles:
            return program.at(Stage.OPTIMIZED)
        entries = {n: self._in_place(g, report) for n, g in program.entries.items()}
        kept = {k: r for k, r in program.symbols.items() if k != PAST}
        storage = Storage.PAGED if self.page else Storage.CONTIGUOUS
        interface = program.interface.fitted(entries.values(), storage)
        made = replace(program, entries=entries, symbols=kept | added, interface=interface)
        return made.at(Stage.OPTIMIZED)

    def _sizes(self, program: Program) -> dict[str, Range]:
        """The symbols that take the place of the past, and their ranges."""
        past = program.symbols[PAST].hi
        if not self.page:
            return {CAPACITY: Range(1, past + self.slack)}
        sequences = program.symbols[BATCH].hi if BATCH in program.symbols else 1
        return {
            PAGES: Range(1, sequences * -(-max(1, past) // self.page)),
            BLOCKS: Range(1, -(-(max(1, past) + self.slack) // self.page)),
        }

    def _in_place(self, graph: Graph, report: PassReport) -> Graph:
        appends = appends_of(graph)
        if not appends:
            return graph
        written = {node.output.name for node in appends}
        caches = {node["past"].name for node in appends}
        new, lengths = appends[0]["new"].type.shape[1], appends[0]["lengths"]
        seen = _seen(graph) if self.page else {}
        rows: tuple[Dim, ...] = (symbol(CAPACITY),)
        moved = graph.substitute({PAST: rows[0] - new})
        tables: list[Value] = []
        if self.page:
            rows = (symbol(PAGES), self.page)
            shape = (lengths.type.shape[0], symbol(BLOCKS))
            tables.append(Value(BLOCK_TABLE, TensorType(DType.i64, shape)))

        def room(v: Value) -> Value:
            shape = (*v.type.shape[: 2 - len(rows)], *rows, *v.type.shape[2:])
            return Value(v.name, v.type.with_shape(shape))

        inputs = [room(v) if v.name in caches else v for v in moved.inputs]
        first = next(i for i, v in enumerate(inputs) if v.name in caches)
        inputs[first:first] = tables

        def write(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            name = node.outputs[0].name
            op = "cache_write" if name in written else node.op
            if name in written:
                report.fire(RULE, places=[node.loc])
            elif not any(x.name in seen for x in node.operands):
                return None
            b.taken.discard(name)
            if name in seen and name not in written:  # rows seen as heads
                shape = (*rows, *node.output.type.shape[2:])
                return b.call(op, *operands, hint=name, shape=shape)
            given = list(operands)
            if tables:
                given += [None] * (operand_index(op, BLOCK_TABLE) - len(given))
            return b.call(op, *given, *tables, hint=name, **node.attrs)

        places = {v.name: i for i, v in enumerate(inputs)}
        aliases = tuple((o, places[graph.inputs[i].name]) for o, i in graph.aliases)
        return replace(rebuild(moved, write, inputs), aliases=aliases)


def appends_of(graph: Graph) -> list[Node]:
    """The nodes that grow a declared cache, and give it back."""
    grown = {(graph.inputs[i].name, graph.outputs[o].name) for o, i in graph.aliases}
    appends = [n for n in graph.nodes if n.op == "append"]
    return [n for n in appends if (n["past"].name, n.output.name) in grown]


def _seen(graph: Graph) -> dict[str, str]:
    """By name the grown rows, and what shows them under another shape, as heads: of which cache."""
    seen = {node.output.name: node["past"].name for node in appends_of(graph)}
    for node in graph.nodes:
        if traits_of(node.op).role is not Role.VIEW or "shape" not in node.attrs:
            continue
        (x,) = node.operands
        if x.name in seen and node.output.type.shape[:2] == x.type.shape[:2]:
            seen[node.output.name] = seen[x.name]
    return seen


def _obstacles(graph: Graph, paged: bool) -> Iterator[Obstacle]:
    """What would compute something else over rows in place than over P + S."""
    grown = {n.output.name: n for n in appends_of(graph)}
    caches = {n["past"].name for n in grown.values()}
    alike = {(n["new"].type.shape[1], n["lengths"]) for n in grown.values()}
    readers = Counter(x.name for n in graph.nodes for x in n.operands)
    rows: set[str] = set()
    updates = {o for o, _ in graph.aliases}
    outputs = {x.name for x in graph.outputs}
    seen = _seen(graph)
    own = {x.name for i, x in enumerate(graph.outputs) if i not in updates or x.name not in grown}
    for value in graph.inputs:
        if PAST in value.type.symbols and value.name not in caches:
            yield "", f"{value} has the extent {PAST} and is no cache", (value.name,)
    if paged and any(v.name == BLOCK_TABLE for v in graph.values()):
        yield "", f"there is a {BLOCK_TABLE} already", (BLOCK_TABLE,)
    for node in graph.nodes:
        names = {v.name for v in node.outputs}
        where, culprits = node.loc or graph.name, tuple(v.name for v in node.outputs)
        if names & grown.keys():
            past = node["past"]
            if str(past.type.shape[1]) != PAST or len(alike) > 1:
                why = f"{past} has not {PAST} rows, or its new rows are not like the others"
                yield where, why, culprits
            if readers[past.name] > 1 or past.name in outputs:
                yield where, f"{past} is read elsewhere as well", (past.name,)
        else:
            why = _obstacle(node, rows, caches) or (paged and _unpaged(node, rows, seen)) or ""
            if not why and traits_of(node.op).masked and rows & {x.name for x in node.operands}:
                at = node["lengths"]
                late = any(at != lengths for _, lengths in alike)
                why = "rows are written and read at different lengths" if late else ""
            if why:
                yield where, why, culprits
            if not _holds(node.outputs):
                continue
        rows |= names
        if names & own:
            yield where, "rows of a cache are an output of their own", culprits


def _obstacle(node: Node, rows: Collection[str], caches: Collection[str]) -> str:
    """Why a node that appends nothing is in the way; empty when it is not."""
    grown = {x.name for x in node.operands if x.name in rows}
    if not grown:
        reads = any(x.name in caches for x in node.operands)
        has = reads or _holds(node.outputs) or PAST in _symbols(node.attrs.values())
        return f"{node.op} has to do with {PAST} rows and updates no declared cache" if has else ""
    masked = {node[name].name for name in traits_of(node.op).masked}
    if masked:
        hidden = grown <= masked and not _holds(node.outputs)
        done = node.get("lengths") is not None and hidden
        return "" if done else f"{node.op} does not mask rows past the end"
    along = "axis" in node.attrs and any(
        _holds_at(x, node.attrs["axis"]) for x in (*node.operands, *node.outputs)
    )
    alone = node.op in ROW_BY_ROW or traits_of(node.op).role in (Role.POINTWISE, Role.VIEW)
    if not alone or along or not all(_holds([v]) for v in node.outputs):
        return f"{node.op} reads rows of a cache, also those past the end"
    return ""


def _unpaged(node: Node, rows: Collection[str], seen: Mapping[str, str]) -> str:
    """Why a node cannot read rows in pages; empty when it can, or reads none."""
    read = next((x.name for x in node.operands if x.name in rows), None)
    masked = {node[name].name for name in traits_of(node.op).masked}
    taken = takes_pages(node.op) and masked <= seen.keys()
    if read is None or node.outputs[0].name in seen or taken:
        return ""
    return f"{node.op} reads the cache {seen.get(read, read)}; attention takes pages"


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
