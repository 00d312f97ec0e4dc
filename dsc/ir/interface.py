"""A program's interface: all that a session or an artifact must know of it beside its graphs.

Limits say how much it takes, guards which entry takes a step, the mesh how many ranks run it, and
states what outlives a step: any memory that an entry takes as an input and gives back as an output.
How a state is stored says what can be done with it:

    storage     input             holds
    grown       T[B, P, *w]       a row a token; a step gives it back with the new rows behind
    contiguous  T[B, C, *w]       a row a token, written in place
    paged       T[N, page, *w]    a row a token, in the pages that a block table names
    ring        T[B, rows, *w]    the latest tokens: token t is row t % rows
    fixed       T[B, *w]          what a sequence has come to, whatever its length

States of tokens can be cut to any earlier length (`truncate`). The others can only be set back to
what they were when somebody looked (`snapshot`, `restore`). A ring has as many rows as the window
that is seen and the largest step together, so that no padding overwrites what is seen; an entry
with a fixed state takes `new` i64[B], the new tokens of each sequence, and leaves padding out.

A row may be codes with scales behind them (`dsc.ir.formats`): what holds it is bytes then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from dsc.ir.graph import Graph, Value
from dsc.ir.limits import Limits
from dsc.ir.paging import page_rows
from dsc.ir.types import TensorType

NEW = "new"
"""The input that says how many of a step's tokens are new to each sequence, not padding."""


class Storage(StrEnum):
    """How a state is stored."""

    GROWN = "grown"
    CONTIGUOUS = "contiguous"
    PAGED = "paged"
    RING = "ring"
    FIXED = "fixed"

    @property
    def of_tokens(self) -> bool:
        """Whether every token of the past has a row of its own, and can be cut off."""
        return self not in (Storage.RING, Storage.FIXED)


@dataclass(frozen=True, slots=True)
class State:
    """Memory that outlives a step: `input` takes it, `output` gives it back.

    `type` is that of one row, or of all that a sequence has where it is fixed; `rows` are those of
    a page or of a ring, 0 elsewhere.
    """

    input: str
    output: str
    type: TensorType
    storage: Storage
    rows: int = 0

    @staticmethod
    def of(value: Value, output: str, storage: Storage) -> State:
        """The state that an input holds. Raises `ValueError` where it has another shape."""
        shape = value.type.shape
        lead = 1 if storage is Storage.FIXED else 2
        rows = shape[1] if storage in (Storage.PAGED, Storage.RING) and len(shape) > 1 else 0
        if len(shape) < lead or not isinstance(rows, int):
            raise ValueError(f"{value} is {value.type}, no {storage} state")
        return State(value.name, output, value.type.with_shape(shape[lead:]), storage, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of a row, or of a sequence where it is fixed."""
        size = self.type.nbytes
        assert isinstance(size, int), f"{self.input} has a symbolic row"
        return size


@dataclass(frozen=True, slots=True)
class Guard:
    """The steps that an entry is for: at most so many sequences, new tokens each, tokens in all.

    `None` is any number. Of several entries that admit a step the first one takes it.
    """

    entry: str
    step: int | None = None
    batch: int | None = None
    context: int | None = None

    def admits(self, step: int, batch: int, context: int) -> bool:
        """Whether a step is one of these; `context` are the tokens of the longest after it."""
        bounds = ((self.step, step), (self.batch, batch), (self.context, context))
        return all(most is None or size <= most for most, size in bounds)


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks run a program, and what they share: `tp`, `ep` or `tp+ep`."""

    ranks: int = 1
    parallel: str = ""


@dataclass(frozen=True, slots=True)
class Interface:
    """Limits, mesh, guards in the order in which they are asked, and states."""

    limits: Limits | None = None
    mesh: Mesh = Mesh()
    guards: tuple[Guard, ...] = ()
    states: tuple[State, ...] = ()

    def fitted(self, graphs: Iterable[Graph], grown: Storage = Storage.GROWN) -> Interface:
        """The interface with the states as the inputs of entries are now.

        Those that a step gave back grown are stored as `grown` says.
        """
        inputs = {v.name: v for graph in graphs for v in graph.inputs}
        states = []
        for s in self.states:
            storage = grown if s.storage is Storage.GROWN else s.storage
            if s.input in inputs:
                states.append(State.of(inputs[s.input], s.output, storage))
        return replace(self, states=tuple(states))

    def to_json(self) -> dict[str, Any]:
        """What the manifest says."""
        return {
            "mesh": asdict(self.mesh),
            "guards": [[g.entry, _given(g)] for g in self.guards],
            "states": [{**asdict(s), "type": str(s.type)} for s in self.states],
        }


def _given(guard: Guard) -> dict[str, int]:
    bounds = asdict(guard)
    return {k: n for k, n in bounds.items() if k != "entry" and n is not None}


def updates(graph: Graph) -> Iterator[State]:
    """The updates of an entry that can only be states of tokens, where nobody declared them.

    Their axis 1 is the past or the capacity, whatever its size, or the rows of a page.
    """
    pages = page_rows(graph)
    for output, source in graph.aliases:
        value = graph.inputs[source]
        rows = value.type.shape[1] if value.type.rank > 1 else 0
        if pages is not None and rows == pages:
            storage = Storage.PAGED
        elif isinstance(rows, int):
            continue
        else:
            same = graph.outputs[output].type == value.type
            storage = Storage.CONTIGUOUS if same else Storage.GROWN
        yield State.of(value, graph.output_names[output], storage)
