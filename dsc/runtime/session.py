"""A session: the sequences that are being generated, with their KV cache.

The same over every backend: it keeps the states that the program declares, in the ways they are
stored (`dsc.ir.interface`, `dsc.runtime.caches`), cuts prompts into chunks, and chooses the entry
for each step. Sequences start together (`prefill`), or join and leave between
steps (`add`, `remove`); a decode step is one step for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from dsc.errors import NoNumbers, UsageError
from dsc.ir.arrays import Array, Kind, extremes, of_kind
from dsc.ir.choosing import NO_TOKEN, Choice, chosen, key_of
from dsc.ir.dims import Sym
from dsc.ir.interface import Storage
from dsc.ir.program import Program
from dsc.runtime.caches import kept_by
from dsc.runtime.executable import Continues, Executable, KeepsCaches, OpensLate
from dsc.runtime.pages import PagePool
from dsc.runtime.steps import Draws, Steps
from dsc.runtime.tokens import Form, check_limit, check_limits, read_ids, read_lengths

CONTIGUOUS, PAGED = Storage.CONTIGUOUS, Storage.PAGED
LIKELIEST = Choice()


@dataclass(slots=True)
class _Active:
    """A sequence: its id, its tokens in the cache, its last logits and what kind they are.

    `cuts` are the lengths that it was cut to, in order.
    """

    id: int
    length: int = 0
    like: Kind = "numpy"
    logits: Array | None = None
    cuts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a sequence of `session` was: its id, its tokens, and what cannot be cut back to them.

    `cuts` is how often it had been cut.
    """

    session: Session
    sequence: int
    length: int
    cuts: int
    saved: Mapping[str, Array]


class Session:
    """Generates with a compiled causal language model.

    `max_batch` sequences of up to `max_context` tokens each; prompts run in chunks of
    `prefill_chunk`. What is not given is what the model was compiled for. Ids are int64 torch
    tensors, NumPy arrays, lists, or what speaks DLPack; logits come back as torch tensors for torch
    tensors, and as fp32 NumPy arrays for all else. For lists they are as they were before, at first
    torch tensors where torch is imported.
    """

    def __init__(
        self,
        executable: Executable,
        program: Program,
        max_batch: int = 1,
        max_context: int | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        self._most = program.limits
        max_context = self._most.max_context if max_context is None else max_context
        check_limits(program, max_batch, max_context)
        if prefill_chunk is not None:
            check_limit("prefill_chunk", prefill_chunk, self._most.prefill_chunk)
        self.executable = executable
        self.program = program
        self.max_batch = max_batch
        self.max_context = max_context
        self.prefill_chunk = self._most.prefill_chunk if prefill_chunk is None else prefill_chunk
        self._vocab = _vocabulary(program)
        page = program.page
        capacity = max_context + self.prefill_chunk
        self._pool = None
        if page is not None:
            count = max_batch * -(-max_context // page)
            self._pool = PagePool(count, page, -(-capacity // page))
        device = executable if isinstance(executable, KeepsCaches) else None
        self._in_place = all(s.storage in (CONTIGUOUS, PAGED) for s in program.states)
        self._device = device if self._in_place else None
        self._kept = kept_by(program.states, max_batch, capacity, self._pool, device)
        self._kind: Kind = "torch" if "torch" in sys.modules else "numpy"
        self._steps = Steps(executable, program, self._kept, self._device, max_batch)
        self._active: list[_Active] = []
        self._next_id = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence in the cache, in the order of `sequences`."""
        return [each.length for each in self._active]

    @property
    def sequences(self) -> list[int]:
        """Ids of the sequences, in the order in which arrays hold their rows.

        A new sequence comes last; when one leaves, the last takes its place.
        """
        return [each.id for each in self._active]

    def logits(self, sequence: int) -> Any:
        """Logits [vocab] after the last token of a sequence. Raises `UsageError`."""
        found = self._active[self._row(sequence)]
        if found.logits is None:
            raise UsageError(
                f"sequence {sequence} was cut: what it said is not known any more",
                hint="give it a token first, such as the last one that it keeps",
            )
        return _like(found.logits, found.like)

    def prepare(self, prompts: Sequence[int]) -> None:
        """Open the entries that prompts of so many tokens and decode steps need, where that waits.

        Without it the first step of each entry opens it, and takes so much longer.
        """
        if isinstance(self.executable, OpensLate):
            chunk, most = self.prefill_chunk, self.max_context
            steps = {(1, most), *((1, min(n + 1, most)) for n in prompts)}
            for n in prompts:
                steps |= {(min(chunk, n - at), min(n, at + chunk)) for at in range(0, n, chunk)}
            batches = {1, len(prompts)}
            for entry in {self.program.choose_entry(n, b, c) for n, c in steps for b in batches}:
                self.executable.open(entry)

    def reset(self) -> None:
        """Forget all sequences; pages go back to the pool."""
        for kept in self._kept:
            kept.clear()
        self._active = []
        self._steps.forget()

    def add(self, ids: Any) -> int:
        """Start one more sequence with the prompt `ids` [S]; the others wait.

        Returns its id, by which `logits`, `decode` and `remove` know it. Raises `UsageError` where
        `max_batch` sequences are there already, or the prompt is longer than `max_context`.
        """
        tokens, like = self._read(ids, "prompt")
        self._check_room()
        new = self._check_new(tokens, None, [0])
        started = self._begin(like)
        try:
            self._append(tokens, new, [len(self._active) - 1], all_logits=False)
        except BaseException:
            self.remove(started)
            raise
        return started

    def _check_room(self) -> None:
        """Raise `UsageError` where no sequence can be added."""
        if len(self._active) == self.max_batch:
            raise UsageError(
                f"the session holds {self.max_batch} sequences already",
                hint="remove one, or " + self._larger("max_batch", self.max_batch),
            )

    def remove(self, sequence: int) -> None:
        """End a sequence: its slot or pages are free. Raises `UsageError` for an unknown id."""
        row = self._row(sequence)
        for kept in self._kept:
            kept.drop(row, self.lengths)
        self._active[row] = self._active[-1]
        self._active.pop()

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Start one more sequence, with the first `length` tokens of another (all by default).

        Returns its id. Prompts that begin alike are computed once this way. In pages both hold the
        same ones until one writes into a page that the other holds as well, and gets a copy of that
        page; contiguous caches are copied. Raises `UsageError` as `add` and `truncate` do.
        """
        row = self._row(sequence)
        held = self._active[row].length
        kept = self._length(row, held if length is None else length)
        self._check_room()
        new = self._begin(self._active[row].like)
        self._active[-1].length = kept
        if kept == held:
            self._active[-1].logits = self._active[row].logits
        for each in self._kept:
            each.fork(row, len(self._active) - 1, self.lengths)
        return new

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence, as if the others had never been.

        Speculated tokens that were refused go this way, or a turn of a talk that is to be taken
        back. Raises `UsageError` for an unknown id, a length that the sequence does not have, and a
        model with a state that cannot be cut: take a `snapshot`.
        """
        row = self._row(sequence)
        self._cut(row, self._length(row, length))

    def _length(self, row: int, length: int) -> int:
        """A length that a sequence can be cut to. Raises `UsageError`."""
        held = self._active[row].length
        if isinstance(length, bool) or not isinstance(length, int | np.integer):
            raise UsageError(f"a length of {length!r}", hint="give a whole number")
        if not 0 <= length <= held:
            raise UsageError(
                f"a length of {length} for a sequence of {held} tokens", hint=f"give 0 to {held}"
            )
        whole = [s.input for s in self.program.states if not s.storage.of_tokens]
        if length < held and whole:
            raise UsageError(
                f"{', '.join(whole)} cannot be cut to fewer tokens",
                hint="take session.snapshot(sequence) before, and session.restore it",
            )
        return int(length)

    def snapshot(self, sequence: int) -> Snapshot:
        """What a sequence is now, to be set back to by `restore`. Raises `UsageError`."""
        row = self._row(sequence)
        saved = {name: x for kept in self._kept for name, x in kept.saved(row).items()}
        now = self._active[row]
        return Snapshot(self, sequence, now.length, len(now.cuts), saved)

    def restore(self, snapshot: Snapshot) -> None:
        """Set a sequence back to what it was, as if later tokens had never been.

        Raises `UsageError` where it was removed, or was cut to fewer tokens since, or is another
        session's.
        """
        if snapshot.session is not self:
            raise UsageError("a snapshot of another session", hint="restore it in the one it is of")
        row = self._row(snapshot.sequence)
        least = min(self._active[row].cuts[snapshot.cuts :], default=snapshot.length)
        if least < snapshot.length:
            raise UsageError(
                f"a snapshot of {snapshot.length} tokens for a sequence that was cut to {least}",
                hint="its later tokens are others now: take a snapshot anew",
            )
        self._cut(row, snapshot.length)
        for kept in self._kept:
            kept.restore(row, snapshot.saved)

    def _cut(self, row: int, length: int) -> None:
        """Keep the first tokens of a row."""
        if length < self._active[row].length:
            self._active[row].length = length
            self._active[row].logits = None
            self._active[row].cuts.append(length)
            for kept in self._kept:
                kept.truncate(self.lengths)

    def prefill(
        self, ids: Any, lengths: Sequence[int] | None = None, all_logits: bool = False
    ) -> Any:
        """Append prompts to the sequences; the first call starts them.

        `ids` is [B, S] (or [S] for one sequence), padded on the right where `lengths` [B] says
        that sequences are shorter. Returns logits [B, vocab] of each sequence's last token, or
        [B, S, vocab] of all positions with `all_logits`. Raises `UsageError`.
        """
        tokens, like = self._read(ids, "batch")
        batch = tokens.shape[0]
        held = self.lengths
        new = self._check_new(tokens, lengths, held if len(held) == batch else [0] * batch)
        if held and len(held) != batch:
            raise UsageError(
                f"{batch} sequences where the session holds {len(held)}",
                hint="give as many rows, or call session.reset()",
            )
        if not held:
            for _ in range(batch):
                self._begin(like)
        try:
            logits = self._append(tokens, new, list(range(batch)), all_logits)
        except BaseException:
            if not held:
                self.reset()
            raise
        return _like(logits, like)

    def decode(self, next_ids: Any) -> Any:
        """Append one token to each sequence, in one step.

        `next_ids` is [B] or [B, 1] in the order of `sequences`, and the logits are [B, vocab]; or a
        mapping from sequence id to token, and the logits are a mapping to [vocab]: sequences that
        it does not name wait. Raises `UsageError`.
        """
        if not self._active:
            raise UsageError("decode before prefill", hint="call session.prefill(ids) first")
        if isinstance(next_ids, Mapping):
            return self._decode_named(next_ids)
        tokens, like = self._read(next_ids, "column")
        if tokens.shape != (len(self._active), 1):
            shape = tuple(tokens.shape)
            raise UsageError(f"next_ids of shape {shape} for {len(self._active)} sequences")
        new = self._check_new(tokens, None, self.lengths)
        return _like(self._append(tokens, new, list(range(len(self._active))), False), like)

    def generate(
        self,
        steps: int,
        choice: Choice = LIKELIEST,
        keys: Sequence[int] | None = None,
        drawn: int | Sequence[int] | None = None,
    ) -> Any:
        """Continue all sequences by `steps` tokens each, chosen from their logits: ids [B, steps].

        What follows is as if `decode` had been given each. `keys` are those of the sequences' draws
        (`dsc.ir.choosing.key_of`), of which `drawn` were made before, of all or of each: where that
        is not given, as many as each has tokens, so that no call repeats another's draws. On a GPU
        tokens are chosen there, and the host waits once. Raises `UsageError`; `NoNumbers` where the
        largest of a step's logits is NaN or infinite, and sequences keep the tokens up to it.
        """
        if not self._active:
            raise UsageError("generate before prefill", hint="call session.prefill(ids) first")
        check_limit("steps", steps, self.max_context)
        keys = [key_of(0, each.id) for each in self._active] if keys is None else list(keys)
        if len(keys) != len(self._active):
            raise UsageError(f"{len(keys)} keys for {len(self._active)} sequences")
        drawn = self.lengths if drawn is None else drawn
        made = [drawn] * len(keys) if isinstance(drawn, int) else list(drawn)
        first = self._chosen(choice, keys, made, [])
        tokens = np.broadcast_to(first[:, None], (len(first), steps))
        self._check_new(tokens, None, self.lengths)
        found = [first]
        if isinstance(self.executable, Continues) and self.chooses:
            found += self._continued(self.executable, first, steps, Draws(choice, keys, made))
        for step in range(len(found), steps + 1):
            self._append(found[-1][:, None], [1] * len(first), [*range(len(first))], False)
            if step < steps:
                found.append(self._chosen(choice, keys, [n + step for n in made], found))
        return of_kind(np.stack(found[:steps], 1), self._active[0].like)

    @property
    def chooses(self) -> bool:
        """Whether `generate` chooses tokens where the logits are."""
        return isinstance(self.executable, Continues) and self._in_place

    def _chosen(
        self, choice: Choice, keys: Sequence[int], draws: Sequence[int], before: Sequence[Array]
    ) -> Array:
        """The next token of each sequence by its logits, after those of `before`."""
        rows = [np.asarray(self.logits(each.id), np.float32) for each in self._active]
        found = [chosen(row, choice, *each) for row, *each in zip(rows, keys, draws, strict=True)]
        if NO_TOKEN in found:
            bad = self._active[found.index(NO_TOKEN)]
            raise NoNumbers(
                f"the largest of the logits of sequence {bad.id} after {bad.length} tokens is no"
                " number (NaN, infinity)",
                of_kind(np.array(before, np.int64).reshape(-1, len(rows)).T, bad.like),
            )
        return np.array(found, np.int64)

    def _continued(
        self, executable: Continues, first: Array, steps: int, draws: Draws
    ) -> list[Array]:
        """Steps that choose their tokens themselves, the first of them given: ids [B] of each.

        They end before a step whose logits give no token, which is as if it had never been.
        """
        before = self.lengths
        ids, logits = self._steps.continued(executable, first, steps, draws, before)
        for each, row in zip(self._active, logits, strict=True):
            each.length, each.logits = each.length + steps, row
        found = [*takewhile(lambda each: NO_TOKEN not in each, ids.T)]
        for row, length in enumerate(before if len(found) < steps else ()):
            self._cut(row, length + len(found))
        return found

    def _decode_named(self, next_ids: Mapping[int, int]) -> dict[int, Any]:
        if not next_ids:
            raise UsageError("no sequence to decode", hint="give at least one id and its token")
        rows = sorted(self._row(sequence) for sequence in next_ids)
        names = [self._active[row].id for row in rows]
        tokens, _ = read_ids([next_ids[name] for name in names], "column")
        if tokens.shape[1] != 1:
            raise UsageError(
                f"{tokens.shape[1]} tokens each for {len(names)} sequences",
                hint="give one token for each id; prefill takes several",
            )
        new = self._check_new(tokens, None, [self._active[row].length for row in rows])
        self._append(tokens, new, rows, all_logits=False)
        return {name: self.logits(name) for name in next_ids}

    def _append(self, tokens: Array, new: list[int], rows: list[int], all_logits: bool) -> Array:
        """Append `new` tokens each to sequences, in chunks; their logits as `prefill` has them.

        Where a chunk fails, sequences are what they were before the first one.
        """
        size = self.prefill_chunk
        active = [self._active[row] for row in rows]
        several = active if tokens.shape[1] > size else []
        before = [(each, each.logits, self.snapshot(each.id)) for each in several]
        parts = []
        try:
            for start in range(0, tokens.shape[1], size):
                chunk = tokens[:, start : start + size]
                here = [min(max(n - start, 0), chunk.shape[1]) for n in new]
                found, after = self._steps.append(chunk, here, rows, self.lengths, all_logits)
                for each, length in zip(self._active, after, strict=True):
                    each.length = length
                parts.append(found)
        except BaseException:
            for each, logits, snapshot in before:
                self.restore(snapshot)
                each.logits = logits
            raise
        ends = []
        for place, (each, count) in enumerate(zip(active, new, strict=True)):
            part, at = divmod(count - 1, size)
            end = parts[part][place, at if all_logits else 0]
            each.logits = end.copy() if all_logits else end
            ends.append(end)
        if len(parts) == 1:
            return parts[0] if all_logits else parts[0][:, 0].copy()
        return np.concatenate(parts, 1) if all_logits else np.stack(ends)

    def _read(self, ids: Any, form: Form) -> tuple[Array, Kind]:
        """Token ids as an array, and the kind in which to answer. Raises `UsageError`."""
        tokens, kind = read_ids(ids, form)
        self._kind = kind or self._kind
        return tokens, self._kind

    def _begin(self, like: Kind) -> int:
        """A new sequence without tokens, in the last row."""
        self._active.append(_Active(self._next_id, like=like))
        for kept in self._kept:
            kept.begin(len(self._active) - 1)
        self._next_id += 1
        return self._active[-1].id

    def _larger(self, option: str, now: int) -> str:
        """What to do about a limit of the session."""
        most = getattr(self._most, option)
        if now < most:
            return f"open the session with a larger {option}: the model takes up to {most}"
        return f"compile the model with a larger {option}"

    def _row(self, sequence: object) -> int:
        for row, each in enumerate(self._active):
            if isinstance(sequence, int | np.integer) and each.id == sequence:
                return row
        known = ", ".join(map(str, self.sequences)) or "none"
        raise UsageError(f"no sequence {sequence!r} in this session", hint=f"there are: {known}")

    def _check_new(
        self, tokens: Array, lengths: Sequence[int] | None, held: Sequence[int]
    ) -> list[int]:
        """How many tokens each sequence gets that holds `held` of them. Raises `UsageError`."""
        batch, size = tokens.shape
        if not 1 <= batch <= self.max_batch:
            raise UsageError(
                f"a batch of {batch}", hint=f"this session takes 1 to {self.max_batch}"
            )
        if size == 0:
            raise UsageError("an empty prompt", hint="give at least one token")
        low, high = extremes(tokens)
        if low < 0 or (self._vocab is not None and high >= self._vocab):
            raise UsageError(
                f"token ids {low}..{high} outside of the vocabulary of {self._vocab}",
                hint="give ids of this model's own tokenizer",
            )
        new = read_lengths(lengths, batch, size)
        longest = max(map(sum, zip(new, held, strict=True)))
        if longest > self.max_context:
            raise UsageError(
                f"a sequence of {longest} tokens, max_context is {self.max_context}",
                hint="give fewer tokens, or " + self._larger("max_context", self.max_context),
            )
        return new


def _vocabulary(program: Program) -> int | None:
    for node in (n for graph in program.entries.values() for n in graph.nodes):
        if node.op == "embedding" and node["ids"].name == "input_ids":
            size = node["weight"].type.shape[0]
            return None if isinstance(size, Sym) else size
    return None


def _like(logits: Array, kind: Kind) -> Any:
    return of_kind(logits if kind == "torch" else logits.astype(np.float32, copy=False), kind)
