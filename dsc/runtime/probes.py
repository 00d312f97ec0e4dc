"""What this machine can do now: a streaming read of memory and a bf16 matrix product.

Speed means little on a machine whose speed moves, so figures are given as shares of these two,
measured beside them. Both keep every thread busy that the process may use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

READ_BYTES = 1 << 30
"""Far more than caches hold."""
PIECE = 1 << 21
"""Bytes of one call; between two calls a thread holds Python's lock for a moment."""
MATRIX = (512, 4096, 2048)
"""Rows, columns and depth of the product: a prompt's chunk times a wide layer."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second that a read streams, floating-point operations a second of a product."""

    bandwidth: float
    matrix: float
    threads: int

    def __str__(self) -> str:
        return (
            f"read {self.bandwidth / 1e9:.1f} GB/s, bf16 matrix product"
            f" {self.matrix / 1e9:.0f} GFLOP/s, {self.threads} threads"
        )


@cache
def machine(threads: int | None = None) -> Machine:
    """Measure both, once a process and number of threads."""
    count = threads or available()
    with ReadProbe(count) as read, MatrixProbe(count) as product:
        return Machine(
            median(read() for _ in range(ROUNDS)), median(product() for _ in range(ROUNDS)), count
        )


def available() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ReadProbe:
    """Reads memory, each thread its own part of it; a call gives bytes a second."""

    def __init__(self, threads: int, size: int = READ_BYTES) -> None:
        words = np.ones(size // 8, dtype=np.int64)
        self.parts = np.array_split(words, threads)
        self.size = words.nbytes
        self.pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> ReadProbe:
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.parts = []

    def __call__(self) -> float:
        """Bytes a second of one pass."""
        seconds = _seconds(lambda: list(self.pool.map(_largest, self.parts)))
        return self.size / seconds


class MatrixProbe:
    """Multiplies bf16 matrices through torch; a call gives floating-point operations a second."""

    def __init__(self, threads: int, shape: tuple[int, int, int] = MATRIX) -> None:
        import torch

        rows, columns, depth = shape
        self._threads, self._before = threads, torch.get_num_threads()
        self._operands: list[torch.Tensor] = [
            torch.full((n, depth), 0.5, dtype=torch.bfloat16) for n in (rows, columns)
        ]
        self.flops = 2 * rows * columns * depth

    def __enter__(self) -> MatrixProbe:
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self._operands = []

    def __call__(self) -> float:
        """Operations a second of one product."""
        import torch

        torch.set_num_threads(self._threads)
        try:
            product = partial(torch.nn.functional.linear, *self._operands)
            return self.flops / _seconds(product)
        finally:
            torch.set_num_threads(self._before)


def _largest(words: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    step = PIECE // words.itemsize
    return max(int(words[i : i + step].max()) for i in range(0, len(words), step))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
