"""`dsc export`: a model in, a folder for somebody else's runtime out: ONNX, or TVM's Relax VM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from typer import Exit, Option

from dsc.cli import console, options
from dsc.cli.compile import build_artifact
from dsc.errors import UsageError
from dsc.ir.types import Precision

if TYPE_CHECKING:
    from dsc.backends.onnxruntime.check import Checked

SHOWN = 8
"""Kinds of operators that a line names, the most frequent."""


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
    cache: Annotated[
        Literal["grown", "in-place"],
        Option(
            "--cache",
            help="grown: a step gives its caches back with more rows, a copy; in-place: they have"
            " room, and new rows are written where past and present are bound to one memory.",
        ),
    ] = "grown",
    server: Annotated[
        Literal["genai", "optimum", "triton-server"] | None,
        options.unset(
            "--for",
            help="Beside the models, what a server wants. genai: genai_config.json and a model for"
            " ONNX Runtime GenAI; optimum: one for ORTModelForCausalLM; triton-server: OUT is a"
            " model repository, with config.pbtxt.  [default: none]",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        options.unset(
            "--max-shard-size",
            metavar="SIZE",
            help="Of weights in a file: 5GB, 500MB, 2GiB; what does not fit goes into more files."
            "  [default: 50GB]",
        ),
    ] = None,
    check: Annotated[
        bool,
        Option(
            "--check",
            help="Hold against what was written: onnx.checker, shapes, onnx's ReferenceEvaluator,"
            " our interpreter layer by layer, operators by provider, sizes.",
        ),
    ] = False,
    fusion_level: options.FusionLevel = 3,
    dtype: options.Dtype = None,
    max_batch: options.MaxBatch = None,
    max_context: options.MaxContext = None,
    prefill_chunk: options.PrefillChunk = 512,
    rope_scaling: options.RopeScaling = None,
    quant: options.Quant = "none",
    keep: options.Keep = None,
    group_size: options.GroupSize = None,
    quant_embedding: options.QuantEmbedding = "none",
    activation_bits: options.ActivationBits = "8",
    json: options.Json = False,
    force: options.Force = False,
    output: options.Output = None,
) -> None:
    """Export MODEL as ONNX, or for TVM's Relax VM, with its caches as inputs and outputs.

    Examples:

        dsc export path/to/checkpoint --check -o onnx-model

        dsc export models/v3.py --dtype fp32 --onnx-ops standard

        dsc export path/to/checkpoint --quant int4 -o onnx-model

        dsc export path/to/checkpoint --format relax -o relax-model
    """
    given = locals().copy()  # every option, by the name that `dsc.compile` has for it
    from dsc.exporting import check_has_weights, exported

    asked: dict[str, Any] = {"opset": opset, "onnx_ops": onnx_ops, "provider": provider}
    asked |= {"caches": cache_dtype, "server": server, "max_shard_size": max_shard_size}
    for own in (*asked.keys() - {"caches"}, "format", "cache_dtype", "check"):
        del given[own]
    given["activation_bits"] = int(activation_bits)
    given["cache"] = cache if cache == "in-place" else "contiguous"
    if check and format != "onnx":
        raise UsageError("--check is for ONNX", hint="leave out --check")
    onnx = format == "onnx"
    if not onnx and (options.chosen(**asked) or cache != "grown"):
        raise UsageError(
            "--opset, --onnx-ops, --onnx-provider, --cache, --cache-dtype, --max-shard-size and"
            " --for are for ONNX",
            hint="leave them out, or the --format",
        )
    if check:
        check_has_weights(model, weights)
    found: list[Checked] = []

    def checked(folder: Path) -> Mapping[str, Any]:
        from dsc.backends.onnxruntime.check import check

        found.append(check(folder))
        return found[0].to_json()

    build_artifact(
        **given,
        backend="onnxruntime" if onnx else "tvm",
        make=exported if onnx else None,
        check=checked if check else None,
        backend_options=options.chosen(**asked) if onnx else {"form": "relax"},
    )
    for each in found:
        if not json:
            _show(each)
        if each.failure:
            console.stderr().print(f"dsc: the export is not what it should be: {each.failure}")
            raise Exit(1)


def _show(found: Checked) -> None:
    """Print what was found as a table, then operators and sizes in a line each."""
    table = Table("question", "model", "", "what was found", box=None, pad_edge=False)
    answers = {True: "yes", False: "NO", None: "-"}
    for each in found.findings:
        cells = (each.question, each.model, answers[each.passed], each.told)
        table.add_row(*map(Text, cells))
    console.tables().print(table)
    for model, providers in found.operators.items():
        for provider, counts in providers.items():
            most = ", ".join(f"{n} {kind}" for kind, n in list(counts.items())[:SHOWN])
            console.tables().print(Text(f"{model} on {provider}: {most}"))
    for name, size in found.sizes.items():
        spelled = f"{size}" if "values" in name else console.human_bytes(size)
        console.tables().print(Text(f"{name.replace('_', ' ')}: {spelled}"))
