"""The machine itself: a read of memory and products, in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc.runtime.probes import MatrixProbe, ReadProbe

NEEDS = {"probe": ("torch",)}


class Engine:
    """Reads the machine's speed; a call of `speed` takes some tens of milliseconds."""

    load_seconds = 0.0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.threads = options["threads"]
        self.asked, self.read = 0, ReadProbe(self.threads, 1)
        self.products = {
            name: MatrixProbe(self.threads, coded=coded).__enter__()
            for name, coded in (("matrix", False), ("coded", True))
        }
        self.units = ", ".join(each.way for each in self.products.values())

    def speed(self, size: int) -> dict[str, float]:
        """Bytes a second of a read over so many, and operations a second."""
        if size != self.asked:
            self.read.__exit__()
            self.asked, self.read = size, ReadProbe(self.threads, size).__enter__()
        found = {name: product() for name, product in self.products.items()}
        return {"bandwidth": self.read(), **found}
