"""Backends: programs in, artifacts out. One folder a backend, found by name."""

from __future__ import annotations

import importlib
from typing import Any

from dsc.backends.base import Backend
from dsc.errors import UsageError, one_of

BACKENDS = {
    "reference": "dsc.backends.reference:ReferenceBackend",
    "null": "dsc.backends.null:NullBackend",
    "onnxruntime": "dsc.backends.onnxruntime:OnnxRuntimeBackend",
    "tvm": "dsc.backends.tvm:TvmBackend",
    "triton": "dsc.backends.triton:TritonBackend",
}
"""Name to `module:class`. Third parties add theirs by the entry-point group `dsc.backends`."""


def names() -> list[str]:
    """All backends that can be asked for, installed or not."""
    return sorted({*BACKENDS, *(e.name for e in _added())})


def get(name: str) -> Backend:
    """The backend called `name`. Raises `UsageError`; never imports a toolchain."""
    place = BACKENDS.get(name)
    if place is None:
        found = [e for e in _added() if e.name == name]
        if not found:
            raise UsageError(f"unknown backend {name!r}", hint=one_of(name, names()))
        place = found[0].value
    module, _, attribute = place.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def _added() -> Any:
    """The entry points of other packages' backends."""
    from importlib.metadata import entry_points  # it reads mail headers, which takes a while

    return entry_points(group="dsc.backends")
