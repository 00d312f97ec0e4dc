"""Time and speed on the device's own clock: events around launches, copies and products.

Launches are queued behind a fill that lasts as long as queueing them takes, so that none waits for
the host and what lies between two events is a kernel and the way to the next. The speeds are what a
step can be held against: bytes a second of a copy, read and written, and operations a second of a
kernel that multiplies the same ones over and over (`kernels/probe.py`).
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dsc.backends.triton.blocks import Blocks
from dsc.backends.triton.devices import CARDS
from dsc.backends.triton.driver import ReadyLaunch
from dsc.backends.triton.launch import POINTER_TYPES, Kernel
from dsc.backends.triton.memory import Memory
from dsc.errors import MemoryLimitError
from dsc.ir.types import DType
from dsc.targets import Target

COPY_BYTES = 1 << 30
FILL_BYTES, LEAST_FILL = 1 << 26, 5e-6
"""Bytes of a fill, and the seconds that one takes at least: no memory has 13 TB/s."""
PACE, SPARE, SLOWEST = 25e-6, 1.25, 1e-4
"""Seconds that queueing a launch and an event takes at first, until that was seen; how much longer
fills run than queueing took the last time; and what it takes at most, but where kernels load."""
ROUNDS = 5
TURNS, WAVES = 4096, 2
PROBES = "probes.json"
"""What kernels.json is for the probes."""
TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
FLOPS = 2 * 128 * 128 * 64
KINDS = {"bf16": DType.bf16, "fp8": DType.f8e4m3, "int8": DType.i8}
ONES = {"bf16": 0x3F80, "fp8": 0x38, "int8": 1}
"""The bits of a one."""


def probe_kernels(target: Target) -> dict[str, Kernel]:
    """By the type that they multiply the kernels that read a target's matrix peak."""
    blocks, made = Blocks(str(target)), {}
    for name, kind in KINDS.items():
        if name == "fp8" and blocks.fp8 != "e4m3fn":
            continue
        pointers = {"a": POINTER_TYPES[kind], "out": "*fp32"}
        signature = {**pointers, "turns": "i32", **dict.fromkeys(TILE, "constexpr")}
        made[name] = Kernel("probe", "multiply", signature, TILE, ("a", "out"), 8, 1)
    return made


class Timer:
    """Events and buffers of a driver's stream; buffers are counted in `memory`."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.driver = memory, memory.driver
        self._events: list[ctypes.c_void_p] = []
        self._fill, self._fill_seconds, self.pace = 0, 0.0, PACE

    def close(self) -> None:
        """Let the events go; its memory goes with all that is held."""
        with ExitStack() as every:
            for event in self._events:
                every.callback(self.driver.drop, event)
            self._events = []

    def spans(self, launches: Sequence[ReadyLaunch]) -> Callable[[], list[float]]:
        """Queue launches; what is returned waits for them and gives the seconds of each."""
        self._ahead(len(launches))
        events = [self._event(i) for i in range(len(launches) + 1)]
        began = time.perf_counter()
        self.driver.record(events[0])
        for launch, event in zip(launches, events[1:], strict=True):
            self.driver.launch(launch)
            self.driver.record(event)
        taken = SPARE * (time.perf_counter() - began) / max(1, len(launches))
        self.pace = min(taken, SLOWEST)

        def read() -> list[float]:
            self.driver.synchronise()
            return [self.driver.seconds(a, b) for a, b in pairwise(events)]

        return read

    def seconds(self, queue: Callable[[], None]) -> float:
        """How long the device takes for what is queued."""
        start, end = self._event(0), self._event(1)
        self.driver.record(start)
        queue()
        self.driver.record(end)
        self.driver.synchronise()
        return self.driver.seconds(start, end)

    def copy_speed(self, size: int = COPY_BYTES) -> float:
        """Bytes a second, read and written, of a copy of `size` bytes, or of half where no room is.

        Raises `MemoryLimitError` where there is room for nothing.
        """
        while True:
            try:
                return self._copied(size)
            except MemoryLimitError:
                if size < FILL_BYTES:
                    raise
            size //= 2

    def product_speed(self, folder: Path, kind: str) -> float:
        """Operations a second of a target's units for a type; of one without, of bf16's.

        `folder` has the target's binaries. Raises `RuntimeError` where a product is wrong.
        """
        records: Mapping[str, Any] = json.loads((folder / PROBES).read_text())
        kind = kind if kind in records else "bf16"
        record = records[kind]
        function = self.driver.load(
            (folder / record["file"]).read_bytes(), record["symbol"], record["warps"],
            record["shared"], record["parameters"],
        )  # fmt: skip
        programs = WAVES * (self.driver.units or _most_units(self.driver.arch))
        itemsize = KINDS[kind].itemsize
        ones = np.full(128 * 64, ONES[kind], f"u{itemsize}")
        sums = np.zeros(programs, np.float32)
        a = self.memory.allocate(ones.nbytes, "a product")
        out = self.memory.allocate(sums.nbytes, "its sums")
        try:
            self.driver.upload(a, ones.ctypes.data, ones.nbytes)
            arguments = [ctypes.c_uint64(a), ctypes.c_uint64(out), ctypes.c_int32(TURNS)]
            launch = self.driver.prepare(function, (programs, 1, 1), arguments)
            times = [self.seconds(lambda: self.driver.launch(launch)) for _ in range(ROUNDS + 1)]
            self.driver.download(sums.ctypes.data, out, sums.nbytes)
            self.driver.synchronise()
        finally:
            self.memory.free(a)
            self.memory.free(out)
        self._check_sums(sums)
        return programs * TURNS * FLOPS / median(times[1:])

    def _copied(self, size: int) -> float:
        """Bytes a second of a copy of so many. Raises `MemoryLimitError`, and then holds none."""
        buffers: list[int] = []
        try:
            for what in ("what is copied", "a copy"):
                buffers.append(self.memory.allocate(size, what))
            times = [
                self.seconds(lambda: self.driver.copy(buffers[0], buffers[1], size))
                for _ in range(ROUNDS + 1)
            ]
        finally:
            for pointer in buffers:
                self.memory.free(pointer)
        return 2 * size / median(times[1:])

    def _check_sums(self, sums: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        if (sums != TURNS * TILE["BLOCK_K"]).any():
            raise RuntimeError("the product that reads the matrix peak is wrong")

    def _ahead(self, launches: int) -> None:
        """Queue what lasts as long as queueing so many launches takes."""
        if not self._fill:
            self._fill = self.memory.allocate(FILL_BYTES, "a fill")
            times = [self.seconds(self._clear) for _ in range(2)]
            self._fill_seconds = max(times[1], LEAST_FILL)
        for _ in range(1 + math.ceil(self.pace * launches / self._fill_seconds)):
            self._clear()

    def _clear(self) -> None:
        self.driver.clear(self._fill, FILL_BYTES)

    def _event(self, number: int) -> ctypes.c_void_p:
        while len(self._events) <= number:
            self._events.append(self.driver.event())
        return self._events[number]


def _most_units(arch: str) -> int:
    """Those of an architecture's largest card."""
    return max(card.units for card in CARDS.values() if card.arch == arch)
