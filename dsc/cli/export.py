"""`dsc export`: a model in, a folder for somebody else's runtime out: ONNX, or TVM's Relax VM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from dsc.cli import console, options
from dsc.cli.compile import build_artifact
from dsc.errors import UsageError
from dsc.ir.types import Precision


def export(
    model: options.Model,
    config: options.Config = None,
    weights: options.Weights = None,
    revision: options.Revision = None,
    format: Annotated[
        Literal["onnx", "relax"],
        Option("--format", help="ONNX, or a library for TVM's Relax virtual machine."),
    ] = "onnx",
    opset: Annotated[
        int | None,
        options.unset(
            "--opset",
            help="Of ONNX: 23 or 24; the older one runs on older runtimes.  [default: 23, or 24 for"
            " --onnx-ops standard]",
        ),
    ] = None,
    onnx_ops: Annotated[
        Literal["ort", "standard"] | None,
        options.unset(
            "--onnx-ops",
            help="ort: ONNX Runtime's own operators too, where they are faster; standard: only"
            " those of ONNX, of opset 24 unless another is given.  [default: ort]",
        ),
    ] = None,
    provider: Annotated[
        Literal["cpu", "cuda"] | None,
        options.unset(
            "--onnx-provider",
            help="Whose kernels of ONNX Runtime the operators are chosen for.  [default: cpu]",
        ),
    ] = None,
    cache_dtype: Annotated[
        Precision | None,
        options.unset(
            "--cache-dtype",
            help="Caches as ONNX inputs and outputs: fp32, or what the model computes in. NumPy has"
            " no bf16.  [default: fp32 for bf16 models, else the model's]",
        ),
    ] = None,
    server: Annotated[
        Literal["genai", "optimum", "triton-server"] | None,
        options.unset(
            "--for",
            help="Beside the models, what a server wants. genai: genai_config.json and a model for"
            " ONNX Runtime GenAI; optimum: one for ORTModelForCausalLM; triton-server: OUT is a"
            " model repository, with config.pbtxt.  [default: none]",
        ),
    ] = None,
    check: Annotated[bool, Option("--check", help="Run onnx.checker on what was written.")] = False,
    fusion_level: options.FusionLevel = 3,
    dtype: options.Dtype = None,
    max_batch: options.MaxBatch = None,
    max_context: options.MaxContext = None,
    prefill_chunk: options.PrefillChunk = 512,
    rope_scaling: options.RopeScaling = None,
    json: options.Json = False,
    force: options.Force = False,
    output: options.Output = None,
) -> None:
    """Export MODEL as ONNX, or for TVM's Relax VM, with its caches as inputs and outputs.

    Examples:

        dsc export path/to/checkpoint --check -o onnx-model

        dsc export models/v3.py --dtype fp32

        dsc export path/to/checkpoint --format relax -o relax-model
    """
    given = locals().copy()  # every option, by the name that `dsc.compile` has for it
    from dsc.exporting import exported

    for own in ("format", "opset", "onnx_ops", "provider", "cache_dtype", "server", "check"):
        del given[own]
    if check and format != "onnx":
        raise UsageError("--check is for ONNX", hint="leave out --check")
    onnx = format == "onnx"
    asked: dict[str, Any] = {"opset": opset, "onnx_ops": onnx_ops, "provider": provider}
    asked |= {"caches": cache_dtype, "server": server}
    if not onnx and options.chosen(**asked):
        raise UsageError(
            "--opset, --onnx-ops, --onnx-provider, --cache-dtype and --for are for ONNX",
            hint="leave them out, or the --format",
        )
    if check and (weights == "none" or model.endswith(".dsc")):
        raise UsageError("--check reads the weights too", hint="give --weights, or no --check")
    folder = build_artifact(
        **given,
        backend="onnxruntime" if onnx else "tvm",
        make=exported if onnx else None,
        backend_options=options.chosen(**asked) if onnx else {"form": "relax"},
    )
    if check:
        _check(folder)


def _check(folder: Path) -> None:
    """Run `onnx.checker` over every model; a model it refuses is our mistake, not the user's."""
    import onnx

    for path in sorted(folder.rglob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        console.stderr().print(f"onnx.checker accepts {path}")
