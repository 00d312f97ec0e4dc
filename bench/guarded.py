"""Memory whose neighbours fault: a buffer ends where a page that nobody may touch begins.

A byte too far is a segmentation fault at once, in whatever code; a byte too early hits the page
before, or the pattern that fills what is left of the first page.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
PATTERN = 0xA5
_PROT_NONE = 0


class Guarded:
    """`nbytes` of memory between two pages without access, at their end or at their start."""

    def __init__(self, nbytes: int, at_end: bool = True) -> None:
        inner = max(1, -(-nbytes // PAGE)) * PAGE
        self._mapped = mmap.mmap(-1, inner + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))
        for page in (base, base + PAGE + inner):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, _PROT_NONE):
                raise OSError("a page cannot be protected")
        start = base + PAGE
        self.address = start + inner - nbytes if at_end else start
        self.bytes = _bytes(self.address, nbytes)
        slack = self.address if not at_end else start
        self._slack = _bytes(slack + (nbytes if not at_end else 0), inner - nbytes)
        self._slack[:] = PATTERN

    @property
    def intact(self) -> bool:
        """Whether nobody wrote into what is left of the buffer's own pages."""
        return bool((self._slack == PATTERN).all())

    def array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """The memory as an array, which must not outlive this object."""
        found: np.ndarray[Any, Any] = self.bytes.view(dtype).reshape(shape)
        return found


def _bytes(address: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if count == 0:
        return np.empty(0, np.uint8)
    memory = memoryview((ctypes.c_uint8 * count).from_address(address))
    return np.frombuffer(memory, np.uint8)
