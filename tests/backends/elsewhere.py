"""Code of the tvm backend for an architecture that is not this one's, run by an emulator.

Debian's qemu-user and g++-aarch64-linux-gnu are enough. `elsewhere.c` is what runs there.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.ir.dims import evaluate, free_symbols
from dsc.ir.program import Program
from dsc.ir.weights import evaluate as weight_of
from dsc.targets import parse_target

TRIPLE = "aarch64-linux-gnu"
SOURCE = Path(__file__).with_suffix(".c")
NUMBER, GIVEN, RESULT, SAME = range(4)
Inputs = Mapping[str, torch.Tensor]


class Elsewhere:
    """A program compiled for another CPU. Skips the test where there is nothing to run it."""

    def __init__(self, program: Program, cpu: str, folder: Path) -> None:
        needs = (f"{TRIPLE}-gcc", f"{TRIPLE}-g++", "qemu-aarch64")
        missing = [tool for tool in needs if not shutil.which(tool)]
        if missing:
            pytest.skip(f"no {', '.join(missing)}: apt install qemu-user g++-{TRIPLE}")
        self.program, self.cpu, self.folder = program, cpu, folder
        emission = get("tvm").emit(program, EmitOptions((parse_target(f"cpu:{cpu}"),)))
        self.meta: Any = emission.meta
        self.steps = bytes(emission.files["tvm/steps.bin"])
        (folder / "kernels.so").write_bytes(emission.files["tvm/kernels.so"])
        line = [f"{TRIPLE}-gcc", "-O1", "-o", str(folder / "main"), str(SOURCE), "-ldl"]
        subprocess.run(line, check=True)
        self.weights = {}
        for name, expression in program.weights.items():
            found = weight_of(expression, program.source)
            parts = found.parts if expression.type.format else (found,)
            for (suffix, _), part in zip(expression.type.parts, parts, strict=True):
                self.weights[f"{name}{suffix}"] = _bytes(part)

    def run(self, calls: Sequence[tuple[str, Inputs]], tasks: int) -> list[dict[str, torch.Tensor]]:
        """The results of calls of entries, whose parallel loops are cut into so many tasks."""
        line = ["qemu-aarch64", "-L", f"/usr/{TRIPLE}", "-cpu", self.cpu, str(self.folder / "main")]
        given = b"".join(self._told(entry, inputs)[0] for entry, inputs in calls)
        done = subprocess.run(
            [*line, str(self.folder / "kernels.so"), str(tasks)],
            input=given, capture_output=True, check=True,
        )  # fmt: skip
        answer, found = memoryview(done.stdout), []
        for entry, inputs in calls:
            assert struct.unpack("<q", answer[:8]) == (0,)
            answer, results = answer[8:], {}
            for name, shape, dtype in self._told(entry, inputs)[1]:
                size = int(np.prod(shape)) * dtype.itemsize
                read = torch.frombuffer(bytearray(answer[:size]) or bytearray(8), dtype=dtype)
                results[name] = read[: size // dtype.itemsize].reshape(shape)
                answer = answer[size:]
            found.append(results)
        return found

    def _told(self, entry: str, inputs: Inputs) -> tuple[bytes, list[tuple[str, Any, torch.dtype]]]:
        """A call as it is sent, and the results that come back."""
        graph, facts = self.program.entries[entry], self.meta["entries"][entry]
        env: dict[str, int] = {}
        for port in graph.inputs:
            for dim, extent in zip(port.type.shape, inputs[port.name].shape, strict=True):
                if str(dim) in free_symbols(dim):
                    env[str(dim)] = extent
        results = [
            (name, tuple(evaluate(d, env) for d in value.type.shape), value.type.dtype.torch)
            for name, value in zip(graph.output_names, graph.outputs, strict=True)
            if name not in facts["in_place"]
        ]
        sizes = {f"output:{n}": int(np.prod(s)) * t.itemsize for n, s, t in results}
        values: list[bytes] = []
        for slot in facts["slots"]:
            if slot == "arena":
                values.append(struct.pack("<qq", GIVEN, facts["arena_bytes"]))
                values.append(bytes(facts["arena_bytes"]))
            elif slot.startswith("input:"):
                values.append(_memory(_bytes(inputs[slot.partition(":")[2]])))
            elif slot in sizes:
                values.append(struct.pack("<qq", RESULT, sizes[slot]))
            elif slot.startswith("output:"):
                source = facts["in_place"][slot.partition(":")[2]]
                values.append(struct.pack("<qq", SAME, facts["slots"].index(f"input:{source}")))
            else:
                values.append(struct.pack("<qq", NUMBER, env.get(slot, 0)))
        values += [struct.pack("<qq", NUMBER, 0)] * facts["derived"]
        values += [_memory(self.weights[name]) for name in self.meta["weights"]]
        values.append(_memory(self.steps[facts["steps_at"] :]))
        count = len(facts["slots"]) + facts["derived"] + len(self.meta["weights"]) + 1
        return entry.encode().ljust(64, b"\0") + struct.pack("<q", count) + b"".join(
            values
        ), results


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _memory(data: bytes) -> bytes:
    return struct.pack("<qq", GIVEN, len(data)) + data
