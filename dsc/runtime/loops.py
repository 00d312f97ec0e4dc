"""The loops of `loops.cc`, compiled for this processor and loaded: what it can do at most."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from dsc import kept
from dsc.errors import InternalError
from dsc.hardware import processor
from dsc.toolchain import compiler_version, cpp_compiler

KIND = "probes"
SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-march=native", "-fPIC", "-shared", "-pthread")
LINE = 64
"""Bytes of a line of memory; each holds eight ones."""


@dataclass(frozen=True, slots=True)
class Loops:
    """A library of loops: the names of its forms of reading, and of its products, by number."""

    library: Any
    forms: tuple[str, ...]
    products: tuple[str, ...]

    def fill(self, address: int, size: int, threads: int) -> None:
        """Write memory that can be read: each thread the part that it will read first."""
        self.library.dsc_fill(address, size // LINE, threads)

    def read(self, form: str, address: int, size: int, threads: int, passes: int) -> float:
        """Seconds of some passes over memory that `fill` wrote, a whole number of lines a thread.

        Raises `InternalError` where not all of it was read.
        """
        found, lines = ctypes.c_uint64(), size // LINE
        number = self.forms.index(form)
        seconds: float = self.library.dsc_read(
            number, address, lines, threads, passes, ctypes.byref(found)
        )
        if found.value != lines * 8 * passes:
            raise InternalError(
                f"reading by {form} saw {found.value} words of {lines * 8 * passes}"
            )
        return seconds

    def multiply(self, product: str, threads: int, seconds: float) -> float:
        """Operations a second of all threads together; 0 where the system does not let us."""
        found: float = self.library.dsc_multiply(self.products.index(product), threads, seconds)
        return found


@cache
def loops() -> Loops | None:
    """The loops, or none where no compiler takes them or no code may be loaded from a file."""
    try:
        data = _library()
        if data is None:
            return None
        with tempfile.TemporaryDirectory(prefix="dsc-loops-") as folder:
            path = Path(folder) / "loops.so"
            path.write_bytes(data)
            library = ctypes.CDLL(str(path))
    except OSError:  # no room, or a folder for temporary files that nothing runs from
        return None
    library.dsc_form.restype = library.dsc_product.restype = ctypes.c_char_p
    library.dsc_read.restype = library.dsc_multiply.restype = ctypes.c_double
    address, long, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.dsc_fill.argtypes = (address, long, number)
    library.dsc_read.argtypes = (number, address, long, number, long, address)
    library.dsc_multiply.argtypes = (number, number, ctypes.c_double)
    return Loops(library, *(tuple(_names(f)) for f in (library.dsc_form, library.dsc_product)))


def _names(function: Any) -> Iterator[str]:
    for number in count():
        name = function(number)
        if name is None:
            return
        yield name.decode()


def _library() -> bytes | None:
    tool = cpp_compiler()
    if not tool:
        return None
    source = SOURCE.read_text()
    key = {
        "source": source,
        "flags": FLAGS,
        "compiler": compiler_version(tool),
        "processor": processor(),
    }
    data = kept.get(KIND, key)
    if data is not None:
        return data
    with tempfile.TemporaryDirectory(prefix="dsc-loops-") as folder:
        path = Path(folder) / "loops.so"
        line = [tool, *FLAGS, str(SOURCE), "-o", str(path)]
        done = subprocess.run(line, capture_output=True, check=False)
        if done.returncode:
            return None
        data = path.read_bytes()
    kept.put(KIND, key, data)
    return data
