"""What a causal language model is compiled for, declared once where its symbols get their ranges.

The limits lie in a program's interface and go with it through passes, texts and artifacts: a
session, an executable, the manifest and run.py read them from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from dsc.ir.dims import Range

OPEN = 2**31 - 1
"""An upper bound that says nothing: torch.export's for a size that it does not know."""
BATCH, STEP, WANTED = "B", "S", "L"
"""Symbols of a step of a causal language model: its sequences, the new tokens of each, and those of
which logits are wanted."""
PAST, CAPACITY = "P", "C"
"""Rows of a cache that a step gives back grown, and of one that it writes in place."""
PAGES, BLOCKS = "N", "M"
"""Pages in all, and those that a block table has for a sequence."""
OPTIONS = {
    BATCH: "max_batch", STEP: "prefill_chunk", WANTED: "prefill_chunk", PAST: "max_context",
    CAPACITY: "max_context", BLOCKS: "max_context", PAGES: "max_batch or max_context",
}  # fmt: skip
"""The option of `compile` that a size of a causal language model follows from."""


def cache_sizes(batch: int, rows: int, page: int, spare: int = 0) -> dict[str, int]:
    """Sizes of caches that hold so many rows of each sequence: in place, or in pages of `page`."""
    blocks = -(-(rows + spare) // page)
    return {CAPACITY: rows + spare, BLOCKS: blocks, PAGES: batch * blocks + spare}


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `max_batch` sequences of `max_context` tokens, `prefill_chunk` new ones in a step."""

    max_batch: int = 4
    max_context: int = 4096
    prefill_chunk: int = 512

    @property
    def symbols(self) -> dict[str, Range]:
        """Ranges of the sizes that the step of a causal language model is made of."""
        batch, new = Range(1, self.max_batch), Range(1, self.prefill_chunk)
        return {BATCH: batch, STEP: new, PAST: Range(0, self.max_context), WANTED: new}

    def within(self, most: Limits) -> Limits:
        """These limits, as far as `most` goes."""
        names = (f.name for f in fields(self))
        return Limits(**{n: min(getattr(self, n), getattr(most, n)) for n in names})

    @staticmethod
    def of(symbols: Mapping[str, Range], page: int) -> Limits:
        """What symbols allow: a cache also has rows, or blocks, for a last chunk's padding."""
        most = {name: bounds.hi for name, bounds in symbols.items()}
        chunk = most.get(STEP, OPEN)
        room = [most[PAST]] if PAST in most else []
        room += [most[CAPACITY] - chunk] if CAPACITY in most else []
        room += [most[BLOCKS] * page - chunk] if BLOCKS in most else []
        return Limits(most.get(BATCH, OPEN), max(0, min(room, default=OPEN)), chunk)
