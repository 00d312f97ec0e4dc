"""Which values an entry's inputs must have so that no operator reads or writes past a tensor.

An operator's declaration says what its index operands may hold (`Within`). Here these demands are
carried back to the inputs of a graph, through bodies and through operators that only rearrange
elements; results such as a router's choices are known to lie within. What is computed in another
way is listed apart: only a check at run time can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dsc.ir.analyses import call_of
from dsc.ir.dims import Dim, Range, bounds, free_symbols, to_json
from dsc.ir.graph import Graph, Node, Operand, Weight
from dsc.ir.op import lookup, operand_index, range_of
from dsc.ir.paging import BLOCK_TABLE, rows_of_page
from dsc.ir.program import Program
from dsc.ir.traits import Within
from dsc.ir.types import DType

INTEGERS = frozenset({DType.i64, DType.i32, DType.i16, DType.i8, DType.u8})
INDEX = "index:"
"""How the names of results begin that `giving_indices` adds."""


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
    """An index that `reader` takes as its operand `place`, and that an entry computes.

    `value` holds it at the top of the graph, where `node` reads it: the reader itself, or the
    region that it is in. It is `None` where the region computes it.
    """

    node: Node
    reader: Node
    place: int
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
    def facts(self) -> list[list[Any]]:
        """Input, least and largest value, and words, for the manifest: what a run.py checks."""
        return [[d.input, to_json(d.span.low), to_json(d.span.high), d.what] for d in self.demands]


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from: an input by name, known values, or some other operand.

    `None` stands for what a region computes. `ordered`: in the order that they have there.
    """

    origin: str | Span | Operand | None
    ordered: bool = True


Sources: TypeAlias = dict[Operand, Source]


def index_ranges(graph: Graph, symbols: Mapping[str, Range]) -> IndexRanges:
    """The demands of a graph on the values of its inputs, each once."""
    walk = _Walk(symbols)
    walk.graph(graph, {v: Source(v.name) for v in graph.inputs}, None)
    return IndexRanges(tuple(walk.demands), tuple(walk.pages), tuple(walk.computed))


def giving_indices(program: Program) -> Program:
    """The program whose entries also give the indices that they compute.

    So whoever runs code that looks at none of them can (`dsc.runtime.admission`).
    """

    def giving(graph: Graph) -> Graph:
        found = index_ranges(graph, program.symbols).computed
        values = dict.fromkeys(c.value for c in found if c.value is not None)
        if not values:
            return graph
        names = (*graph.output_names, *(index_name(v) for v in values))
        return replace(graph, outputs=(*graph.outputs, *values), output_names=names)

    return program.map_entries(giving)


def index_name(value: Operand) -> str:
    """What a result is called that is there to be checked."""
    return f"{INDEX}{value}"


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
                    if found is not None and isinstance(found.origin, (str, Span)):
                        sources[value] = found
                continue
            for name, within in lookup(node.op).within.items():
                self._demand(node, name, within, sources, region)
            self._pages(node, sources)
            sources |= _results(node, sources, region)

    def _demand(
        self, node: Node, name: str, within: Within, sources: Sources, region: Node | None
    ) -> None:
        index = node.get(name)
        if index is None:
            return
        span = Span(*range_of(within, call_of(node)), within.ascending)
        source = _source(index, sources, region)
        origin, as_it_was = source.origin, source.ordered or not within.ascending
        if isinstance(origin, str) and as_it_was:
            self.demands[Demand(origin, span, within.what)] = None
            return
        if isinstance(origin, Span) and self._inside(origin, source.ordered, span):
            return
        value: Operand | None = index  # not what it was made of, whose storage may be another's now
        if region is not None:
            value = None if isinstance(origin, (str, Span)) or not as_it_was else origin
        place = operand_index(node.op, name)
        self.computed.append(Computed(region or node, node, place, value, span, within.what))

    def _pages(self, node: Node, sources: Sources) -> None:
        rows = rows_of_page(node)
        if rows is None:
            return
        given = [node[x] for x in (BLOCK_TABLE, "lengths")]
        origins = [sources[x].origin for x in given if x in sources]
        names = [x for x in origins if isinstance(x, str)]
        if len(names) == 2:
            self.pages[PageDemand(names[0], names[1], rows)] = None

    def _inside(self, given: Span, ordered: bool, wanted: Span) -> bool:
        """Whether values of one span, in its order or not, always lie in another."""
        room = (given.low - wanted.low, wanted.high - given.high)
        known = all(free_symbols(d) <= self._symbols.keys() for d in room)
        in_order = (given.ascending and ordered) or not wanted.ascending
        return in_order and known and all(bounds(d, self._symbols).lo >= 0 for d in room)


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
    known = None if isinstance(x, Weight) else sources.get(x)
    if known is not None:
        return known
    return Source(x if region is None or isinstance(x, Weight) else None)


def _results(node: Node, sources: Sources, region: Node | None) -> Sources:
    """The sources of a node's results, as far as something is known of them."""
    holds = _holds(node)
    found: Sources = {}
    for place, value in enumerate(node.outputs):
        span = _given(node, place)
        if span is not None:
            found[value] = Source(span)
        elif holds:
            source = _source(node.operands[0], sources, region)
            known = isinstance(source.origin, (str, Span))
            whole = holds != "some" or isinstance(source.origin, Span)
            # At the top, what is computed is looked at where it is read: the storage of what it was
            # made of may be another's by then. What is demanded of a part is not of the whole.
            if whole and (known or region is not None):
                found[value] = replace(source, ordered=source.ordered and holds == "order")
    return found


def _given(node: Node, place: int) -> Span | None:
    """The values that a node's result is declared to have."""
    within = lookup(node.op).gives.get(place)
    if within is None:
        return None
    return Span(*range_of(within, call_of(node)), within.ascending)


def _holds(node: Node) -> str:
    """What a node's results hold of the elements of its first operand (`OpDef.elements`)."""
    return "order" if _widens(node) else lookup(node.op).elements


def _widens(node: Node) -> bool:
    """Whether a node makes integers of integers that hold all of them."""
    if node.op != "cast":
        return False
    given, made = node.operands[0].type.dtype, node.output.type.dtype
    return {given, made} <= INTEGERS and (made is given or made.itemsize > given.itemsize)
