"""Tuning: which tile of each choice is the fastest on the card at hand.

The plan of an artifact names its choices and what else there is for each (`blocks`). A *round*
lowers the program again with another tile for as many choices as there are: of those that shape one
launch, one at a time, so that a launch that is faster says of which choice. So there are about as
many rounds as the longest list of tiles has, and not as their product. Of a round only new kernels
are compiled; those that do not compile, or spill, are dropped with the tiles that asked for them.
The round's steps are held against the plan's as it is: results that are others than a change in the
order of sums explains are wrong, and halves of the round find out whose. Then both take turns, and
launches are timed by events. A tile is taken where its launches took less by more than both
readings scatter; all that were taken are compiled into one plan, and that is held against the old
one as a whole, in results and in time.

What measures is a `Card` (`tuner` has that of a driver), so that the search itself can be held
against planted times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Protocol, TypeAlias

import numpy as np

from dsc.backends.triton.blocks import AnyTile, Choice, tile_json
from dsc.backends.triton.launch import Kernel, LaunchProgram
from dsc.backends.triton.modelled import CONTEXT, LARGE_BATCH
from dsc.backends.triton.program import Lowered
from dsc.errors import BackendUnavailable, DeviceError, MemoryLimitError
from dsc.ir.arrays import Array
from dsc.ir.program import Program
from dsc.runtime.emission import Progress

REPEATS = 10
"""Turns of each plan in each step, after one that is left out."""
MARGIN = 0.02
"""The share of its time that a tile must save at least."""
WRONG = {16: 0.05, 32: 1e-3}
"""What the logits of the typical position may differ by, as a share of their norm, by the bits of
the compute type: sums in another order move those of a 16-bit model by about a hundredth."""
FAR, MOST_FAR = 0.5, 0.125
"""A position that differs by more has other logits: a router at a tie may have chosen another
expert for a few, a tile that is wrong in some of its rows gives more of them."""
REFUSALS = (BackendUnavailable, DeviceError, MemoryLimitError)
"""How a card refuses: a binary, a call, and what there is no room for."""
Changed: TypeAlias = Mapping[str, AnyTile]
Seconds: TypeAlias = Sequence[float | None]
"""By launch of an entry; `None` of one that does not run."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is timed: its entry, sequences, new tokens, and tokens in the cache before."""

    entry: str
    batch: int
    new: int
    context: int

    @staticmethod
    def of(program: Program, batch: int, new: int, context: int) -> Step:
        """The step by the entry that a session would choose."""
        return Step(program.choose_entry(new, batch, context + new), batch, new, context)

    def __str__(self) -> str:
        of = f" of {self.batch}" if self.batch > 1 else ""
        return f"{self.entry}{of}: {self.new} at {self.context}"


def steps_of(program: Program, entries: Sequence[str] = ()) -> list[Step]:
    """The steps that are timed: of each entry, at one sequence and, in decode, at many."""
    limits, found = program.limits, dict[Step, None]()
    chunk = min(limits.prefill_chunk, limits.max_context)
    many = min(LARGE_BATCH, limits.max_batch)
    news = {1, chunk, *(guard.step for guard in program.guards if guard.step)}
    for new in sorted(n for n in news if n <= chunk):
        for batch in (1, many) if new == 1 else (1,):
            context = 0 if new == chunk > 1 else max(0, min(CONTEXT, limits.max_context - new))
            found[Step.of(program, batch, new, context)] = None
    return [step for step in found if not entries or step.entry in entries]


Times: TypeAlias = Mapping[Step, tuple[Sequence[Seconds], Sequence[Seconds]]]
"""Turns of each step, by the plan as it is and by another."""


class Trial(Protocol):
    """A plan on a card."""

    def run(self, step: Step) -> Seconds:
        """Seconds by launch of a step's entry. Raises `REFUSALS`."""
        ...

    def logits(self, step: Step) -> Array:
        """Logits of positions of a step, [positions, vocab]. Raises `REFUSALS`."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@dataclass(frozen=True)
class Built:
    """A plan, and the binaries and records of all its kernels."""

    lowered: Lowered
    records: Mapping[str, Any]
    binaries: Mapping[str, bytes]


class Card(Protocol):
    """What runs and times a plan."""

    def open(self, built: Built) -> Trial:
        """Load it. Raises `REFUSALS`."""
        ...


Compile = Callable[
    [Mapping[str, Kernel], Lowered],
    tuple[Mapping[str, bytes], Mapping[str, Any], Mapping[str, str]],
]
"""Binaries by file, records by kernel, and why others have none (`compile.compile_each`)."""


@dataclass
class Kernels:
    """Kernels that there are: records by key, binaries by file, and why others are of no use.

    `compiles` makes those that are missing, or is `None` where nothing here can.
    """

    records: dict[str, Any]
    binaries: dict[str, bytes]
    compiles: Compile | None
    unusable: dict[str, str] = field(default_factory=dict)

    def wanted(self, lowered: Lowered) -> dict[str, str]:
        """Have a plan's kernels compiled; why some of them are of no use, by key."""
        kernels = lowered.program.kernels
        missing = {
            key: kernel
            for key, kernel in kernels.items()
            if key not in self.records and key not in self.unusable
        }
        if missing and self.compiles is None:
            self.unusable |= dict.fromkeys(missing, "not among what was compiled before")
        elif missing and self.compiles is not None:
            binaries, records, failed = self.compiles(missing, lowered)
            self.binaries |= binaries
            self.records |= records
            self.unusable |= {
                key: f"does not compile: {_first(why)}" for key, why in failed.items()
            }
            self.unusable |= {
                key: f"spills {record['spill_bytes']} bytes"
                for key, record in records.items()
                if record.get("spill_bytes")
            }
        return {key: self.unusable[key] for key in kernels if key in self.unusable}

    def of(self, lowered: Lowered) -> Built:
        """A plan with its kernels."""
        records = {key: self.records[key] for key in sorted(lowered.program.kernels)}
        return Built(
            lowered, records, {r["file"]: self.binaries[r["file"]] for r in records.values()}
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds that a choice's launches took by turn, with a tile and with that which was there."""

    seconds: tuple[float, ...]
    before: tuple[float, ...]

    @property
    def share(self) -> float:
        """What it takes of the time before."""
        return median(self.seconds) / median(self.before) if median(self.before) else 1.0

    @property
    def scatter(self) -> float:
        """The larger of both spreads between quartiles, as a share of the time before."""
        if len(self.before) < 2 or not median(self.before):
            return 0.0
        spreads = ((q[2] - q[0]) for q in (quantiles(self.seconds), quantiles(self.before)))
        return max(spreads) / median(self.before)

    @property
    def is_faster(self) -> bool:
        """Whether it is faster by more than what readings scatter, and more than the margin."""
        return 1.0 - self.share > max(MARGIN, self.scatter)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tile that is not to be had for a choice, and why."""

    key: str
    tile: AnyTile
    why: str

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"key": self.key, "tile": tile_json(self.tile), "why": self.why}


@dataclass
class Found:
    """What a search has found: the tiles that were taken, and the plan with them.

    `built` is `None` where nothing is taken, and `why` says why. `readings` are by choice and tile,
    `steps` seconds of the kernels of each step before and after; `left` counts tiles that were not
    tried.
    """

    tiles: dict[str, AnyTile] = field(default_factory=dict)
    built: Built | None = None
    readings: dict[tuple[str, AnyTile], Reading] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    steps: dict[Step, tuple[float, float]] = field(default_factory=dict)
    left: int = 0
    why: str = ""

    def report(self, choices: Mapping[str, Choice]) -> dict[str, Any]:
        """As JSON values: `choices` are those of the plan as it was."""

        def read(key: str, tile: AnyTile) -> dict[str, Any]:
            reading = self.readings[key, tile]
            shares = {"share": round(reading.share, 4), "scatter": round(reading.scatter, 4)}
            return {"key": key, "tile": tile_json(tile), **shares}

        before = {key: {"before": tile_json(choices[key].taken)} for key in self.tiles}
        return {
            "choices": len(choices),
            "tried": len(self.readings),
            "taken": [before[key] | read(key, tile) for key, tile in self.tiles.items()],
            "why_not": self.why,
            "measured": [read(key, tile) for key, tile in self.readings],
            "dropped": [dropped.as_json() for dropped in self.dropped],
            "not_tried": self.left,
            "steps": [
                {"step": str(step), "before_us": round(a * 1e6, 2), "after_us": round(b * 1e6, 2)}
                for step, (a, b) in self.steps.items()
            ],
        }


def rounds(plan: LaunchProgram, entries: Sequence[str] = ()) -> list[dict[str, AnyTile]]:
    """Tiles to be tried, by choice: each in one round, and those that meet in a launch apart."""
    meets: dict[str, set[str]] = {key: set() for key in plan.choices}
    asked: dict[str, None] = {}
    for name, entry in plan.entries.items():
        for launch in entry.launches:
            asked |= dict.fromkeys(launch.choices if not entries or name in entries else ())
            for key in launch.choices:
                meets[key] |= set(launch.choices) - {key}
    made: list[dict[str, AnyTile]] = []
    for at in range(max((len(plan.choices[key].others) for key in asked), default=0)):
        for key in asked:
            tile = dict(enumerate(plan.choices[key].others)).get(at)
            if tile is None:
                continue
            free = (r for r in made if key not in r and not meets[key] & r.keys())
            into = next(free, None)
            if into is None:
                made.append({key: tile})
            else:
                into[key] = tile
    return made


def apart(
    base: LaunchProgram, other: LaunchProgram, changed: Iterable[str]
) -> dict[str, dict[str, list[int]]] | None:
    """By choice and entry the launches that are others in a plan with other tiles.

    `None` where they cannot be told apart: there are other launches, or some are others that no
    changed choice shapes.
    """
    found: dict[str, dict[str, list[int]]] = {key: {} for key in changed}
    for name, entry in base.entries.items():
        launches = other.entries[name].launches
        sites = [[(x.node, x.op) for x in each] for each in (entry.launches, launches)]
        if sites[0] != sites[1]:
            return None
        for at, (x, y) in enumerate(zip(entry.launches, launches, strict=True)):
            if (x.kernel, x.grid) == (y.kernel, y.grid):
                continue
            own = [key for key in x.choices if key in found]
            if not own:
                return None
            for key in own:
                found[key].setdefault(name, []).append(at)
    return found


def asking(
    plan: LaunchProgram, unusable: Mapping[str, str], changed: Iterable[str]
) -> dict[str, str]:
    """Of changed choices those that ask a plan for kernels that are not to be had, and why."""
    keys = set(changed)
    return {
        key: unusable[launch.kernel]
        for entry in plan.entries.values()
        for launch in entry.launches
        for key in launch.choices
        if launch.kernel in unusable and key in keys
    }


class Search:
    """Tries the tiles of a plan's choices on a card; `found` is what came of it.

    `lower` makes a plan with tiles by key that stand in place of the plan's own. `steps` are timed;
    `held` are those whose results are compared where a tile changes them, of other entries as well.
    """

    def __init__(
        self,
        lower: Callable[[Changed], Lowered],
        kernels: Kernels,
        card: Card,
        steps: Sequence[Step],
        held: Sequence[Step],
        bits: int,
    ) -> None:
        self._lower, self._kernels, self._card = lower, kernels, card
        self._steps, self._held, self._allowed = steps, held, WRONG[max(16, bits)]
        self.base = lower({})
        self.found = Found()
        unusable = {k: w for k, w in kernels.wanted(self.base).items() if k not in kernels.records}
        if unusable:
            raise BackendUnavailable(
                f"{len(unusable)} kernels of the artifact's own plan cannot be had",
                hint="compile the artifact again with this version of dsc",
            )

    def run(self, rounds: Sequence[Changed], deadline: float, progress: Progress) -> Found:
        """Try rounds until a moment of `time.monotonic`, then the plan with what was faster."""
        self._trial = self._card.open(self._kernels.of(self.base))
        try:
            self._logits = {step: self._trial.logits(step) for step in self._held}
            for step, found in self._logits.items():
                if not np.isfinite(found).all():
                    raise BackendUnavailable(
                        f"the artifact's own logits are no numbers in {step}: nothing can be held"
                        " against them",
                        "run `dsc verify` on it; tune other entries, with --entry",
                    )
            for at, tiles in enumerate(rounds):
                progress("measuring tiles", at, len(rounds))
                if time.monotonic() > deadline:
                    self.found.left += len(tiles)
                    continue
                self._try(dict(tiles))
            progress("measuring the whole", len(rounds), len(rounds))
            self._conclude()
        finally:
            self._trial.close()
        return self.found

    def build(self, changed: Changed) -> tuple[dict[str, AnyTile], Lowered | None]:
        """A plan whose kernels can all be had: tiles that ask for others are dropped.

        `None` where what asks for a kernel that is not to be had cannot be told.
        """
        left = dict(changed)
        while True:
            lowered = self._lower(left)
            unusable = self._kernels.wanted(lowered)
            unusable = {k: w for k, w in unusable.items() if k not in self.base.program.kernels}
            why = asking(lowered.program, unusable, left)
            if not why:
                return left, None if unusable else lowered
            for key, reason in why.items():
                self.found.dropped.append(Dropped(key, left.pop(key), reason))

    def _try(self, tiles: dict[str, AnyTile]) -> None:
        """Time a round, or, where it is wrong or says nothing of each of its tiles, its halves."""
        changed, lowered = self.build(tiles)
        if lowered is None:
            self._drop(changed, "a kernel behind it is not to be had")
            return
        places = apart(self.base.program, lowered.program, changed)
        if places is None and len(changed) > 1:
            self._halves(changed)
            return
        if places is not None:  # what changes nothing is another way to say the same kernel
            changed = {key: tile for key, tile in changed.items() if places[key]}
        if not changed:
            return
        times, why = self._measured(lowered)
        if why:
            self._drop(changed, why)
            return
        for key, tile in changed.items():
            reading = _reading(times, None if places is None else places[key])
            if reading is not None:
                self.found.readings[key, tile] = reading

    def _measured(self, lowered: Lowered) -> tuple[Times, str]:
        """Seconds by launch of a plan and of that which was there, or what is wrong with it."""
        try:
            trial = self._card.open(self._kernels.of(lowered))
            try:
                why = self._wrong(trial, lowered.program)
                return {} if why else {step: self._turns(trial, step) for step in self._steps}, why
            finally:
                with suppress(*REFUSALS):  # of a card that answers no more
                    trial.close()
        except REFUSALS as refusal:
            why = f"the card refuses it: {_first(str(refusal))}"
        try:
            for step in self._steps[:1]:
                self._trial.run(step)
        except DeviceError as end:
            raise BackendUnavailable(
                f"the card answers no more: {_first(str(end))}; {why}",
                "the artifact is what it was; tune other entries, with --entry",
            ) from None
        return {}, why

    def _drop(self, changed: dict[str, AnyTile], why: str) -> None:
        """Leave out the tiles of a round that is wrong: of several, those that are it alone."""
        if len(changed) > 1:
            self._halves(changed)
            return
        for key, tile in changed.items():
            self.found.dropped.append(Dropped(key, tile, why))

    def _halves(self, changed: dict[str, AnyTile]) -> None:
        items = list(changed.items())
        for part in (items[: len(items) // 2], items[len(items) // 2 :]):
            self._try(dict(part))

    def _wrong(self, trial: Trial, plan: LaunchProgram) -> str:
        """What is wrong with a plan's results, or nothing."""
        entries = self.base.program.entries
        for step, expected in self._logits.items():
            if plan.entries[step.entry].launches == entries[step.entry].launches:
                continue
            if why := others(trial.logits(step), expected, self._allowed):
                return f"other results in {step}: {why}"
        return ""

    def _turns(self, trial: Trial, step: Step) -> tuple[list[Seconds], list[Seconds]]:
        """Seconds by launch of so many turns of the plan as it is, and of another."""
        before, after = list[Seconds](), list[Seconds]()
        for turn in range(REPEATS + 1):
            both = [(self._trial, before), (trial, after)]
            for each, into in both[:: 1 if turn % 2 else -1]:
                into.append(each.run(step))
        return before[1:], after[1:]

    def _conclude(self) -> None:
        """Take what was faster, as one plan, where that is right and faster as a whole."""
        best: dict[str, tuple[float, AnyTile]] = {}
        for (key, tile), reading in self.found.readings.items():
            if reading.is_faster and reading.share < best.get(key, (1.0, tile))[0]:
                best[key] = reading.share, tile
        if not best:
            self.found.why = "no tile is faster"
            return
        tiles, lowered = self.build({key: tile for key, (_, tile) in best.items()})
        if lowered is None:
            self.found.why = "faster tiles ask together for a kernel that is not to be had"
            return
        times, why = self._measured(lowered)
        if why:
            self.found.why = f"with all faster tiles {why}"
            return
        self.found.steps = {
            step: (median(_sum(x, None) for x in before), median(_sum(x, None) for x in after))
            for step, (before, after) in times.items()
        }
        before, after = (sum(both[at] for both in self.found.steps.values()) for at in (0, 1))
        if not after < before:
            self.found.why = "with all faster tiles the whole is no faster"
            return
        self.found.tiles, self.found.built = tiles, self._kernels.of(lowered)


def _reading(times: Times, where: Mapping[str, Sequence[int]] | None) -> Reading | None:
    """The launches at some places of entries, or all, in all steps; `None` where none ran."""
    seconds, before = [0.0] * REPEATS, [0.0] * REPEATS
    for step, (old, new) in times.items():
        places = None if where is None else where.get(step.entry, ())
        for turn in range(REPEATS):
            before[turn] += _sum(old[turn], places)
            seconds[turn] += _sum(new[turn], places)
    return Reading(tuple(seconds), tuple(before)) if any(before) else None


def _sum(launches: Seconds, places: Sequence[int] | None) -> float:
    return sum(launches[at] or 0.0 for at in (range(len(launches)) if places is None else places))


def others(found: Array, expected: Array, allowed: float) -> str:
    """Why logits [positions, vocab] are others than `expected` of numbers, or nothing."""
    if not np.isfinite(found).all():
        return "logits that are no numbers"
    errors = errors_of(found, expected)
    if (typical := np.median(errors)) > allowed:
        return f"{typical:.2g} of the logits' norm"
    far = np.mean(errors > FAR)
    return f"{far:.0%} of the positions are far off" if far > MOST_FAR else ""


def errors_of(found: Array, expected: Array) -> Array:
    """What each row differs by, as a share of its norm."""
    a, b = (np.asarray(x, np.float64) for x in (found, expected))
    off = np.linalg.norm(a - b, axis=-1)
    norm = np.linalg.norm(b, axis=-1)
    return np.where(off == 0.0, 0.0, off / np.where(norm == 0.0, 1.0, norm))


def _first(text: str) -> str:
    return text.partition("\n")[0][:200]
