"""The `onnxruntime` backend: ONNX models, run by ONNX Runtime on the CPU.

One model for each entry that differs, `onnx/<entry>.onnx`, with the latent cache as inputs and
outputs and all weights in files of limited size beside them. The models pass `onnx.checker`. They
are in one of two dialects (`contrib.py`): standard operators of opset 23 (ONNX Runtime 1.23) or 24
(1.25), and ONNX Runtime's own beside them unless `onnx_ops` is `standard`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsc.backends.base import Capabilities, EmitOptions, No, Support, Yes
from dsc.backends.onnxruntime.contrib import release
from dsc.backends.onnxruntime.external_data import check_external
from dsc.errors import ArtifactError, BackendUnavailable
from dsc.ir.graph import Node
from dsc.ir.ops.quant import takes_codes
from dsc.ir.paging import reads_pages
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.types import DType
from dsc.runtime.emission import Emission
from dsc.runtime.executable import Executable
from dsc.targets import Target

COMPUTED = frozenset(
    {DType.f32, DType.bf16, DType.f16, DType.i64, DType.i32, DType.i16, DType.i8, DType.u8}
    | {DType.boolean}
)
"""Element types that emitters handle; the 8-bit floats can only be converted from and to."""
FLOATS_ONLY = frozenset({"linear", "pow"})
"""ONNX Runtime computes powers of integers in fp64, and has no Gemm of them."""
GROUP = 128
"""Columns that share a scale: repacked, such a group has two numbers in fp32 beside its codes."""
CODES = ("i8", "i4")
"""Of weights, as ONNX Runtime's MatMulNBits reads them."""
BLOCK = 256
"""Columns of the largest block of such codes that it has kernels for."""
OPTIONS = (
    "opset", "caches", "prepack", "server", "onnx_ops", "provider", "max_shard_size", "indices",
)  # fmt: skip
"""`indices`: whether models give the indices that they compute, for `dsc.load` to look at."""
INSTALL = "pip install onnx onnxruntime"


class OnnxRuntimeBackend:
    """Programs to ONNX models, and those to `InferenceSession`s."""

    name = "onnxruntime"

    def capabilities(self, target: Target) -> Capabilities:
        """Caches go in and come out grown; experts stay one operator; weights may be in codes."""
        return Capabilities(
            options=OPTIONS,
            regions=RegionLimits(accepts=_accepts),
            formats=CODES,
            group=GROUP,
            unsigned=BLOCK,
            pairs=True,
            activations=CODES,
        )

    def supports(self, node: Node) -> Support:
        """Whether there is an emitter and a kernel for the node's element types."""
        _require("onnx")
        from dsc.backends.onnxruntime.emit import emitter_of
        from dsc.backends.onnxruntime.emit.coded import takes

        if node.body is not None:
            refused = (self.supports(inner) for inner in node.body.nodes)
            return next((answer for answer in refused if isinstance(answer, No)), Yes())
        if emitter_of(node.op) is None:
            return No(f"no ONNX form of {node.op}")
        if reads_pages(node):
            return No("it takes no caches in pages")
        coded = any(x.type.format is not None for x in node.operands)
        if coded and not takes(node):
            return No("it takes no weights in such codes")
        if takes_codes(node) and not coded:
            return No("it takes no rows as codes beside numbers")
        if node.op == "cast":
            return Yes()
        numbers = [x for x in node.operands if x.type.format is None]
        types = [x.type.dtype for x in (*numbers, *node.outputs)]
        strange = sorted({t.value for t in types if t not in COMPUTED})
        if node.op in FLOATS_ONLY and not types[0].is_float:
            return No(f"{node.op} of {types[0]}; floats have it")
        return No(f"{node.op} on {', '.join(strange)}") if strange else Yes()

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Build the models, their texts and what tells of them (`emission.py`)."""
        _require("onnx")
        from dsc.backends.onnxruntime.emission import emitted

        return emitted(program, options, self)

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Open an artifact. Sessions are made when an entry first runs.

        Raises `ArtifactError` where a model reads what is not the artifact's, or has no weights.
        """
        _require("onnx")
        _require("onnxruntime")
        check_runtime(manifest.get("needs") or {}, manifest["meta"])
        if manifest["weights"] is None and program.weights:
            raise ArtifactError(
                "the artifact was exported without weights", str(folder), "export it with them"
            )
        for path in sorted(set(manifest["meta"]["models"].values())):
            check_data(folder, path, manifest["files"])
        from dsc.backends.onnxruntime.session import OnnxExecutable

        return OnnxExecutable(folder, manifest, program)


def check_data(folder: Path, model: str, files: Collection[str]) -> None:
    """Raise `ArtifactError` where a model reads what is not the artifact's (`external_data`)."""
    try:
        check_external(folder, model, files)
    except (ValueError, OSError) as problem:
        raise ArtifactError(
            str(problem), str(folder), "do not run it; export the model again"
        ) from None


def _accepts(node: Node) -> bool:
    """Whether there is a product or a lookup for what a node reads in codes."""
    _require("onnx")
    from dsc.backends.onnxruntime.emit.coded import takes

    return takes(node)


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise BackendUnavailable(f"the package {module} is not installed", INSTALL)


def check_runtime(needs: Mapping[str, str], meta: Mapping[str, Any]) -> None:
    """Raise `BackendUnavailable` where the installed ONNX Runtime is older than a model needs."""
    import onnxruntime

    from dsc.backends.onnxruntime.options import older_forms

    least, here = needs.get("onnxruntime", "").partition(">=")[2], onnxruntime.__version__
    if release(here) < release(least):
        others = older_forms(meta, least, here)
        raise BackendUnavailable(
            f"this model needs ONNX Runtime {least}, {here} is installed",
            f"pip install 'onnxruntime>={least}'"
            + (f", or export it again with {others}" if others else ""),
        )
