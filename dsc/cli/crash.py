"""What remains of a crash: a traceback and, where a pass failed, the program that made it fail."""

from __future__ import annotations

import platform
import shlex
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsc._version import __version__
from dsc.errors import InternalError
from dsc.user_folders import state_folder


def save_crash(error: BaseException, argv: Sequence[str]) -> tuple[Path, str]:
    """Write `traceback.txt` and a repro file; return their folder and the line that reproduces it.

    Where the chain of causes holds an `InternalError` with a program, that program becomes
    `repro.dsc` and its own command is the line. Otherwise the line is the command as it was typed,
    saved as `repro.sh`. Raises `OSError` where nothing can be written anywhere.
    """
    folder = _new_folder()
    _write(folder / "traceback.txt", told(error, argv))
    internal = next((e for e in _chain(error) if isinstance(e, InternalError) and e.program), None)
    if internal is None:
        line = _line(argv)
        _write(folder / "repro.sh", f"cd {shlex.quote(str(Path.cwd()))} && {line}\n")
        return folder, line
    _write(folder / "repro.dsc", internal.program)
    return folder, internal.command.replace("repro.dsc", shlex.quote(str(folder / "repro.dsc")))


def told(error: BaseException, argv: Sequence[str]) -> str:
    """The versions, the command and the traceback."""
    trace = "".join(traceback.format_exception(error))
    return (
        f"dsc {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"command: {_line(argv)}\n\n{trace}"
    )


def _new_folder() -> Path:
    """Make a fresh folder in the user's state folder, or a temporary one where that fails."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        crashes = state_folder() / "crashes"
        crashes.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{stamp}-", dir=crashes))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"dsc-crash-{stamp}-"))


def _line(argv: Sequence[str]) -> str:
    return shlex.join(["dsc", *argv])


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")  # arguments may be bytes
