"""Random calls of compiled entries, right and wrong, over memory that faults on a byte too far.

`run(kind, calls)` compiles a small model of the family and calls its entries in processes of their
own, so that a crash is seen and named. About half of the calls are right: they must work and give
finite logits. The others have one fault (a size, an address, a shape, an element type, an id, a
length, a position, a page, a place of logits): they must be refused with one error, and leave
every cache as it was. Doors: `library`, the function of the shared library by addresses; the
`executable`, by tensors; `script`, a process of run.py's `Model` a call.

A call is drawn from its seed and number alone: `python -m bench.random_calls FOLDER DOOR SEED N 1`
repeats one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.guarded import Guarded

if TYPE_CHECKING:
    from dsc.ir.program import Program

ROOT = Path(__file__).resolve().parent.parent
FAR = (1 << 31, 1 << 40, (1 << 62) + 1, -(1 << 63), -(1 << 31))
"""Numbers whose products with sizes overflow."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kind:
    """What is called: a backend, the layout of its caches, and the door."""

    backend: str
    cache: str
    door: str

    @property
    def name(self) -> str:
        """How figures name it."""
        return f"{self.backend} {self.cache} {self.door}"


@dataclass
class Call:
    """A call of an entry: arrays by input, the sizes that they have, and what is wrong with it.

    `numbers` are what the library is told in the place of right sizes and addresses.
    """

    entry: str
    sizes: dict[str, int]
    arrays: dict[str, Array]
    fault: str = ""
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of the calls of one kind; `bad` names those that did not go as they must."""

    calls: int = 0
    worked: int = 0
    refused: int = 0
    crashes: int = 0
    bad: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, other: Mapping[str, Any]) -> None:
        """Count what a process reports."""
        self.calls += other["calls"]
        self.worked += other["worked"]
        self.refused += other["refused"]
        self.bad += other["bad"]
        self.faults.update(other["faults"])


SHARES = {
    Kind("tvm", "contiguous", "library"): 7_000,
    Kind("tvm", "paged", "library"): 6_000,
    Kind("tvm", "contiguous", "executable"): 1_500,
    Kind("tvm", "paged", "executable"): 1_500,
    Kind("onnxruntime", "contiguous", "executable"): 3_400,
    Kind("triton", "contiguous", "interpreter"): 300,
    Kind("tvm", "contiguous", "script"): 110,
    Kind("tvm", "paged", "script"): 90,
    Kind("onnxruntime", "contiguous", "script"): 100,
}
"""How many calls are made of each kind, of 20,000."""


def figures(calls: int) -> dict[str, Any]:
    """What came of so many calls, shared out among the kinds."""
    found: dict[str, Any] = {"ok": True, "calls": 0}
    with tempfile.TemporaryDirectory() as place:
        for kind, share in SHARES.items():
            folder = Path(place) / f"{kind.backend}-{kind.cache}"
            if not folder.exists():
                save(kind, folder)
            outcome = run(kind, folder, max(1, share * calls // 20_000))
            found["calls"] += outcome.calls
            few = outcome.calls // 10  # half of the calls are wrong, of those in scripts most
            both = outcome.worked > few and outcome.refused > few
            found["ok"] = found["ok"] and both and not outcome.bad and not outcome.crashes
            found[kind.name] = {**vars(outcome), "faults": dict(outcome.faults)}
            found[kind.name]["bad"] = outcome.bad[:20]
    return found


def model(max_batch: int = 4, max_context: int = 64) -> Program:
    """The model that is called: two layers, one with experts, odd widths."""
    from tests.backends.canonical_lm import Sizes, canonical_lm

    return canonical_lm(Sizes(), max_batch, max_context)


def save(kind: Kind, folder: Path) -> None:
    """Compile the model for a kind."""
    import dsc

    options = {"compile": False} if kind.backend == "triton" else None
    compiled = dsc.compile(
        model(), backend=kind.backend, cache=kind.cache, max_context=64, prefill_chunk=32,
        backend_options=options,
    )  # fmt: skip
    compiled.save(folder)


def run(kind: Kind, folder: Path, calls: int, seed: int = 0) -> Outcome:
    """Make calls of the artifact in `folder`; a process that dies is started again behind it."""
    if kind.door == "script":
        from bench.random_scripts import run_scripts

        return run_scripts(folder, calls, seed)
    total, first = Outcome(), 0
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if kind.door == "interpreter" else None
    while first < calls:
        line = [sys.executable, "-m", "bench.random_calls", str(folder), kind.door, str(seed)]
        done = subprocess.run(
            [*line, str(first), str(calls - first)],
            cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            total.add(json.loads(lines[-1]))
            break
        started = [json.loads(x) for x in lines if x.startswith("[")]
        if not started:
            raise RuntimeError(f"{kind.name}: no call was made\n{done.stderr}")
        number, what = started[-1]
        total.calls += number - first + 1
        total.crashes += 1
        total.bad.append(f"call {number} ({what}) ended the process with {done.returncode}")
        first = number + 1
    return total


# --- drawing calls --------------------------------------------------------------------------------


def draw(program: Program, door: str, seed: int, number: int) -> Call:
    """Call `number` of a seed: right, or with one fault."""
    rng = random.Random(f"{seed}/{number}")
    call = _right(program, rng)
    if rng.random() < 0.5:
        return call
    faults = dict(_VALUES)
    if door == "library":
        faults |= {"size": _wrong_size, "address": _null}
    else:
        faults |= {"shape": _wrong_shape, "element type": _wrong_type, "absent": _absent}
        faults["beyond"] = _beyond
    if "block_table" not in call.arrays:
        faults.pop("block_table")
        faults.pop("hole")
    name = rng.choice(sorted(faults))
    call.fault = name if faults[name](program, call, rng) else ""
    return call


def _right(program: Program, rng: random.Random) -> Call:
    """A call as a session makes it."""
    from dsc.ir.dims import evaluate
    from dsc.ir.paging import page_rows

    entry = rng.choice(list(program.entries))
    graph, ranges = program.entries[entry], program.symbols
    few = rng.random() < 0.7
    sizes = {"B": rng.randint(1, ranges["B"].hi), "S": 1, "L": 1}
    if entry != "decode":
        sizes["S"] = rng.randint(1, 4 if few else ranges["S"].hi)
        sizes["L"] = rng.randint(1, 2 if few else ranges["L"].hi)
    room = sizes["S"]
    if "C" in ranges:
        sizes["C"] = rng.randint(room, 40 + room if few else ranges["C"].hi)
        most = sizes["C"] - room
    elif "P" in ranges:
        most = sizes["P"] = rng.randint(0, ranges["P"].hi)
    else:
        rows = page_rows(graph)
        assert rows is not None
        sizes["M"] = rng.randint(1, ranges["M"].hi)
        sizes["N"] = max(ranges["N"].lo, min(ranges["N"].hi, sizes["B"] * sizes["M"]))
        most = sizes["M"] * rows - room
    arrays: dict[str, Array] = {}
    for value in graph.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.shape)
        kind = np.float32 if value.type.dtype.is_float else np.int64
        arrays[value.name] = np.full(shape, 0.25 if kind is np.float32 else 0, kind)
    lengths = [rng.randint(0, most) for _ in range(sizes["B"])]
    vocab = vocabulary(program)
    arrays["input_ids"][:] = [[rng.randrange(vocab) for _ in range(room)] for _ in lengths]
    arrays["lengths"][:] = lengths
    arrays["positions"][:] = np.array(lengths)[:, None] + np.arange(room)
    arrays["logits_at"][:] = [[rng.randrange(room) for _ in range(sizes["L"])] for _ in lengths]
    if "block_table" in arrays:
        rows = page_rows(graph) or 1
        for b, length in enumerate(lengths):
            used = -(-length // rows)
            pages = [rng.randrange(sizes["N"]) for _ in range(used)]
            rest = [rng.choice((-1, rng.randrange(sizes["N"]))) for _ in range(sizes["M"] - used)]
            arrays["block_table"][b] = pages + rest
    return Call(entry, sizes, arrays)


def vocabulary(program: Program) -> int:
    """How many ids the model knows."""
    graph = next(iter(program.entries.values()))
    table = next(n for n in graph.walk() if n.op == "embedding").operands[1]
    size = table.type.shape[0]
    assert isinstance(size, int)
    return size


Fault = Callable[["Program", Call, random.Random], bool]
"""Puts a fault into a call; says whether the call is wrong now."""


def _one_of(name: str, wrong: Callable[[Program, Call, random.Random], int]) -> Fault:
    def put(program: Program, call: Call, rng: random.Random) -> bool:
        array = call.arrays[name]
        array.reshape(-1)[rng.randrange(array.size)] = wrong(program, call, rng)
        return True

    return put


def _outside(low: int, high: int, rng: random.Random) -> int:
    return rng.choice((low - 1, high + 1, *FAR))


def _most_tokens(program: Program, call: Call) -> int:
    from dsc.ir.paging import page_rows

    sizes = call.sizes
    if "C" in sizes:
        return sizes["C"] - sizes["S"]
    if "P" in sizes:
        return sizes["P"]
    return sizes["M"] * (page_rows(program.entries[call.entry]) or 1) - sizes["S"]


def _hole(program: Program, call: Call, rng: random.Random) -> bool:
    """No page where a sequence has tokens."""
    rows = [b for b, length in enumerate(call.arrays["lengths"]) if length]
    if not rows:
        return False
    call.arrays["block_table"][rng.choice(rows), 0] = -1
    return True


_VALUES: dict[str, Fault] = {
    "input_ids": _one_of("input_ids", lambda p, c, r: _outside(0, vocabulary(p) - 1, r)),
    "positions": _one_of("positions", lambda p, c, r: _outside(0, 1 << 24, r)),
    "lengths": _one_of("lengths", lambda p, c, r: _outside(0, _most_tokens(p, c), r)),
    "logits_at": _one_of("logits_at", lambda p, c, r: _outside(0, c.sizes["S"] - 1, r)),
    "block_table": _one_of("block_table", lambda p, c, r: _outside(-1, c.sizes["N"] - 1, r)),
    "hole": _hole,
}


def _wrong_size(program: Program, call: Call, rng: random.Random) -> bool:
    """A size that memory was not planned for; the buffers stay."""
    used = {s for v in program.entries[call.entry].inputs for s in v.type.symbols}
    name = rng.choice(sorted(used & call.sizes.keys()))
    bounds = program.symbols[name]
    call.numbers[name] = _outside(bounds.lo, bounds.hi, rng)
    return True


def _null(program: Program, call: Call, rng: random.Random) -> bool:
    graph = program.entries[call.entry]
    outputs = [f"output:{name}" for name in graph.output_names]
    call.numbers[rng.choice(["arena", *(f"input:{v.name}" for v in graph.inputs), *outputs])] = 0
    return True


def _wrong_shape(program: Program, call: Call, rng: random.Random) -> bool:
    """Another extent of an axis, or one axis more or less: wrong unless the shapes still agree."""
    name = rng.choice(sorted(call.arrays))
    array = call.arrays[name]
    shape = list(array.shape)
    axis = rng.randrange(len(shape))
    way = rng.choice(("more", "less", "axis", "none", "beyond"))
    if way == "axis":
        shape.insert(axis, 1)
    elif way == "none":
        shape[axis] = 0
    elif way == "beyond":
        shape[axis] = rng.choice((33, 577, 1000))
    else:
        shape[axis] += 1 if way == "more" else -1
    call.arrays[name] = np.resize(array, shape) if 0 not in shape else np.empty(shape, array.dtype)
    if name in ("lengths", "logits_at", "block_table"):
        call.arrays[name][...] = 0
    return not _agree(program, call)


def _agree(program: Program, call: Call) -> bool:
    """Whether shapes are still those of one set of sizes, within their ranges."""
    from dsc.ir.dims import evaluate, symbol_name

    inputs = program.entries[call.entry].inputs
    sizes: dict[str, int] = {}
    for value in inputs:
        shape = call.arrays[value.name].shape
        if len(shape) != value.type.rank:
            return False
        for dim, size in zip(value.type.shape, shape, strict=True):
            name = symbol_name(dim)
            if name is not None:
                sizes.setdefault(name, size)
    fitting = all(
        tuple(evaluate(d, sizes) for d in v.type.shape) == call.arrays[v.name].shape for v in inputs
    )
    inside = all(program.symbols[s].lo <= n <= program.symbols[s].hi for s, n in sizes.items())
    if not fitting or not inside:
        return False
    call.sizes |= sizes
    return int(call.arrays["lengths"].max()) <= _most_tokens(program, call) and (
        "block_table" not in call.arrays or int(call.arrays["block_table"].max()) < sizes["N"]
    )


def _beyond(program: Program, call: Call, rng: random.Random) -> bool:
    """All shapes agree on a size that memory was not planned for."""
    from dsc.ir.dims import evaluate

    inputs = program.entries[call.entry].inputs
    used = {s for v in inputs for s in v.type.symbols}
    name = rng.choice(sorted(used & call.sizes.keys()))
    bounds = program.symbols[name]
    call.sizes[name] = rng.choice((bounds.hi + 1, bounds.hi + 7, max(0, bounds.lo - 1)))
    for value in inputs:
        shape = tuple(evaluate(d, call.sizes) for d in value.type.shape)
        call.arrays[value.name] = np.zeros(shape, call.arrays[value.name].dtype)
    return not bounds.lo <= call.sizes[name] <= bounds.hi


def _wrong_type(program: Program, call: Call, rng: random.Random) -> bool:
    name = rng.choice(sorted(call.arrays))
    other = np.int32 if call.arrays[name].dtype == np.int64 else np.float64
    call.arrays[name] = call.arrays[name].astype(rng.choice((other, np.float16)))
    return True


def _absent(program: Program, call: Call, rng: random.Random) -> bool:
    del call.arrays[rng.choice(sorted(call.arrays))]
    return True


# --- the doors ------------------------------------------------------------------------------------


Door = Callable[[Call, Mapping[str, Guarded], "list[Guarded]"], "Array | str"]
"""Makes a call over guarded inputs and lists what else it took: logits, or why it was refused."""


def library_door(folder: Path, program: Program) -> Door:
    """The entry's function of a tvm library, called by addresses."""
    import dsc
    from dsc.ir.dims import evaluate

    executable: Any = dsc.load(folder, trust=True).executable

    def make(call: Call, given: Mapping[str, Guarded], taken: list[Guarded]) -> Array | str:
        graph, facts = program.entries[call.entry], executable.meta["entries"][call.entry]
        values = {"zero": 0, "self": 0, "status": 0, **call.sizes}
        values |= {f"input:{name}": memory.address for name, memory in given.items()}
        taken.append(Guarded(facts["arena_bytes"]))
        values["arena"] = taken[-1].address
        found: dict[str, Array] = {}
        for name, value in zip(graph.output_names, graph.outputs, strict=True):
            if name in facts["in_place"]:
                values[f"output:{name}"] = given[facts["in_place"][name]].address
                continue
            shape = tuple(evaluate(d, call.sizes) for d in value.type.shape)
            taken.append(Guarded(4 * int(np.prod(shape))))
            values[f"output:{name}"] = taken[-1].address
            found[name] = taken[-1].array(shape, np.float32)
        values |= call.numbers
        weights = executable.weights.addresses(executable.meta["weights"])
        words = [values[slot] for slot in facts["slots"]] + [0] * facts["derived"] + weights
        table = Guarded(8 * len(words))
        table.array((len(words),), np.int64)[:] = words
        taken.append(table)
        steps = executable._steps.ctypes.data + facts["steps_at"]
        failed = executable.functions[call.entry](table.address, steps)
        return " ".join(facts["checks"][failed - 1]) if failed else found["logits"]

    return make


def executable_door(folder: Path, program: Program) -> Door:
    """A loaded artifact, called with tensors; what it allocates is guarded as well."""
    import dsc

    return _tensor_door(dsc.load(folder, trust=True).executable)


def interpreter_door(folder: Path, program: Program) -> Door:
    """Triton's interpreter in this process, behind the checks of its executable."""
    from safetensors.torch import load_file

    from dsc.backends.triton.client import InterpretedExecutable
    from dsc.backends.triton.interpret import InterpretedProgram, Kernels
    from dsc.backends.triton.launch import runnable
    from dsc.ir.arrays import array_of, tensor_of
    from dsc.runtime.admission import Admitted
    from dsc.runtime.plan import Plan

    launches = runnable(Plan.from_json((folder / "triton/interpret/plan.json").read_bytes()))
    weights = load_file(folder / "weights" / "model.safetensors")
    kernels = Kernels(folder / "triton" / "kernels")
    inside = InterpretedProgram(launches, kernels, weights)
    executable: Any = InterpretedExecutable.__new__(InterpretedExecutable)
    Admitted.__init__(executable, program)
    executable._launches = launches

    def interpret(entry: str, sizes: Any, inputs: Mapping[str, Array]) -> Any:
        outputs, times = inside.run(entry, sizes, {n: tensor_of(x) for n, x in inputs.items()})
        return {n: array_of(x) for n, x in outputs.items()}, times

    executable._interpret = interpret
    return _tensor_door(executable)


def _tensor_door(executable: Any) -> Door:
    import torch

    from dsc.errors import DscError
    from dsc.ir import arrays

    plain, placed = torch.empty, arrays._placed

    def make(call: Call, given: Mapping[str, Guarded], taken: list[Guarded]) -> Array | str:
        def empty(*size: Any, dtype: Any = None) -> Any:
            if dtype is None or len(size) != 1 or not isinstance(size[0], (int, list, tuple)):
                return plain(*size, dtype=dtype)
            shape = (size[0],) if isinstance(size[0], int) else tuple(size[0])
            taken.append(Guarded(int(np.prod(shape)) * dtype.itemsize))
            return torch.from_numpy(taken[-1].bytes).view(dtype).view(shape)

        def place(make: Any, shape: Any, dtype: Any) -> Array:
            taken.append(Guarded(int(np.prod(shape)) * dtype.itemsize))
            return taken[-1].array(tuple(shape), dtype.numpy)

        inputs = {n: given[n].array(array.shape, array.dtype) for n, array in call.arrays.items()}
        torch.empty = empty  # type: ignore[assignment]
        arrays._placed = place
        try:
            return executable.run(call.entry, inputs)["logits"].astype(np.float32)  # type: ignore[no-any-return]
        except DscError as refusal:
            return str(refusal)
        finally:
            torch.empty, arrays._placed = plain, placed

    return make


DOORS: dict[str, Callable[[Path, Any], Door]] = {
    "library": library_door,
    "executable": executable_door,
    "interpreter": interpreter_door,
}


def make_calls(folder: Path, door: str, seed: int, first: int, count: int) -> None:
    """Make calls `first` .. of a seed, each told before it is made; then a line of figures."""
    from dsc.runtime import artifact

    program = artifact.read(folder, trust=True).program
    make = DOORS[door](folder, program)
    outcome = Outcome()
    for number in range(first, first + count):
        call = draw(program, door, seed, number)
        what = f"{call.entry} {call.sizes} {call.fault}"
        sys.stdout.write(json.dumps([number, what]) + "\n")
        sys.stdout.flush()
        problem = one_call(make, call, at_end=number % 4 > 0, outcome=outcome)
        outcome.calls += 1
        if problem:
            outcome.bad.append(f"call {number} ({what}): {problem}")
    print(json.dumps({**vars(outcome), "faults": dict(outcome.faults)}))


def one_call(make: Door, call: Call, at_end: bool, outcome: Outcome) -> str:
    """What went wrong with a call; empty when it went as it must."""
    given: dict[str, Guarded] = {}
    taken: list[Guarded] = []
    for name, array in call.arrays.items():
        given[name] = Guarded(array.nbytes, at_end)
        given[name].array(array.shape, array.dtype)[...] = array
    before = {name: memory.bytes.copy() for name, memory in given.items()}
    try:
        answer = make(call, given, taken)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    if not all(memory.intact for memory in (*given.values(), *taken)):
        return "wrote outside of a buffer"
    if isinstance(answer, str):
        outcome.refused += 1
        outcome.faults[call.fault] += 1
        if not call.fault:
            return f"refused: {answer}"
        changed = [n for n, memory in given.items() if (memory.bytes != before[n]).any()]
        return f"refused, and changed {changed}" if changed else ""
    outcome.worked += 1
    if call.fault:
        return "ran"
    return "" if np.isfinite(answer).all() else "gave no numbers"


if __name__ == "__main__":
    place, way, *numbers = sys.argv[1:]
    make_calls(Path(place), way, *map(int, numbers))
