"""Where dsc keeps what is the user's own: a cache that may go at any time, and state.

The folders are those of the XDG base directory specification; nothing here creates them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def state_folder() -> Path:
    """`$XDG_STATE_HOME/dsc`, `~/.local/state/dsc` by default. `OSError` where there is no home."""
    return Path(os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state") / "dsc"


def cache_entry(kind: str, key: Mapping[str, Any]) -> Path:
    """The file of a cache entry, `$XDG_CACHE_HOME/dsc/KIND/HASH.json`, `~/.cache` by default.

    The name is a hash: an entry must hold its whole key, to be compared when it is read. `OSError`
    where there is no home.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / kind / f"{name}.json"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dsc`, `~/.cache/dsc` by default. `OSError` where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "dsc"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", "~") from None
