"""Folders that are written beside their place and take it when they are whole.

Whoever writes holds a lock on its unfinished folder, which the system takes back when the process
ends, however it ends. So what a process left that was killed is told from what another one is still
writing, and the next that writes to the same place clears it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsc.files import made, named

UNFINISHED, REPLACED = "unfinished", "replaced"
"""What is being written, and what was there before, for as long as both must be moved."""
_AT_CWD, _EXCHANGE = -100, 2
"""`AT_FDCWD` and `RENAME_EXCHANGE` of Linux."""


@contextmanager
def replacing(out: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well.

    What was there before stays until then. `check` raises where what is there is to stay: it looks
    before, and again at the end, since another process may have put something there. Raises
    `FileError` where the machine refuses.
    """
    check()
    with named(out), made(out.parent):
        clear(out)
        with _own(out, UNFINISHED) as folder:
            yield folder
            folder.chmod(0o755)
            check()
            _put(folder, out)


def clear(out: Path) -> None:
    """Remove what processes left beside `out` that were killed; what they moved goes back."""
    if not out.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(out.name)}\.({UNFINISHED}|{REPLACED})\.\w{{8}}")
    with suppress(OSError):
        for each in sorted(out.parent.iterdir()):
            found = name.fullmatch(each.name)
            if found is None or each.is_symlink() or (lock := _locked(each, wait=False)) is None:
                continue
            with suppress(OSError):
                if found[1] == REPLACED and not os.path.lexists(out):
                    os.rename(each / out.name, out)
            _remove(each)
            os.close(lock)


def _remove(path: Path) -> None:
    """Take a folder away, or the link that stood for one; what cannot be stays."""
    with suppress(OSError):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


@contextmanager
def _own(out: Path, what: str) -> Iterator[Path]:
    """A new folder beside `out`, locked; it is gone at the end unless it took another name.

    One that has what `out` was stays where nothing took that place: `clear` puts it back.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{what}.", dir=out.parent))
        lock = _locked(folder, wait=True)
        if folder.exists():  # else another process took it for one that is left
            break
        if lock is not None:
            os.close(lock)
    try:
        yield folder
    finally:
        if what == UNFINISHED or os.path.lexists(out):
            _remove(folder)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, wait: bool) -> int | None:
    """A descriptor that locks a folder; `None` where another process has it, or nothing locks."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(lock)
        return None
    return lock


def _put(folder: Path, out: Path) -> None:
    """Put `folder` in the place of `out`; where that fails, `out` is what it was."""
    if not os.path.lexists(out):
        os.rename(folder, out)
        return
    if _exchange(folder, out):
        return
    with _own(out, REPLACED) as old:
        try:
            os.rename(out, old / out.name)
            os.rename(folder, out)
        except BaseException:
            with suppress(FileNotFoundError):  # it was not moved yet
                os.rename(old / out.name, out)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Give two paths each other's names at once; whether this system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_CWD, names[0], _AT_CWD, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
