"""Steps of a session: the arrays that an entry is given, which entry that is, and its call.

A step is over rows of sequences with so many tokens each. What it is given is filled into the same
arrays as long as steps have the same sizes, so that an executable binds an entry once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import numpy as np

from dsc.ir.arrays import Array
from dsc.ir.choosing import Choice
from dsc.ir.interface import NEW
from dsc.ir.program import Program
from dsc.runtime.caches import Kept
from dsc.runtime.executable import Call, Continues, Executable, KeepsCaches
from dsc.runtime.profiler import entry_span


@dataclass(frozen=True, slots=True)
class Draws:
    """How tokens are chosen, the keys of the sequences' draws, and how many of each were made."""

    choice: Choice
    keys: Sequence[int]
    made: Sequence[int]


class Steps:
    """Runs steps of up to `max_batch` sequences, whose states are in `kept`.

    `device` says how many rows a step has there, where caches stay on one.
    """

    def __init__(
        self,
        executable: Executable,
        program: Program,
        kept: Sequence[Kept],
        device: KeepsCaches | None,
        max_batch: int,
    ) -> None:
        self._executable, self._program = executable, program
        self._kept, self._device, self._max_batch = kept, device, max_batch
        self._tokens: dict[str, Array] = {}
        self._bound: tuple[str, dict[str, Array], Call] | None = None

    def forget(self) -> None:
        """Hold no call over arrays of sequences that are gone."""
        self._bound = None

    def append(
        self, chunk: Array, new: Sequence[int], rows: list[int], before: list[int], wide: bool
    ) -> tuple[Array, list[int]]:
        """Append `new` of the tokens of `chunk` [B, S] to the sequences in `rows`.

        `before` are the tokens of all sequences; those after it come back, and the logits of rows
        [B, S, vocab] where `wide`, else of each one's last token [B, 1, vocab]. Sequences between
        them may have to come along: what is written for them lies past their end, as padding does.
        """
        size = chunk.shape[1]
        together = max((kept.together(rows) for kept in self._kept), key=len, default=rows)
        mine = [together.index(row) for row in rows]
        after = list(before)
        for row, count in zip(rows, new, strict=True):
            after[row] += count
        together, held = self._filled(together, before)
        given = self._arrays(len(together), size, size if wide else 1)
        given["input_ids"][mine] = chunk
        given["lengths"][:] = held
        given["positions"][:] = given["lengths"][:, None] + np.arange(size)
        given[NEW][:] = 0
        given[NEW][mine] = new
        if not wide:
            given["logits_at"][mine, 0] = [max(count - 1, 0) for count in new]
        for kept in self._kept:
            given |= kept.inputs(together, before, after, size)
        entry = self._program.choose_entry(size, len(together), max(held) + size)
        call = self._call(entry, given)
        with entry_span(self._program.entries[entry], given):
            outputs = call()
        for kept in self._kept:
            kept.keep(together, outputs, after)
        found = outputs["logits"]
        return (found if len(mine) == len(together) else found[mine]), after

    def continued(
        self, executable: Continues, first: Array, steps: int, draws: Draws, before: list[int]
    ) -> tuple[Array, Array]:
        """Steps of all sequences that choose their tokens themselves, the first of them given.

        The ids [B, steps] and the logits [B, vocab] behind the last of them.
        """
        count = len(first)
        after = [n + steps for n in before]
        rows, held = self._filled(list(range(count)), before)
        given = self._arrays(len(rows), 1, 1)
        given["input_ids"][:count, 0] = first
        given["lengths"][:] = held
        given["positions"][:, 0] = held
        given["logits_at"][:] = 0
        given[NEW][:] = 0
        given[NEW][:count] = 1
        for kept in self._kept:
            given |= kept.inputs(rows, before, after, steps)
        entry = self._program.choose_entry(1, len(rows), max(after))
        wanted = {v.name for v in self._program.entries[entry].inputs}
        sampling, seeds = np.zeros((len(rows), 4), np.float32), np.zeros((len(rows), 2), np.int64)
        sampling[:count], seeds[:count, 0] = draws.choice.row, draws.keys
        seeds[:count, 1] = [n + 1 for n in draws.made]
        inputs = {name: x for name, x in given.items() if name in wanted}
        ids, logits = executable.continued(entry, inputs, sampling, seeds, steps)
        return ids[:count], logits[:count, 0]

    def _filled(self, rows: list[int], before: Sequence[int]) -> tuple[list[int], list[int]]:
        """The rows of a step, as many as the device wants, and the tokens that they hold.

        Rows of nobody hold none, and nobody sees what is written for them.
        """
        held = [before[row] for row in rows]
        if self._device is None or rows[-1] != len(before) - 1:
            return rows, held
        end = min(rows[-1] + 1 + self._device.rows(len(rows)) - len(rows), self._max_batch)
        more = range(rows[-1] + 1, end)
        return [*rows, *more], [*held, *(0 for _ in more)]

    def _arrays(self, count: int, size: int, wanted: int) -> dict[str, Array]:
        """Arrays for the tokens of a step over `count` rows: those of the last one of such sizes.

        Rows that nobody fills hold tokens of a former step, which only must be tokens.
        """
        shapes = {
            "input_ids": (count, size),
            "positions": (count, size),
            "lengths": (count,),
            "logits_at": (count, wanted),
            NEW: (count,),
        }
        if {name: x.shape for name, x in self._tokens.items()} != shapes:
            self._tokens = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
            self._tokens["logits_at"][:] = np.arange(wanted)
        return dict(self._tokens)

    def _call(self, entry: str, given: dict[str, Array]) -> Call:
        """The entry over these arrays: what ran the last step, where that was over the same."""
        if self._bound is not None:
            known, arrays, call = self._bound
            if known == entry and all(map(is_, arrays.values(), given.values())):
                return call
        call = self._executable.bind(entry, given)
        self._bound = entry, given, call
        return call
