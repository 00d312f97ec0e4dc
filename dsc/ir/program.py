"""A program: named entry graphs that share weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsc.errors import UsageError
from dsc.ir.dims import Range, Sym, free_symbols
from dsc.ir.graph import Graph, Weight
from dsc.ir.interface import Guard, Interface, Mesh, State, Storage, updates
from dsc.ir.limits import BATCH, Limits
from dsc.ir.stages import Stage, is_legal
from dsc.ir.types import TensorType
from dsc.ir.weights import MetaSource, WeightExpr, WeightSource, leaf, source_types

ANY_SIZE = 1 << 20
"""The largest size of a symbol that a bare graph does not bound."""
TOKEN_INPUTS = ("input_ids", "positions", "lengths", "logits_at")
"""What every step of a causal language model takes beside its caches."""


def is_causal_step(graph: Graph) -> bool:
    """Whether an entry is a step of a causal language model."""
    return {v.name for v in graph.inputs}.issuperset(TOKEN_INPUTS)


@dataclass(frozen=True)
class Program:
    """What every pass takes and returns.

    `entries` are graphs by name (`decode`, `extend`, `prefill`, or one `main`); `weights` gives
    each `@name` its expression over `source`; `symbols` bounds every symbolic dim; `interface`
    declares what a session must know; `meta` holds facts of the model: its configuration, how it
    generates (JSON values only).
    """

    name: str
    entries: Mapping[str, Graph]
    weights: Mapping[str, WeightExpr] = field(default_factory=dict)
    symbols: Mapping[str, Range] = field(default_factory=dict)
    source: WeightSource = field(default_factory=lambda: MetaSource({}))
    meta: Mapping[str, Any] = field(default_factory=dict)
    stage: Stage = Stage.TRACED
    interface: Interface = field(default_factory=Interface)

    def __post_init__(self) -> None:
        """Give every graph its entry's name, so that the text form reads back the same.

        Where no state is declared, a causal language model has those that its updates can only be.
        """
        if not self.interface.states and self.entries and self.is_causal_lm:
            states = {s.input: s for graph in self.entries.values() for s in updates(graph)}
            declared = replace(self.interface, states=tuple(states.values()))
            object.__setattr__(self, "interface", declared)
        if any(graph.name != name for name, graph in self.entries.items()):
            named = {
                name: graph if graph.name == name else replace(graph, name=name)
                for name, graph in self.entries.items()
            }
            object.__setattr__(self, "entries", named)

    @property
    def is_causal_lm(self) -> bool:
        """Whether a session can continue texts with it."""
        return all(map(is_causal_step, self.entries.values()))

    @property
    def states(self) -> tuple[State, ...]:
        """What outlives a step."""
        return self.interface.states

    @property
    def mesh(self) -> Mesh:
        """The ranks that it runs on."""
        return self.interface.mesh

    @property
    def guards(self) -> tuple[Guard, ...]:
        """Which entry takes a step: the first that admits it."""
        return self.interface.guards

    def ranges(self, entry: str) -> Mapping[str, Range]:
        """The ranges of an entry's symbols: the program's, of sequences what its guard admits."""
        most = next((g.batch for g in self.guards if g.entry == entry), None)
        known = self.symbols.get(BATCH)
        if most is None or known is None or most >= known.hi:
            return self.symbols
        return {**self.symbols, BATCH: Range(min(known.lo, most), most)}

    @property
    def page(self) -> int | None:
        """Rows of a page of its states; `None` where none lies in pages."""
        return next((s.rows for s in self.states if s.storage is Storage.PAGED), None)

    @property
    def limits(self) -> Limits:
        """What a causal language model takes: as declared, else what its symbols allow."""
        return self.interface.limits or Limits.of(self.symbols, self.page or 1)

    @property
    def has_weights(self) -> bool:
        """Whether its weights have values, not types alone."""
        return not self.weights or self.source.has_values

    def declaring(self, **changes: Any) -> Program:
        """The program with other limits, mesh, guards or states."""
        return replace(self, interface=replace(self.interface, **changes))

    def limited(self, asked: Limits) -> Program:
        """The program with its limits declared: the asked ones, as far as its own go."""
        return self.declaring(limits=asked.within(self.limits))

    def entry(self, name: str, inputs: Collection[str] | None = None) -> Graph:
        """The entry called `name`; with `inputs` given, all that it takes must be among them.

        Raises `UsageError` naming the entries there are, or the inputs that are missing.
        """
        graph = self.entries.get(name)
        if graph is None:
            raise UsageError(f"no entry {name}", hint=f"one of {', '.join(self.entries)}")
        if inputs is not None:
            missing = [v.name for v in graph.inputs if v.name not in inputs]
            if missing:
                raise UsageError(f"entry {name} needs the inputs {', '.join(missing)}")
        return graph

    def choose_entry(self, step: int, batch: int, context: int) -> str:
        """The entry for so many new tokens a sequence, sequences, and tokens of the longest.

        The first whose guard admits it, else the last.
        """
        for guard in self.guards:
            if guard.entry in self.entries and guard.admits(step, batch, context):
                return guard.entry
        return next(reversed(list(self.entries)))

    def map_entries(self, function: Callable[[Graph], Graph]) -> Program:
        """The program with each entry rewritten; itself when none changed."""
        entries = {name: function(graph) for name, graph in self.entries.items()}
        if all(entries[name] is graph for name, graph in self.entries.items()):
            return self
        return replace(self, entries=entries)

    def with_weights(self, added: Mapping[str, WeightExpr]) -> Program:
        """The program with more weights."""
        return replace(self, weights={**self.weights, **added}) if added else self

    def at(self, stage: Stage) -> Program:
        """The program marked as being at `stage`."""
        return self if stage is self.stage else replace(self, stage=stage)

    def weight_types(self) -> dict[str, TensorType]:
        """Types of all weights by name."""
        return {name: expr.type for name, expr in self.weights.items()}

    def used_weights(self) -> set[str]:
        """Names of the weights that some entry reads."""
        from dsc.ir.graph import Weight

        used: set[str] = set()
        for graph in self.entries.values():
            used |= {x.name for x in graph.outputs if isinstance(x, Weight)}
            for node in graph.walk():
                used |= {x.name for x in node.operands if isinstance(x, Weight)}
        return used

    def pruned(self) -> Program:
        """The program without weights that no entry reads."""
        used = self.used_weights()
        if used >= self.weights.keys():
            return self
        return replace(self, weights={k: v for k, v in self.weights.items() if k in used})

    def shrunk(self) -> Program:
        """The same program with every dim mapped to a small one, for verification at full depth."""
        from dsc.ir.shrink import shrink

        return shrink(self)


def program_of(
    graph: Graph, source: WeightSource | None = None, stages: Sequence[Stage] = tuple(Stage)
) -> Program:
    """A program of one graph, at the first of `stages` where its operators are legal.

    Its weights are those of `source`, or types alone; its sizes may be anything.
    """
    types = {
        x.name: x.type
        for x in (*(y for n in graph.walk() for y in n.operands), *graph.outputs)
        if isinstance(x, Weight)
    }
    symbols = dict.fromkeys(sorted(graph_symbols(graph)), Range(0, ANY_SIZE))
    operators = {node.op for node in graph.walk()}
    fitting = (s for s in stages if all(is_legal(op, s) for op in operators))
    weights = {name: leaf(name, t) for name, t in types.items()}
    stage = next(fitting, stages[0])
    given = source or MetaSource(source_types(weights.values()))
    return Program(graph.name, {graph.name: graph}, weights, symbols, given, {}, stage)


def graph_symbols(graph: Graph) -> frozenset[str]:
    """All symbols of types and attributes, those of nested bodies too."""
    found: set[str] = set()
    for value in graph.values():
        found |= value.type.symbols
    for node in graph.nodes:
        for value in node.attrs.values():
            for dim in value if isinstance(value, tuple) else (value,):
                found |= free_symbols(dim) if isinstance(dim, Sym) else frozenset()
        if node.body is not None:
            found |= graph_symbols(node.body)
    return frozenset(found)
