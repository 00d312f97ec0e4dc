"""The run.py of an artifact as a module, for tests that call what a reader of it would call."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def run_module(folder: Path) -> Any:
    """Return the module that is the artifact's run.py."""
    spec = spec_from_file_location("run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
