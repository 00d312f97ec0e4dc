"""Which values an entry's inputs must have so that no operator reads or writes past a tensor.

An operator's declaration says what its index operands may hold (`Within`). Here these demands are
carried back to the inputs of a graph, through bodies and through operators that only rearrange
elements; results such as a router's choices are known to lie within. What is computed in another
way is listed apart: only a check at run time can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dsc.ir.dims import Dim, Range, bounds, free_symbols
from dsc.ir.graph import Graph, Node, Operand, Weight
from dsc.ir.op import OpDef, lookup
from dsc.ir.paging import BLOCK_TABLE, PAGES, reads_pages
from dsc.ir.traits import Within
from dsc.ir.types import DType

INTEGERS = frozenset({DType.i64, DType.i32, DType.i8, DType.u8})


@dataclass(frozen=True, slots=True)
class Span:
    """The values low <= x <= high; `ascending`: in the order of the elements."""

    low: Dim
    high: Dim
    ascending: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """What an entry demands of every value of an input; `what` says what each of them is."""

    input: str
    span: Span
    what: str


@dataclass(frozen=True, slots=True)
class PageDemand:
    """Rows below `lengths[b]` must lie in pages that `table` names, of `rows` each."""

    table: str
    lengths: str
    rows: int

    @property
    def what(self) -> str:
        """What is demanded, for a user."""
        return "must name a page for every token in the cache"


@dataclass(frozen=True, slots=True)
class Computed:
    """An index that the operator `op` at `loc` takes from `value`, which an entry computes.

    `value` is a value or a weight at the top of the graph, `None` where a region computes it.
    """

    node: Node
    value: Operand | None
    span: Span
    what: str


@dataclass(frozen=True)
class IndexRanges:
    """What a graph demands of its inputs, and the indices that it computes itself."""

    demands: tuple[Demand, ...]
    pages: tuple[PageDemand, ...]
    computed: tuple[Computed, ...]

    @property
    def facts(self) -> list[list[str]]:
        """Input, least and largest value, and words, for the manifest: what a run.py checks."""
        return [[d.input, str(d.span.low), str(d.span.high), d.what] for d in self.demands]


Source: TypeAlias = str | Span | Operand | None
"""Where values come from: an input by name, an operator that gives a span, or some other operand.

`None` stands for what a region computes.
"""
Sources: TypeAlias = dict[Operand, Source]


def index_ranges(graph: Graph, symbols: Mapping[str, Range]) -> IndexRanges:
    """The demands of a graph on the values of its inputs, each once."""
    walk = _Walk(symbols)
    walk.graph(graph, {v: v.name for v in graph.inputs}, None)
    return IndexRanges(tuple(walk.demands), tuple(walk.pages), tuple(walk.computed))


class _Walk:
    """Follows indices through a graph and the bodies of its regions, in order."""

    def __init__(self, symbols: Mapping[str, Range]) -> None:
        self.demands: dict[Demand, None] = {}
        self.pages: dict[PageDemand, None] = {}
        self.computed: list[Computed] = []
        self._symbols = symbols

    def graph(self, graph: Graph, sources: Sources, region: Node | None) -> None:
        """Walk a graph whose inputs have these sources; `region` owns it where it is a body."""
        for node in graph.nodes:
            if node.body is not None:
                given = [_source(x, sources, region) for x in node.operands]
                inner: Sources = dict(zip(node.body.inputs, given, strict=True))
                self.graph(node.body, inner, region or node)
                for value, result in zip(node.outputs, node.body.outputs, strict=True):
                    found = inner.get(result)
                    if isinstance(found, (str, Span)):
                        sources[value] = found
                continue
            definition = lookup(node.op)
            for name, within in definition.within.items():
                self._demand(node, definition, name, within, sources, region)
            self._pages(node, sources)
            sources |= _results(node, sources, region)

    def _demand(
        self,
        node: Node,
        definition: OpDef,
        name: str,
        within: Within,
        sources: Sources,
        region: Node | None,
    ) -> None:
        index = node.get(name)
        if index is None:
            return
        types = [None if x is None else x.type for x in node.inputs]
        low, high = definition.range_of(within, types, node.attrs)
        span = Span(low, high, within.ascending)
        source = _source(index, sources, region)
        if isinstance(source, str):
            self.demands[Demand(source, span, within.what)] = None
        elif isinstance(source, Span):
            if not self._inside(source, span):
                self.computed.append(Computed(region or node, None, span, within.what))
        else:
            self.computed.append(Computed(region or node, source, span, within.what))

    def _pages(self, node: Node, sources: Sources) -> None:
        if not reads_pages(node):
            return
        rows = node[PAGES].type.shape[1]
        names = [sources.get(node[x]) for x in (BLOCK_TABLE, "lengths")]
        if isinstance(names[0], str) and isinstance(names[1], str) and isinstance(rows, int):
            self.pages[PageDemand(names[0], names[1], rows)] = None

    def _inside(self, given: Span, wanted: Span) -> bool:
        """Whether values of one span always lie in another."""
        room = (given.low - wanted.low, wanted.high - given.high)
        known = all(free_symbols(d) <= self._symbols.keys() for d in room)
        ordered = given.ascending or not wanted.ascending
        return ordered and known and all(bounds(d, self._symbols).lo >= 0 for d in room)


def known_span(x: Operand, nodes: Sequence[Node]) -> Span | None:
    """The values that a result of these nodes is known to have, by what operators declare."""
    kept = True
    for node in reversed(nodes):
        if x not in node.outputs or node.body is not None:
            continue
        span = _given(node, node.outputs.index(x))
        if span is not None:
            return span if kept else replace(span, ascending=False)
        holds = _holds(node)
        if not holds:
            return None
        x, kept = node.operands[0], kept and holds == "order"
    return None


def _source(x: Operand, sources: Sources, region: Node | None) -> Source:
    """Where an operand comes from."""
    if isinstance(x, Weight):
        return x
    known = sources.get(x)
    return known if known is not None or region is not None else x


def _results(node: Node, sources: Sources, region: Node | None) -> Sources:
    """The sources of a node's results, as far as something is known of them."""
    holds = _holds(node)
    found: Sources = {}
    for place, value in enumerate(node.outputs):
        source: Source = _given(node, place)
        if source is None and holds:
            source = _source(node.operands[0], sources, region)
            if isinstance(source, Span) and holds != "order":
                source = replace(source, ascending=False)
            elif not isinstance(source, Span) and holds == "some":
                source = None  # what is demanded of a part is not demanded of the whole
        if source is not None:
            found[value] = source
    return found


def _given(node: Node, place: int) -> Span | None:
    """The values that a node's result is declared to have."""
    definition = lookup(node.op)
    within = definition.gives.get(place)
    if within is None:
        return None
    types = [None if x is None else x.type for x in node.inputs]
    return Span(*definition.range_of(within, types, node.attrs), within.ascending)


def _holds(node: Node) -> str:
    """What a node's results hold of the elements of its first operand (`OpDef.elements`)."""
    return "order" if _widens(node) else lookup(node.op).elements


def _widens(node: Node) -> bool:
    """Whether a node makes wider integers of integers."""
    if node.op != "cast":
        return False
    given, made = node.operands[0].type.dtype, node.output.type.dtype
    return {given, made} <= INTEGERS and made.itemsize >= given.itemsize
