"""Processes of our own that compile, or interpret kernels, beside the one that asks."""

from __future__ import annotations

import os
from pathlib import Path


def child_environment() -> dict[str, str]:
    """This process's environment, with a path on which a child imports the very same `dsc`."""
    import dsc

    roots = [str(Path(p).resolve().parent) for p in dsc.__path__]
    search = [*roots, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
