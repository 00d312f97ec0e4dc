"""Packages from outside that add operators and rules: imported when they are needed."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from dsc.errors import UsageError

GROUP = "dsc.extensions"
"""The entry-point group under which a package names the module to import."""


@cache
def load_extensions() -> None:
    """Import the modules that installed packages name. Raises `UsageError`."""
    for each in entry_points(group=GROUP):
        try:
            importlib.import_module(each.value)
        except ImportError as problem:
            raise UsageError(
                f"the extension {each.name} ({each.value}) cannot be imported: {problem}",
                hint="repair or uninstall the package that names it",
            ) from problem
