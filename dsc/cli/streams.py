"""The standard streams as the command needs them: output names itself when it cannot be written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

OUTPUT = "standard output"
"""The file name that errors of standard output carry."""


class Output(io.TextIOWrapper):
    """A text stream whose errors name it: a broken pipe of ours is told from anybody else's."""

    def write(self, text: str) -> int:
        """Write, with `OUTPUT` as the file name of an error."""
        with _named():
            return super().write(text)

    def flush(self) -> None:
        """Flush, with `OUTPUT` as the file name of an error."""
        with _named():
            super().flush()


class Remarks(io.TextIOWrapper):
    """Standard error: what it cannot take is lost, for progress is no reason to stop."""

    def write(self, text: str) -> int:
        """Write, or lose it."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or lose it."""
        with suppress(OSError):
            super().flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = OUTPUT
        raise


def prepare() -> None:
    """Make the standard streams safe to print to.

    Those that were closed go nowhere, so that no file of ours becomes standard output; what a
    terminal cannot show is escaped, not a crash.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    if type(sys.stdout) is io.TextIOWrapper:
        sys.__stdout__ = sys.stdout = Output(*_kept(sys.stdout))  # type: ignore[misc]
    if type(sys.stderr) is io.TextIOWrapper:
        sys.__stderr__ = sys.stderr = Remarks(*_kept(sys.stderr))  # type: ignore[misc]


def _kept(stream: io.TextIOWrapper) -> tuple[Any, str, str, None, bool]:
    """What makes a stream of another class over the same file; the old one is of no more use."""
    encoding, buffered = stream.encoding, stream.line_buffering
    return stream.detach(), encoding, "backslashreplace", None, buffered


def discard_output() -> None:
    """Let what is still in the buffer go nowhere, so that Python's exit does not complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
