"""Device memory of all that this process holds on GPUs: counted, within the user's limit.

Sessions and artifacts share a card. What one of them allocates is held against
`dsc.set_memory_limit("cuda", …)` together with what all others hold; where that or the card is
full, caches of sessions that are gone are given back first, and then the refusal says who holds
what.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack

from dsc.backends.triton.driver import Driver, OutOfMemory
from dsc.errors import MemoryLimitError
from dsc.settings import memory_limit

LOCK = threading.RLock()
"""Held while memory is taken or given back, and while it is looked for what is gone."""
_HOLDERS: weakref.WeakSet[Memory] = weakref.WeakSet()
HINT = (
    "let go of a session or a model, open it with a smaller max_batch or max_context, or raise the"
    ' limit: dsc.set_memory_limit("cuda", megabytes)'
)


class Memory:
    """What one executable, `name`, holds; `reclaim` gives back what nobody needs any more."""

    def __init__(self, driver: Driver, name: str, reclaim: Callable[[], None]) -> None:
        self.driver = driver
        self.name = name
        self.sizes: dict[int, int] = {}
        self._reclaim = reclaim
        with LOCK:
            _HOLDERS.add(self)

    @property
    def held(self) -> int:
        """Bytes that are allocated."""
        return sum(self.sizes.values())

    def allocate(self, size: int, what: str) -> int:
        """Device memory for something. Raises `MemoryLimitError`."""
        with LOCK:
            limit = memory_limit("cuda")
            if limit is not None and _held() + size > limit:
                _reclaim_all()
                if _held() + size > limit:
                    told = f"the limit is {limit / 1e6:.1f} MB"
                    raise MemoryLimitError(self._refusal(size, what, told), hint=HINT)
            try:
                pointer = self.driver.allocate(size)
            except OutOfMemory:
                _reclaim_all()
                pointer = self._once_more(size, what)
            self.sizes[pointer] = max(size, 1)
            return pointer

    def _once_more(self, size: int, what: str) -> int:
        try:
            return self.driver.allocate(size)
        except OutOfMemory:
            free, total = self.driver.memory()
            told = f"the GPU has {free / 1e6:.1f} MB free of {total / 1e6:.1f}"
            raise MemoryLimitError(self._refusal(size, what, told), hint=HINT) from None

    def _refusal(self, size: int, what: str, told: str) -> str:
        each = [f"{x.name} {x.held / 1e6:.1f}" for x in _HOLDERS if x.sizes]
        held = f"; held now: {', '.join(sorted(each))} MB" if each else ""
        return f"{size / 1e6:.1f} MB for {what} of {self.name} do not fit: {told}{held}"

    def free(self, pointer: int) -> None:
        """Give memory back."""
        with LOCK:
            del self.sizes[pointer]
            self.driver.free(pointer)

    def release(self) -> None:
        """Give all of it back, whatever fails of it."""
        with LOCK, ExitStack() as every:
            for pointer in self.sizes:
                every.callback(self.driver.free, pointer)
            self.sizes.clear()


def _held() -> int:
    return sum(each.held for each in _HOLDERS)


def _reclaim_all() -> None:
    for each in list(_HOLDERS):
        each._reclaim()
