"""The backend: programs to kernel binaries and launches, and artifacts to executables.

`emit` writes, under `triton/` of the artifact:

    kernels/<module>.py          the source of every kernel, templates and generated ones
    interpret/plan.json          the launch plan with the interpreter's block sizes
    <arch>/plan.json             the launch plan for a GPU, one folder a target
    <arch>/kernels.json          for each kernel: file, symbol, shared memory, registers, spills,
                                 matrix instructions
    <arch>/probes.json           the same for the kernels that read the card's matrix peak
    <arch>/<kernel>.cubin|hsaco  the binaries, one for each distinct specialisation

`plan.json` of the artifact is the plan for the first target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsc.backends.base import Capabilities, EmitOptions, No, Support, Yes, check_supported
from dsc.backends.triton import choices
from dsc.backends.triton.blocks import INTERPRET
from dsc.backends.triton.compile import compile_kernels, require_triton
from dsc.backends.triton.context import template
from dsc.backends.triton.dependent import as_compiled
from dsc.backends.triton.devices import CARDS, LAUNCH_SECONDS
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.lower import reason
from dsc.backends.triton.lower.regions import ANCHORS
from dsc.backends.triton.program import lowered_program
from dsc.backends.triton.timer import PROBES, probe_kernels
from dsc.backends.triton.worker import INTERPRETED
from dsc.errors import ArtifactError, UsageError
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.formats import CACHED
from dsc.ir.graph import Node
from dsc.ir.index_ranges import giving_indices, index_ranges
from dsc.ir.interface import Storage
from dsc.ir.op import named
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.sampled import giving_ids
from dsc.ir.traits import Role
from dsc.runtime.emission import Emission, Progress
from dsc.runtime.executable import Executable
from dsc.runtime.tuned import Tuned
from dsc.targets import KNOWN, Target, parse_target

FOLDER = "triton"
DEFAULT_WEIGHTS = "weights/model.safetensors"
DEFAULT_TARGET = Target("cuda", "sm_90")
ALL_TARGETS = tuple(f"{kind}:{arch}" for kind, archs in KNOWN.items() for arch in archs)
FUSION_LEVEL = 3
CARD = CARDS["H100"]
EXPERTS = ExpertKernels(
    rereads=True, tile=16, balance=CARD.peak("bf16") / CARD.bandwidth,
    launch=round(CARD.bandwidth * LAUNCH_SECONDS),
)  # fmt: skip
"""As one card has it, for all: the order of magnitude decides."""
FEW_SEQUENCES = 4
"""Sequences of a decode step whose products norm their rows, and of which each has its experts."""
FORMATS = ("i8", "i4", "f8e4m3")
"""Codes of weights that kernels read as they are stored."""
PROMOTED = 128
"""Columns that sums of integers have in common at least: each sum costs three instructions."""
PROBE_TEXT = {"probe": template("probe")}
RUNNER = Path(__file__).with_name("runner.py")


def _is_strides(view: Node) -> bool:
    """Every view is: kernels read and write by strides."""
    return True


class TritonBackend:
    """Triton kernels, compiled ahead of time for GPUs; run on one, or in the interpreter."""

    name = "triton"

    def capabilities(self, target: Target) -> Capabilities:
        """Caches in place, experts alone or grouped, absorbed decode, weights as they are stored.

        Rows that FP8 multiplies are FP8 where that is asked for. Beside integers they are 8-bit
        ones where scales are for 128 columns, and stay numbers elsewhere.
        """
        return Capabilities(
            options=("compile", "dependent", "tune"),
            states=(Storage.CONTIGUOUS, Storage.GROWN, Storage.PAGED),
            few=FEW_SEQUENCES,
            experts=EXPERTS,
            shared_experts=True,
            absorbed=True,
            formats=FORMATS,
            activations=FORMATS,
            powers=True,
            least=PROMOTED,
            caches=CACHED,
            fuse=FUSION_LEVEL,
            regions=RegionLimits(
                anchors=ANCHORS,
                epilogue=named(Role.POINTWISE) | {"reshape", "split"},
                codes=True,
                free=_is_strides,
                accepts=lambda node: isinstance(self.supports(node), Yes),
            ),
            targets=(str(DEFAULT_TARGET), *(t for t in ALL_TARGETS if t != str(DEFAULT_TARGET))),
        )

    def supports(self, node: Node) -> Support:
        """Whether there is a kernel for this node."""
        if node.body is not None and index_ranges(node.body, {}).computed:
            return No("a region that computes an index: what it reads by could not be looked at")
        why = reason(node)
        return Yes() if why is None else No(why)

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Lower and compile for every GPU target asked for, or where none is for the GPUs at hand.

        Without any the interpreter's plan is the artifact's: nothing else could run.
        `options.extra["compile"] = False` leaves binaries out: launches and sources only. With
        `dependent` False kernels begin when the former one is done, on all targets. Tiles that were
        measured on the card at hand are taken unless `tune` is False.
        """
        check_supported(program, self)
        program = giving_ids(giving_indices(program))
        targets = [t for t in options.targets if t.is_gpu] or _at_hand()
        known = {t: choices.known(t, options.extra.get("tune", True)) for t in targets}
        here = lowered_program(program, INTERPRET, options.reuse)
        made = {t: lowered_program(program, str(t), options.reuse, known[t].tiles) for t in targets}
        plans = [each.program.plan() for each in made.values()] or [here.program.plan()]
        for plan in plans:
            options.admit(plan)
        sources = dict(here.sources)
        files = {f"{FOLDER}/{INTERPRETED}": here.plan}
        notes: list[str] = []
        summary: dict[str, Any] = {}
        for target, there in made.items():
            gpu = there.program
            taken = sum(choice.taken != choice.tiles[0] for choice in gpu.choices.values())
            notes += [known[target].note(taken)] if taken else []
            sources |= (texts := with_templates(gpu, there.sources))
            place = f"{FOLDER}/{target.arch}"
            files[f"{place}/plan.json"] = there.plan
            summary[str(target)] = {"kernels": len(gpu.kernels), "launches": launch_counts(gpu)}
            if options.extra.get("compile", True):
                code = _compiled(gpu, target, texts, options)
                files |= {f"{place}/{name}": data for name, data in code.items()}
        texts = with_templates(here.program, sources)
        files |= {f"{FOLDER}/kernels/{m}.py": t.encode() for m, t in sorted(texts.items())}
        runner = RUNNER.read_text() if program.is_causal_lm else ""
        return Emission(
            files, plans[0], meta={"targets": summary}, runner=runner, notes=tuple(notes)
        )

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Load for the GPU at hand when its binaries are there, else for the interpreter.

        Of a manifest that lists files those count that it lists: others nobody has looked at.
        """
        from dsc.hardware import gpus

        present = [g.target for g in gpus() if g.target.partition(":")[0] in KNOWN]
        places = {t: f"{FOLDER}/{_arch(t)}/kernels.json" for t in present}
        listed = manifest.get("files") or places.values()
        built = [t for t, at in places.items() if at in listed and (folder / at).is_file()]
        weights = folder / (manifest.get("weights") or DEFAULT_WEIGHTS)
        return self.load_on(built[0] if built else INTERPRET, folder, weights, program)

    def kernel_report(self, folder: Path, program: Program) -> Mapping[str, Any]:
        """Registers, spills, matrix instructions, and modelled steps, of each target's kernels."""
        from dsc.backends.triton.report import kernel_report

        return kernel_report(folder / FOLDER, program)

    def prepare_tuning(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        program: Program,
        entries: Sequence[str],
        progress: Progress,
    ) -> list[Tuned]:
        """See `dsc.backends.base.Tunes`."""
        from dsc.backends.triton.tuner import prepare

        return prepare(folder, manifest, program, entries, progress)

    def tune(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        program: Program,
        entries: Sequence[str],
        budget: float | None,
        progress: Progress,
    ) -> Tuned:
        """See `dsc.backends.base.Tunes`."""
        from dsc.backends.triton.tuner import tune

        return tune(folder, manifest, program, entries, budget, progress)

    def load_on(self, device: str, folder: Path, weights: Path, program: Program) -> Executable:
        """Load for `interpret` or for a GPU by target name. Raises `BackendUnavailable`.

        `weights` is the safetensors file of the packed weights; a program that reads none may lack
        it.
        """
        if not weights.is_file() and any(program.used_weights()):
            raise ArtifactError(
                "the artifact was compiled without weights",
                where=str(folder),
                hint="compile it with weights (--weights FOLDER) to run it",
            )
        if device == INTERPRET:
            require_triton()
            from dsc.backends.triton.client import InterpretedExecutable

            return InterpretedExecutable(folder / FOLDER, weights, program)
        kind, _, arch = device.partition(":")
        if kind in KNOWN:
            from dsc.backends.triton.device import DeviceExecutable, driver_of

            place = folder / FOLDER / arch
            return DeviceExecutable(place, weights, program, driver_of(kind))
        raise UsageError(
            f"unknown device {device!r}", hint=f"{INTERPRET}, cuda:<arch> or hip:<arch>"
        )


def _at_hand() -> list[Target]:
    """The targets of the GPUs here, each once."""
    from dsc.hardware import gpus

    found = dict.fromkeys(gpu.target for gpu in gpus())
    return [parse_target(each) for each in found if each in ALL_TARGETS]


def _compiled(
    program: LaunchProgram, target: Target, texts: Mapping[str, str], options: EmitOptions
) -> dict[str, bytes]:
    """Binaries and their records, of a plan's kernels and of the probes, by file name."""
    if options.extra.get("dependent", True):
        texts = as_compiled(texts, program.kernels.values(), target)
    binaries, records = compile_kernels(program.kernels, target, texts, options.progress)
    probes, facts = compile_kernels(probe_kernels(target), target, PROBE_TEXT)
    told = {"kernels.json": records, PROBES: facts}
    return {**binaries, **probes} | {n: json.dumps(x, indent=1).encode() for n, x in told.items()}


def _arch(target: str) -> str:
    return target.partition(":")[2]


def with_templates(program: LaunchProgram, generated: Mapping[str, str]) -> dict[str, str]:
    """The source text of every module that the launches use."""
    modules = {kernel.module for kernel in program.kernels.values()}
    return {m: generated.get(m) or template(m) for m in sorted(modules | generated.keys())}


def launch_counts(program: LaunchProgram) -> dict[str, int]:
    """Launches of each entry."""
    return {name: len(entry.launches) for name, entry in program.entries.items()}
