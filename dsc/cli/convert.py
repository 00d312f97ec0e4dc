"""`dsc convert`: a checkpoint in FP8 becomes one in bf16, or the other way round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from dsc.cli import console, options


def convert(
    source: Annotated[
        str,
        Argument(
            metavar="IN",
            help="A checkpoint folder, or ORG/NAME of the Hugging Face Hub.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, Argument(metavar="OUT", help="Where the new one goes.", show_default=False)
    ],
    to: Annotated[
        Literal["bf16", "fp8"],
        Option("--to", help="bf16 of weights in FP8; FP8 in blocks of 128 x 128 of plain weights."),
    ],
    scale_fmt: Annotated[
        Literal["f32", "ue8m0"],
        Option("--scale-fmt", help="Scales of FP8: the least, or powers of two (DeepSeek-V3.1)."),
    ] = "f32",
    max_shard_size: Annotated[
        str,
        Option("--max-shard-size", metavar="SIZE", help="Of tensors in a file: 5GB, 500MB, 2GiB."),
    ] = "5GB",
    revision: options.Revision = None,
    json: options.Json = False,
    force: Annotated[bool, Option("--force", help="Replace the checkpoint at OUT.")] = False,
) -> None:
    """Convert the checkpoint IN between block FP8 and bf16, as DeepSeek's and Qwen's have it.

    Runs on a CPU and in a stream: no more than blocks of a weight are in memory.

    Examples:

        dsc convert path/to/checkpoint-fp8 checkpoint-bf16 --to bf16

        dsc convert path/to/checkpoint out --to fp8 --max-shard-size 2GB
    """
    from dsc.frontends.convert import convert as converted
    from dsc.frontends.hub import located

    began = time.perf_counter()
    with console.progress_bar() as progress:
        found = converted(
            located(source, revision, progress)[0],
            out,
            to,
            scale_fmt=scale_fmt,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    total = sum(found.files.values())
    if json:
        counts = {"bytes": total, "tensors": found.tensors, "converted": found.converted}
        made = {"output": str(found.folder), "to": to, **counts, "seconds": round(seconds, 3)}
        console.print_json(made | {"files": found.files, "notes": found.notes})
        return
    for note in found.notes:
        console.stderr().print(f"note: {note}")
    console.stdout().print(
        f"{found.folder}: {len(found.files)} files, {console.human_bytes(total)}, "
        f"{found.tensors} tensors; {found.converted} converted to {to} in {seconds:.1f} s"
        f" ({console.human_bytes(total / seconds)}/s)"
    )
