"""What an executable holds on a device: buffers, caches, and launches that are ready to run.

A KV cache that an entry updates in place is uploaded when it is first given and stays on the
device: later steps that give it unmodified, whole or a view of some of its slots, find it there.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np

from dsc.backends.triton.driver import Driver, ReadyLaunch
from dsc.backends.triton.memory import LOCK, Memory
from dsc.backends.triton.schedule import Schedule
from dsc.backends.triton.timer import Timer
from dsc.backends.triton.weights import Uploaded
from dsc.ir.arrays import Array

REPLAYS = 64  # sets of sizes and addresses whose launches are kept
T = TypeVar("T")
Key: TypeAlias = tuple[object, ...]
"""An entry and the sizes of its symbols; of what is ready to run, the addresses too."""


@dataclass(slots=True)
class Resident:
    """The device's copy of all memory of an array that holds caches; `stale` until uploaded."""

    owner: weakref.ref[Array]
    pointer: int
    stale: bool = True


@dataclass(slots=True)
class Replay:
    """The launches of a schedule on its addresses, and the graph of all that come again."""

    launches: Sequence[ReadyLaunch]
    graph: ctypes.c_void_p | None = None


@dataclass(slots=True)
class Held:
    """All of it, of one executable, which it outlives until it is given back.

    `pools` are buffers by name with their sizes, `caches` residents by the owner's address,
    `schedules` are by entry and sizes, `replays` what is ready to run, the latest last. `weights`
    are those that it shares with others, if any.
    """

    driver: Driver
    name: str
    weights: Uploaded | None = None
    pools: dict[str, tuple[int, int]] = field(default_factory=dict)
    caches: dict[int, Resident] = field(default_factory=dict)
    memory: Memory = field(init=False)
    timer: Timer = field(init=False)
    schedules: dict[Key, Schedule] = field(default_factory=dict)
    replays: dict[Key, Replay] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count what is allocated, with what all others hold."""
        self.memory = Memory(self.driver, self.name, self.reclaim)
        self.timer = Timer(self.memory)

    def schedule(self, key: Key, make: Callable[[], Schedule]) -> Schedule:
        """The schedule for an entry's sizes."""
        return _kept(self.schedules, key, make, lambda old: None)

    def replay(self, key: Key, make: Callable[[], Replay]) -> Replay:
        """What is ready to run under a key."""
        return _kept(self.replays, key, make, self._forget)

    def pool(self, name: str, size: int) -> int:
        """A buffer by name that grows when a call needs more."""
        pointer, held = self.pools.get(name, (0, -1))
        if size > held:
            if held >= 0:
                self.driver.synchronise()
                self.memory.free(self.pools.pop(name)[0])
            pointer = self.memory.allocate(size, f"the buffer {name!r}")
            self.pools[name] = (pointer, size)
        return pointer

    def cleared(self, cache: Array) -> None:
        """Have zeros on the device for the memory of a new cache."""
        owner = _owner(cache)
        resident = self._settle(owner)
        self.driver.clear(resident.pointer, owner.nbytes)
        resident.stale = False

    def resident(self, cache: Array) -> int:
        """Where a cache lies on the device, uploaded when it is new or was changed by the host.

        What stays is the memory: a session gives views of it, of the sequences that are in a step.
        """
        owner = _owner(cache)
        known = self.caches.get(owner.ctypes.data)
        if known is None or known.owner() is not owner:
            known = self._settle(owner)
        if known.stale:
            self.driver.upload(known.pointer, owner.ctypes.data, owner.nbytes)
            self.driver.synchronise()
            known.stale = False
        return known.pointer + cache.ctypes.data - owner.ctypes.data

    def fresh(self, cache: Array) -> int | None:
        """Where a cache lies on the device, unless the host's memory is what counts."""
        owner = _owner(cache)
        known = self.caches.get(owner.ctypes.data)
        if known is None or known.stale:
            return None
        return known.pointer + cache.ctypes.data - owner.ctypes.data

    def changed(self, cache: Array) -> None:
        """The host wrote to the memory that a cache lies in."""
        known = self.caches.get(_owner(cache).ctypes.data)
        if known is not None:
            known.stale = True

    def reclaim(self) -> None:
        """Give the memory of caches back that are gone."""
        gone = [place for place, each in self.caches.items() if each.owner() is None]
        if gone:
            self.driver.activate()
        for place in gone:
            self.memory.free(self.caches.pop(place).pointer)

    def release(self) -> None:
        """Give all of it back, after the work that is queued; what fails is told at the end."""
        with ExitStack() as every:
            every.callback(self.driver.close)
            if self.weights is not None:
                every.callback(self.weights.leave, self.driver)
            every.callback(self._leave)
            every.callback(self.timer.close)
            for replay in self.replays.values():
                every.callback(self._forget, replay)
            every.callback(self.driver.synchronise)
            self.driver.activate()

    def _leave(self) -> None:
        with LOCK:  # who reclaims meanwhile frees nothing twice
            self.caches.clear()
            self.memory.release()

    def _settle(self, owner: Array) -> Resident:
        """Room for a new cache, once that of caches which are gone is free."""
        place = owner.ctypes.data
        with LOCK:
            self.reclaim()
            if place in self.caches:
                self.memory.free(self.caches.pop(place).pointer)
            pointer = self.memory.allocate(owner.nbytes, "a cache")
            made = Resident(weakref.ref(owner), pointer)
            self.caches[place] = made
        return made

    def _forget(self, replay: Replay) -> None:
        if replay.graph is not None:
            graph, replay.graph = replay.graph, None
            self.driver.forget(graph)


def _kept(held: dict[Key, T], key: Key, make: Callable[[], T], drop: Callable[[T], None]) -> T:
    """What is held under a key, made where it is not; the oldest of many is let go."""
    found = held.pop(key, None)
    if found is None:
        found = make()
    held[key] = found
    if len(held) > REPLAYS:
        drop(held.pop(next(iter(held))))
    return found


def _owner(array: Array) -> Array:
    """The array whose memory an array is a part of."""
    return array.base if isinstance(array.base, np.ndarray) else array
