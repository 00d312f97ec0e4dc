"""Modules that are imported when first used, so that what does not need them stays light."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands in for a module until an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:
            self._module = importlib.import_module(self._name)
        return getattr(self._module, attribute)  # asked anew: somebody may replace it


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")
