"""The tvm backend: our own TIR kernels, compiled by LLVM into one library for one CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsc.backends.base import Capabilities, EmitOptions, No, Support, Yes
from dsc.backends.tvm.launch import Unsupported
from dsc.backends.tvm.lean import INSTALL, NEEDS
from dsc.errors import BackendUnavailable
from dsc.hardware import cpu
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.formats import CACHED
from dsc.ir.graph import Node
from dsc.ir.index_ranges import index_ranges
from dsc.ir.interface import Storage
from dsc.ir.lanes import moves_nothing
from dsc.ir.op import lookup, named
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.runtime.emission import Emission
from dsc.runtime.executable import Executable
from dsc.runtime.plan import Plan
from dsc.targets import Target

LIBRARY = "tvm/kernels.so"
STEPS = "tvm/steps.bin"
RUNNER = Path(__file__).with_name("runner.py")
COVERS_CACHES = ("cache_write", "latent_attention", "mla_attention")
"""Operators with kernels over caches in codes."""
EXPERTS = ExpertKernels(rereads=False, tile=1, balance=24.0, launch=80_000)
"""Two cores of 1 TFLOP/s in bf16 at 41 GB/s, and 2 microseconds a launch."""


class TvmBackend:
    """Compiles for the host's CPU, or for the one that a target such as `cpu:znver4` names."""

    name = "tvm"

    def capabilities(self, target: Target) -> Capabilities:
        """Caches in place; experts as one kernel, or grouped; rows and epilogues as regions.

        Rope is no epilogue: its angles would be computed again by every block of columns.
        """
        return Capabilities(
            options=("form", "tune"),
            states=(Storage.CONTIGUOUS, Storage.GROWN, Storage.PAGED),
            experts=EXPERTS,
            shared_experts=True,
            formats=("i8", "i4", "f8e4m3"),
            tile=16,
            activations=("i8", "i4", "f8e4m3"),
            caches=CACHED,
            plain_forms=("relax",),
            fuse=3,
            regions=RegionLimits(
                anchors=frozenset({"linear", "grouped_linear"}),
                epilogue=named(Role.POINTWISE) | {"reshape", "split"},
                accepts=lambda node: isinstance(self.supports(node), Yes),
            ),
            targets=("cpu",),
        )

    def warm(self, model: bool) -> None:
        """Start a compiling process; for a model it builds what is timed where that is unknown."""
        from dsc.backends.tvm import tuning, workers

        workers.warm()
        if model:
            tuning.begin()

    def supports(self, node: Node) -> Support:
        """Whether there is a kernel for the node's operator, element types and shapes."""
        require_tvm()
        from dsc.backends.tvm.machine import GENERIC
        from dsc.backends.tvm.schedule import launch_of
        from dsc.backends.tvm.tir import STORAGE

        definition = lookup(node.op)
        region = definition.traits.role is Role.REGION
        reads_codes = region or definition.attr("activations") is not None
        for x in (*node.operands, *node.outputs):
            if x.type.stored is not x.type:
                if node.op not in COVERS_CACHES:
                    return No(f"{node.op} of a cache in {x.type.dtype}{x.type.format}")
                continue
            if x.type.format is not None and not reads_codes:
                return No(f"{node.op} of a weight in {x.type.dtype}{x.type.format}")
            if x.type.format is None and x.type.dtype not in STORAGE:
                return No(f"element type {x.type.dtype}")
        if moves_nothing(node):
            return Yes()
        if node.body is not None and index_ranges(node.body, {}).computed:
            return No("a region that computes an index: only a step between can check it")
        try:
            launch_of(node, GENERIC)
        except Unsupported as reason:
            return No(str(reason))
        return Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Compile the kernels into `tvm/kernels.so` and write the lists of steps.

        The manifest's meta gives, for each entry, what its `values` hold, which outputs are inputs
        updated in place, and where its list starts; and the order of the weights.
        """
        require_tvm()
        import numpy as np

        from dsc.backends.tvm import library
        from dsc.backends.tvm.checks import entry_checks, facts_of
        from dsc.backends.tvm.machine import cpu_of, machine_for
        from dsc.backends.tvm.objects import Kernel, objects_of
        from dsc.backends.tvm.schedule import plan_program
        from dsc.backends.tvm.tuning import Tiling, tuned

        target = options.targets[0] if options.targets else Target("cpu")
        machine = machine_for(target)
        threads = options.threads
        if threads is None and target.arch in ("", cpu_of("").host):
            threads = cpu().cores
        if threads is not None:
            machine = machine.shared_by(threads)
        if options.extra.get("form") == "relax":
            from dsc.backends.tvm import relax

            # Nobody asks the operating system for tiles before TVM's own run time calls a kernel.
            machine = replace(machine, tiles=False, byte_tiles=False)
            return relax.emit(program, machine, options)
        machine = replace(machine, byte_tiles=machine.byte_tiles and _multiplies_codes(program))
        by = "rule"
        if _multiplies_bf16(program):
            asked = options.extra.get("tune", True)
            machine, by = tuned(machine, target, options.threads, asked)
        plans, table = plan_program(program, machine, options.reuse)
        plan = Plan(plans, {"backend": self.name, "cpu": machine.cpu})
        options.admit(plan)
        kernels = {name: Kernel.of(name, each, machine) for name, each in table.launches.items()}
        numbers = {name: i for i, name in enumerate(kernels, library.FIRST)}
        weights = sorted(
            name + suffix
            for name, t in program.weight_types().items() for suffix, _ in t.parts
        )  # fmt: skip
        entries: dict[str, Any] = {}
        lists: list[Any] = []
        functions = {}
        for name, graph in program.entries.items():
            slots = library.Slots.of(graph, plans[name], weights)
            found = index_ranges(graph, program.symbols)
            checks = entry_checks(graph, program.symbols, found)
            functions[name] = (slots, checks)
            entries[name] = {
                "in_place": plans[name].in_place,
                "checks": facts_of(checks),
                "slots": slots.given,
                "derived": len(slots.derived),
                "arena_bytes": plans[name].arena_bytes,
                "steps_at": 8 * sum(map(len, lists)),
            }
            lists.append(library.encode_steps(slots, numbers))
        arity = {x.kernel: len(x.arguments) for plan in plans.values() for x in plan.launches}
        called = [(kernel.symbol, arity[name]) for name, kernel in kernels.items()]
        sources = [source for launch in table.launches.values() for source in launch.sources]
        objects = objects_of(list(kernels.values()), options.progress)
        source = library.source_of(called, functions)
        code = library.compile_library(source, objects, machine, sources)
        tiling = Tiling.of(machine)
        meta = {
            "cpu": machine.cpu,
            "cpu_needs": cpu_of(target.arch).needs,
            "tiles": machine.tiles or machine.byte_tiles,
            "threads": options.threads,
            "tiling": {**asdict(tiling), "run": machine.run, "by": by},
            "weights": weights,
            "entries": entries,
        }
        runner = RUNNER.read_text() if program.is_causal_lm else ""
        files = {LIBRARY: code, STEPS: np.concatenate(lists).tobytes()}
        cut = f"{tiling.narrow} | {tiling.wide} columns a task, by {by}"
        native = machine.bf16 and _multiplies_bf16(program)
        notes = (f"bf16 products by {tiling.way}, {cut}",) if native else ()
        needs = {"apache-tvm": NEEDS}
        return Emission(files, plan, meta=meta, runner=runner, notes=notes, needs=needs)

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Load the library and map the weights; TVM's compiler is not imported."""
        require_tvm()
        if manifest["meta"].get("form") == "relax":
            from dsc.backends.tvm.relax import RelaxExecutable

            return RelaxExecutable(folder, manifest, program)
        from dsc.backends.tvm.executable import TvmExecutable

        return TvmExecutable(folder, manifest, program)


def _multiplies_bf16(program: Program) -> bool:
    """Whether any weights are bf16."""
    return any(w.type.dtype is DType.bf16 for w in program.weights.values())


def _multiplies_codes(program: Program) -> bool:
    """Whether any weights are integer codes."""
    return any(w.type.format and w.type.dtype.is_int for w in program.weights.values())


def require_tvm() -> None:
    """Raise `BackendUnavailable` when TVM is not installed. Imports nothing."""
    if find_spec("tvm") is None or find_spec("tvm_ffi") is None:
        raise BackendUnavailable(
            "the tvm backend needs the packages apache-tvm and apache-tvm-ffi",
            INSTALL,
        )
