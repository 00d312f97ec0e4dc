"""The tvm backend: our own TIR kernels, compiled by LLVM into one library for one CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.backends.base import Capabilities, Emission, EmitOptions, No, Support, Yes
from dsc.errors import BackendUnavailable
from dsc.ir.graph import Node, Value
from dsc.ir.types import DType
from dsc.targets import Target

if TYPE_CHECKING:
    from dsc.backends.tvm.executable import TvmExecutable
    from dsc.ir.program import Program

LIBRARY = "tvm/kernels.so"
DTYPES = frozenset({DType.f32, DType.bf16, DType.f16})


class TvmBackend:
    """Compiles for the host's CPU, or for the one that a target such as `cpu:znver4` names."""

    name = "tvm"
    rules: Sequence[Any] = ()

    def capabilities(self, target: Target) -> Capabilities:
        """Caches in place; experts as one kernel; no fused regions yet."""
        return Capabilities(in_place_cache=True, grouped_moe=False, dtypes=DTYPES, targets=("cpu",))

    def supports(self, node: Node) -> Support:
        """Whether there is a kernel for the node's operator, element types and shapes."""
        require_tvm()
        from dsc.backends.tvm.launch import Unsupported
        from dsc.backends.tvm.machine import GENERIC
        from dsc.backends.tvm.schedule import VIEWS, launch_of
        from dsc.backends.tvm.tir import STORAGE

        for x in (*node.operands, *node.outputs):
            if x.type.dtype not in STORAGE:
                return No(f"element type {x.type.dtype}")
        if node.op in VIEWS:
            return Yes()
        try:
            launch_of(node, GENERIC)
        except Unsupported as reason:
            return No(str(reason))
        return Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Compile kernels and host functions into `tvm/kernels.so`.

        The manifest's meta gives, for each entry, what its table holds and which outputs are
        inputs updated in place; and the order of the weights.
        """
        require_tvm()
        from dsc.backends.tvm.library import compile_library, host_functions, slots_of
        from dsc.backends.tvm.machine import machine_for
        from dsc.backends.tvm.schedule import plan_program
        from dsc.runtime.plan import Plan

        target = options.targets[0] if options.targets else Target("cpu")
        machine = machine_for(target)
        plans, kernels = plan_program(program, machine)
        weights = sorted(program.weights)
        functions: dict[str, Any] = {}
        entries: dict[str, Any] = {}
        for name, graph in program.entries.items():
            slots = slots_of(graph, plans[name])
            functions |= host_functions(name, plans[name], slots, weights)
            in_place = {
                output: program.memory[name].places[x.name].key
                for output, x in zip(graph.output_names, graph.outputs, strict=True)
                if isinstance(x, Value) and program.memory[name].places[x.name].region == "input"
            }
            entries[name] = {
                "slots": slots,
                "arena_bytes": plans[name].arena_bytes,
                "in_place": in_place,
                "inputs": [[v.name, v.type.dtype.value, _dims(v)] for v in graph.inputs],
                "outputs": [
                    [output, x.type.dtype.value, _dims(x)]
                    for output, x in zip(graph.output_names, graph.outputs, strict=True)
                ],
            }
        functions |= kernels.build()
        if options.progress is not None:
            options.progress("kernels", 0, len(kernels.names))
        library = compile_library(functions, machine)
        if options.progress is not None:
            options.progress("kernels", len(kernels.names), len(kernels.names))
        meta = {
            "cpu": machine.cpu,
            "threads": options.threads,
            "weights": weights,
            "entries": entries,
            "guards": dict(program.meta.get("guards", {})),
        }
        runner = Path(__file__).with_name("runner.py.txt").read_text()
        plan = Plan(plans, {"backend": self.name, "cpu": machine.cpu})
        return Emission({LIBRARY: library}, plan, meta=meta, runner=runner)

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> TvmExecutable:
        """Load the library and map the weights; TVM's compiler is not imported."""
        require_tvm()
        from dsc.backends.tvm.executable import TvmExecutable

        return TvmExecutable(folder, manifest, program)


def _dims(x: Any) -> list[str]:
    return [str(d) for d in x.type.shape]


def require_tvm() -> None:
    """Raise `BackendUnavailable` when TVM is not installed. Imports nothing."""
    if find_spec("tvm") is None or find_spec("tvm_ffi") is None:
        raise BackendUnavailable(
            "the tvm backend needs the packages apache-tvm and apache-tvm-ffi",
            hint="pip install 'apache-tvm>=0.27,<0.28'",
        )
