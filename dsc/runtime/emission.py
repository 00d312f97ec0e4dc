"""What a backend hands to the writer of artifacts, and the manifest that tells of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from dsc.errors import ArtifactError
from dsc.runtime.plan import Plan

MANIFEST = "dsc.json"
RUN_SCRIPT, EXAMPLE = "run.py", "example.py"
"""Written for people to run; loading an artifact imports neither."""
Place: TypeAlias = tuple[str, int, int]
"""Where a weight lies: the name of a file beside `weights_path`, the first byte, and how many."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called while long work goes on."""


@dataclass(frozen=True)
class Emission:
    """What `emit` gives: files by path relative to the artifact, and how to run them.

    `weights_path` is where the artifact's writer streams the packed weights: one safetensors file,
    or several beside that with `shard_size` bytes of tensors each, where large tensors start at
    multiples of `page`;
    `meta` is JSON that `load` finds again in the manifest; `runner` is the backend's part of the
    artifact's run.py (a module text that defines `class Model`), or empty; `notes` are lines for
    the report. `finish`, where given, makes the files that need to know where each weight lies: it
    is called with the place of each weight by name. `needs` are the packages that running takes, by
    name, as pip is told them.
    """

    files: Mapping[str, bytes]
    plan: Plan | None = None
    weights_path: str = "weights/model.safetensors"
    shard_size: int | None = None
    page: int = 1
    meta: Mapping[str, Any] = field(default_factory=dict)
    runner: str = ""
    notes: tuple[str, ...] = ()
    finish: Callable[[Mapping[str, Place]], Mapping[str, bytes]] | None = None
    needs: Mapping[str, str] = field(default_factory=dict)


def check_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` where `folder` holds no longer the artifact of this manifest.

    What is read from a folder after it was opened may be another artifact's, compiled over it.
    """
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        found = {}
    if found.get("files") != manifest.get("files"):
        raise ArtifactError(
            "the artifact was replaced after it was opened",
            where=str(folder),
            hint="load the folder again",
        )
