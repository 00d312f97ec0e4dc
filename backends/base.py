"""What a backend is: six members, and the plain data that passes between them.

A backend says what it can do (`capabilities`, `supports`), how it wants programs (`rules`), turns
one into files (`emit`, which needs no device), and files into something that runs (`load`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from dsc.errors import ArtifactError, UnsupportedOperator, UsageError
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.graph import Graph, Node
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.types import DType, TensorType
from dsc.targets import Target

if TYPE_CHECKING:
    import torch

    from dsc.runtime.plan import Plan

MANIFEST = "dsc.json"
Progress: TypeAlias = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called while long work goes on."""


@dataclass(frozen=True, slots=True)
class Yes:
    """The backend takes this node."""


@dataclass(frozen=True, slots=True)
class No:
    """The backend does not take this node, and why."""

    reason: str


Support: TypeAlias = Yes | No


@dataclass(frozen=True)
class Capabilities:
    """What passes need to know of a backend, as data.

    `in_place_cache`: KV caches are preallocated and written in place. `paged_cache`: it also takes
    them in pages, through a block table. `experts`: it has grouped GEMMs, and this is what its
    kernels for experts cost. `shared_experts`: a shared expert is cheaper as one more of the routed
    ones, in one stack of weights, than as linears of its own. `absorbed`: wants decode and
    extend in the absorbed form. `entries`: the entry graphs it wants of a causal LM. `fuse`: the
    highest fusion level that its kernels take; `regions`: what they take within it. `collectives`:
    its executables speak to other ranks; without it a sharded program is emitted in segments, with
    the collectives between them. `options`: what it reads of `backend_options`.
    """

    in_place_cache: bool = False
    paged_cache: bool = False
    experts: ExpertKernels | None = None
    shared_experts: bool = False
    absorbed: bool = True
    dtypes: frozenset[DType] = frozenset({DType.f32, DType.bf16, DType.f16})
    entries: tuple[str, ...] = ("decode", "extend", "prefill")
    fuse: int = 0
    regions: RegionLimits = field(default_factory=RegionLimits)
    collectives: bool = False
    options: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True)
class EmitOptions:
    """What a user asked of code generation.

    Without `reuse` no two buffers of a plan overlap. `admit` is called with the plan once there is
    one, before the expensive part; it raises what is wrong with it.
    """

    targets: tuple[Target, ...] = (Target("cpu"),)
    threads: int | None = None
    progress: Progress | None = None
    reuse: bool = True
    admit: Callable[[Plan], None] = lambda plan: None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Emission:
    """What `emit` gives: files by path relative to the artifact, and how to run them.

    `weights_path` is where the artifact's writer streams the packed weights (one safetensors file);
    `meta` is JSON that `load` finds again in the manifest; `runner` is the backend's part of the
    artifact's run.py (a module text that defines `class Model`), or empty; `notes` are lines for
    the report. `finish`, where given, makes the files that need to know where each weight lies: it
    is called with weight name to (offset, bytes) in the file at `weights_path`. `needs` are the
    packages that running takes, by name, as pip is told them.
    """

    files: Mapping[str, bytes]
    plan: Plan | None = None
    weights_path: str = "weights/model.safetensors"
    meta: Mapping[str, Any] = field(default_factory=dict)
    runner: str = ""
    notes: tuple[str, ...] = ()
    finish: Callable[[Mapping[str, tuple[int, int]]], Mapping[str, bytes]] | None = None
    needs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Signature:
    """Names and types of an entry's inputs and outputs, and which outputs update which inputs."""

    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[tuple[str, TensorType], ...]
    aliases: tuple[tuple[int, int], ...]

    @staticmethod
    def of(graph: Graph) -> Signature:
        """The signature of a graph."""
        return Signature(
            tuple((v.name, v.type) for v in graph.inputs),
            tuple(zip(graph.output_names, (x.type for x in graph.outputs), strict=True)),
            graph.aliases,
        )


def check_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` where `folder` holds no longer the artifact of this manifest.

    What is read from a folder after it was opened may be another artifact's, compiled over it.
    """
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        found = {}
    if found.get("files") != manifest.get("files"):
        raise ArtifactError(
            "the artifact was replaced after it was opened",
            where=str(folder),
            hint="load the folder again",
        )


class Executable(Protocol):
    """A loaded artifact."""

    def run(self, entry: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run an entry on CPU tensors by name.

        A cache that is written in place is mutated and returned as the tensor that was given.
        """
        ...


@runtime_checkable
class Threaded(Protocol):
    """An executable whose threads can be set after it was loaded."""

    def set_threads(self, threads: int | None, pin: bool | None) -> None:
        """Use this many threads, pinned to cores or not; `None` leaves the default.

        Raises `UsageError` where that is impossible.
        """
        ...


def set_threads(executable: Executable, threads: int | None, pin: bool | None) -> None:
    """Set the threads of an executable. Raises `UsageError` where it has none to set."""
    if not isinstance(executable, Threaded):
        raise UsageError(
            "this backend has no threads to set", hint="leave out threads and pin, or use tvm"
        )
    executable.set_threads(threads, pin)


@runtime_checkable
class KeepsCaches(Protocol):
    """An executable whose caches live on its device: the host's tensors only stand for them."""

    def read_back(self, cache: torch.Tensor) -> None:
        """Copy a cache's contents into the host tensor that stands for it."""
        ...


@runtime_checkable
class OpensLate(Protocol):
    """An executable that opens the code of an entry when it first runs, or when asked to."""

    def open(self, entry: str) -> None:
        """Open it now, so that the first step takes no longer than the next."""
        ...


@runtime_checkable
class StandIn(Protocol):
    """An executable that is there in the place of compiled code.

    `stand_in` tells a user what runs instead and what that means; `computes`: whether the results
    are those of the program.
    """

    stand_in: str
    computes: bool


class Backend(Protocol):
    """Turns programs into artifacts and artifacts into executables."""

    name: str
    rules: Sequence[Any]

    def capabilities(self, target: Target) -> Capabilities:
        """What passes may assume when they prepare a program for this backend."""
        ...

    def supports(self, node: Node) -> Support:
        """Whether a node can be emitted."""
        ...

    def emit(self, program: Program, options: EmitOptions) -> Emission:
        """Generate code. Pure: needs no device. Raises `BackendUnavailable`."""
        ...

    def load(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> Executable:
        """Load an artifact's code and weights. `program` is its parsed program.dsc."""
        ...


def check_supported(program: Program, backend: Backend) -> None:
    """Raise one `UnsupportedOperator` that lists every node the backend refuses, and why."""
    refused: dict[tuple[str, str], list[str]] = {}
    for graph in program.entries.values():
        for node in graph.nodes:
            answer = backend.supports(node)
            if isinstance(answer, No):
                refused.setdefault((node.op, answer.reason), []).append(node.loc or graph.name)
    if refused:
        lines = [
            f"{op}: {reason} (at {places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})"
            for (op, reason), places in refused.items()
        ]
        raise UnsupportedOperator(
            f"the {backend.name} backend does not take:\n" + "\n".join(lines),
            hint="choose another backend; `dsc doctor` lists those that run here",
            places=[place for places in refused.values() for place in places],
        )
