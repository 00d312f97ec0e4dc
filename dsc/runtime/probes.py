"""What this machine can do now: a read of so many bytes, and a product.

Speed means little on a machine whose speed moves, so figures are given as shares of these two,
measured beside them, and so that neither can be passed: the best of several forms of each. All keep
every thread busy that the process may use.

A step whose weights stay in the processor's caches reads them faster than memory could give them,
so the read goes over as many bytes as the step's, again and again. A product is what the processor
multiplies in registers, in the fastest of the types that a program's own may be computed in, or by
torch where that knows instructions that the compiler does not. Where there is no compiler
(`loops`), the C library's search for a byte reads, and torch multiplies.
"""

from __future__ import annotations

import ctypes
import mmap
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
from dsc.runtime.loops import LINE, loops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

READ_BYTES = 1 << 30
"""Far more than caches hold."""
LEAST_BYTES = 1 << 18
"""Of a thread's part; what is smaller is read no faster."""
PASS_BYTES = 1 << 26
"""Of a call at least, by as many passes as that takes."""
LARGE_PAGE = 1 << 21
STREAMS = 8
"""Most of a thread at once: its part is so many times as many lines."""
SEARCH = "search for a byte"
ABSENT = 7
"""A byte that the memory which is read does not hold."""
MATRIX = (512, 4096, 2048)
"""Rows, columns and depth of the product: a prompt's chunk times a wide layer."""
FEW_ROWS, WORTH = 32, 4
"""Rows of a product by torch that comes first: the large one is left out where this is not a
fraction as fast as what was found before."""
PRODUCTS = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "fp16": ("fp16", "fp32")}
"""Types in which the products of a program may be computed, by the program's own: 16-bit factors
may be widened."""
CODES = "int8"
"""The type of products of 8-bit codes, which may be computed in the program's own as well."""
MULTIPLY_SECONDS = 0.004
"""Of a reading of products in registers."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second of a read over `size` bytes, operations a second of a product in `dtype`.

    `coded` is the speed of products of codes, `None` where a program has none; `device` what was
    read where it is not `threads` of this machine's processors.
    """

    bandwidth: float
    matrix: float
    threads: int
    size: int = READ_BYTES
    dtype: str = "bf16"
    coded: float | None = None
    device: str = ""

    def shared(self, ranks: int) -> Machine:
        """The part that each of some ranks has of it."""
        coded = None if self.coded is None else self.coded / ranks
        bandwidth, matrix = self.bandwidth / ranks, self.matrix / ranks
        return replace(self, bandwidth=bandwidth, matrix=matrix, coded=coded)

    def as_dict(self) -> dict[str, Any]:
        """The readings for --json."""
        return {
            "read_bytes_per_s": self.bandwidth,
            "read_bytes": self.size,
            "matrix_flop_per_s": self.matrix,
            "matrix_dtype": self.dtype,
            "coded_op_per_s": self.coded,
            **({"device": self.device} if self.device else {}),
        }

    def __str__(self) -> str:
        codes = "" if self.coded is None else f" (of codes {self.coded / 1e9:.0f})"
        return (
            f"read {self.bandwidth / 1e9:.1f} GB/s over {self.size / 1e6:.4g} MB, {self.dtype}"
            f" matrix product {self.matrix / 1e9:.0f} GFLOP/s{codes},"
            f" {self.device or f'{self.threads} threads'}"
        )


@cache
def machine(
    threads: int | None = None, size: int = READ_BYTES, dtype: str = "bf16", coded: bool = False
) -> Machine:
    """Measure all, once a process, number of threads, size of the read and types of products."""
    count = threads or cpu().cores
    with ReadProbe(count, size) as read, MatrixProbe(count, dtype=dtype) as product:
        found = Machine(steadily(read), steadily(product), count, read.size, product.dtype)
    return replace(found, coded=coded_speed(count, dtype)) if coded else found


def coded_speed(threads: int, dtype: str) -> float:
    """Operations a second of products of codes."""
    with MatrixProbe(threads, dtype=dtype, coded=True) as product:
        return steadily(product)


def steadily(probe: Callable[[], float]) -> float:
    """The median of a few readings."""
    return median(probe() for _ in range(ROUNDS))


class ReadProbe:
    """Reads `size` bytes of memory in large pages, each thread its own part of them.

    A call gives bytes a second: the better of the two forms of reading that were best at the
    beginning.
    """

    def __init__(self, threads: int, size: int = READ_BYTES) -> None:
        step = LINE * STREAMS
        part = max(LEAST_BYTES, min(size, READ_BYTES) // threads // step * step)
        self.threads, self.size = threads, part * threads
        self.memory = _large_pages(self.size)
        self._passes = -(-PASS_BYTES // self.size)
        self._loops = loops() or _Search(threads)
        self.forms = self._loops.forms

    def __enter__(self) -> ReadProbe:
        self._loops.fill(self.memory.ctypes.data, self.size, self.threads)
        speeds = [{form: self.read(form) for form in self.forms} for _ in range(2)]
        best = {form: max(each[form] for each in speeds) for form in self.forms}
        self.forms = tuple(sorted(best, key=best.__getitem__, reverse=True)[:2])
        return self

    def __exit__(self, *_: object) -> None:
        self.memory = np.empty(0, np.uint8)

    def __call__(self) -> float:
        """Bytes a second of some passes."""
        return max(map(self.read, self.forms))

    def read(self, form: str) -> float:
        """Bytes a second of one form of reading. What caches can hold is in them by then."""
        given = (form, self.memory.ctypes.data, self.size, self.threads)
        if self._passes > 1:
            self._loops.read(*given, 1)
        return self.size * self._passes / self._loops.read(*given, self._passes)


def _large_pages(size: int) -> Bytes:
    """Memory that nothing was written to yet."""
    held = mmap.mmap(-1, size + LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        held.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(held, np.uint8)
    first = -whole.ctypes.data % LARGE_PAGE
    return whole[first : first + size]


class _Search:
    """Reads by the C library's search for a byte, which needs no compiler."""

    forms = (SEARCH,)

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.find: Any = ctypes.CDLL(None).memchr
        self.find.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self.find.restype = ctypes.c_void_p

    def fill(self, address: int, size: int, threads: int) -> None:
        """Write other bytes."""
        ctypes.memset(address, 1, size)

    def read(self, form: str, address: int, size: int, threads: int, passes: int) -> float:
        """Seconds of some passes, each thread over its own part."""
        part = size // threads
        search = partial(self._search, part, passes)
        start = time.perf_counter()
        found = list(self.pool.map(search, range(address, address + size, part)))
        seconds = time.perf_counter() - start
        assert not any(found), "a byte was found that nobody wrote"
        return seconds

    def _search(self, size: int, passes: int, address: int) -> bool:
        return any([self.find(address, ABSENT, size) for _ in range(passes)])


class MatrixProbe:
    """Multiplies; a call gives operations a second, two for each product that is added to a sum.

    Of the types that a program in `dtype` may be computed in, for products of codes that of codes
    too, that which is fastest here, and of the ways to compute in it that which is.
    """

    def __init__(
        self,
        threads: int,
        shape: tuple[int, int, int] | None = None,
        dtype: str = "bf16",
        coded: bool = False,
    ) -> None:
        self._shape = shape or MATRIX
        self._threads, self._before = threads, torch.get_num_threads()
        self._types = (CODES, *PRODUCTS[dtype]) if coded else PRODUCTS[dtype]
        self._run: Callable[[], float] = lambda: 0.0
        self.dtype, self.way = dtype, ""

    def __enter__(self) -> MatrixProbe:
        ways = self._in_registers()
        speeds = {way: max(run(), run()) for way, run in ways.items()}
        for each in self._types:
            few = self._by_torch(each, FEW_ROWS)
            few()
            if WORTH * few() < max(speeds.values(), default=0.0):
                continue
            way = f"{each} by torch"
            ways[way] = self._by_torch(each, self._shape[0])
            ways[way]()
            speeds[way] = ways[way]()
        self.way = max(speeds, key=speeds.__getitem__)
        self.dtype, self._run = self.way.partition(" ")[0], ways[self.way]
        return self

    def __exit__(self, *_: object) -> None:
        self._run = lambda: 0.0

    def __call__(self) -> float:
        """Operations a second of one reading."""
        return self._run()

    def _in_registers(self) -> dict[str, Callable[[], float]]:
        found = loops()
        if found is None:
            return {}
        names = (name for name in found.products if name.partition(" ")[0] in self._types)
        return {n: partial(found.multiply, n, self._threads, MULTIPLY_SECONDS) for n in names}

    def _by_torch(self, dtype: str, rows: int) -> Callable[[], float]:
        _, columns, depth = self._shape
        kind = torch.int8 if dtype == CODES else PRECISIONS[dtype].torch
        x, weight = (torch.ones(n, depth, dtype=kind) for n in (rows, columns))
        run = partial(torch._int_mm, x, weight.t()) if dtype == CODES else partial(
            torch.nn.functional.linear, x, weight
        )  # fmt: skip

        def speed() -> float:
            torch.set_num_threads(self._threads)
            try:
                return 2 * rows * columns * depth / seconds_of(run)
            finally:
                torch.set_num_threads(self._before)

        return speed


def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
