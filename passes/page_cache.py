"""Keep caches in pages that sequences take as they grow, in the place of growing copies.

What           a cache [B,P,w] becomes pages [N,page,w], append becomes a cache_write through a
               block table [B,M], one for all caches, and attention reads the pages that the table
               names. Row t of sequence b is in page block_table[b,t/page].
Why it pays    memory goes to tokens that are there, not to max_context rows a sequence; sequences
               may come, go and share pages; nothing is copied as they grow.
Preconditions  stage CANONICAL or OPTIMIZED; caches that are declared updates, written by append and
               read only by attention that takes a block table, in every entry; nothing else of
               extent P. Otherwise the program stays as it is.
Before         graph main(%q: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,S,4], %r: f32[B,S,2],
                 %n: i64[B], %past.latent: f32[B,P,4], %past.rope: f32[B,P,2]) {
                 %latent = append %past.latent, %c, %n : f32[B,P+S,4]
                 %rope = append %past.rope, %r, %n : f32[B,P+S,2]
                 %o = latent_attention %q, %qr, %latent, %rope, %n {scale=0.5} : f32[B,S,2,4]
                 return %o, %latent as "present.latent" updates %past.latent,
                   %rope as "present.rope" updates %past.rope
               }
After          graph main(%q: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,S,4], %r: f32[B,S,2],
                 %n: i64[B], %block_table: i64[B,M], %past.latent: f32[N,64,4],
                 %past.rope: f32[N,64,2]) {
                 %latent = cache_write %past.latent, %c, %n, %block_table : f32[N,64,4]
                 %rope = cache_write %past.rope, %r, %n, %block_table : f32[N,64,2]
                 %o = latent_attention %q, %qr, %latent, %rope, %n, %block_table {scale=0.5}
                   : f32[B,S,2,4]
                 return %o, %latent as "present.latent" updates %past.latent,
                   %rope as "present.rope" updates %past.rope
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.ir.analyses import Use, uses
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.interface import Storage
from dsc.ir.op import traits_of
from dsc.ir.paging import BLOCK_TABLE, PAGE, takes_pages
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.passes.append_cache_in_place import PAST, appends_of
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

PAGES, BLOCKS = "N", "M"
RULE = "page"


@dataclass(frozen=True)
class PageCache(Pass):
    """Put every cache into pages of `page` rows; a table has room for `slack` rows of padding."""

    page: int = option(PAGE, least=1)
    slack: int = option(512, least=0)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # attention sums over whole pages where it summed over P + S rows

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite all entries, or none: they share their caches."""
        graphs = program.entries.values()
        misses = [miss for graph in graphs for miss in _obstacles(graph)]
        if not misses and not any(map(appends_of, graphs)):
            return program.at(Stage.OPTIMIZED)
        taken = [s for s in (PAGES, BLOCKS) if s in program.symbols]
        misses += [Miss("", f"the symbol {s} has another meaning here") for s in taken]
        for miss in misses:
            report.miss(RULE, miss.where, miss.reason, miss.culprits)
        if misses:
            return program.at(Stage.OPTIMIZED)
        past = max(1, program.symbols[PAST].hi)
        sequences = program.symbols["B"].hi if "B" in program.symbols else 1
        symbols = {k: r for k, r in program.symbols.items() if k != PAST}
        symbols[PAGES] = Range(1, sequences * -(-past // self.page))
        symbols[BLOCKS] = Range(1, -(-(past + self.slack) // self.page))
        entries = {n: self._paged(g, report) for n, g in program.entries.items()}
        interface = program.interface.fitted(entries.values(), Storage.PAGED)
        return replace(
            program,
            entries=entries,
            symbols=symbols,
            stage=Stage.OPTIMIZED,
            interface=interface,
        )

    def _paged(self, graph: Graph, report: PassReport) -> Graph:
        writes = {node.output.name: node for node in appends_of(graph)}
        if not writes:
            return graph
        batch = next(iter(writes.values()))["lengths"].type.shape[0]
        table = Value(BLOCK_TABLE, TensorType(DType.i64, (batch, symbol(BLOCKS))))
        caches = {node["past"].name for node in writes.values()}

        def pages(x: Value) -> Value:
            shape = (symbol(PAGES), self.page, *x.type.shape[2:])
            return Value(x.name, x.type.with_shape(shape))

        inputs = [pages(v) if v.name in caches else v for v in graph.inputs]
        inputs.insert(next(i for i, v in enumerate(inputs) if v.name in caches), table)

        def rewrite(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            written = node.outputs[0].name in writes
            if not written and not any(x.name in writes for x in node.operands):
                return None
            b.taken.discard(node.output.name)
            if written:
                report.fire(RULE, places=[node.loc])
            op = "cache_write" if written else node.op
            return b.call(op, *operands, table, hint=node.output.name, **node.attrs)

        made = rebuild(graph, rewrite, inputs)
        places = {v.name: i for i, v in enumerate(inputs)}
        aliases = tuple((o, places[graph.inputs[i].name]) for o, i in graph.aliases)
        return replace(made, aliases=aliases)


@dataclass(frozen=True)
class Miss:
    """Why a cache stays as it is, and the values to blame."""

    where: str
    reason: str
    culprits: tuple[str, ...] = ()


def _obstacles(graph: Graph) -> Iterator[Miss]:
    """What stands in the way of pages in a graph."""
    declared = {graph.inputs[i].name: o for o, i in graph.aliases}
    writes = {node.output.name: node for node in appends_of(graph)}
    for node in graph.nodes:
        if takes_pages(node.op) and traits_of(node.op).masked:
            yield from _unwritten(node, writes)
    readers = uses(graph)
    for name, write in writes.items():
        yield from _other_uses(readers, name, write, declared[write["past"].name])
    if not writes:
        return
    if any(v.name == BLOCK_TABLE for v in graph.values()):
        yield Miss("", f"there is a {BLOCK_TABLE} already", (BLOCK_TABLE,))
    for value in graph.values():
        if PAST in value.type.symbols and value.name not in declared | writes:
            yield Miss("", f"%{value.name} has the extent {PAST}", (value.name,))
            return


def _unwritten(node: Node, writes: Mapping[str, Node]) -> Iterator[Miss]:
    """Rows that attention reads and no append writes, or one at other lengths."""
    read = [node[name].name for name in traits_of(node.op).masked]
    if not set(read) <= writes.keys():
        yield Miss(node.loc, "its cache is no declared update", tuple(read))
    elif {writes[name]["lengths"] for name in read} != {node["lengths"]}:
        reason = "rows are written and read at different lengths"
        yield Miss(node.loc, reason, (node.output.name,))


def _other_uses(
    readers: Mapping[str, Sequence[Use]], name: str, write: Node, output: int
) -> Iterator[Miss]:
    """Why a cache is no attention's alone."""
    past = write["past"].name
    for node, place in readers[name]:
        masked = () if node is None else [node.get(x) for x in traits_of(node.op).masked]
        if node is None and place == output:
            continue
        if node is None or readers[past] != [(write, 0)]:
            yield Miss(write.loc, f"the cache {past} is used besides", (past,))
        elif not takes_pages(node.op) or node.inputs[place] not in masked:
            reason = f"{node.op} reads the cache {past}; attention over a latent takes pages"
            yield Miss(node.loc, reason, (name,))
