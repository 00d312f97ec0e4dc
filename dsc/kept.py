"""What is kept between runs so that it need not be made again: traces, kernels, libraries, timings.

An entry is a file, `$XDG_CACHE_HOME/dsc/KIND/HASH` (`~/.cache` by default), named by the hash of
everything that it depends on. The file holds that key in full beside the data, and a hash of both:
one that is damaged, cut short or somebody else's is a miss, never an error. Files appear whole or
not at all, so that any number of processes may write, and be killed, at once.

All kinds together take at most `limit()` bytes: beyond it what was used longest ago goes. Code
comes out of here, so a folder that others may write to is not used. `DSC_CACHE=off` turns it off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dsc._version import __version__
from dsc.errors import UsageError
from dsc.files import nearest
from dsc.settings import switched
from dsc.user_folders import cache_folder

DEFAULT_LIMIT = 2 << 30
MOST = 512 << 20
"""Bytes of the largest entry that is kept."""
HOME = Path(__file__).parent
"""The package; in a checkout some of its folders are links, which have to be named."""
_MAGIC = b"dsc kept 1\n"
_DIGEST = hashlib.sha256().digest_size
_UNFINISHED = "."
"""How the names of files begin that are being written."""
_STALE = 3600.0
"""Seconds after which a file that is being written must have lost its writer."""
_SHARE = 64
"""What has been written before the folder is measured again: the limit divided by this."""

_written = 0
_measured = False


def get(kind: str, key: Mapping[str, Any]) -> bytes | None:
    """What is kept under a key, or `None`."""
    with suppress(OSError):
        path = _path(kind, key)
        if path is None:
            return None
        if path.stat().st_size > MOST:
            return None
        data = _opened(path.read_bytes(), _text(key))
        if data is not None:
            with suppress(OSError):  # of a cache that can only be read
                os.utime(path)  # the time of its last use
        return data
    return None


def put(kind: str, key: Mapping[str, Any], data: bytes) -> None:
    """Keep data under a key. A cache that takes nothing is a slower next time, no error."""
    text = _text(key)
    body = len(text).to_bytes(8, "little") + text + data
    whole = _MAGIC + hashlib.sha256(body).digest() + body
    with suppress(OSError):
        path = _path(kind, key)
        if path is None or len(whole) > MOST:
            return
        _make(path.parent)
        handle, fresh = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(whole)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
        _bound(len(whole))


@cache
def sources(*folders: str) -> str:
    """A hash of the Python files in folders of dsc, as part of a key; read once a process."""
    return _sources(folders)


def edited(*folders: str) -> bool:
    """Whether sources are others by now, which a process that starts now would run."""
    return _sources(folders) != sources(*folders)


def _sources(folders: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted((HOME / folder).rglob("*.py"))
        assert files, f"{folder} holds no sources"
        for file in files:
            digest.update(f"{file.relative_to(HOME)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def surroundings() -> dict[str, Any]:
    """What any computation may depend on, as part of a key: Python, packages, and how torch is set.

    It is what holds now, for the thread that asks.
    """
    known = {"packages": _packages(), "python": sys.version, "dsc": __version__}
    return {**known, "set": _settings()}


def _settings() -> list[str]:
    """What is set of torch in this process and steps into what it computes; none as it starts."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return []
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    casts = [f"{kind}: {torch.get_autocast_dtype(kind)}" for kind in kinds]
    found = [str(torch.get_default_dtype()), str(torch.get_default_device()), *casts]
    return [] if found == ["torch.float32", "cpu"] else found


def _packages() -> list[str]:
    """All installed packages with their versions, as their metadata's folders are called."""
    names = set()
    for folder in sys.path:
        with suppress(OSError):
            names |= {name for name in os.listdir(folder or ".") if name.endswith("-info")}
    return sorted(names)


def limit() -> int:
    """Bytes that all entries may take together: `DSC_CACHE_BYTES`, or 2 GiB.

    Raises `UsageError` where it is no whole number.
    """
    given = os.environ.get("DSC_CACHE_BYTES")
    if given is None:
        return DEFAULT_LIMIT
    if not re.fullmatch("[0-9]{1,18}", given):
        raise UsageError(f"DSC_CACHE_BYTES is {given!r}", hint="give a whole number of bytes")
    return int(given)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache: its kind, bytes, and when it was used last (seconds since the epoch)."""

    path: Path
    kind: str
    size: int
    used: float


def entries() -> list[Entry]:
    """All that is kept, what was used longest ago first."""
    with suppress(OSError):
        return sorted(
            (each for each, whole in _files(cache_folder()) if whole), key=lambda each: each.used
        )
    return []


def clear(kind: str | None = None) -> int:
    """Remove the entries of a kind, or all; how many bytes are free now."""
    freed = 0
    with suppress(OSError):
        for each, _ in _files(cache_folder()):
            if kind is None or each.kind == kind:
                freed += _removed(each)
    return freed


def refused() -> str:
    """Why nothing is kept: a reason in words, or "".

    Raises `UsageError` where a setting is none: whoever looks here first, before any work.
    """
    limit()
    if not switched("DSC_CACHE", on="on", off="off"):
        return "DSC_CACHE is off"
    try:
        folder = cache_folder()
        found = _found(folder)
    except OSError as problem:
        return problem.strerror or str(problem)
    if found is None:
        place = nearest(folder)
        return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if found.st_uid != os.getuid():
        return f"{folder} is somebody else's"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder}"
    return ""


def _found(folder: Path) -> os.stat_result | None:
    """The status of a folder, `None` where it is still to be made. `OSError` where it cannot be."""
    try:
        return folder.stat()
    except FileNotFoundError:
        return None


def _path(kind: str, key: Mapping[str, Any]) -> Path | None:
    if refused():
        return None
    return cache_folder() / kind / hashlib.sha256(_text(key)).hexdigest()


def _text(key: Mapping[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True).encode()


def is_whole(content: bytes) -> bool:
    """Whether a file is an entry as it was written."""
    start = len(_MAGIC) + _DIGEST
    return content[:start] == _MAGIC + hashlib.sha256(content[start:]).digest()


def _opened(content: bytes, key: bytes) -> bytes | None:
    """The data of an entry, where it is whole and of this key."""
    if not is_whole(content):
        return None
    body = content[len(_MAGIC) + _DIGEST :]
    size = int.from_bytes(body[:8], "little")
    return body[8 + size :] if body[8 : 8 + size] == key else None


def _make(folder: Path) -> None:
    """Make a folder of the cache, for its user alone."""
    if not folder.is_dir():
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def _bound(size: int) -> None:
    """Remove what was used longest ago where the limit is passed; looks once in a while."""
    global _measured, _written
    most = limit()
    _written += size
    if _measured and _written < most // _SHARE:
        return
    _measured, _written = True, 0
    found = list(_files(cache_folder()))
    for each, whole in found:
        if not whole and each.used < time.time() - _STALE:
            _removed(each)
    held = sum(each.size for each, whole in found if whole)
    for each in sorted((e for e, whole in found if whole), key=lambda e: e.used):
        if held <= most:
            break
        held -= _removed(each)


def _files(root: Path) -> Iterator[tuple[Entry, bool]]:
    """Every file of the cache, and whether it is an entry, not one that is being written."""
    for kind in root.iterdir() if root.is_dir() else ():
        if not kind.is_dir() or kind.is_symlink():
            continue
        for file in os.scandir(kind):
            with suppress(OSError):  # another process removed it
                if file.is_file(follow_symlinks=False):
                    found = file.stat(follow_symlinks=False)
                    entry = Entry(Path(file.path), kind.name, found.st_size, found.st_mtime)
                    yield entry, not file.name.startswith(_UNFINISHED)


def _removed(entry: Entry) -> int:
    """Remove an entry; its bytes, or 0 where it cannot be removed."""
    with suppress(OSError):
        entry.path.unlink()
        return entry.size
    return 0
