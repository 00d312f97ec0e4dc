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
OPTIONS = {
    "B": "max_batch", "S": "prefill_chunk", "L": "prefill_chunk", "P": "max_context",
    "C": "max_context", "M": "max_context", "N": "max_batch or max_context",
}  # fmt: skip
"""The option of `compile` that a size of a causal language model follows from."""


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `max_batch` sequences of `max_context` tokens, `prefill_chunk` new ones in a step."""

    max_batch: int = 4
    max_context: int = 4096
    prefill_chunk: int = 512

    @property
    def symbols(self) -> dict[str, Range]:
        """Ranges of B, S, P and L, of which the step of a causal language model is made."""
        new = Range(1, self.prefill_chunk)
        return {"B": Range(1, self.max_batch), "S": new, "P": Range(0, self.max_context), "L": new}

    def within(self, most: Limits) -> Limits:
        """These limits, as far as `most` goes."""
        names = (f.name for f in fields(self))
        return Limits(**{n: min(getattr(self, n), getattr(most, n)) for n in names})

    @staticmethod
    def of(symbols: Mapping[str, Range], page: int) -> Limits:
        """What symbols allow: a cache also has rows, or blocks, for a last chunk's padding."""
        most = {name: bounds.hi for name, bounds in symbols.items()}
        chunk = most.get("S", OPEN)
        room = [most["P"]] if "P" in most else []
        room += [most["C"] - chunk] if "C" in most else []
        room += [most["M"] * page - chunk] if "M" in most else []
        return Limits(most.get("B", OPEN), max(0, min(room, default=OPEN)), chunk)
