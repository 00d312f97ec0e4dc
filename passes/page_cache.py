"""Keep latent caches in pages that sequences take as they grow, in the place of growing copies.

What           the two caches of a layer, [B,P,c] and [B,P,r], become pages [N,page,c+r] of whole
               rows; appends become one page_write through a block table [B,M], and attention reads
               the pages that the table names. Row t of sequence b is in page block_table[b,t/page].
Why it pays    memory goes to tokens that are there, not to max_context rows a sequence; sequences
               may come, go and share pages; nothing is copied as they grow.
Preconditions  stage CANONICAL or OPTIMIZED; caches that are declared updates, written by append and
               read by mla_attention or latent_attention alone, in every entry; nothing else of
               extent P. Otherwise the program stays as it is.
Before         graph main(%q: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,S,4], %r: f32[B,S,2],
                 %lengths: i64[B], %past.latent: f32[B,P,4], %past.rope: f32[B,P,2]) {
                 %latent = append %past.latent, %c, %lengths : f32[B,P+S,4]
                 %rope = append %past.rope, %r, %lengths : f32[B,P+S,2]
                 %o = latent_attention %q, %qr, %latent, %rope, %lengths {scale=0.5} : f32[B,S,2,4]
                 return %o, %latent as "present.latent" updates %past.latent,
                   %rope as "present.rope" updates %past.rope
               }
After          graph main(%q: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,S,4], %r: f32[B,S,2],
                 %lengths: i64[B], %block_table: i64[B,M], %past.pages: f32[N,64,6]) {
                 %present.pages = page_write %past.pages, %c, %r, %block_table, %lengths
                   : f32[N,64,6]
                 %o = paged_latent_attention %q, %qr, %present.pages, %block_table, %lengths
                   {scale=0.5} : f32[B,S,2,4]
                 return %o, %present.pages as "present.pages" updates %past.pages
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsc.ir.analyses import uses
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.paging import BLOCK_TABLE, PAGE
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

PAST, PAGES, BLOCKS = "P", "N", "M"
RULE = "page"
PAGED = {"latent_attention": "paged_latent_attention", "mla_attention": "paged_mla_attention"}


@dataclass(frozen=True)
class PageCache(Pass):
    """Put every latent cache into pages of `page` rows."""

    page: int = option(PAGE, least=1)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # attention sums over whole pages where it summed over P + S rows

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite all entries, or none: they share their caches."""
        caches: dict[str, list[_Cache]] = {}
        misses: list[Miss] = []
        for name, graph in program.entries.items():
            caches[name], found = _caches(graph)
            misses += found
        if not any(caches.values()) and not misses:
            return program.at(Stage.OPTIMIZED)
        taken = [s for s in (PAGES, BLOCKS) if s in program.symbols]
        misses += [Miss("", f"the symbol {s} has another meaning here") for s in taken]
        for miss in misses:
            report.miss(RULE, miss.where, miss.reason, miss.culprits)
        if misses:
            return program.at(Stage.OPTIMIZED)
        entries = {n: self._paged(g, caches[n], report) for n, g in program.entries.items()}
        blocks = -(-max(1, program.symbols[PAST].hi) // self.page)
        sequences = program.symbols["B"].hi if "B" in program.symbols else 1
        symbols = {k: r for k, r in program.symbols.items() if k != PAST}
        symbols |= {PAGES: Range(1, sequences * blocks), BLOCKS: Range(1, blocks)}
        paged = {c.pages: [v.name for v in c.inputs] for found in caches.values() for c in found}
        meta = {**program.meta, "paged": paged}
        return replace(program, entries=entries, symbols=symbols, meta=meta, stage=Stage.OPTIMIZED)

    def _paged(self, graph: Graph, caches: Sequence[_Cache], report: PassReport) -> Graph:
        """The graph over pages; `caches` are all that it has."""
        if not caches:
            return graph
        batch = caches[0].appends[0].operands[2].type.shape[0]
        table = Value(BLOCK_TABLE, TensorType(DType.i64, (batch, symbol(BLOCKS))))
        pages = {c.pages: Value(c.pages, self._pages_type(c)) for c in caches}
        by_append = {a.output.name: c for c in caches for a in c.appends}
        pending: dict[str, Operand | None] = {}
        written: dict[str, Operand] = {}

        def rewrite(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            cache = by_append.get(node.output.name) if node.op == "append" else None
            if cache is not None:
                pending[node.output.name] = operands[1]
                latent, rope = (pending.get(a.output.name) for a in cache.appends)
                if latent is None or rope is None:
                    return [pages[cache.pages]]
                (written[cache.pages],) = b.call(
                    "page_write", pages[cache.pages], latent, rope, table, operands[2],
                    hint=cache.present,
                )  # fmt: skip
                report.fire(RULE, places=[node.loc])
                return [written[cache.pages]]
            if node.op not in PAGED:
                return None
            rows = written[by_append[node.operands[2].name].pages]
            b.taken.discard(node.output.name)
            return b.call(
                PAGED[node.op], *operands[:2], rows, table, *operands[4:],
                scale=node.attrs["scale"], hint=node.output.name,
            )  # fmt: skip

        old = {v.name for c in caches for v in c.inputs}
        made = rebuild(graph, rewrite, [*graph.inputs, table, *pages.values()])
        return _with_pages(made, caches, written, old, [table, *pages.values()])

    def _pages_type(self, cache: _Cache) -> TensorType:
        latent, rope = (v.type for v in cache.inputs)
        return latent.with_shape((symbol(PAGES), self.page, latent.shape[2] + rope.shape[2]))


@dataclass(frozen=True)
class _Cache:
    """One layer's cache: the appends to its latent and rope part, their inputs and outputs.

    `pages` and `present` name the input and the output that take their place.
    """

    appends: tuple[Node, Node]
    inputs: tuple[Value, Value]
    outputs: tuple[int, int]
    pages: str
    present: str


@dataclass(frozen=True)
class Miss:
    """Why a cache stays as it is, and the values to blame."""

    where: str
    reason: str
    culprits: tuple[str, ...] = ()


def _caches(graph: Graph) -> tuple[list[_Cache], list[Miss]]:
    """The caches of a graph by layer, and what stands in the way of paging them."""
    declared = {graph.inputs[i].name: o for o, i in graph.aliases}
    appends = {
        n.output.name: n for n in graph.nodes if n.op == "append" and n.operands[0].name in declared
    }
    found: dict[str, _Cache] = {}
    misses: list[Miss] = []
    for node in graph.nodes:
        if node.op not in PAGED:
            continue
        latent, rope = (appends.get(x.name) for x in node.operands[2:4])
        if latent is None or rope is None:
            culprits = tuple(x.name for x in node.operands[2:4])
            misses.append(Miss(node.loc, "its cache is no declared update", culprits))
            continue
        if len({x.operands[-1].name for x in (latent, rope, node)}) > 1:
            reason = "rows are written and read at different lengths"
            misses.append(Miss(node.loc, reason, (node.output.name,)))
            continue
        found[latent.output.name] = _cache(graph, (latent, rope), declared)
    paired = {a.output.name for c in found.values() for a in c.appends}
    misses += _other_uses(graph, appends, paired, declared)
    if appends:
        misses += _of_past_extent(graph, declared, appends)
        if any(v.name == BLOCK_TABLE for v in graph.values()):
            misses.append(Miss("", f"there is a {BLOCK_TABLE} already", (BLOCK_TABLE,)))
    return list(found.values()), misses


def _cache(graph: Graph, appends: tuple[Node, Node], declared: dict[str, int]) -> _Cache:
    latent, rope = (graph.input(a.operands[0].name) for a in appends)
    outputs = declared[latent.name], declared[rope.name]
    names = [graph.output_names[o] for o in outputs]
    present = _joined(*names)
    return _Cache(appends, (latent, rope), outputs, _joined(latent.name, rope.name), present)


def _joined(latent: str, rope: str) -> str:
    """One name for two parts: `past.0.latent` and `past.0.rope` are `past.0.pages`."""
    stem = latent.rpartition(".")[0]
    return f"{stem or latent}.pages" if stem == rope.rpartition(".")[0] else f"{latent}.pages"


def _other_uses(
    graph: Graph, appends: dict[str, Node], paired: set[str], declared: dict[str, int]
) -> Iterator[Miss]:
    """Caches that something else reads than attention over a latent, or that are paired twice."""
    found = uses(graph)
    for name, append in appends.items():
        past = append.operands[0].name
        readers = [(n, i) for n, i in found[name] if n is not None]
        strange = [n for n, i in readers if n.op not in PAGED or i not in (2, 3)]
        outputs = [i for n, i in found[name] if n is None]
        if strange:
            reason = f"{strange[0].op} reads the cache {past}; only latent caches have pages"
            yield Miss(strange[0].loc, reason, (name,))
        elif name not in paired and not readers:
            yield Miss(append.loc, f"nothing reads the cache {past}", (name,))
        elif outputs != [declared[past]] or len(found[past]) > 1:
            yield Miss(append.loc, f"the cache {past} is used besides", (past,))
        elif len({n.operands[5 - i].name for n, i in readers}) > 1:
            yield Miss(append.loc, f"the cache {past} has several counterparts", (name,))


def _of_past_extent(
    graph: Graph, declared: dict[str, int], appends: dict[str, Node]
) -> Iterator[Miss]:
    """Values other than caches that have an axis of P rows: pages have none."""
    for value in graph.values():
        if PAST in value.type.symbols and value.name not in declared | appends:
            yield Miss("", f"%{value.name} has the extent {PAST}", (value.name,))
            return


def _with_pages(
    graph: Graph,
    caches: Sequence[_Cache],
    written: dict[str, Operand],
    old: set[str],
    added: Sequence[Value],
) -> Graph:
    """The rebuilt graph with its new inputs where the old caches were, and its new outputs."""
    kept = [v for v in graph.inputs if v.name not in old | {v.name for v in added}]
    first = min(i for i, v in enumerate(graph.inputs) if v.name in old)
    inputs = [*kept[:first], *added, *kept[first:]]
    place = {v.name: i for i, v in enumerate(inputs)}
    at_latent = {c.outputs[0]: c for c in caches}
    at_rope = {c.outputs[1] for c in caches}
    carried = dict(graph.aliases)
    outputs: list[Operand] = []
    names: list[str] = []
    aliases: list[tuple[int, int]] = []
    for index, (operand, name) in enumerate(zip(graph.outputs, graph.output_names, strict=True)):
        cache = at_latent.get(index)
        if index in at_rope:
            continue
        if cache is not None:
            aliases.append((len(outputs), place[cache.pages]))
        elif index in carried:
            aliases.append((len(outputs), place[graph.inputs[carried[index]].name]))
        outputs.append(operand if cache is None else written[cache.pages])
        names.append(name if cache is None else cache.present)
    return Graph(
        graph.name, tuple(inputs), graph.nodes, tuple(outputs), tuple(names), tuple(aliases)
    )
