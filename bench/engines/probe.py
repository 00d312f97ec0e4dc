"""The machine itself: a streaming read and a matrix product, in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc.runtime.probes import MatrixProbe, ReadProbe

NEEDS = {"probe": ("torch",)}


class Engine:
    """Reads the machine's speed; a call of `speed` takes some tens of milliseconds."""

    load_seconds = 0.0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.read = ReadProbe(options["threads"]).__enter__()
        self.product = MatrixProbe(options["threads"]).__enter__()

    def speed(self) -> dict[str, float]:
        """Bytes and operations a second."""
        return {"bandwidth": self.read(), "matrix": self.product()}
