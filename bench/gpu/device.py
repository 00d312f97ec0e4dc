"""A model that was prepared, on the device, over weights that are made there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsc.backends.triton.device import DeviceExecutable, driver_of
from dsc.backends.triton.driver import Driver
from dsc.ir.dims import evaluate
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType

BLOCK_BYTES = 1 << 22
"""Of random numbers, of which weights are made by repeating."""
SPREAD, CODE = 0.02, 100.0
"""The deviation of weights, and how large an FP8 code is."""


def driver_for(folder: Path) -> Driver:
    """The driver of the device that a model was prepared for. Raises `BackendUnavailable`."""
    archs = sorted(path.parent.name for path in (folder / "triton").glob("*/plan.json"))
    return driver_of("hip" if archs and archs[0].startswith("gfx") else "cuda")


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights."""
    program = parse_program((folder / "program.dsc").read_text())
    return sum(evaluate(t.nbytes, {}) for t in program.weight_types().values())


def poisoned(driver: Driver) -> Driver:
    """The driver, which hands out memory full of ones: NaN as a float, -1 as an integer."""
    allocate = driver.allocate

    def poison(size: int) -> int:
        pointer = allocate(size)
        ones = np.full(max(size, 1), 0xFF, np.uint8)
        driver.upload(pointer, ones.ctypes.data, ones.nbytes)
        driver.synchronise()
        return pointer

    driver.allocate = poison  # type: ignore[method-assign]
    return driver


@contextmanager
def opened(folder: Path) -> Iterator[tuple[DeviceExecutable, Program]]:
    """A model of a folder over weights that are made for it."""
    program = parse_program((folder / "program.dsc").read_text())
    driver = driver_for(folder)
    weights = Weights(driver, program)
    place = folder / "triton" / driver.arch
    executable = DeviceExecutable(place, weights.places, program, driver)
    try:
        yield executable, program
    finally:
        weights.free()
        executable.close()


class Weights:
    """A program's weights on the device, of random blocks that are repeated."""

    def __init__(self, driver: Driver, program: Program) -> None:
        self.driver, self.places = driver, dict[str, int]()
        driver.activate()
        self._made: dict[str, tuple[int, int]] = {}
        for name, type_ in program.weight_types().items():
            for suffix, part in type_.parts:
                self.places[name + suffix] = self._filled(name + suffix, part, bool(suffix))
        driver.synchronise()

    def free(self) -> None:
        """Give all of it back."""
        self.driver.activate()
        self.driver.synchronise()
        for pointer in (*self.places.values(), *(at for at, _ in self._made.values())):
            self.driver.free(pointer)
        self.places, self._made = {}, {}

    def _filled(self, name: str, part: TensorType, is_scale: bool) -> int:
        size = evaluate(part.nbytes, {})
        target = self.driver.allocate(size)
        block, length = self._block(name, part.dtype, is_scale)
        for at in range(0, size, length):
            self.driver.copy(target + at, block, min(length, size - at))
        return target

    def _block(self, name: str, dtype: DType, is_scale: bool) -> tuple[int, int]:
        """Where a block of numbers for such a weight lies, and its bytes."""
        kind = "ones" if "norm" in name else "rope" if "inv_freq" in name else str(dtype)
        kind = f"scales, {kind}" if is_scale else kind
        if kind not in self._made:
            made = numbers(kind, dtype)
            pointer = self.driver.allocate(made.nbytes)
            self.driver.upload(pointer, made.ctypes.data, made.nbytes)
            self.driver.synchronise()
            self._made[kind] = pointer, made.nbytes
        return self._made[kind]


def numbers(kind: str, dtype: DType) -> Any:
    """Ones for norms, frequencies for rope, small numbers, their scales, and codes but for NaN."""
    count, values = BLOCK_BYTES // dtype.itemsize, np.random.default_rng(1)
    if kind == "ones":
        return np.ones(count).astype(dtype.numpy)
    if kind == "rope":
        return (1e4 ** -(np.arange(count) % 32 / 32)).astype(dtype.numpy)
    if not dtype.is_float or dtype.bits < 16:
        codes = values.integers(0, 120, count, dtype=np.uint8)
        return codes | (values.integers(0, 2, count, dtype=np.uint8) << 7)
    if kind.startswith("scales"):
        return (SPREAD / CODE * values.uniform(0.5, 1.5, count)).astype(dtype.numpy)
    return (SPREAD * values.standard_normal(count, np.float32)).astype(dtype.numpy)
