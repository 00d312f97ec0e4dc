"""What tuning an artifact gives: a report, and what of its files becomes another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tuned:
    """`report` is JSON. `files` are new ones by path, whole; without any all stays as it is.

    `gone` are paths, or beginnings of paths that end in `/`, of which only new files are left;
    `targets` is what the manifest's meta then says of some targets.
    """

    report: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    targets: Mapping[str, Any] = field(default_factory=dict)
