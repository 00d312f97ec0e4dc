"""Files that dsc reads and writes: places tried before the work, whole or not at all, in words.

What the machine refuses (no room, no right, no such folder) is never a bug of dsc: an `OSError`
becomes a `FileError` that says which path, why, and what to do. `translated` is the one place that
does it, for the command line and for the API alike.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

from dsc.errors import FileError, UsageError

_ANOTHER = "give a path that you may use"
_TEMPORARY = "set TMPDIR to a folder that you may write to"
_ROOM = "free some space, or give a place on another disk"
HINTS = {
    errno.EACCES: _ANOTHER,
    errno.EPERM: _ANOTHER,
    errno.EROFS: _ANOTHER,
    errno.ENOENT: "make the folder first, or give another path",
    errno.ENOTDIR: "a part of the path is a file; give another one",
    errno.EISDIR: "it is a folder; give a file",
    errno.EEXIST: "give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or use another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
}

STANDARD_INPUT = "-"
"""How a command line calls it."""
_ABSENT = "give the path of a file that is there"
WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What only writing meets."""


def translated(error: OSError, where: str | Path | None = None, reading: bool = False) -> FileError:
    """The error that tells a user of `error`.

    `where` is what the user asked for: it stands for our temporary files beside it, and serves
    where `error` names no path. `reading`: it was only to be read.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None and reason.startswith("No usable temporary directory"):
        return FileError("no folder for temporary files can be written", hint=_TEMPORARY)
    place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if where is not None and (place is None or _beside(Path(where)) in place):
        place = str(where)
    number = error.errno or 0
    verb = "read" if reading else "write" if number in WRITING else "read or write"
    hint = HINTS.get(number)
    if number == errno.ENOENT and (reading or (place and Path(place).parent.is_dir())):
        hint = _ABSENT  # who writes makes the file
    return FileError(f"cannot {verb}: {reason}", where=place, hint=hint)


def _beside(path: Path) -> str:
    """How the names of our temporary files beside `path` begin."""
    return f".{path.name}."


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@contextmanager
def named(where: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `FileError` about `where`, unless it names another."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise translated(error, where) from error


def read_text(file: str | Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        FileError: it cannot be read.
        UsageError: it is no UTF-8.
    """
    standard = str(file) == STANDARD_INPUT
    where = "standard input" if standard else str(file)
    try:
        data = sys.stdin.buffer.read() if standard else Path(file).read_bytes()
    except OSError as problem:
        raise translated(problem, where, reading=True) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(no_text(problem), where, "convert it, as with iconv -t UTF-8") from None


def no_text(problem: UnicodeDecodeError) -> str:
    """What is wrong with bytes that should be text."""
    return f"this is no UTF-8 text: byte {problem.start} is {problem.object[problem.start]:#04x}"


def why_no_file(path: Path) -> str:
    """What keeps `path` from being a regular file, links followed: "is missing", …; or "".

    A pipe or a device, which may never end, is none.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link that leads nowhere" if path.is_symlink() else "is missing"
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    except ValueError:  # of a name that holds a zero byte
        return "is missing"
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def is_led_out(folder: Path, path: Path) -> bool:
    """Whether `path`, in `folder`, lies elsewhere when all links are followed.

    A snapshot of the Hugging Face cache (`<cache>/<repo>/snapshots/<revision>/`) is a folder of
    links into `<repo>/blobs/`, and from there into the store that repositories share,
    `<cache>/blobs/`; those, and no other links out of the folder, may be followed.
    """
    try:
        home, found = (Path(os.path.realpath(each)) for each in (folder, path))
    except ValueError:  # of a name that holds a zero byte
        return True
    if found.is_relative_to(home):
        return False
    snapshot = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    if snapshot is None:
        return True
    repository = snapshot.parent.parent
    shared = repository.parent / "blobs" / found.parent.name
    return found.parent not in (repository / "blobs", shared)


def check_writable(path: str | Path) -> None:
    """Raise `FileError` unless a file could be put at `path`; nothing stays behind.

    Folders above it that are missing would be made, so the nearest one that exists is tried.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    with named(path):
        if target.exists() and not _replaceable(target):
            target.open("ab").close()
            return
    check_makeable(path)


def check_makeable(folder: Path) -> None:
    """Raise `FileError` unless a folder could be put at this place, or in the place of one."""
    _try_in(Path(os.path.realpath(folder)).parent, folder)


def check_fillable(folder: Path) -> None:
    """Raise `FileError` unless files can be written into `folder`, there or still to be made."""
    _try_in(folder, folder)


def _try_in(place: Path, asked: Path) -> None:
    with named(asked):
        try:
            os.rmdir(tempfile.mkdtemp(prefix=_beside(asked), dir=nearest(place)))
        except FileNotFoundError:  # the folder is there: it is none of a disk, as /proc
            raise FileError("nothing can be made here", str(asked), HINTS[errno.EEXIST]) from None


def check_room(place: Path, needed: int, what: str, a_file: int | None = None) -> None:
    """Raise `FileError` unless `needed` bytes fit at `place`, before they are written.

    `a_file`: those of the largest file, where there are several.
    """
    free = shutil.disk_usage(nearest(place.parent)).free
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    a_file = needed if a_file is None else a_file
    if needed > free:
        raise FileError(
            f"{what}: {needed / 1e6:.1f} MB needed, the disk has {free / 1e6:.1f} MB left",
            where=str(place),
            hint=_ROOM,
        )
    if largest != resource.RLIM_INFINITY and a_file > largest:
        raise FileError(
            f"{what}: {a_file / 1e6:.1f} MB needed, a file may have {largest / 1e6:.1f} MB",
            where=str(place),
            hint=HINTS[errno.EFBIG],
        )


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; take back those that were made if the block fails."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, whole or not at all; folders above it are made. Raises `FileError`."""
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays one
    with named(path), made(target.parent):
        if target.exists() and not _replaceable(target):
            target.write_bytes(data)
            return
        handle, fresh = tempfile.mkstemp(prefix=_beside(path), dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(fresh, 0o666 & ~_umask())
            os.replace(fresh, target)
        except BaseException:
            os.unlink(fresh)
            raise


def _replaceable(path: Path) -> bool:
    """Whether a new file can take the place of `path`; not of a device, or in a locked folder."""
    return path.is_file() and os.access(path.parent, os.W_OK)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    found = os.umask(0o022)
    os.umask(found)
    return found


def size_of(told: int | str) -> int:
    """A number of bytes. Raises `UsageError`.

    >>> size_of("5GB"), size_of("1.5 kB"), size_of("2GiB"), size_of(7)
    (5000000000, 1500, 2147483648, 7)
    >>> len(str(size_of("9" * 400)))
    400
    """
    found = _SIZE.fullmatch(str(told).strip())
    number = 0
    if found is not None:
        base = 1024 if found[3] else 1000
        number = int(Fraction(found[1]) * base ** _POWERS[found[2].lower()])
    if number < 1:
        raise UsageError(f"{told!r} is no size of a file", hint="give one, as 5GB or 500MB")
    return number


def copy_linked(source: Path, target: Path) -> None:
    """Have all of a folder in another that is there: files as links to the same bytes, else copied.

    Links to elsewhere stay links.
    """
    for place, folders, names in os.walk(source):
        into = target / Path(place).relative_to(source)
        into.mkdir(exist_ok=True)
        for name in (*names, *(x for x in folders if Path(place, x).is_symlink())):
            path = Path(place, name)
            try:
                os.link(path, into / name, follow_symlinks=False)
            except OSError:  # another device, or a file system that has no links
                shutil.copy2(path, into / name, follow_symlinks=False)
