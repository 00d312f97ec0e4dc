"""The KV caches of a session's sequences, in the three forms that entries take them.

A session's active sequences are rows 0 .. n-1. When one leaves, the last takes its row, so that the
rows stay dense and a step runs over a part of them without a copy. All three forms answer alike:

    together(rows)        the rows that a step over `rows` takes; what it adds only waits
    inputs(rows, ...)     the cache inputs of a step over these rows
    keep(rows, ...)       take over what the step gave back
    truncate(lengths)     forget what lies past each row's length
    drop(row)             forget a row; the last one moves there
    clear()               forget all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsc.ir.graph import Graph, Value
from dsc.ir.paging import BLOCK_TABLE
from dsc.runtime.pages import PagePool, zeros

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache of an entry: the input that takes it, the output that gives it back."""

    input: Value
    output: str
    in_place: bool

    @property
    def width(self) -> tuple[int, ...]:
        """The extents of a cached token."""
        return tuple(d for d in self.input.type.shape[2:] if isinstance(d, int))


def cache_specs(graph: Graph) -> list[CacheSpec]:
    """The caches of an entry. In place: the output has the input's type."""
    specs = []
    for output, source in graph.aliases:
        value = graph.inputs[source]
        in_place = graph.outputs[output].type == value.type
        specs.append(CacheSpec(value, graph.output_names[output], in_place))
    return specs


class Caches(Protocol):
    """What the three forms have in common; `before`, `after` are tokens of every active row."""

    def together(self, rows: Sequence[int]) -> list[int]:
        """The rows that must run in one step with `rows`, in order."""
        ...

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, torch.Tensor]:
        """The cache inputs of a step that takes the rows from `before` to `after` tokens.

        `size` are the new tokens that the step has for each row, padding included.
        """
        ...

    def keep(self, rows: Sequence[int], outputs: Tensors, after: Sequence[int]) -> None:
        """Take over the outputs of that step."""
        ...

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what all rows have past these lengths."""
        ...

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Forget `row` of the rows of `lengths` tokens; the last moves into its place."""
        ...

    def clear(self) -> None:
        """Forget all rows."""
        ...


class SlotCaches:
    """Caches written in place: a slot of `capacity` rows for each of `count` sequences.

    A step over neighbouring slots is given a view of them. Memory is the system's until a row is
    written. Where slots live on a device, `read_back` brings a view of them to the host.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        count: int,
        capacity: int,
        read_back: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._specs = specs
        self._shape = (count, capacity)
        self._read_back = read_back
        self._slots: dict[str, torch.Tensor] = {}
        self._views: dict[str, torch.Tensor] = {}
        self._window = (0, 0)

    def together(self, rows: Sequence[int]) -> list[int]:
        """All rows from the first to the last."""
        return list(range(min(rows), max(rows) + 1))

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, torch.Tensor]:
        """Views of the slots; the same tensors as long as the rows stay the same."""
        if not self._slots:
            self._slots = {
                s.input.name: zeros((*self._shape, *s.width), s.input.type.dtype)
                for s in self._specs
            }
        window = (rows[0], rows[-1] + 1)
        if window != self._window:
            self._window = window
            self._views = {name: slot[slice(*window)] for name, slot in self._slots.items()}
        return dict(self._views)

    def keep(self, rows: Sequence[int], outputs: Tensors, after: Sequence[int]) -> None:
        """Nothing: the step wrote into the slots."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Nothing: what lies past a row's length is never seen, and is written over."""

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Copy the last slot's tokens into the slot that becomes free."""
        last = len(lengths) - 1
        if row < last:
            for slot in self._slots.values():
                if self._read_back is not None:  # all rows: the host's copy is what counts then
                    self._read_back(slot[: last + 1])
                slot[row, : lengths[last]] = slot[last, : lengths[last]]

    def clear(self) -> None:
        """Give the memory back, unless it is a device's: what a row held is never seen again."""
        if self._read_back is None:
            self._slots, self._views, self._window = {}, {}, (0, 0)


class GrownCaches:
    """Caches that a step returns grown, [rows, longest, width]: a copy a step, as the entries do.

    A step over some of the rows costs one more, to put them among the others again.
    """

    def __init__(self, specs: Sequence[CacheSpec]) -> None:
        self._specs = specs
        self._held: dict[str, torch.Tensor] = {}

    def together(self, rows: Sequence[int]) -> list[int]:
        """All rows from the first to the last."""
        return list(range(min(rows), max(rows) + 1))

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, torch.Tensor]:
        """The rows, cut to the longest of them."""
        longest = max(before[r] for r in rows)
        found = {}
        for spec in self._specs:
            if longest == 0:
                found[spec.input.name] = zeros((len(rows), 0, *spec.width), spec.input.type.dtype)
                continue
            held = self._held[spec.input.name]
            found[spec.input.name] = held[rows[0] : rows[-1] + 1, :longest].contiguous()
        return found

    def keep(self, rows: Sequence[int], outputs: Tensors, after: Sequence[int]) -> None:
        """The grown rows, among those that were not part of the step."""
        longest = max(after)
        for spec in self._specs:
            grown = outputs[spec.output][:, :longest]
            if len(rows) < len(after):
                held = self._held[spec.input.name]
                whole = zeros((len(after), longest, *spec.width), spec.input.type.dtype)
                whole[: len(held), : held.shape[1]] = held[: len(after)]
                whole[rows[0] : rows[-1] + 1, : grown.shape[1]] = grown
                grown = whole
            self._held[spec.input.name] = grown.contiguous()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Cut to the longest row; what lies past the end of others is never seen."""
        for name, held in self._held.items():
            self._held[name] = held[:, : max(lengths)].contiguous()

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """The rows without one, the last in its place, cut to the longest that is left."""
        order = list(range(len(lengths)))
        order[row] = order[-1]
        longest = max((lengths[r] for r in order[:-1]), default=0)
        for name, held in self._held.items():
            self._held[name] = held[order[:-1], :longest].contiguous()

    def clear(self) -> None:
        """Forget the tensors."""
        self._held = {}


class PagedCaches:
    """Caches in the pages of a pool: a step is given a table of its own rows' pages."""

    def __init__(self, specs: Sequence[CacheSpec], pool: PagePool) -> None:
        self._specs = specs
        self._pool = pool
        self._pages: dict[str, torch.Tensor] = {}

    def together(self, rows: Sequence[int]) -> list[int]:
        """Just these: pages need no order."""
        return list(rows)

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, torch.Tensor]:
        """All pages, with pages taken for the new tokens, and the rows' table.

        What former sequences left in a page is never seen.
        """
        if not self._pages:
            shape = (self._pool.count, self._pool.rows)
            self._pages = {
                s.input.name: zeros((*shape, *s.width), s.input.type.dtype) for s in self._specs
            }
        self._pool.grow(after)
        widest = max(before[r] for r in rows)
        return {**self._pages, BLOCK_TABLE: self._pool.table(rows, widest + size)}

    def keep(self, rows: Sequence[int], outputs: Tensors, after: Sequence[int]) -> None:
        """Nothing: the step wrote into the pages."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Give the pages back that no row needs for so many tokens."""
        self._pool.shrink(lengths)

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Give the row's pages back."""
        self._pool.drop(row)

    def clear(self) -> None:
        """Give all pages back; the memory stays."""
        self._pool.release()
