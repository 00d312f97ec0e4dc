"""The `onnxruntime` backend: ONNX models in standard operators, run by ONNX Runtime on the CPU.

One model for each entry that differs, `onnx/<entry>.onnx`, with the latent cache as inputs and
outputs and all weights in one file beside them. The models pass `onnx.checker`, need opset 24
(ONNX 1.19, ONNX Runtime 1.24) and no operator outside of the standard.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsc.backends.base import (
    Capabilities,
    Emission,
    EmitOptions,
    Executable,
    No,
    Support,
    Yes,
)
from dsc.errors import BackendUnavailable, UnsupportedOperator
from dsc.ir.graph import Node
from dsc.ir.index_ranges import index_ranges
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.targets import Target

COMPUTED = frozenset(
    {DType.f32, DType.bf16, DType.f16, DType.i64, DType.i32, DType.i16, DType.i8, DType.u8}
    | {DType.boolean}
)
"""Element types that emitters handle; the 8-bit floats can only be converted from and to."""
CONVERSIONS = frozenset({"cast", "dequantize_block"})
INSTALL = "pip install onnx onnxruntime"


class OnnxRuntimeBackend:
    """Programs to ONNX models, and those to `InferenceSession`s."""

    name = "onnxruntime"
    rules: Sequence[Any] = ()

    def capabilities(self, target: Target) -> Capabilities:
        """Caches go in and come out grown; experts stay one operator."""
        return Capabilities()

    def supports(self, node: Node) -> Support:
        """Whether there is an emitter and a kernel for the node's element types."""
        _require("onnx")
        from dsc.backends.onnxruntime.emit import EMITTERS

        if node.body is not None:
            refused = (self.supports(inner) for inner in node.body.nodes)
            return next((answer for answer in refused if isinstance(answer, No)), Yes())
        if node.op not in EMITTERS:
            return No(f"no ONNX form of {node.op}")
        if node.op in CONVERSIONS:
            return Yes()
        types = [x.type.dtype for x in (*node.operands, *node.outputs)]
        strange = sorted({t.value for t in types if t not in COMPUTED})
        return No(f"{node.op} on {', '.join(strange)}") if strange else Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Build the models. Their bytes come from `finish`, which needs the places of weights.

        Raises `UnsupportedOperator` with all nodes that have no ONNX form.
        """
        _require("onnx")
        from dsc.backends.onnxruntime import model

        self._check(program)
        shared = model.shared_entries(program)
        files = {entry: f"{model.FOLDER}/{owner}.onnx" for entry, owner in shared.items()}
        owners = sorted(set(shared.values()))
        built = {}
        for done, owner in enumerate(owners):
            if options.progress is not None:
                options.progress("models", done, len(owners))
            built[files[owner]] = model.build_model(program.entries[owner], owner)
        meta = {
            "models": files,
            "guards": dict(program.meta.get("guards", {})),
            "chunk": options.prefill_chunk,
            "threads": options.threads,
            "prepack": bool(options.extra.get("prepack", False)),
            "opset": model.OPSET,
            "context": options.max_context,
            "checks": index_ranges(list(program.entries.values())[-1], program.symbols).facts,
        }

        def finish(places: Mapping[str, tuple[int, int]]) -> Mapping[str, bytes]:
            return {path: one.serialized(places) for path, one in built.items()}

        return Emission(
            files={},
            weights_path=f"{model.FOLDER}/{model.WEIGHTS}",
            meta=meta,
            runner=Path(__file__).with_name("runner.py").read_text(),
            finish=finish,
        )

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Open an artifact. Sessions are made when an entry first runs."""
        _require("onnx")
        _require("onnxruntime")
        from dsc.backends.onnxruntime.session import OnnxExecutable

        return OnnxExecutable(folder, manifest, program)

    def _check(self, program: Program) -> None:
        refused: dict[str, str] = {}
        for graph in program.entries.values():
            for node in graph.nodes:
                answer = self.supports(node)
                if isinstance(answer, No):
                    refused.setdefault(answer.reason, node.loc)
        if refused:
            lines = [f"{reason} ({loc})" if loc else reason for reason, loc in refused.items()]
            raise UnsupportedOperator(
                "ONNX cannot express:\n" + "\n".join(f"  {line}" for line in lines),
                hint="compile with --fallback reference, or for another backend",
            )


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise BackendUnavailable(f"the package {module} is not installed", INSTALL)
