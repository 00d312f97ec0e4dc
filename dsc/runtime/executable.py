"""What runs: a loaded artifact, and what some of them can do beside running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from dsc.errors import UsageError
from dsc.ir.lazy import torch


class Executable(Protocol):
    """A loaded artifact."""

    def run(self, entry: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run an entry on CPU tensors by name.

        A cache that is written in place is mutated and returned as the tensor that was given.
        """
        ...


@runtime_checkable
class Threaded(Protocol):
    """An executable whose threads can be set after it was loaded."""

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Use this many threads, pinned to cores or not; `None` leaves the default.

        Raises `UsageError` where that is impossible.
        """
        ...


def set_threads(executable: Executable, threads: int | None, pin: bool | None) -> None:
    """Set the threads of an executable. Raises `UsageError` where it has none to set."""
    if not isinstance(executable, Threaded):
        raise UsageError(
            "this backend has no threads to set", hint="leave out threads and pin, or use tvm"
        )
    executable.set_threads(threads, pin)


@runtime_checkable
class KeepsCaches(Protocol):
    """An executable whose caches live on its device: the host's tensors only stand for them."""

    def read_back(self, cache: torch.Tensor) -> None:
        """Copy a cache's contents into the host tensor that stands for it."""
        ...


@runtime_checkable
class OpensLate(Protocol):
    """An executable that opens the code of an entry when it first runs, or when asked to."""

    def open(self, entry: str) -> None:
        """Open it now, so that the first step takes no longer than the next."""
        ...


@runtime_checkable
class StandIn(Protocol):
    """An executable that is there in the place of compiled code.

    `stand_in` tells a user what runs instead and what that means; `computes`: whether the results
    are those of the program.
    """

    stand_in: str
    computes: bool
