"""Ranks as processes: joining a group, agreeing on what is run, and exchanging tensors over gloo.

The environment is torchrun's: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Nothing here waits
without a limit, and what ends a wait names the ranks that did not answer and the operator they were
waited for at. A rank that is killed closes its connections, so the others learn of it at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from dsc._version import __version__
from dsc.errors import RankError, UsageError
from dsc.ir.lazy import torch
from dsc.ir.ranks import Group, current, set_process_group

__all__ = [
    "Place", "ProcessGroup", "agree", "connect", "current", "digest", "join", "launched", "place",
    "share",
]  # fmt: skip

TIMEOUT = 25.0
"""Seconds that a collective waits for the slowest rank. `DSC_COLLECTIVE_TIMEOUT` changes it."""
RENDEZVOUS = 120.0
"""Seconds in which all ranks must have started. `DSC_RENDEZVOUS_TIMEOUT` changes it."""
PATIENCE = 1.0
"""Seconds after which a rank that waits for others to start says for whom."""
LAUNCHERS = ("DSC_LAUNCHED", "TORCHELASTIC_RUN_ID")
"""Variables of those that start all ranks at once, and end them all when one fails to start."""
PATIENT = 3600.0
"""Seconds that a rank waits for what another has read from a disk, as all of its weights."""
STORE_TIMEOUT = 2.0
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_TAG = 1 << 30
_MOST_LEAVING = 16


@dataclass(frozen=True)
class Place:
    """Which rank of how many this process is, and where rank 0 listens."""

    rank: int
    size: int
    address: str
    port: int
    hosts: bool
    """Whether this process is the one that listens (not so under torchrun, whose agent does)."""


def launched(environment: Mapping[str, str]) -> bool:
    """Whether somebody started this process as one of several ranks."""
    return "RANK" in environment or "WORLD_SIZE" in environment


def place(environment: Mapping[str, str]) -> Place:
    """The place that the environment gives this process. Raises `UsageError`, naming a variable."""
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise UsageError(
            f"the environment of this rank lacks {', '.join(missing)}",
            hint="start the ranks with `dsc generate OUT --ranks N` or with torchrun, which set"
            f" {', '.join(VARIABLES)}",
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise UsageError(f"{name} is {environment[name]!r}; a number is needed")
        numbers[name] = int(environment[name])
    rank, size, port = numbers.values()
    if not rank < size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {size}; ranks count from 0")
    if not 0 < port < 1 << 16:
        raise UsageError(f"MASTER_PORT is {port}", hint="a port is a number from 1 to 65535")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, environment["MASTER_ADDR"], port, rank == 0 and not agent)


class ProcessGroup:
    """The ranks of a run, each a process, fully connected over TCP."""

    def __init__(self, where: Place, store: Any, transport: Any, timeout: float) -> None:
        self.rank, self.size, self.timeout = where.rank, where.size, timeout
        self._store, self._transport = store, transport
        self._numbers: Counter[tuple[int, int]] = Counter()
        self._leaving: list[tuple[int, Any]] = []

    def exchange(
        self, what: str, sent: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Send and receive at once. Raises `RankError` that names who did not take part.

        A call that only sends does not wait: up to `_MOST_LEAVING` messages are on their way.
        """
        lost: dict[int, bool] = {}
        coming: list[tuple[int, Any]] = []
        leaving: list[tuple[int, Any]] = []
        for peer, tensor in wanted.items():
            if tensor.numel():
                with _noting(lost, peer):
                    tag = self._next(peer, self.rank)
                    coming.append((peer, self._transport.recv([_bytes(tensor)], peer, tag)))
        for peer, tensor in sent.items():
            if tensor.numel():
                with _noting(lost, peer):
                    tag = self._next(self.rank, peer)
                    work = self._transport.send([_bytes(tensor)], peer, tag)
                    leaving.append((peer, work))
        if not wanted:
            self._leaving += leaving
            surplus = max(0, len(self._leaving) - _MOST_LEAVING)
            leaving, self._leaving = self._leaving[:surplus], self._leaving[surplus:]
        self._wait([*coming, *leaving], lost)
        if lost:
            raise self._lost(what, lost)
        return dict(wanted)

    def _wait(self, works: Sequence[tuple[int, Any]], lost: dict[int, bool]) -> None:
        deadline = time.monotonic() + self.timeout
        for peer, work in works:
            if peer not in lost:
                left = max(deadline - time.monotonic(), 0.001)
                with _noting(lost, peer):
                    work.wait(timedelta(seconds=left))

    def _next(self, source: int, to: int) -> int:
        """The tag of the next message from one rank to another: their number."""
        self._numbers[source, to] += 1
        return self._numbers[source, to] % _MAX_TAG

    def share(self, key: str, text: str, patience: float = 0.0) -> list[str]:
        """Every rank's `text`, in order of rank. Raises `RankError` that names who is missing.

        Rank 0, with whom the texts lie, returns when all have read them: it may end right after.
        The slowest is waited for as long as for a collective, or for `patience` seconds.
        """
        limit = max(patience, self.timeout)
        self._store.set(f"{key}/{self.rank}", text)
        found = [t.decode() for t in _wait_for(self._store, key, self.size, limit)]
        self._store.set(f"{key}/read/{self.rank}", "")
        if self.rank == 0:
            _wait_for(self._store, f"{key}/read", self.size, self.timeout)
        return found

    def _lost(self, what: str, lost: Mapping[int, bool]) -> RankError:
        """The error for ranks that are gone (True) or silent (False), here or seen by another."""
        silent = [peer for peer, gone in lost.items() if not gone]
        gone = [peer for peer, is_gone in lost.items() if is_gone]
        first = self._first_seen(gone or silent)
        if gone:
            found = f"{_named(first)} died: the connection closed at {what}"
        else:
            found = f"{_named(first)} did not come to {what} within {self.timeout:g} s"
        hint = f"see what {_named(first)} printed last, then start all ranks again"
        return RankError(f"{found} (seen by rank {self.rank})", hint=hint)

    def _first_seen(self, lost: Sequence[int]) -> Sequence[int]:
        """Who was found missing first: a rank that stops for that reason is not to blame."""
        if self._store is None or 0 in lost:
            return lost
        with suppress(Exception):  # the store may be gone with the rank that held it
            known = self._store.compare_set("lost", "", json.dumps(list(lost)))
            found = json.loads(known)
            return [peer for peer in found if peer != self.rank] or lost
        return lost


@contextmanager
def _noting(lost: dict[int, bool], peer: int) -> Iterator[None]:
    """Notes in `lost` that a peer failed: True when its connection closed, False when it waited."""
    try:
        yield
    except RuntimeError as problem:
        lost[peer] = "timed out" not in str(problem).lower()


def join(
    environment: Mapping[str, str] = os.environ,
) -> Group:
    """Meet the other ranks and make them the group of this process.

    Raises `UsageError` for an environment that cannot be right, `RankError` when a rank does not
    come in time.
    """
    if current().size > 1:
        return current()
    where = place(environment)
    if where.size == 1:
        return current()
    timeout = _seconds(environment, "DSC_COLLECTIVE_TIMEOUT", TIMEOUT)
    group = connect(where, timeout, _seconds(environment, "DSC_RENDEZVOUS_TIMEOUT", RENDEZVOUS))
    set_process_group(group)
    return group


def connect(where: Place, timeout: float = TIMEOUT, rendezvous: float = RENDEZVOUS) -> ProcessGroup:
    """Meet the other ranks within `rendezvous` seconds. Raises `UsageError`, `RankError`."""
    if where.address in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        raise UsageError("this torch has no gloo", hint="install a torch built with distributed")
    listener = f"{where.address}:{where.port}"
    with _saying(f"rank {where.rank} waits for rank 0 at {listener}, for {rendezvous:g} s at most"):
        store = _open_store(dist, where, rendezvous)
    store.set(f"hello/{where.rank}", __version__)
    _wait_for(store, "hello", where.size, rendezvous, f"rank {where.rank} at {listener}")
    prefixed = dist.PrefixStore("gloo", store)
    limit = timedelta(seconds=rendezvous)
    try:
        transport = dist.ProcessGroupGloo(prefixed, where.rank, where.size, limit)
    except RuntimeError as problem:
        raise RankError(f"rank {where.rank} could not connect to the others: {problem}") from None
    store.set_timeout(timedelta(seconds=STORE_TIMEOUT))
    return ProcessGroup(where, store, transport, timeout)


def share(key: str, lines: list[str]) -> list[list[str]]:
    """What every rank has to tell, in order of rank, after work that takes one longer than another.

    Raises `RankError` that names who told nothing.
    """
    group = current()
    if not isinstance(group, ProcessGroup):
        return [lines]
    return [json.loads(text) for text in group.share(key, json.dumps(lines), PATIENT)]


def agree(key: str, facts: Mapping[str, str]) -> None:
    """Check that every rank runs the same. Raises `RankError` that names who differs, and in what.

    `facts` are digests or short texts by name: program, weights, seed, version. Ranks are compared
    with what most of them have, and with rank 0 where there is no majority.
    """
    group = current()
    if not isinstance(group, ProcessGroup):
        return
    texts = group.share(f"facts/{key}", json.dumps(dict(facts), sort_keys=True))
    everyone: list[dict[str, str]] = [json.loads(text) for text in texts]
    lines = []
    for name in sorted({name for each in everyone for name in each}):
        values = [each.get(name, "nothing") for each in everyone]
        most = max(values, key=lambda v: (values.count(v), v == values[0]))
        apart = [rank for rank, value in enumerate(values) if value != most]
        if apart:
            same = [rank for rank, value in enumerate(values) if value == most]
            theirs = ", ".join(dict.fromkeys(values[rank] for rank in apart))
            lines.append(f"{name}: {theirs} on {_named(apart)}, {most} on {_named(same)}")
    if lines:
        raise RankError(
            "the ranks do not run the same thing\n" + "\n".join(lines),
            hint="give every rank the same artifact, options and version of dsc",
        )


def digest(*parts: bytes | str) -> str:
    """A short digest of what a rank runs, as `agree` compares and shows it."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def _open_store(dist: Any, where: Place, rendezvous: float) -> Any:
    try:
        return dist.TCPStore(
            where.address, where.port, where.size, where.hosts,
            timeout=timedelta(seconds=rendezvous), wait_for_workers=False,
        )  # fmt: skip
    except (RuntimeError, ValueError) as problem:
        listener = f"{where.address}:{where.port}"
        if where.hosts:
            raise RankError(f"rank 0 cannot listen at {listener}: {problem}") from None
        raise RankError(
            f"rank {where.rank} found nobody at {listener} within {rendezvous:g} s",
            hint="check MASTER_ADDR and MASTER_PORT, and that rank 0 was started",
        ) from None


@contextmanager
def _saying(words: str) -> Iterator[None]:
    """Say on standard error what a block waits for that takes longer than `PATIENCE`."""
    if any(name in os.environ for name in LAUNCHERS):
        yield
        return
    timer = threading.Timer(PATIENCE, partial(print, f"dsc: {words}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for(store: Any, key: str, size: int, timeout: float, waiting: str = "") -> list[bytes]:
    """What every rank wrote under `key`. Raises `RankError` that names who wrote nothing.

    `waiting` names who waits for the others to start, and says whom for each time that changes.
    """
    names = [f"{key}/{rank}" for rank in range(size)]
    start = time.monotonic()
    told: list[int] = []
    quiet = not waiting or any(name in os.environ for name in LAUNCHERS)
    try:
        while not all(store.check([name]) for name in names):
            absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            waited = time.monotonic() - start
            if waited > PATIENCE and not quiet and absent != told:
                text = f"dsc: {waiting} waits for {_named(absent)} of {size}"
                print(f"{text}, for {timeout - waited:.0f} s more", file=sys.stderr, flush=True)
                told = absent
            if waited > timeout:
                raise RankError(
                    f"{_named(absent)} did not come within {timeout:g} s",
                    hint=f"start all {size} ranks, each with its own RANK",
                )
            time.sleep(0.02)
        return [store.get(name) for name in names]
    except RuntimeError as problem:
        raise RankError(f"rank 0 died ({key}): {problem}") from None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes: gloo knows not every element type."""
    return tensor.reshape(-1).view(torch.uint8)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise UsageError(f"{name} is {text!r}", hint="give a positive number of seconds")
    return value
