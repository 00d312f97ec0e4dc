"""What a program runs on when it is calibrated: windows of a text, or inputs by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dsc.calibration.measure import Batch
from dsc.errors import CheckpointError, UsageError
from dsc.files import read_text
from dsc.frontends.tokenizer import parse_tokenizer
from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.program import Program
from dsc.runtime.admission import Admitted
from dsc.runtime.executable import Call
from dsc.runtime.session import Session
from dsc.runtime.tokens import read_ids

Text: TypeAlias = str | PathLike[str] | Sequence[int] | Array
"""A file's path or a text itself, or token ids as a list or an array."""
SEQLEN = 256
ASKS = "give the path of a text, a text, or a list of token ids"


def windows(ids: Sequence[int], count: int, length: int) -> Array:
    """At most `count` windows of `length` ids, [W, length], spread evenly, none over another.

    Ids that are fewer are one window.

    >>> windows(range(10), 2, 3).tolist(), windows(range(3), 4, 8).tolist()
    ([[0, 1, 2], [7, 8, 9]], [[0, 1, 2]])
    """
    length = min(length, len(ids))
    count = max(1, min(count, len(ids) // length))
    last = len(ids) - length
    starts = [round(last * i / max(1, count - 1)) for i in range(count)]
    return np.asarray([ids[start : start + length] for start in starts], dtype=np.int64)


def text_ids(given: Text, tokenizer: Path | bytes | None) -> list[int]:
    """The token ids that a text is. Raises `UsageError`."""
    ids = _spelled(given, tokenizer) if isinstance(given, str | PathLike) else _listed(given)
    if len(ids) < 2:
        raise UsageError(f"{len(ids)} tokens are too few to calibrate with", hint=ASKS)
    return ids


def _listed(given: Sequence[int] | Array) -> list[int]:
    found, _ = read_ids(given, "prompt")
    return [int(each) for each in found[0]]


def _spelled(given: str | PathLike[str], tokenizer: Path | bytes | None) -> list[int]:
    is_file = not isinstance(given, str) or os.path.isfile(given)  # of any text it says so
    if tokenizer is None:
        raise UsageError("the model has no tokenizer to read a text with", hint="give token ids")
    spelled = parse_tokenizer(tokenizer, CheckpointError, "get the checkpoint again")
    return list(spelled.encode(read_text(str(given)) if is_file else str(given)).ids)


def token_batches(
    program: Program, ids: Sequence[int], nsamples: int, seqlen: int | None
) -> list[Batch]:
    """Steps over windows of a text, as a session over the program would run them."""
    limits = program.limits
    longest = min(limits.prefill_chunk, limits.max_context)
    if seqlen is not None and seqlen > longest:
        raise UsageError(
            f"seqlen is {seqlen}, and a step takes {longest} tokens",
            hint="compile with a larger prefill_chunk, or calibrate with shorter samples",
        )
    taken = windows(ids, nsamples, min(SEQLEN, longest) if seqlen is None else seqlen)
    size = limits.max_batch
    return [_step(program, taken[at : at + size]) for at in range(0, len(taken), size)]


def named_batches(program: Program, given: object) -> list[Batch]:
    """Inputs by name, or several such, of a program that is no language model's."""
    listed = [given] if isinstance(given, Mapping) else given
    if not isinstance(listed, Sequence) or not all(isinstance(x, Mapping) for x in listed):
        raise UsageError(
            f"{program.name} is no causal language model and reads no text",
            hint="give its inputs by name: {name: array}, or a list of such",
        )
    entry = next(iter(program.entries))
    taker = _Taker(program)
    for inputs in listed:
        taker.take(entry, {name: array_of(x) for name, x in inputs.items()})
    return taker.taken


def _step(program: Program, ids: Array) -> Batch:
    taker = _Taker(program)
    session = Session(taker, program, len(ids), ids.shape[1])
    try:
        session.prefill(ids, all_logits=True)
    except _TakenError:
        pass
    (batch,) = taker.taken
    return batch


class _TakenError(Exception):
    """The inputs of a step are known, and nothing has to run."""


class _Taker(Admitted):
    """Stands for an executable, notes what it is to run, and runs nothing."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.taken: list[Batch] = []

    def take(self, entry: str, inputs: Mapping[str, Array]) -> None:
        """Note copies of inputs, once they are admitted: a session uses its arrays again."""
        graph = self.program.entry(entry, inputs)
        self.admissions[entry].check(inputs)
        copies = {v.name: tensor_of(inputs[v.name].copy()) for v in graph.inputs}
        self.taken.append(Batch(entry, copies))

    def bind(self, entry: str, inputs: Mapping[str, Array]) -> Call:
        """Note what a session asks for."""
        self.take(entry, inputs)
        raise _TakenError
