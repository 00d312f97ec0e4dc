"""What the verbs that run a model on random tokens share: what fits, what runs, and on what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dsc.cli import console
from dsc.errors import UsageError
from dsc.targets import parse_target

if TYPE_CHECKING:
    from dsc.ir.program import Program
    from dsc.runtime.probes import Machine

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


@dataclass(frozen=True, slots=True)
class Probes:
    """What reads the speed of what a model runs on: bytes a second, and operations a second.

    `coded` are those of products of 8-bit codes. `size` is how many bytes a read goes over, `dtype`
    the type of the product, `device` what is read where it is not this machine's processors.
    """

    read: Callable[[], float]
    product: Callable[[], float]
    coded: Callable[[], float]
    size: int
    dtype: str
    device: str = ""


@contextmanager
def probes(compiled: Any, threads: int, size: int) -> Iterator[Probes]:
    """Those of the device that runs the model where it reads its own speed, else of processors."""
    from dsc.runtime.costs import multiplies_fp8
    from dsc.runtime.executable import ReadsSpeed
    from dsc.runtime.probes import MatrixProbe, ReadProbe, coded_speed
    from dsc.verification import compute_dtype

    own, dtype = compiled.executable, compute_dtype(compiled.program)
    if isinstance(own, ReadsSpeed):
        kind = "fp8" if multiplies_fp8(compiled.program) else "bf16"
        made = (
            own.copy_speed,
            partial(own.product_speed, kind),
            partial(own.product_speed, "int8"),
        )
        yield Probes(*made, size, kind, own.device)
        return
    with ReadProbe(threads, size) as read, MatrixProbe(threads, dtype=dtype) as product:
        yield Probes(read, product, partial(coded_speed, threads, dtype), read.size, product.dtype)


@contextmanager
def read_speed(compiled: Any, threads: int, size: int) -> Iterator[Callable[[], float]]:
    """What reads bytes a second alone."""
    from dsc.runtime.executable import ReadsSpeed
    from dsc.runtime.probes import ReadProbe

    if isinstance(compiled.executable, ReadsSpeed):
        yield compiled.executable.copy_speed
        return
    with ReadProbe(threads, size) as read:
        yield read


def machine_of(compiled: Any, threads: int | None, size: int, coded: bool) -> Machine:
    """The speed of what runs a model: as its device reads it itself, or a rank's part of this one.

    It is read over as many bytes as a step of a rank reads, `size`, or many where that is 0.
    """
    from dsc.runtime.executable import ReadsSpeed
    from dsc.runtime.probes import READ_BYTES, Machine, machine, steadily
    from dsc.verification import compute_dtype

    if not isinstance(compiled.executable, ReadsSpeed):
        count, ranks = machine_threads(threads)
        dtype = compute_dtype(compiled.program)
        return machine(count, ranks * size or READ_BYTES, dtype, coded).shared(ranks)
    with probes(compiled, 0, size or READ_BYTES) as found:
        codes = found.coded() if coded else None
        speeds = steadily(found.read), steadily(found.product)
        return Machine(*speeds, 0, found.size, found.dtype, codes, found.device)


def unread(compiled: Any) -> str:
    """Why a model is held against no limit; nothing where the probes read what it runs on."""
    from dsc.runtime.executable import ReadsSpeed

    cpu = parse_target(compiled.targets[0]).kind == "cpu"
    if cpu or isinstance(compiled.executable, ReadsSpeed):
        return ""
    return (
        "no share of a limit: the probes read processors, and this is code for"
        f" {compiled.targets[0]}"
    )
