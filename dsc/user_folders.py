"""Where dsc keeps what is the user's own: a cache that may go at any time, and state.

The folders are those of the XDG base directory specification; nothing here creates them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


def state_folder() -> Path:
    """`$XDG_STATE_HOME/dsc`, `~/.local/state/dsc` by default. `OSError` where there is no home."""
    return Path(os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state") / "dsc"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dsc`, `~/.cache/dsc` by default. `OSError` where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "dsc"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", "~") from None
