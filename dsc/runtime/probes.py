"""What this machine can do now: a read of so many bytes, and a matrix product.

Speed means little on a machine whose speed moves, so figures are given as shares of these two,
measured beside them. Both keep every thread busy that the process may use. A step whose weights
stay in the processor's caches reads them faster than memory could give them, so the read goes over
as many bytes as the step's, again and again; the product is the fastest of the types that a
program's own may be computed in.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dsc.hardware import cpu
from dsc.ir.lazy import torch
from dsc.ir.types import PRECISIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

READ_BYTES = 1 << 30
"""Far more than caches hold."""
LEAST_BYTES = 1 << 18
"""Of a thread's part; what is smaller is read no faster."""
PASS_BYTES = 1 << 26
"""Of a call at least, by as many passes as that takes."""
ABSENT = 7
"""A byte that the memory which is read does not hold."""
MATRIX = (512, 4096, 2048)
"""Rows, columns and depth of the product: a prompt's chunk times a wide layer."""
PRODUCTS = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "fp16": ("fp16", "fp32")}
"""Types in which the products of a program may be computed, by the program's own: 16-bit factors
may be widened."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second of a read over `size` bytes, operations a second of a product in `dtype`."""

    bandwidth: float
    matrix: float
    threads: int
    size: int = READ_BYTES
    dtype: str = "bf16"

    def shared(self, ranks: int) -> Machine:
        """The part that each of some ranks has of it."""
        return replace(self, bandwidth=self.bandwidth / ranks, matrix=self.matrix / ranks)

    def as_dict(self) -> dict[str, Any]:
        """The readings for --json."""
        return {
            "read_bytes_per_s": self.bandwidth,
            "read_bytes": self.size,
            "matrix_flop_per_s": self.matrix,
            "matrix_dtype": self.dtype,
        }

    def __str__(self) -> str:
        return (
            f"read {self.bandwidth / 1e9:.1f} GB/s over {self.size / 1e6:.4g} MB, {self.dtype}"
            f" matrix product {self.matrix / 1e9:.0f} GFLOP/s, {self.threads} threads"
        )


@cache
def machine(threads: int | None = None, size: int = READ_BYTES, dtype: str = "bf16") -> Machine:
    """Measure both, once a process, number of threads, size of the read and type of the product."""
    count = threads or cpu().cores
    with ReadProbe(count, size) as read, MatrixProbe(count, dtype=dtype) as product:
        return Machine(steadily(read), steadily(product), count, read.size, product.dtype)


def steadily(probe: Callable[[], float]) -> float:
    """The median of a few readings."""
    return median(probe() for _ in range(ROUNDS))


class ReadProbe:
    """Reads `size` bytes of memory, each thread its own part of them; a call gives bytes a second.

    The C library's search for a byte reads as fast as a core can, and outside of Python's lock.
    """

    def __init__(self, threads: int, size: int = READ_BYTES) -> None:
        part = max(LEAST_BYTES, min(size, READ_BYTES) // threads)
        self.parts = [np.full(part, 1, dtype=np.uint8) for _ in range(threads)]
        self.size = part * threads
        self._passes = -(-PASS_BYTES // self.size)
        self._search: Any = ctypes.CDLL(None).memchr
        self._search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._search.restype = ctypes.c_void_p
        self.pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> ReadProbe:
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.parts = []

    def __call__(self) -> float:
        """Bytes a second of some passes."""
        seconds = seconds_of(lambda: list(self.pool.map(self._read, self.parts)))
        return self.size * self._passes / seconds

    def _read(self, part: Bytes) -> None:
        for _ in range(self._passes):
            self._search(part.ctypes.data, ABSENT, part.nbytes)


class MatrixProbe:
    """Multiplies matrices through torch; a call gives floating-point operations a second.

    Of the types that a program in `dtype` may be computed in, that which is faster here.
    """

    def __init__(
        self, threads: int, shape: tuple[int, int, int] | None = None, dtype: str = "bf16"
    ) -> None:
        rows, columns, depth = shape or MATRIX
        self._threads, self._before = threads, torch.get_num_threads()
        self._operands: dict[str, list[torch.Tensor]] = {
            name: [
                torch.full((n, depth), 0.5, dtype=PRECISIONS[name].torch) for n in (rows, columns)
            ]
            for name in PRODUCTS[dtype]
        }
        self.dtype = dtype
        self.flops = 2 * rows * columns * depth

    def __enter__(self) -> MatrixProbe:
        for name in self._operands:
            self._run(name)
        speeds = {name: self._run(name) for name in self._operands}
        self.dtype = max(speeds, key=speeds.__getitem__)
        self._operands = {self.dtype: self._operands[self.dtype]}
        return self

    def __exit__(self, *_: object) -> None:
        self._operands = {}

    def __call__(self) -> float:
        """Operations a second of one product."""
        return self._run(self.dtype)

    def _run(self, dtype: str) -> float:
        torch.set_num_threads(self._threads)
        try:
            product = partial(torch.nn.functional.linear, *self._operands[dtype])
            return self.flops / seconds_of(product)
        finally:
            torch.set_num_threads(self._before)


def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
