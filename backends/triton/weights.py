"""Weights on a device: those of a file are uploaded once for all executables that read it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from dsc.backends.triton.driver import Driver
from dsc.backends.triton.memory import LOCK, Memory
from dsc.runtime.standalone import mapped_weights

Identity: TypeAlias = tuple[object, ...]
"""The kind of device and the file, which is another one once it was written anew."""
_SHARED: dict[Identity, Uploaded] = {}


class Uploaded:
    """The weights of a file as they lie in it, and the drivers of who reads them.

    `places` are addresses by name, once they are there. Each reader has a driver of its own, and
    all of these share the device's memory: the last one to leave frees it.
    """

    def __init__(self, key: Identity, driver: Driver, name: str) -> None:
        self.key, self.readers = key, list[Driver]()
        self.places: Mapping[str, int] | None = None
        self._memory = Memory(driver, name, lambda: None)
        self._uploading = threading.Lock()

    def upload(self, path: Path) -> Mapping[str, int]:
        """Where they lie; who comes first uploads them. Raises `MemoryLimitError`."""
        with self._uploading:
            if self.places is None:
                content, offsets = mapped_weights(path)
                driver = self._memory.driver
                base = self._memory.allocate(len(content), "weights")
                driver.upload(base, content.ctypes.data, len(content))
                driver.synchronise()
                self.places = {name: base + offset for name, offset in offsets.items()}
            return self.places

    def leave(self, driver: Driver) -> None:
        """A reader, whose device is active, is done."""
        with LOCK:
            self.readers.remove(driver)
            self._memory.driver = self.readers[0] if self.readers else driver
            if not self.readers:
                self.places = None
                _SHARED.pop(self.key, None)
                self._memory.release()


def shared(path: Path, driver: Driver, name: str) -> Uploaded:
    """The weights of a file for one more reader; `name` is who is said to hold them."""
    told = path.stat()
    key = driver.kind, told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns
    with LOCK:
        found = _SHARED.setdefault(key, Uploaded(key, driver, name))
        found.readers.append(driver)
        return found
