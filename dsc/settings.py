"""What a user sets once for the whole process: memory limits and the debug mode.

Every layer may read this module; it imports nothing of dsc but the errors.
"""

from __future__ import annotations

import os
import re
from math import inf

from dsc.errors import UsageError

_MEGABYTE = 1_000_000
_memory_limits: dict[str, int] = {}
_debug_mode = False


def set_memory_limit(device: str, megabytes: float | None) -> None:
    """Bound the arena, cache and weights that dsc may hold on `device`; None lifts the bound.

    `device` is the family or one device of it: "cpu", "cuda", "cuda:1". A plan that needs more is
    refused with `MemoryLimitError` before anything is allocated. Megabytes are 10^6 bytes.

    >>> set_memory_limit("cpu", 8000)
    >>> memory_limit("cpu")
    8000000000
    >>> set_memory_limit("cpu", None)
    """
    if not re.fullmatch(r"(cpu|cuda|hip)(:\d+)?", str(device)):
        raise UsageError(f"a memory limit of the device {device!r}", hint='such as "cpu", "cuda:1"')
    if megabytes is None:
        _memory_limits.pop(device, None)
        return
    given: object = megabytes
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < megabytes < inf:
        raise UsageError(f"a memory limit of {megabytes} MB", hint="give a positive number of MB")
    _memory_limits[device] = round(megabytes * _MEGABYTE)


def memory_limit(device: str) -> int | None:
    """Return the limit in bytes that holds for `device`: its own, else its family's, else None."""
    return _memory_limits.get(device, _memory_limits.get(device.partition(":")[0]))


def set_debug_mode(enabled: bool = True) -> None:
    """Verify every pass, and the shapes of every operator as it runs, until switched off."""
    global _debug_mode
    _debug_mode = enabled


def debug_mode() -> bool:
    """Return whether the debug mode is on."""
    return _debug_mode


def switched(variable: str, *, on: str, off: str, unset: bool = True) -> bool:
    """Whether a variable of the environment is set to `on`; unset or empty, it is as `unset` says.

    Raises `UsageError` for another value: what was meant to turn something off must not be lost.
    """
    given = os.environ.get(variable) or (on if unset else off)
    if given not in (on, off):
        raise UsageError(f"{variable} is {given!r}", hint=f"give {on} or {off}")
    return given == on
