"""Compiling processes: as many as there are cores and requests, started when they are needed.

They wait for the next compile until they have been idle for a minute, or this process ends.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from dsc.backends.tvm.worker import FAILED, REFUSED, receive, send
from dsc.errors import InternalError
from dsc.processes import child_environment

Request: TypeAlias = tuple[str, tuple[Any, ...]]
"""A function of this tree as `module:name`, and its arguments."""


def run(requests: Sequence[Request], done: Callable[[int], None] | None = None) -> list[Any]:
    """What each request gives, in order; `done(n)` is called when n of them are.

    Raises what a function refused as a user's mistake, `InternalError` for what else went wrong.
    """
    if not requests:
        return []
    wanted = max(len(_idle), -(-len(requests) // _WORTH_A_START))
    with ThreadPoolExecutor(min(_cores(), len(requests), wanted)) as pool:
        answers = [pool.submit(_ask, request) for request in requests]
        try:
            for number, answer in enumerate(as_completed(answers), 1):
                answer.result()
                if done is not None:
                    done(number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [answer.result() for answer in answers]


def warm(processes: int = 1) -> None:
    """Start processes that a compile is about to need, where they have cores of their own."""
    if _cores() > 1:
        _idle.extend(_start() for _ in range(min(processes, _cores()) - len(_idle)))


_idle: list[subprocess.Popen[bytes]] = []
_WORTH_A_START = 6
"""Kernels that are built in the time in which a process starts."""


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _ask(request: Request) -> Any:
    """The answer of a process. One that had ended while it waited is replaced."""
    while True:
        try:
            process, waited = _idle.pop(), True
        except IndexError:
            process, waited = _start(), False
        try:
            with _busy(process):
                assert process.stdin is not None, "processes are started with pipes"
                assert process.stdout is not None, "processes are started with pipes"
                send(process.stdin, request)
                kind, answer = receive(process.stdout)
        except (EOFError, BrokenPipeError):
            if waited:
                continue
            raise InternalError(f"the compiling process ended at {request[0]}") from None
        if kind == REFUSED:
            raise answer
        if kind == FAILED:
            raise InternalError(f"{request[0]}:\n{answer}")
        return answer


@contextmanager
def _busy(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process at work: it waits again when the block ends well, and else is ended."""
    try:
        yield
    except BaseException:
        _end(process)
        raise
    _idle.append(process)


def _start() -> subprocess.Popen[bytes]:
    # In a session of its own it outlives an interrupt of ours, and ends with our end of its pipes.
    return subprocess.Popen(
        [sys.executable, "-c", "from dsc.backends.tvm.worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()


@atexit.register
def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


os.register_at_fork(after_in_child=_idle.clear)
