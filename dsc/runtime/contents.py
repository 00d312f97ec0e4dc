"""What is stored of weights, as bytes: made by several threads, given in order.

What a block costs is reading, arithmetic and hashing, all of which leave the interpreter to other
threads; so a thread a core makes blocks, each a few ahead of what is taken, and the memory that
waits is theirs alone. The bytes are the same however many threads there are.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsc.errors import CheckpointError
from dsc.hardware import cpu
from dsc.ir.arrays import array_of
from dsc.ir.streams import Block, cuts
from dsc.ir.types import TensorType
from dsc.ir.weights import WeightExpr, WeightSource, sources

RELEASE_BYTES = 128 << 20
"""Bytes that are read before the pages of the checkpoint that they came from are given back."""
WORKERS = 16
"""Threads at most: more would wait for the one that writes."""
AHEAD = 2
"""Blocks that wait for each thread."""
Stored: TypeAlias = tuple[str, WeightExpr]
"""A tensor of a file, by name."""


def contents(
    stored: Iterable[Stored], source: WeightSource, workers: int | None = None
) -> Generator[tuple[str, Any], None, None]:
    """The bytes of tensors in their order, block by block, each with its tensor's name.

    `workers`: threads; without it as many as there are cores.

    Raises `CheckpointError`, with the name, for bytes that are not what a tensor's type says.
    """
    count = workers or min(cpu().cores, WORKERS)
    alone = _Alone()
    with ThreadPoolExecutor(count, "dsc-pack") as pool:
        try:
            yield from _Ordered(source, pool, alone, AHEAD * count).all(stored)
        finally:
            pool.shutdown(cancel_futures=True)
            alone.end()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What blocks are of; `read`: bytes that one of its own is read from."""

    name: str
    type: TensorType
    read: float


class _Ordered:
    """Blocks that are being made, the first of which is the next to be given."""

    def __init__(
        self, source: WeightSource, pool: ThreadPoolExecutor, alone: _Alone, most: int
    ) -> None:
        self.source, self.pool, self.alone, self.most = source, pool, alone, most
        self.waiting: deque[tuple[_Tensor, Future[Any] | None]] = deque()
        self.given, self.held = 0, 0.0

    def all(self, stored: Iterable[Stored]) -> Iterator[tuple[str, Any]]:
        """The bytes of tensors, as `contents` gives them."""
        for name, expr in stored:
            read = sum(nbytes(leaf.type) for leaf in sources(expr))
            tensor = _Tensor(name, expr.type, max(1.0, read / max(1, nbytes(expr.type))))
            for block in cuts(expr, self.source):
                self.waiting.append((tensor, self.pool.submit(self._bytes, block, expr.type)))
                yield from self._taken(self.most)
            self.waiting.append((tensor, None))
        yield from self._taken(0)

    def _bytes(self, block: Block, declared: TensorType) -> Any:
        self.alone.begin()
        return bytes_of(block(), declared)

    def _taken(self, most: int) -> Iterator[tuple[str, Any]]:
        """The first blocks, until no more than `most` wait."""
        while len(self.waiting) > most:
            tensor, made = self.waiting.popleft()
            if made is None:
                self._check_end(tensor)
                continue
            try:
                data = made.result()
            except CheckpointError as error:
                error.where = error.where or tensor.name
                raise
            self.given += len(data)
            yield tensor.name, data
            self._release(len(data) * tensor.read)

    def _check_end(self, tensor: _Tensor) -> None:
        """Raise `CheckpointError` unless a tensor's bytes were as many as its type has."""
        given, self.given = self.given, 0
        if given != nbytes(tensor.type):
            raise CheckpointError(f"{given} bytes for {tensor.type}", where=tensor.name)

    def _release(self, read: float) -> None:
        """Give pages back that were read, beyond so many."""
        self.held += read
        if self.held > RELEASE_BYTES:
            self.source.release()
            self.held = 0.0


class _Alone:
    """Has torch compute on the thread that asks for it, since all cores have one that asks.

    torch keeps one number for threads to come, which is set back at the end.
    """

    def __init__(self) -> None:
        self.before = 0

    def begin(self) -> None:
        """Called by each thread before it computes."""
        torch: Any = sys.modules.get("torch")
        if hasattr(torch, "get_num_threads") and (now := torch.get_num_threads()) > 1:
            self.before = self.before or now
            torch.set_num_threads(1)

    def end(self) -> None:
        """Called by the thread that began."""
        if self.before:
            torch: Any = sys.modules["torch"]
            torch.set_num_threads(self.before)


def bytes_of(block: Any, declared: TensorType) -> Any:
    """The bytes of an array or a tensor, which must be of this element type."""
    array = np.ascontiguousarray(array_of(block))
    if array.dtype != declared.dtype.numpy:
        raise CheckpointError(f"a weight of {array.dtype} for {declared}")
    return array.reshape(-1).view(np.uint8) if array.size else b""


def nbytes(t: TensorType) -> int:
    """The bytes of a tensor that is there."""
    if not isinstance(t.nbytes, int):
        raise CheckpointError(f"a weight of symbolic shape {t}")
    return t.nbytes
