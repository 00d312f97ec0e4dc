"""Which pages hold which sequence: pages are taken as sequences grow and given back at the end.

One block table serves all layers: page n of every layer belongs to the same tokens. Sequences that
begin alike may hold the same pages; who writes into one that another holds too gets a copy of it
first (Kwon et al. 2023, section 4.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsc.errors import UsageError

NONE = -1
"""What stands in a block table where a sequence has no page."""
LEAST = 8
"""Blocks of a wide table at least."""
Copy = tuple[int, int]
"""A page, and the one that is to hold the same."""


class PagePool:
    """Pages 0 .. `count`-1 of `rows` tokens each; `blocks[b]` are the pages of sequence b.

    The lowest free page is taken first, so that memory that was used is used again. A table has
    `most` blocks at most, or as many as are needed.
    """

    def __init__(self, count: int, rows: int, most: int = 0) -> None:
        self.count = count
        self.rows = rows
        self.most = most
        self.blocks: list[list[int]] = []
        self._free = list(range(count - 1, -1, -1))
        self._holders = Counter[int]()

    @property
    def used(self) -> int:
        """Pages that are taken."""
        return self.count - len(self._free)

    def grow(self, lengths: Sequence[int], writes: Mapping[int, int] | None = None) -> list[Copy]:
        """Give sequence b pages for `lengths[b]` tokens. Raises `UsageError` when none is left.

        `writes` are the sequences that are written to, each with its first new token: of pages from
        there on that others hold as well they get copies, which the caller is to make.
        """
        self._reach(len(lengths))
        wanted = [-(-n // self.rows) for n in lengths]
        shared = self._shared(writes or {})
        missing = sum(max(0, n - len(held)) for n, held in zip(wanted, self.blocks, strict=True))
        missing += len(shared)
        if missing > len(self._free):
            raise UsageError(
                f"{missing} more pages of {self.rows} tokens are needed, {len(self._free)} are"
                f" free of {self.count}",
                hint="open the session with a larger max_batch or max_context",
            )
        copies = []
        for sequence, block in shared:
            old, new = self.blocks[sequence][block], self._take()
            self._holders[old] -= 1
            self.blocks[sequence][block] = new
            copies.append((old, new))
        for held, n in zip(self.blocks, wanted, strict=True):
            while len(held) < n:
                held.append(self._take())
        return copies

    def share(self, row: int, other: int, tokens: int) -> None:
        """Let the new sequence `row` hold the pages of the first tokens of another one."""
        self._reach(row + 1)
        self.blocks[row] = self.blocks[other][: -(-tokens // self.rows)]
        self._holders.update(self.blocks[row])

    def shrink(self, lengths: Sequence[int]) -> None:
        """Take back the pages that sequence b does not need for `lengths[b]` tokens."""
        for held, n in zip(self.blocks, lengths, strict=True):
            kept = -(-n // self.rows)
            self._give_back(held[kept:])
            del held[kept:]

    def drop(self, row: int) -> None:
        """Take back the pages of sequence `row`; the last sequence takes its place."""
        self._give_back(self.blocks[row])
        self.blocks[row] = self.blocks[-1]
        self.blocks.pop()

    def release(self) -> None:
        """Take back all pages."""
        self.blocks = []
        self._free = list(range(self.count - 1, -1, -1))
        self._holders.clear()

    def table(self, rows: Sequence[int], tokens: int, wide: bool = False) -> NDArray[np.int64]:
        """The block table of `rows` with room for so many tokens: int64 [rows, blocks].

        A `wide` one has a power of two of blocks, so that few widths come in a life.
        """
        width = -(-tokens // self.rows)
        if wide:
            width = min(1 << max(width - 1, LEAST - 1).bit_length(), max(width, self.most))
        held = (self.blocks[row] if row < len(self.blocks) else [] for row in rows)
        return np.array([blocks + [NONE] * (width - len(blocks)) for blocks in held], np.int64)

    def _reach(self, count: int) -> None:
        self.blocks += [[] for _ in range(count - len(self.blocks))]

    def _shared(self, writes: Mapping[int, int]) -> list[tuple[int, int]]:
        """Sequences and their blocks that are written to while others hold the page as well."""
        found, left = [], self._holders.copy()
        for sequence, first in writes.items():
            for block in range(first // self.rows, len(self.blocks[sequence])):
                page = self.blocks[sequence][block]
                if left[page] > 1:  # the last one that holds it keeps it
                    left[page] -= 1
                    found.append((sequence, block))
        return found

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        self._holders.subtract(pages)
        free = [page for page in pages if self._holders[page] == 0]
        self._free = sorted([*self._free, *free], reverse=True)
