"""Which pages hold which sequence: pages are taken as sequences grow and given back at the end.

One block table serves all layers: page n of every layer belongs to the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsc.errors import UsageError

NONE = -1
"""What stands in a block table where a sequence has no page."""


class PagePool:
    """Pages 0 .. `count`-1 of `rows` tokens each; `blocks[b]` are the pages of sequence b.

    The lowest free page is taken first, so that memory that was used is used again.
    """

    def __init__(self, count: int, rows: int) -> None:
        self.count = count
        self.rows = rows
        self.blocks: list[list[int]] = []
        self._free = list(range(count - 1, -1, -1))

    @property
    def used(self) -> int:
        """Pages that are taken."""
        return self.count - len(self._free)

    def grow(self, lengths: Sequence[int]) -> None:
        """Give sequence b pages for `lengths[b]` tokens. Raises `UsageError` when none is left."""
        self.blocks += [[] for _ in range(len(lengths) - len(self.blocks))]
        wanted = [-(-n // self.rows) for n in lengths]
        missing = sum(max(0, n - len(held)) for n, held in zip(wanted, self.blocks, strict=True))
        if missing > len(self._free):
            raise UsageError(
                f"{missing} more pages of {self.rows} tokens are needed, {len(self._free)} are"
                f" free of {self.count}",
                hint="open the session with a larger max_batch or max_context",
            )
        for held, n in zip(self.blocks, wanted, strict=True):
            while len(held) < n:
                held.append(self._free.pop())

    def shrink(self, lengths: Sequence[int]) -> None:
        """Take back the pages that sequence b does not need for `lengths[b]` tokens."""
        for held, n in zip(self.blocks, lengths, strict=True):
            kept = -(-n // self.rows)
            self._free = sorted([*self._free, *held[kept:]], reverse=True)
            del held[kept:]

    def drop(self, row: int) -> None:
        """Take back the pages of sequence `row`; the last sequence takes its place."""
        self._free = sorted([*self._free, *self.blocks[row]], reverse=True)
        self.blocks[row] = self.blocks[-1]
        self.blocks.pop()

    def release(self) -> None:
        """Take back all pages."""
        self.blocks = []
        self._free = list(range(self.count - 1, -1, -1))

    def table(self, rows: Sequence[int], tokens: int) -> NDArray[np.int64]:
        """The block table of `rows` with room for so many tokens: int64 [rows, blocks]."""
        width = -(-tokens // self.rows)
        held = (self.blocks[row] for row in rows)
        return np.array([blocks + [NONE] * (width - len(blocks)) for blocks in held], np.int64)
