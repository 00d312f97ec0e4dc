"""Runs a plan in the interpreter and watches every load and store: no launch may depend on luck.

Programs of a launch run on a GPU in any order and at the same time, so what one writes no other may
write, or read, in the same launch. The interpreter runs them one after another and would never
show it. `TracedProgram` gives every buffer memory of its own between guards, notes who loads and
stores which bytes, runs an entry in the grid's order and again in a shuffled one, and tells:

    overlap    two programs, or two lanes with different values, store to the same bytes
    race       a program loads what another of the launch stores
    unwritten  bytes are loaded, or given back as a result, that nobody has stored
    outside    an access beyond the buffers of its launch, or a store to what is only to be read
    order      what a launch stores differs between the two orders

What goes through an atomic is in order: whoever changes a word sees what those stored who changed
it before. Faulty accesses are told and left out, so that a run goes on.

`TracedExecutable` runs an artifact so, and collects `faults`; given the plan of a GPU it runs that
one's tiles.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dsc.backends.triton import worker
from dsc.backends.triton.client import InterpretedExecutable
from dsc.backends.triton.interpret import InterpretedProgram
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.schedule import Call, resolve
from dsc.ir.dims import evaluate
from dsc.ir.lazy import torch
from dsc.runtime.plan import INPUT, READ, WEIGHT, EntryPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[Any]

GUARD, ALIGNMENT = 4096, 256
NOBODY, SEVERAL = -1, -2
POISON = 0xFF
"""What memory holds that nobody has written: NaN in every float, -1 in every integer."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a launch: its kernel, its number in the plan and the module it is of."""

    kind: str
    kernel: str
    launch: int
    loc: str
    detail: str

    def __str__(self) -> str:
        where = f" at {self.loc}" if self.loc else ""
        return f"{self.kind}: launch {self.launch}, {self.kernel}{where}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Span:
    """Memory of a buffer that a launch was given, and whether it may be stored to."""

    start: int
    end: int
    buffer: int
    name: str
    stored: bool


class Watch:
    """One launch: who loads and stores what. `defined` says by buffer which bytes were stored."""

    def __init__(
        self, spans: Sequence[Span], defined: Mapping[int, Bytes], tell: Callable[[str, str], None]
    ) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        self._starts = np.array([s.start for s in self.spans], dtype=np.int64)
        self._ends = np.array([s.end for s in self.spans], dtype=np.int64)
        self.defined, self.tell = defined, tell
        sizes = {s.buffer: s.end - s.start for s in self.spans if s.stored}
        self.writer = {b: np.full(size, NOBODY, dtype=np.int32) for b, size in sizes.items()}
        self._reader = {b: np.full(size, NOBODY, dtype=np.int32) for b, size in sizes.items()}
        self.program = 0
        self._acquired: dict[int, set[int]] = {}
        self._released: dict[int, set[int]] = {}

    def loaded(self, addresses: Bytes, mask: Bytes, size: int) -> Bytes:
        """Note a load of elements of `size` bytes; the mask of those that may be loaded."""
        kept, found = self._found(addresses, mask, size, "loads")
        for span, places in found:
            self._check_defined(span, places, "loads")
            if span.buffer in self.writer:
                self._check(self.writer[span.buffer][places], "race", f"loads {span.name}")
                reader = self._reader[span.buffer]
                alone = np.isin(reader[places], (NOBODY, self.program))
                reader[places] = np.where(alone, self.program, SEVERAL)
        return kept

    def stored(self, addresses: Bytes, mask: Bytes, values: Bytes) -> Bytes:
        """Note a store; the mask of the elements that may be stored."""
        kept, found = self._found(addresses, mask, values.dtype.itemsize, "stores to")
        self._check_lanes(addresses[kept], values[kept])
        for span, places in found:
            if not span.stored:
                self.tell(
                    "outside", f"program {self.program} stores to {span.name}, which it reads"
                )
                continue
            writer, what = self.writer[span.buffer], f"stores to {span.name}"
            self._check(writer[places], "overlap", what)
            self._check(self._reader[span.buffer][places], "race", what)
            writer[places] = self.program
            if span.buffer in self.defined:
                self.defined[span.buffer][places] = True
        return kept

    def changed(self, addresses: Bytes, mask: Bytes, size: int) -> Bytes:
        """Note an atomic change: it sees what those stored who changed the word before."""
        kept, found = self._found(addresses, mask, size, "changes")
        own = self._acquired.setdefault(self.program, set())
        for address in addresses[kept].ravel().tolist():
            before = self._released.setdefault(address, set())
            own |= before
            before |= own | {self.program}
        for span, places in found:
            self._check_defined(span, places, "changes")
        return kept

    def _check_defined(self, span: Span, places: Bytes, what: str) -> None:
        known = self.defined.get(span.buffer)
        if known is not None and not known[places].all():
            self.tell("unwritten", f"program {self.program} {what} {span.name} before a store")

    def _found(
        self, addresses: Bytes, mask: Bytes, size: int, what: str
    ) -> tuple[Bytes, list[tuple[Span, Bytes]]]:
        """The mask of accesses inside of spans, and for each span the bytes within it."""
        kept = np.array(np.broadcast_to(mask, addresses.shape), dtype=bool)
        at = addresses.astype(np.int64)
        index = np.searchsorted(self._starts, at, side="right") - 1
        inside = (index >= 0) & (at + size <= self._ends[index])
        if not inside[kept].all():
            wrong = int(at[kept & ~inside].ravel()[0])
            self.tell("outside", f"program {self.program} {what} {self._near(wrong)}")
            kept &= inside
        found = []
        for number in np.unique(index[kept]).tolist():
            span = self.spans[number]
            first = at[kept & (index == number)] - span.start
            found.append((span, (first[:, None] + np.arange(size)).ravel()))
        return kept, found

    def _near(self, address: int) -> str:
        """An address by the nearest buffer of the launch."""
        span = min(self.spans, key=lambda s: max(s.start - address, address - s.end, 0))
        if address >= span.end:
            return f"{address - span.end} bytes behind {span.name}"
        return f"byte {address - span.start} of {span.name}, of {span.end - span.start}"

    def _check(self, others: Bytes, kind: str, what: str) -> None:
        """Tell of a byte that another program, whom this one does not follow, has used."""
        strange = np.unique(others[(others != NOBODY) & (others != self.program)]).tolist()
        strange = [p for p in strange if p not in self._acquired.get(self.program, ())]
        if strange:
            other = "several" if strange[0] == SEVERAL else f"program {strange[0]}"
            used = {"overlap": "stored", "race": "loads" if "stores" in what else "stored"}[kind]
            self.tell(kind, f"program {self.program} {what} where {other} {used}")

    def _check_lanes(self, addresses: Bytes, values: Bytes) -> None:
        """Tell of two lanes of a store that give one place different values."""
        order = np.argsort(addresses, kind="stable")
        at = addresses[order]
        bits = np.ascontiguousarray(values[order]).view(f"u{values.dtype.itemsize}")
        if ((at[1:] == at[:-1]) & (bits[1:] != bits[:-1])).any():
            self.tell("overlap", f"two lanes of program {self.program} store different values")


def observe(watch: Callable[[], Watch | None]) -> None:
    """Have the interpreter tell whoever watches of every load, store and atomic."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    atomics = {name: getattr(builder, name) for name in ("create_atomic_rmw", "create_atomic_cas")}

    def size_of(pointers: Any) -> int:
        return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        current = watch()
        if current is not None:
            mask = handle(current.loaded(ptrs.data, mask.data, size_of(ptrs)), tl.int1)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current = watch()
        if current is not None:
            values = np.broadcast_to(value.data, ptrs.data.shape)
            mask = handle(current.stored(ptrs.data, mask.data, values), tl.int1)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        current = watch()
        if current is not None:
            mask = handle(current.changed(ptr.data, mask.data, size_of(ptr)), tl.int1)
        return atomics["create_atomic_rmw"](self, op, ptr, val, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        current = watch()
        if current is not None:
            current.changed(ptr.data, np.ones_like(ptr.data, dtype=bool), size_of(ptr))
        return atomics["create_atomic_cas"](self, ptr, *rest)

    builder.create_masked_load, builder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


class _Memory:
    """An entry's buffers at some sizes, each between guards, and which bytes of them are defined.

    Weights stay where they are, and what is an input is copied in.
    """

    def __init__(
        self,
        plan: EntryPlan,
        sizes: Mapping[str, int],
        inputs: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        self.sizes = [evaluate(buffer.size, sizes) for buffer in plan.buffers]
        room = sum(-(-size // ALIGNMENT) * ALIGNMENT + GUARD for size in self.sizes)
        self._bytes = np.full(room + GUARD, POISON, dtype=np.uint8)
        at = GUARD - self._bytes.ctypes.data % ALIGNMENT
        self.views: dict[int, Bytes] = {}
        self.defined: dict[int, Bytes] = {}
        self.addresses: dict[int, int] = {}
        for number, buffer in enumerate(plan.buffers):
            if buffer.region == WEIGHT:
                self.addresses[number] = weights[buffer.name].data_ptr()
                continue
            size = self.sizes[number]
            self.views[number] = self._bytes[at : at + size]
            self.addresses[number] = self._bytes.ctypes.data + at
            at += -(-size // ALIGNMENT) * ALIGNMENT + GUARD
            if buffer.region != INPUT:
                self.defined[number] = np.zeros(size, dtype=bool)
        for port in plan.inputs:
            given = _bytes(inputs[port.name].contiguous())
            self.views[port.buffer][: given.size] = given


def _bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a dense tensor."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


class TracedProgram(InterpretedProgram):
    """Entries run twice, in two orders of their programs, with every access noted."""

    def __init__(
        self, program: LaunchProgram, kernels: Any, weights: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(program, kernels, weights)
        self._watch: Watch | None = None
        self._faults: list[Fault] = []
        observe(lambda: self._watch)

    def run(
        self, entry: str, sizes: Mapping[str, int], inputs: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        """The outputs of the run in the grid's order, and when each launch ended."""
        self._faults = []
        plan = self._program.entries[entry]
        times, memory, first = self._traced(plan, sizes, inputs, None)
        _, _, second = self._traced(plan, sizes, inputs, random.Random(SEED))
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            if one != other:
                launch = plan.launches[number]
                detail = "what it stores differs where its programs run in another order"
                self._faults.append(Fault("order", launch.kernel, number, launch.loc, detail))
                break
        outputs, given = {}, {port.buffer: inputs[port.name] for port in plan.inputs}
        for port in plan.outputs:
            size = memory.sizes[port.buffer]
            known = memory.defined.get(port.buffer)
            if known is not None and not known[:size].all():
                detail = f"{int((~known[:size]).sum())} bytes of the result {port.name}"
                self._faults.append(Fault("unwritten", "", len(plan.launches), "", detail))
            shape = [evaluate(d, sizes) for d in port.type.shape]
            made = torch.empty(shape, dtype=port.type.dtype.torch)
            outputs[port.name] = torch.empty_like(given.get(port.buffer, made))
            content = _bytes(outputs[port.name])
            content[:] = memory.views[port.buffer][: content.size]
        return outputs, times

    def told(self) -> dict[str, Any]:
        """The faults of the last run."""
        return {"faults": [asdict(fault) for fault in self._faults]}

    def _traced(
        self,
        plan: EntryPlan,
        sizes: Mapping[str, int],
        inputs: Mapping[str, torch.Tensor],
        shuffled: random.Random | None,
    ) -> tuple[list[float], _Memory, list[str]]:
        """When launches ended, memory after them, and a hash of what each of them stored."""
        memory = _Memory(plan, sizes, inputs, self._weights)
        times, digests = [time.perf_counter()], []
        for number, call in enumerate(resolve(plan, sizes).calls):
            watch = Watch(
                self._spans(plan, number, memory), memory.defined, self._teller(plan, number)
            )
            self._launch(call, memory, watch, shuffled)
            digests.append(_digest(watch, memory))
            times.append(time.perf_counter())
        return times, memory, digests

    def _launch(
        self, call: Call, memory: _Memory, watch: Watch, shuffled: random.Random | None
    ) -> None:
        run = self._bound(call, memory.addresses)
        places = list(enumerate(np.ndindex(call.grid)))
        if shuffled is not None:
            shuffled.shuffle(places)
        self._watch = watch
        try:
            for watch.program, place in places:
                run(place)
        finally:
            self._watch = None

    def _spans(self, plan: EntryPlan, number: int, memory: _Memory) -> list[Span]:
        """The buffers that a launch was given, each as a whole."""
        accesses: dict[int, set[str]] = {}
        for ref in plan.launches[number].refs:
            accesses.setdefault(ref.buffer, set()).add(ref.access)
        spans = []
        for buffer, found in accesses.items():
            start, of = memory.addresses[buffer], plan.buffers[buffer]
            name = of.name or f"buffer {buffer}"
            end = start + memory.sizes[buffer]
            spans.append(Span(start, end, buffer, f"{of.region} {name}", found != {READ}))
        return spans

    def _teller(self, plan: EntryPlan, number: int) -> Callable[[str, str], None]:
        """What notes a fault of a launch: the first of each kind."""
        launch = plan.launches[number]

        def tell(kind: str, detail: str) -> None:
            known = {(fault.kind, fault.launch) for fault in self._faults}
            if (kind, number) not in known:
                self._faults.append(Fault(kind, launch.kernel, number, launch.loc, detail))

        return tell


def _digest(watch: Watch, memory: _Memory) -> str:
    """A hash of all that the buffers hold which a launch stores to, as far as it is defined."""
    found = hashlib.blake2b()
    for buffer in sorted(watch.writer):
        known = memory.defined.get(buffer)
        content = memory.views[buffer]
        found.update((content if known is None else content[known]).tobytes())
    return found.hexdigest()


class TracedExecutable(InterpretedExecutable):
    """An artifact run by a `TracedProgram`, in a process of its own; what it found so far."""

    process = "access"

    @property
    def faults(self) -> list[Fault]:
        """What was wrong in all runs until now, in their order."""
        return self.__dict__.setdefault("_faults", [])  # type: ignore[no-any-return]

    def _told(self, header: Mapping[str, Any]) -> None:
        self.faults.extend(Fault(**each) for each in header["faults"])


def main() -> None:
    """Be the process of a `TracedExecutable`."""
    worker.main(TracedProgram)
