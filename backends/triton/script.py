"""The launch plan as run.py of an artifact reads it: for one sequence, in the terms of the driver.

`run.json` beside a target's binaries says:

    kernels   file, symbol, bytes of shared memory and threads of each binary
    buffers   bytes of the arena, of each input and of the logits, at the most tokens and the most
              context that the artifact takes: whatever a step needs fits
    entries   in the order of their guards, each with `most` tokens that it takes, the type and
              shape of the `logits`, and its `launches`: a kernel's number, three sizes of the grid,
              and for each parameter its type, the buffer that it points into, and a number

Numbers and sizes are texts over B, S, L and C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc.backends.triton.launch import Kernel, LaunchProgram
from dsc.ir.dims import evaluate
from dsc.ir.limits import Limits
from dsc.runtime.plan import ARENA, INPUT, OUTPUT, Argument, EntryPlan, Ref

POINTER = "u64"
"""How run.py calls an address; Triton's own parameters, which are last, are addresses of 0."""


def script_plan(
    program: LaunchProgram,
    records: Mapping[str, Mapping[str, Any]],
    guards: Mapping[str, int],
    limits: Limits,
) -> dict[str, Any]:
    """The content of `run.json`. `guards` gives the most tokens of an entry; 0 is any number."""
    numbers = {key: number for number, key in enumerate(records)}
    chunk = limits.prefill_chunk
    sizes = {"B": 1, "S": chunk, "L": chunk, "C": limits.max_context + chunk}
    buffers: dict[str, int] = {ARENA: max(e.arena_bytes for e in program.entries.values())}
    entries = []
    names = [name for name in guards if name in program.entries] or list(program.entries)
    for name in names:
        entry, limit = program.entries[name], guards.get(name) or chunk
        most = chunk if name == names[-1] else min(limit, chunk)
        for buffer in entry.buffers:
            if buffer.region in (INPUT, OUTPUT):
                label = f"{buffer.region} {buffer.name}"
                buffers[label] = max(buffers.get(label, 0), evaluate(buffer.size, sizes))
        logits = next(port for port in entry.outputs if port.name == "logits")
        launches = []
        for launch in entry.launches:
            kernel, record = program.kernels[launch.kernel], records[launch.kernel]
            arguments = [
                _argument(entry, kind, value)
                for kind, value in zip(_kinds(kernel), launch.arguments, strict=True)
            ]
            arguments += [[POINTER, None, "0"]] * (record["parameters"] - len(arguments))
            grid = [str(d) for d in (*launch.grid, 1, 1)[:3]]
            launches.append([numbers[launch.kernel], grid, arguments])
        shape = [str(d) for d in logits.type.shape]
        dtype = logits.type.dtype.value
        entries.append({"most": most, "logits": [dtype, shape], "launches": launches})
    kernels = [[r["file"], r["symbol"], r["shared"], r["warps"] * 32] for r in records.values()]
    return {"kernels": kernels, "buffers": buffers, "entries": entries}


def _kinds(kernel: Kernel) -> list[str]:
    return [kind for kind in kernel.signature.values() if kind != "constexpr"]


def _argument(entry: EntryPlan, kind: str, value: Argument) -> list[str | None]:
    """A parameter's type, the buffer that it points into, and where in it; or a number."""
    if not isinstance(value, Ref):
        return [kind, None, str(value)]
    buffer = entry.buffers[value.buffer]
    if buffer.region == ARENA:
        return [POINTER, ARENA, f"{buffer.offset}+{value.offset}"]
    return [POINTER, f"{buffer.region} {buffer.name}", str(value.offset)]
