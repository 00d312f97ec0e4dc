"""What a session keeps of its sequences between steps: their states, in the ways they are stored.

A session's active sequences are rows 0 .. n-1. When one leaves, the last takes its row, so that the
rows stay dense and a step runs over a part of them without a copy. Each way to store answers alike:

    together(rows)        the rows that a step over `rows` takes; what it adds only waits
    inputs(rows, ...)     the inputs of a step over these rows
    keep(rows, ...)       take over what the step gave back
    begin(row)            a new sequence has this row
    fork(row, new, n)     a new sequence begins with the first n tokens of another row
    truncate(lengths)     forget what lies past each row's length
    drop(row)             forget a row; the last one moves there
    saved(row)            what cannot be cut of a row, to be set back by `restore`
    clear()               forget all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from dsc.ir.arrays import Array, zeros
from dsc.ir.interface import State, Storage
from dsc.ir.paging import BLOCK_TABLE
from dsc.runtime.executable import KeepsCaches
from dsc.runtime.pages import PagePool

Arrays: TypeAlias = Mapping[str, Array]


class Kept:
    """What the ways to store have in common; `before`, `after` are tokens of every active row."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    def together(self, rows: Sequence[int]) -> list[int]:
        """The rows that must run in one step with `rows`, in order: from the first to the last."""
        return list(range(min(rows), max(rows) + 1))

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, Array]:
        """The inputs of a step that takes the rows from `before` to `after` tokens.

        `size` are the new tokens that the step has for each row, padding included.
        """
        raise NotImplementedError

    def keep(self, rows: Sequence[int], outputs: Arrays, after: Sequence[int]) -> None:
        """Take over the outputs of that step: nothing, where it wrote into its inputs."""

    def begin(self, row: int) -> None:
        """A new sequence has this row: of tokens, what a former one left is never seen."""

    def fork(self, row: int, new: int, lengths: Sequence[int]) -> None:
        """Give the last row `new` what `row` has of its first `lengths[new]` tokens.

        Of states that cannot be cut it gets all.
        """
        raise NotImplementedError

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what all rows have past these lengths: it is never seen, and is written over."""

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Forget `row` of the rows of `lengths` tokens; the last moves into its place."""
        raise NotImplementedError

    def saved(self, row: int) -> dict[str, Array]:
        """Copies of what a row has in states that cannot be cut."""
        return {}

    def restore(self, row: int, saved: Arrays) -> None:
        """Give a row what was saved of it."""

    def clear(self) -> None:
        """Forget all rows."""
        raise NotImplementedError


class Slots(Kept):
    """A slot for each of `count` sequences: room for `capacity` tokens, a ring, or a fixed state.

    A step over neighbouring slots is given a view of them. Memory is the system's until a row is
    written. Where slots live on a `device`, the host's stand for them.
    """

    def __init__(
        self,
        states: Sequence[State],
        count: int,
        capacity: int,
        device: KeepsCaches | None = None,
    ) -> None:
        super().__init__(states)
        self._count, self._capacity = count, capacity
        self._device = device
        self._whole = {s.input for s in states if not s.storage.of_tokens}
        self._slots: dict[str, Array] = {}
        self._views: dict[str, Array] = {}
        self._window: tuple[int, int] | None = None

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, Array]:
        """Views of the slots; the same arrays as long as the rows stay the same."""
        if not self._slots:
            self._slots = {s.input: self._slot(s) for s in self._states}
        window = (rows[0], rows[-1] + 1)
        if window != self._window:
            self._window = window
            self._views = {name: slot[slice(*window)] for name, slot in self._slots.items()}
        return dict(self._views)

    def keep(self, rows: Sequence[int], outputs: Arrays, after: Sequence[int]) -> None:
        """Copy what it gave back of rings and fixed states; tokens it wrote into the slots."""
        for state in self._states:
            if state.input in self._whole:
                self._views[state.input][...] = outputs[state.output]

    def begin(self, row: int) -> None:
        """A ring and a fixed state begin with zeros."""
        for name in self._whole & self._slots.keys():
            self._slots[name][row] = 0

    def fork(self, row: int, new: int, lengths: Sequence[int]) -> None:
        """Copy what the slot holds of so many tokens, and its rings and fixed states."""
        self._copy(row, new, lengths[new])

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Copy what the last slot holds into the slot that becomes free."""
        last = len(lengths) - 1
        if row != last:
            self._copy(last, row, lengths[last])

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for name, slot in self._slots.items():
            held = slice(None) if name in self._whole else slice(tokens)
            copy_rows(slot[source, held], slot[target, held], self._device)

    def saved(self, row: int) -> dict[str, Array]:
        """Copies of the row's rings and fixed states."""
        return {name: self._slots[name][row].copy() for name in self._whole & self._slots.keys()}

    def restore(self, row: int, saved: Arrays) -> None:
        """Copy them back; what was saved before there were any is zeros."""
        for name in self._whole & self._slots.keys():
            self._slots[name][row] = saved.get(name, 0)

    def clear(self) -> None:
        """Give the memory back, unless it is a device's: what a row held is never seen again."""
        if self._device is None:
            self._slots, self._views, self._window = {}, {}, None

    def _slot(self, state: State) -> Array:
        rows = {Storage.CONTIGUOUS: (self._capacity,), Storage.RING: (state.rows,)}
        shape = (self._count, *rows.get(state.storage, ()), *_row(state))
        return new_cache(shape, state, self._device)


class Grown(Kept):
    """Caches that a step returns grown, [rows, longest, width]: a copy a step, as the entries do.

    A step over some of the rows costs one more, to put them among the others again.
    """

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__(states)
        self._held: dict[str, Array] = {}

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, Array]:
        """The rows, cut to the longest of them."""
        longest = max(before[r] for r in rows)
        if longest == 0:
            shapes = {s: (len(rows), 0, *_row(s)) for s in self._states}
            return {s.input: zeros(shape, s.type.stored.dtype) for s, shape in shapes.items()}
        window = slice(rows[0], rows[-1] + 1)
        held = {s.input: self._held[s.input][window, :longest] for s in self._states}
        return {name: np.ascontiguousarray(x) for name, x in held.items()}

    def keep(self, rows: Sequence[int], outputs: Arrays, after: Sequence[int]) -> None:
        """The grown rows, among those that were not part of the step."""
        longest = max(after)
        for state in self._states:
            grown = outputs[state.output][:, :longest]
            if len(rows) < len(after):
                held = self._held[state.input]
                whole = zeros((len(after), longest, *_row(state)), state.type.stored.dtype)
                whole[: len(held), : held.shape[1]] = held[: len(after)]
                whole[rows[0] : rows[-1] + 1, : grown.shape[1]] = grown
                grown = whole
            self._held[state.input] = np.ascontiguousarray(grown)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Cut to the longest row; what lies past the end of others is never seen."""
        for name, held in self._held.items():
            self._held[name] = np.ascontiguousarray(held[:, : max(lengths)])

    def fork(self, row: int, new: int, lengths: Sequence[int]) -> None:
        """The rows, and one of them again behind them."""
        for name, held in self._held.items():
            self._held[name] = np.concatenate([held, held[row : row + 1]])

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """The rows without one, the last in its place, cut to the longest that is left."""
        order = list(range(len(lengths)))
        order[row] = order[-1]
        longest = max((lengths[r] for r in order[:-1]), default=0)
        for name, held in self._held.items():
            self._held[name] = np.ascontiguousarray(held[order[:-1], :longest])

    def clear(self) -> None:
        """Forget the arrays."""
        self._held = {}


class Paged(Kept):
    """Caches in the pages of a pool: a step is given a table of its own rows' pages.

    Where pages live on a `device`, the host's stand for them.
    """

    def __init__(
        self, states: Sequence[State], pool: PagePool, device: KeepsCaches | None = None
    ) -> None:
        super().__init__(states)
        self._pool = pool
        self._device = device
        self._pages: dict[str, Array] = {}
        self._table = np.empty((0, 0), np.int64)

    def together(self, rows: Sequence[int]) -> list[int]:
        """Just these: pages need no order."""
        return list(rows)

    def inputs(
        self, rows: Sequence[int], before: Sequence[int], after: Sequence[int], size: int
    ) -> dict[str, Array]:
        """All pages, with pages taken for the new tokens, and the rows' table: as long as it lasts.

        What former sequences left in a page is never seen. Rows behind those of sequences have no
        pages.
        """
        if not self._pages:
            shape = (self._pool.count, self._pool.rows)
            self._pages = {
                s.input: new_cache((*shape, *_row(s)), s, self._device) for s in self._states
            }
        own = [row for row in rows if row < len(after)]
        for old, new in self._pool.grow(after, {r: before[r] for r in own}):
            for pages in self._pages.values():
                copy_rows(pages[old], pages[new], self._device)
        table = self._pool.table(rows, max(before[r] for r in own) + size, self._device is not None)
        if not np.array_equal(table, self._table):
            self._table = table
        return {**self._pages, BLOCK_TABLE: self._table}

    def fork(self, row: int, new: int, lengths: Sequence[int]) -> None:
        """The same pages: who writes into one first gets a copy of it."""
        self._pool.share(new, row, lengths[new])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Give the pages back that no row needs for so many tokens."""
        self._pool.shrink(lengths)

    def drop(self, row: int, lengths: Sequence[int]) -> None:
        """Give the row's pages back."""
        self._pool.drop(row)

    def clear(self) -> None:
        """Give all pages back; the memory stays."""
        self._pool.release()


def kept_by(
    states: Sequence[State],
    count: int,
    capacity: int,
    pool: PagePool | None,
    device: KeepsCaches | None,
) -> list[Kept]:
    """What keeps the states of `count` sequences, of `capacity` tokens each, as is declared."""
    grown = [s for s in states if s.storage is Storage.GROWN]
    paged = [s for s in states if s.storage is Storage.PAGED]
    slots = [s for s in states if s not in (*grown, *paged)]
    kept: list[Kept] = [Slots(slots, count, capacity, device)] if slots else []
    if grown:
        kept.append(Grown(grown))
    if paged and pool is not None:
        kept.append(Paged(paged, pool, device))
    return kept


def new_cache(shape: tuple[int, ...], state: State, device: KeepsCaches | None) -> Array:
    """A cache of zeros, or what stands for one on a device."""
    dtype = state.type.stored.dtype
    return zeros(shape, dtype) if device is None else device.new_cache(shape, dtype)


def copy_rows(source: Array, target: Array, device: KeepsCaches | None) -> None:
    """Copy a dense part of a cache to another, where they live."""
    if device is None:
        target[...] = source
    else:
        device.copy(source, target)


def _row(state: State) -> tuple[int, ...]:
    """The extents of a row, or of what a sequence has."""
    return tuple(d for d in state.type.stored.shape if isinstance(d, int))
