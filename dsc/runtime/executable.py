"""What runs: a loaded artifact, and what some of them can do beside running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from dsc.errors import UsageError
from dsc.ir.arrays import Array, Kind, array_of, is_tensor, of_kind
from dsc.ir.graph import Value
from dsc.ir.types import DType

if TYPE_CHECKING:
    from dsc.ir.program import Program

ArrayType: TypeAlias = tuple[tuple[int, ...], DType]
"""Shape and element type."""
Call: TypeAlias = Callable[[], dict[str, Array]]
"""A step over arrays that stay where they are, with what they hold when it is called."""


class Executable(Protocol):
    """A loaded artifact."""

    program: Program

    def bind(self, entry: str, inputs: Mapping[str, Array]) -> Call:
        """A call of an entry on dense arrays by name, admitted by their sizes and types.

        It gives the outputs by name: a cache that is written in place is the array that was given,
        all else is new. Raises `UsageError`, and so does the call for indices that lead outside.
        """
        ...

    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run an entry on arrays of any kind by name; of torch tensors alone it gives tensors.

        A cache that is written in place is what was given.
        """
        graph = self.program.entry(entry, inputs)
        in_place = graph.updated_inputs().values()
        given = {v.name: _read(v, inputs[v.name], v.name in in_place) for v in graph.inputs}
        if isinstance(self, KeepsCaches):
            for name in in_place:
                self.changed(given[name])
        results = self.bind(entry, given)()
        if isinstance(self, KeepsCaches):
            for name in in_place:
                self.read_back(given[name])
        kind: Kind = "torch" if all(map(is_tensor, inputs.values())) else "numpy"
        names = {id(array): name for name, array in given.items()}
        return {
            name: inputs[names[id(x)]] if id(x) in names else of_kind(x, kind)
            for name, x in results.items()
        }


def _read(value: Value, given: Any, in_place: bool) -> Array:
    """An input as a dense array: a copy where it is none, and may be one. Raises `UsageError`."""
    try:
        found = array_of(given)
        if isinstance(given, list | tuple):
            found = found.astype(value.type.stored.dtype.numpy, casting="same_kind")
    except (TypeError, ValueError, RuntimeError, BufferError, LookupError) as problem:
        raise UsageError(
            f"input {value.name} is no array on this machine's memory: {problem}",
            hint="give a NumPy array, a torch tensor on the CPU, or what speaks DLPack",
        ) from None
    return found if in_place or found.flags.c_contiguous else found.copy()


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
    """An executable whose caches live on its device: the host's arrays only stand for them."""

    def new_cache(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """An array that stands for zeros on the device; the host's memory is never touched."""
        ...

    def rows(self, batch: int) -> int:
        """How many rows a step of so many sequences has: code is made ready for each number."""
        ...

    def copy(self, source: Array, target: Array) -> None:
        """Copy a dense view of a cache to another, on the device."""
        ...

    def read_back(self, cache: Array) -> None:
        """Copy what the device holds of an array, or of a view, into it."""
        ...

    def changed(self, cache: Array) -> None:
        """Take what the host's array holds from now on, of which this is the whole or a view."""
        ...


@runtime_checkable
class Continues(Protocol):
    """An executable that chooses tokens where their logits are, and goes on with them."""

    def continued(
        self,
        entry: str,
        inputs: Mapping[str, Array],
        sampling: Array,
        seeds: Array,
        steps: int,
    ) -> tuple[Array, Array]:
        """Run steps of one token, each with what the one before chose; caches as `bind` has them.

        `sampling` and `seeds` are those of the operator `sample`; each step draws the next number.
        Gives the ids [B, steps] that the steps chose, and the logits of the last. Raises what
        `bind` and its call raise.
        """
        ...


@runtime_checkable
class ReadsSpeed(Protocol):
    """An executable that reads how fast its own device is."""

    @property
    def device(self) -> str:
        """What the device is, as a target has it: `cuda:sm_90`."""
        ...

    def copy_speed(self) -> float:
        """Bytes a second that it copies, read and written."""
        ...

    def product_speed(self, kind: str) -> float:
        """Operations a second of its matrix units in a type: `bf16`, `fp8`, `int8`."""
        ...


@dataclass(frozen=True, slots=True)
class IndexSpan:
    """An input whose values are `least` to `most`; `ascending`: in the order of its elements."""

    input: str
    least: int
    most: int
    ascending: bool
    what: str


@runtime_checkable
class Queues(Protocol):
    """An executable that runs over its device's memory, wherever the caller has it."""

    def sizes(
        self, entry: str, types: Mapping[str, ArrayType]
    ) -> tuple[Mapping[str, int], dict[str, ArrayType]]:
        """The sizes of an entry's symbols by its inputs, and what its outputs are.

        Raises `UsageError` for what the entry does not admit.
        """
        ...

    def queue(
        self, entry: str, sizes: Mapping[str, int], addresses: Mapping[str, int], stream: int
    ) -> None:
        """Queue an entry on a stream of the caller's, over inputs and outputs by name.

        Nothing is copied and nothing waits. Nobody looks at what indices hold: see `indices`.
        """
        ...

    def indices(self, entry: str, sizes: Mapping[str, int]) -> list[IndexSpan]:
        """What indices among an entry's inputs may hold, which the caller has looked at."""
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
