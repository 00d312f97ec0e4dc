"""Tuning an artifact: its plan's search space measured on the card that a driver here answers for.

Steps are timed on random tokens over caches of zeros, whose numbers no kernel's time depends on;
results are compared in sessions, behind a prompt as long as the step's context. The plan as it is
and one with other tiles lie on the card at once, over the same weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsc.backends.triton import choices
from dsc.backends.triton.backend import FOLDER, with_templates
from dsc.backends.triton.choices import triton_version
from dsc.backends.triton.compile import compile_each, has_triton, require_triton
from dsc.backends.triton.dependent import as_compiled
from dsc.backends.triton.device import DeviceExecutable, driver_of
from dsc.backends.triton.launch import Kernel, LaunchProgram
from dsc.backends.triton.program import Lowered, lowered_program
from dsc.backends.triton.tuning import (
    Built,
    Changed,
    Dropped,
    Kernels,
    Search,
    Seconds,
    Step,
    asking,
    rounds,
    steps_of,
)
from dsc.errors import ArtifactError, BackendUnavailable, UsageError
from dsc.hardware import Gpu, gpus
from dsc.ir.arrays import Array
from dsc.ir.costs import step_sizes
from dsc.ir.dims import evaluate
from dsc.ir.index_ranges import giving_indices
from dsc.ir.limits import WANTED
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.program import Program
from dsc.ir.sampled import SAMPLE, giving_ids
from dsc.runtime.emission import Progress
from dsc.runtime.plan import PLAN, Plan
from dsc.runtime.profiler import EntryRun, Profiler
from dsc.runtime.session import Session
from dsc.runtime.tuned import Tuned
from dsc.targets import Target, parse_target

SPACE = "space"
"""The folder of kernels that were compiled before for tiles to be measured."""
REPORT = "tuned.json"
Placed: TypeAlias = Path | Mapping[str, int]
"""A file of weights, or where they lie on the device already."""
CHUNK, POSITIONS = 512, 16
"""Tokens of a prompt at once before results are compared, and positions of a chunk, at most."""


class Tuner:
    """The tuning of an artifact for one target: its plan as it is, and what else there is."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        program: Program,
        target: Target,
        entries: Sequence[str],
        progress: Progress,
    ) -> None:
        self.folder, self.program, self.target = folder, program, target
        self.first = manifest["targets"][0] == str(target)
        self.triton = str(manifest["versions"].get("triton", ""))
        self.place = folder / FOLDER / target.arch
        self.progress, self.entries = progress, entries
        self._emitted = giving_ids(giving_indices(program))
        self._plan = (self.place / PLAN).read_bytes()
        records = json.loads((self.place / "kernels.json").read_text())
        self._dependent = any(record.get("dependent") for record in records.values())
        stored = LaunchProgram.of(Plan.from_json(self._plan)).choices
        self.own = {k: c.taken for k, c in stored.items() if c.taken != c.tiles[0]}
        own = self.lower({})
        texts = with_templates(own.program, own.sources)
        if own.plan != self._plan or texts != _texts(folder / FOLDER / "kernels", texts):
            raise ArtifactError(
                "the artifact's plan or kernels are not those that this version of dsc makes",
                where=str(folder), hint="compile it again, and tune that",
            )  # fmt: skip
        binaries = {r["file"]: (self.place / r["file"]).read_bytes() for r in records.values()}
        compiles = has_triton() and triton_version() == self.triton
        self.kernels = Kernels(records, binaries, self._compile if compiles else None)

    def lower(self, changed: Changed) -> Lowered:
        """The plan with other tiles in place of its own."""
        return lowered_program(self._emitted, str(self.target), True, {**self.own, **changed})

    def _compile(
        self, kernels: Mapping[str, Kernel], lowered: Lowered
    ) -> tuple[Mapping[str, bytes], Mapping[str, Any], Mapping[str, str]]:
        texts: Mapping[str, str] = with_templates(lowered.program, lowered.sources)
        if self._dependent:
            texts = as_compiled(texts, lowered.program.kernels.values(), self.target)
        return compile_each(kernels, self.target, texts, self.progress)

    def prepare(self) -> Tuned:
        """Compile what measuring could ask for, for a card whose machine has no Triton."""
        require_triton()
        if self.kernels.compiles is None:
            raise self._another_triton()
        known = set(self.kernels.records)
        base = self.lower({}).program
        dropped: list[Dropped] = []
        for each in rounds(base, self.entries):
            lowered = self.lower(each)
            why = asking(lowered.program, self.kernels.wanted(lowered), each)
            dropped += [Dropped(key, each[key], reason) for key, reason in why.items()]
        records = {k: r for k, r in self.kernels.records.items() if k not in known}
        usable = {k: r for k, r in records.items() if k not in self.kernels.unusable}
        place = f"{FOLDER}/{self.target.arch}/{SPACE}"
        files = {f"{place}/{r['file']}": self.kernels.binaries[r["file"]] for r in usable.values()}
        told = {"kernels": usable, "unusable": self.kernels.unusable}
        files[f"{place}/kernels.json"] = _json(told)
        report = {
            "target": str(self.target), "kernels": len(usable),
            "bytes": sum(map(len, files.values())), "dropped": [x.as_json() for x in dropped],
        }  # fmt: skip
        return Tuned(report, files, (f"{place}/",))

    def tune(self, card: Gpu, weights: Placed, budget: float | None) -> Tuned:
        """Measure on a card, and make the files of an artifact with what was found."""
        self._take_prepared()
        tries = rounds(self.lower({}).program, self.entries)
        began = time.monotonic()
        deadline = began + budget if budget is not None else float("inf")
        with tempfile.TemporaryDirectory(prefix="dsc-tune-") as scratch:
            device = OnDevice(self.target, self.program, weights, Path(scratch))
            steps, bits = steps_of(self.program, self.entries), _bits(self.program)
            held = steps_of(self.program)
            search = Search(self.lower, self.kernels, device, steps, held, bits)
            found = search.run(tries, deadline, self.progress)
        known = search.base.program.choices
        report = {"target": str(self.target), "card": card.name, **found.report(known)}
        report["seconds"] = round(time.monotonic() - began, 1)
        measured = {key: known[key].taken for key, _ in found.readings} | found.tiles
        choices.keep(card, self.triton, measured)
        if found.built is None:
            return Tuned(report)
        return Tuned(
            report, self._files(found.built, report), self._gone(), self._facts(card, found.built)
        )

    def _take_prepared(self) -> None:
        """Take what was compiled before. Raises `BackendUnavailable` where nothing can be."""
        place = self.place / SPACE
        if (place / "kernels.json").is_file():
            told = json.loads((place / "kernels.json").read_text())
            self.kernels.records |= told["kernels"]
            self.kernels.unusable |= told["unusable"]
            self.kernels.binaries |= {
                r["file"]: (place / r["file"]).read_bytes() for r in told["kernels"].values()
            }
        elif self.kernels.compiles is None and has_triton():
            raise self._another_triton()
        elif self.kernels.compiles is None:
            raise BackendUnavailable(
                "there is no Triton here to compile other tiles with",
                "install it (pip install 'triton>=3.5'), or run `dsc tune --prepare` on the folder"
                " where it is, and copy the folder here again",
            )

    def _another_triton(self) -> ArtifactError:
        """What one version makes of a kernel says nothing of what another one makes."""
        return ArtifactError(
            f"its kernels were made by Triton {self.triton}, here is {triton_version()}",
            where=str(self.folder),
            hint=f"compile it again, or install that (pip install triton=={self.triton})",
        )

    def _files(self, built: Built, report: Mapping[str, Any]) -> dict[str, bytes]:
        place, lowered = f"{FOLDER}/{self.target.arch}", built.lowered
        texts = with_templates(lowered.program, lowered.sources)
        return {
            f"{place}/{PLAN}": lowered.plan,
            **({PLAN: lowered.plan} if self.first else {}),
            f"{place}/kernels.json": _json(built.records),
            f"{place}/{REPORT}": _json(report),
            **{f"{place}/{name}": data for name, data in built.binaries.items()},
            **{f"{FOLDER}/kernels/{m}.py": text.encode() for m, text in texts.items()},
        }

    def _gone(self) -> tuple[str, ...]:
        """What the new files stand in place of."""
        place = f"{FOLDER}/{self.target.arch}"
        own = json.loads((self.place / "kernels.json").read_text())
        return (f"{place}/{SPACE}/", *(f"{place}/{record['file']}" for record in own.values()))

    def _facts(self, card: Gpu, built: Built) -> dict[str, Any]:
        """What the manifest tells of the target."""
        launches = {name: len(e.launches) for name, e in built.lowered.program.entries.items()}
        kernels = len(built.lowered.program.kernels)
        return {str(self.target): {"kernels": kernels, "launches": launches, "tuned": card.name}}


def prepare(
    folder: Path,
    manifest: Mapping[str, Any],
    program: Program,
    entries: Sequence[str],
    progress: Progress,
) -> list[Tuned]:
    """What `Tuner.prepare` gives for each target of an artifact."""
    targets = [parse_target(t) for t in manifest["targets"]]
    made = [t for t in targets if (folder / FOLDER / t.arch / "kernels.json").is_file()]
    if not made:
        raise _without_kernels(folder)
    return [Tuner(folder, manifest, program, t, entries, progress).prepare() for t in made]


def tune(
    folder: Path,
    manifest: Mapping[str, Any],
    program: Program,
    entries: Sequence[str],
    budget: float | None,
    progress: Progress,
) -> Tuned:
    """What `Tuner.tune` gives on the card at hand. Raises `BackendUnavailable` where none is."""
    targets = [t for t in manifest["targets"] if parse_target(t).is_gpu]
    arches = {t: folder / FOLDER / parse_target(t).arch for t in targets}
    if not any((place / "kernels.json").is_file() for place in arches.values()):
        raise _without_kernels(folder)
    card = next((gpu for gpu in gpus() if gpu.target in arches), None)
    if card is None:
        here = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in gpus()) or "none"
        raise BackendUnavailable(
            f"no GPU here runs these kernels: they are for {', '.join(arches)}, here is {here}",
            "tune it on the card's own machine; `dsc tune --prepare` compiles here what that asks"
            " for, so that it needs no Triton there",
        )
    weights = folder / (manifest.get("weights") or "")
    if not manifest.get("weights") and any(program.used_weights()):
        raise ArtifactError(
            "the artifact was compiled without weights", where=str(folder),
            hint="compile again with --weights DIR to tune it",
        )  # fmt: skip
    tuner = Tuner(folder, manifest, program, parse_target(card.target), entries, progress)
    return tuner.tune(card, weights, budget)


def _without_kernels(folder: Path) -> UsageError:
    return UsageError(
        "the artifact has no kernels for a GPU", where=str(folder),
        hint="compile it for one: --backend triton --target cuda:sm_90",
    )  # fmt: skip


class OnDevice:
    """The first device of a driver; plans that are open at once share the weights."""

    def __init__(self, target: Target, program: Program, weights: Placed, scratch: Path) -> None:
        self._target, self._program, self._weights = target, program, weights
        self._scratch, self._opened = scratch, 0

    def open(self, built: Built) -> OnDeviceTrial:
        """See `tuning.Card`."""
        self._opened += 1
        place = self._scratch / str(self._opened) / self._target.arch
        place.mkdir(parents=True)
        (place / PLAN).write_bytes(built.lowered.plan)
        (place / "kernels.json").write_bytes(_json(built.records))
        for name, data in built.binaries.items():
            (place / name).write_bytes(data)
        driver = driver_of(self._target.kind)
        executable = DeviceExecutable(place, self._weights, self._program, driver)
        shutil.rmtree(place.parent)
        return OnDeviceTrial(executable, self._program, built.lowered.program)


class OnDeviceTrial:
    """A plan on the device."""

    def __init__(self, executable: DeviceExecutable, program: Program, plan: LaunchProgram) -> None:
        self._executable, self._program, self._plan = executable, program, plan
        self._inputs: dict[Step, dict[str, Any]] = {}

    def close(self) -> None:
        """See `tuning.Trial`."""
        self._executable.close()

    def run(self, step: Step) -> Seconds:
        """See `tuning.Trial`."""
        if step not in self._inputs:
            self._inputs[step] = step_inputs(self._executable, self._program, step)
        found = _Runs()
        with found:
            self._executable.run(step.entry, self._inputs[step])
        (ran,) = found.entries
        times = iter(ran.steps())
        launches = self._plan.entries[step.entry].launches
        runs = (x.op != SAMPLE and x.runs(ran.sizes) for x in launches)
        return [next(times).seconds if each else None for each in runs]

    def logits(self, step: Step) -> Array:
        """See `tuning.Trial`.

        Sequences have other lengths each, where states can be cut, and an end of their own.
        """
        if not step.context:
            inputs = step_inputs(self._executable, self._program, step, POSITIONS)
            return _rows(self._executable.run(step.entry, inputs)["logits"])
        chunk = min(max(step.new, CHUNK), self._program.limits.prefill_chunk)
        length = step.context + step.new
        session = Session(self._executable, self._program, step.batch, length, chunk)
        ids = random_ids(self._program, step.batch, length)
        session.prefill(ids[:1, : step.context])
        cut = all(state.storage.of_tokens for state in self._program.states)
        for left in range(step.batch - 1, 0, -1):
            session.fork(0, step.context * left // step.batch if cut else None)
        return _rows(session.prefill(ids[:, step.context :], all_logits=True))


class _Runs(Profiler):
    """Keeps the runs of entries as they are reported."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[EntryRun] = []

    def ran(self, run: EntryRun) -> None:
        """Keep it."""
        self.entries.append(run)


def step_inputs(
    executable: DeviceExecutable, program: Program, step: Step, positions: int = 1, room: int = 0
) -> dict[str, Any]:
    """The inputs of a step: random ids, caches of the device, pages one after the other.

    Caches have `room` for so many tokens more. Logits are wanted of so many positions at most,
    spread over the new tokens, the last among them.
    """
    graph, states = program.entries[step.entry], {state.input for state in program.states}
    sizes = step_sizes(graph, step.batch, step.new, step.context + room, program.symbols)
    wanted = np.linspace(step.new - 1, 0, min(positions, step.new)).astype(np.int64)[::-1]
    sizes |= {WANTED: len(wanted)} if WANTED in sizes else {}
    inputs: dict[str, Any] = {}
    for value in graph.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.stored.shape)
        if value.name in states:
            inputs[value.name] = executable.new_cache(shape, value.type.stored.dtype)
        else:
            inputs[value.name] = np.zeros(shape, value.type.dtype.numpy)
    given = {
        "input_ids": random_ids(program, step.batch, step.new),
        "positions": step.context + np.arange(step.new), "lengths": step.context,
        "logits_at": wanted, "new": step.new,
    }  # fmt: skip
    for name in given.keys() & inputs.keys():
        inputs[name][...] = given[name]
    if BLOCK_TABLE in inputs:
        table = inputs[BLOCK_TABLE]
        table[...] = np.arange(table.size).reshape(table.shape)
    return inputs


def _rows(logits: Any) -> Array:
    found = np.asarray(logits)
    return found.reshape(-1, found.shape[-1]).astype(np.float32)


def random_ids(program: Program, batch: int, length: int) -> Array:
    """Seeded ids, int64 [batch, length]."""
    logits = next(
        v.type.shape[-1]
        for graph in program.entries.values()
        for name, v in zip(graph.output_names, graph.outputs, strict=True)
        if name == "logits"
    )
    ids = np.random.default_rng(0).integers(0, evaluate(logits, {}), (batch, length))
    return ids.astype(np.int64)


def _bits(program: Program) -> int:
    """Bits of the narrowest type that numbers have on the way."""
    types = {v.type.dtype for graph in program.entries.values() for v in graph.values()}
    return min((t.bits for t in types if t.is_float and t.bits >= 16), default=32)


def _texts(folder: Path, modules: Iterable[str]) -> dict[str, str]:
    """What an artifact has of some modules of kernels."""
    places = ((name, folder / f"{name}.py") for name in modules)
    return {name: place.read_text() for name, place in places if place.is_file()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
