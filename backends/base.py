"""What a backend is: five members, and the plain data that passes between them.

A backend says what it can do and how it wants programs (`capabilities`, `supports`), turns one into
files (`emit`, which needs no device), and files into something that runs (`load`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from dsc.errors import UnsupportedOperator
from dsc.ir.expert_forms import ExpertKernels
from dsc.ir.graph import Node
from dsc.ir.interface import Storage
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.runtime.emission import Emission, Progress
from dsc.runtime.executable import Executable
from dsc.runtime.plan import Plan
from dsc.runtime.tuned import Tuned
from dsc.targets import Target


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
    """What passes need to know of a backend, as data."""

    targets: tuple[str, ...] = ("cpu",)
    """What it makes code for, first what it makes it for where nobody says."""
    options: tuple[str, ...] = ()
    """What it reads of `backend_options`."""
    entries: tuple[str, ...] = ("decode", "extend", "prefill")
    """The entry graphs that it wants of a causal LM."""
    few: int = 0
    """Sequences up to which a decode step is to be an entry of its own, where more are allowed."""
    states: tuple[Storage, ...] = (Storage.GROWN, Storage.CONTIGUOUS)
    """How its executables may store states, first how KV caches are where nobody asks for pages."""
    absorbed: bool = True
    """It wants decode and extend in the absorbed form."""
    experts: ExpertKernels | None = None
    """It has grouped GEMMs, and this is what its kernels for experts cost."""
    shared_experts: bool = False
    """A shared expert is cheaper as one more of the routed ones than as linears of its own."""
    fuse: int = 0
    """The highest fusion level that its kernels take."""
    regions: RegionLimits = field(default_factory=RegionLimits)
    """What they take within it, and which kernels there are for codes."""
    collectives: bool = False
    """Its executables speak to other ranks; else segments between collectives are emitted."""
    formats: tuple[str, ...] = ()
    """Codes (`dsc.ir.formats`) of weights that it takes as they are stored."""
    tile: int = 1
    """Rows of such codes that lie side by side."""
    unsigned: int = 0
    """Columns of the largest block, where it takes codes unsigned, row after row; else 0."""
    group: int = 32
    """Columns of a row that share a scale in int8 and int4 where nobody says how many, at most."""
    pairs: bool = False
    """Experts in codes want each gate row beside its up row."""
    plain_forms: tuple[str, ...] = ()
    """Forms of its code, as its option `form` names them, that take no codes."""
    activations: tuple[str, ...] = ()
    """The codes of weights whose products take their rows as codes too.

    Where codes are unsigned that is in the weights' own blocks.
    """
    powers: bool = False
    """Scales of such rows are powers of two beside weights that store such."""
    least: int = 0
    """Beside integers rows are codes only where so many columns or a multiple share a scale.

    There must be no zero point then; 0 asks for nothing.
    """
    caches: tuple[str, ...] = ()
    """Codes of latent caches that its kernels write and read."""

    @property
    def kinds_of_steps(self) -> dict[str, Any]:
        """Its entries, as options of the pass that makes them."""
        return {"entries": self.entries, "few": self.few}


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


class Backend(Protocol):
    """Turns programs into artifacts and artifacts into executables."""

    name: str

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


@runtime_checkable
class Warms(Protocol):
    """A backend that can start what a compile needs before there is a program."""

    def warm(self, model: bool) -> None:
        """Start it, in a process beside this one; it is no error if nobody comes to need it.

        A whole model is worth more than a function: what is timed for it may be built by then.
        """
        ...


@runtime_checkable
class TellsKernels(Protocol):
    """A backend that knows of its kernels what their binaries say, and what steps of them cost."""

    def kernel_report(self, folder: Path, program: Program) -> Mapping[str, Any]:
        """The report of an artifact as JSON: `kernels`, `choices`, `steps`, `assumptions`."""
        ...


@runtime_checkable
class Tunes(Protocol):
    """A backend that measures on the device at hand what of an artifact could be made otherwise."""

    def tune(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        program: Program,
        entries: Sequence[str],
        budget: float | None,
        progress: Progress,
    ) -> Tuned:
        """Measure for `budget` seconds, or to the end; of some entries, or of all.

        Raises `BackendUnavailable` where no device here runs the artifact.
        """
        ...

    def prepare_tuning(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        program: Program,
        entries: Sequence[str],
        progress: Progress,
    ) -> list[Tuned]:
        """Compile here, for each target, what measuring could ask for there."""
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
