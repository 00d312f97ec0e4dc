"""`dsc compile`: a model in, a folder that runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.cli import console, options
from dsc.errors import UsageError

if TYPE_CHECKING:
    from dsc.api import CompiledModel


def compile(
    model: options.Model,
    config: options.Config = None,
    weights: options.Weights = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    target: options.Targets = None,
    fusion_level: options.FusionLevel = 3,
    dtype: options.Dtype = None,
    max_batch: options.MaxBatch = None,
    max_context: options.MaxContext = None,
    prefill_chunk: options.PrefillChunk = 512,
    rope_scaling: options.RopeScaling = None,
    cache: options.Cache = "contiguous",
    cache_format: options.CacheFormat = "bf16",
    threads: options.Threads = None,
    tune: options.Tune = True,
    fallback: options.Fallback = None,
    ranks: options.Ranks = None,
    parallel: options.Parallel = None,
    quant: options.Quant = "none",
    keep: options.Keep = None,
    group_size: options.GroupSize = None,
    quant_embedding: options.QuantEmbedding = "none",
    activation_bits: options.ActivationBits = "8",
    calibrate: options.Calibrate = None,
    nsamples: options.NSamples = 4,
    seqlen: options.SeqLen = None,
    avg_bits: options.AvgBits = None,
    print_ir_after: options.PrintIrAfter = None,
    dump_dir: options.DumpDir = None,
    verify_each: options.VerifyEach = False,
    json: options.Json = False,
    force: options.Force = False,
    output: options.Output = None,
) -> None:
    """Compile MODEL into a folder that runs without its modelling code.

    Examples:

        dsc compile models/v3.py --backend triton

        dsc compile path/to/checkpoint --backend tvm --dtype fp32 -o out

        dsc compile path/to/checkpoint --weights none --backend null --target cuda:sm_90

        dsc compile path/to/checkpoint --quant int4 --calibrate book.txt --avg-bits 5
    """
    asked = locals().copy()  # every option, by the name that `dsc.compile` has for it
    del asked["tune"]
    asked["activation_bits"] = int(activation_bits)
    if json and print_ir_after:
        raise UsageError(
            "--json and --print-ir-after both write to standard output",
            hint="write the IR to a folder with --dump-dir",
        )
    build_artifact(**asked, backend_options=None if tune else {"tune": False})


def build_artifact(
    model: str,
    output: Path | None,
    force: bool,
    json: bool,
    backend: str | None,
    make: Callable[..., CompiledModel] | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
    **asked: Any,
) -> Path:
    """Compile, save, and say what was made; `asked` are options of `dsc.compile`, None: unset.

    `make` is called as `dsc.compile` is, which is the default; what `check` finds of the folder
    is part of the JSON.
    """
    from dsc import api
    from dsc.runtime.artifact import check_free

    if model.endswith(".dsc") and asked.get("dtype") is not None:
        raise UsageError("a text has element types of its own", hint="leave out --dtype")
    folder = output or default_output(model, backend or api.best_backend().name)
    check_free(folder, force)  # before minutes go into compiling
    given = options.chosen(**asked)
    with console.progress_bar() as progress:
        compiled = (make or api.compile)(model, backend=backend, progress=progress, **given)
        progress(f"writing: {folder}")
        compiled.save(folder, force=force, progress=progress)
        found = None
        if check is not None:
            progress(f"checking: {folder}")
            found = check(folder)
        phases = progress.seconds()
    told = {} if found is None else {"check": found}
    shown = {"phases": phases, **told} if json else None
    _describe(compiled, folder, shown, bool(given.get("print_ir_after")))
    return folder


def default_output(model: str, backend: str) -> Path:
    """Name the folder that `-o` would have named.

    >>> default_output("models/v3.py", "triton"), default_output("checkpoints/R1/", "tvm")
    (PosixPath('v3-triton'), PosixPath('R1-tvm'))
    """
    from dsc.frontends.hub import model_name

    path = Path(model)
    stem = path.stem if path.suffix == ".py" else model_name(path.resolve())
    return Path(f"{stem}-{backend}")


def _describe(
    compiled: CompiledModel, folder: Path, shown: Mapping[str, Any] | None, aside: bool
) -> None:
    """Say what was made, in JSON where there is more to be `shown` in it.

    `aside`, on standard error, where the IR went to standard output.
    """
    _warn_of_trust(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    if shown is not None:
        made = {"output": str(folder), "backend": compiled.backend, "bytes": total}
        console.print_json({**made, **shown, "report": compiled.report})
        return
    found = compiled.report.get("quantisation")
    if found:
        from dsc.cli.report_tables import quantisation_table

        (console.stderr() if aside else console.tables()).print(quantisation_table(found))
    for note in compiled.report.get("notes", []):
        console.stderr().print(f"note: {note}")
    (console.stderr() if aside else console.stdout()).print(
        f"{folder}: {len(files)} files, {console.human_bytes(total)}, for {compiled.backend}"
    )


def _warn_of_trust(folder: Path) -> None:
    """Say so where nothing keeps that this user built the code."""
    from dsc.runtime import artifact, sharded

    ranks = sharded.opened(folder)
    each = folder if ranks is None else ranks.rank(0)
    if not artifact.loads_untrusted(each):
        console.stderr().print(
            "the state folder cannot be written (XDG_STATE_HOME, by default ~/.local/state), so"
            " nothing says that you built this: load it with --trust"
        )
