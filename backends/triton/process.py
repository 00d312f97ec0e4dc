"""The environment of the child processes that compile and interpret."""

from __future__ import annotations

import os
from pathlib import Path


def import_environment() -> dict[str, str]:
    """This process's environment, with a path on which a child imports the very same `dsc`."""
    import dsc

    roots = [str(Path(p).resolve().parent) for p in dsc.__path__]
    search = [*roots, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", "1"),
    }
