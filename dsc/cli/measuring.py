"""What the verbs that run a model on random tokens share: what fits, what runs, and on what."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dsc.cli import console
from dsc.errors import UsageError
from dsc.targets import parse_target

if TYPE_CHECKING:
    from dsc.ir.program import Program

_SEED = 0


def tell_stand_in(executable: object, nothing: str) -> None:
    """Say what runs in the place of compiled code.

    Raises `UsageError` where nothing computes: there is `nothing` then.
    """
    from dsc.cli.ranks import speaks
    from dsc.runtime.executable import StandIn
    from dsc.runtime.segmented import SegmentedExecutable

    if isinstance(executable, SegmentedExecutable):
        executable = executable.segments
    if not isinstance(executable, StandIn):
        return
    if not executable.computes:
        raise UsageError(
            f"there is {nothing}: {executable.stand_in}",
            hint="compile the model for another backend: tvm, onnxruntime, reference or triton",
        )
    if speaks():
        console.stderr().print(executable.stand_in)


def check_fits(compiled: Any, batch: int, *needed: tuple[int, str]) -> None:
    """Raise `UsageError` unless an artifact takes so many sequences, of so many tokens.

    `needed` are pairs of tokens, and the options that ask for them.
    """
    if batch > compiled.max_batch:
        raise UsageError(
            f"--batch {batch}: the artifact takes {compiled.max_batch} sequences",
            hint=f"give --batch {compiled.max_batch}, or compile it with a larger --max-batch",
        )
    for tokens, asked in needed:
        if tokens > compiled.max_context:
            raise UsageError(
                f"{asked}: {tokens} tokens, and the artifact holds {compiled.max_context}",
                hint="ask for fewer, or compile it with a larger --max-context",
            )


def vocabulary(program: Program) -> int:
    """Return the number of tokens a model knows: how many logits it gives. Raises `UsageError`."""
    for graph in program.entries.values():
        for name, value in zip(graph.output_names, graph.outputs, strict=True):
            size = value.type.shape[-1] if name == "logits" and value.type.rank else None
            if isinstance(size, int):
                return size
    raise UsageError("only causal language models are measured", where=f"{program.name}: no logits")


def random_ids(vocab: int, batch: int, length: int) -> Any:
    """Return seeded ids, int64 [batch, length]: routing sees many experts, and runs repeat."""
    import numpy as np

    return np.random.default_rng(_SEED).integers(0, vocab, (batch, length), dtype=np.int64)


def machine_threads(threads: int | None) -> tuple[int, int]:
    """How many threads the machine's speed is read with, and how many ranks share that machine."""
    from dsc.hardware import cpu
    from dsc.ir.ranks import current

    size = current().size
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if size > 1 else 1
    return min(cpu().cores, threads * ranks) if threads else cpu().cores, ranks


def unread(compiled: Any) -> str:
    """Why a model is held against no limit; nothing where the probes read what it runs on."""
    if parse_target(compiled.targets[0]).kind == "cpu":
        return ""
    return (
        "no share of a limit: the probes read processors, and this is code for"
        f" {compiled.targets[0]}"
    )
