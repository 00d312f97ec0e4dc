"""Start the ranks of a run as processes of this machine, and see them to their end.

Rank 0 speaks to the user. When a rank fails, the others find out by themselves (their collectives
name it); what has not ended after a while is ended here. No process outlives the call.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import dsc
from dsc.errors import RankError

GRACE = 30.0
"""Seconds that ranks have to notice that another one failed."""
POLL = 0.05


def command(arguments: Sequence[str]) -> list[str]:
    """The line that runs `dsc` with `arguments` in this very Python."""
    return [sys.executable, "-c", "from dsc.cli import main; main()", *arguments]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """A rank's environment: torchrun's variables, its share of the cores, this dsc."""
    root = str(Path(dsc.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}
    shared |= {
        "DSC_LAUNCHED": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
    }
    return shared | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run(line: Sequence[str], ranks: int, grace: float = GRACE) -> int:
    """Run `line` as `ranks` ranks; the exit status of the first that failed, else 0.

    Raises `RankError` when a rank was killed by a signal.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dsc-ranks-") as folder:
        logs = [Path(folder) / f"rank_{rank}" for rank in range(ranks)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as file:
                    running.append(_start(line, rank, ranks, port, file))
            first = _first_failure(running)
            _wait(running, None if first is None else grace)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return 0 if first is None else _report(first, running, logs)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    line: Sequence[str], rank: int, ranks: int, port: int, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    quiet = None if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen(
        line,
        env=environment(rank, ranks, port),
        stdin=subprocess.DEVNULL,
        stdout=quiet,
        stderr=None if rank == 0 else log,
    )


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The rank that fails first; `None` when all end well."""
    while True:
        codes = [process.poll() for process in running]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            killed = [rank for rank in failed if (codes[rank] or 0) < 0]
            return (killed or failed)[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL)


def _wait(running: Sequence[subprocess.Popen[bytes]], limit: float | None) -> None:
    """Wait until all have ended, or for `limit` seconds."""
    deadline = None if limit is None else time.monotonic() + limit
    while any(process.poll() is None for process in running):
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL)


def _report(first: int, running: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> int:
    """Say what the user has not seen: the words of a rank other than 0, and signals."""
    code = running[first].returncode
    if first:
        sys.stderr.write(logs[first].read_text("utf-8", "replace"))
    if code < 0:
        raise RankError(
            f"rank {first} was killed by {signal.Signals(-code).name}",
            hint="the machine may be out of memory; start all ranks again",
        )
    return int(code)
