"""Products over weights in codes, as cases for the triton backend: programs, inputs, what is right.

A case is one product with a weight in a stored format; all are entries of one program, so that one
interpreting process runs them all. What a text calls `%w` is the weight.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.blocks import INTERPRET
from dsc.backends.triton.compile import compiler_environment
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.worker import INTERPRETED
from dsc.ir.formats import Packed, pack, pack_state
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program, parse_type
from dsc.ir.printer import print_expr
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, leaf
from dsc.runtime import artifact as artifacts
from tests.backends.triton_cases import block_table


@dataclass(frozen=True)
class Case:
    """An operator's inputs by type, and its call, in which %w, %v are the weights."""

    weights: tuple[str, ...]
    inputs: Mapping[str, str]
    call: str
    result: str
    updates: str = ""

    def types(self, name: str) -> dict[str, TensorType]:
        """The types of the weights by name."""
        return {f"{name}.{i}": parse_type(text) for i, text in enumerate(self.weights)}


def program(cases: Mapping[str, Case]) -> Program:
    """An entry a case, over seeded weights of rows that differ in size."""
    tensors: dict[str, torch.Tensor] = {}
    typed, entries = "", ""
    for name, case in cases.items():
        call = case.call
        for at, (weight, t) in enumerate(case.types(name).items()):
            for (suffix, _), part in zip(t.parts, _packed(t, at).parts, strict=True):
                tensors[f"{weight}{suffix}"] = part
            typed += f"  @{weight} : {t} = {print_expr(leaf(weight, t))}\n"
            call = call.replace(f"%{'wv'[at]}", f"@{weight}")
        given = ", ".join(f"%{x}: {t}" for x, t in case.inputs.items())
        entries += (
            f"graph {name}({given}) {{\n  {call} : {case.result}\n  return %y{case.updates}\n}}\n"
        )
    text = f'program "codes" {{stage=LOWERED}}\nweights {{\n{typed}}}\n{entries}'
    return parse_program(text, DictSource(tensors))


def _packed(t: TensorType, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    shape = [int(d) for d in t.shape]  # type: ignore[arg-type]
    x = torch.randn(shape, generator=generator)
    x[..., 1::3, :] *= 30
    if t.format is None:
        return Packed(t, (x.to(t.dtype.torch),))
    return pack(x + 0.7 if t.format.zeros is not None else x, t)


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Seeded operands: numbers near 1, indices below 3, and where three groups of rows begin."""
    generator, given = torch.Generator().manual_seed(len(case.call)), {}
    for name, text in case.inputs.items():
        t = parse_type(text)
        shape = [int(d) for d in t.shape]  # type: ignore[arg-type]
        if name == "offsets":
            rows = parse_type(case.inputs["x"]).shape[0]
            given[name] = torch.tensor([0, 3, 3, rows])
        elif name == "lengths":
            given[name] = torch.tensor([30, 0])[: shape[0]]
        elif name == "table":
            given[name] = block_table(7, t)
        elif t.format is not None:
            numbers = torch.randn(shape, generator=generator)
            numbers[0] *= 1e-3
            given[name] = pack_state(numbers, t).parts[0]
        elif t.dtype is DType.i64:
            given[name] = torch.randint(0, 3, shape, generator=generator)
        else:
            given[name] = torch.randn(shape, generator=generator).to(t.dtype.torch)
    return given


def loaded(made: Program, folder: Path, target: str = INTERPRET) -> Any:
    """The program's kernels in the interpreter, with weights as an artifact holds them.

    For a `target` what is interpreted are the kernels and the tiles that it gets.
    """
    backend = TritonBackend()
    emission = backend.emit(made, EmitOptions(extra={"compile": False}))
    lowered, sources = lower_program(made, target)
    texts = with_templates(lowered, sources)
    files = {f"triton/kernels/{name}.py": text.encode() for name, text in texts.items()}
    files |= {f"triton/{INTERPRETED}": lowered.plan().to_json()}
    emission = replace(emission, files={**emission.files, **files})
    out = artifacts.write(
        folder / "out", made, emission, backend="triton", targets=("cuda:sm_90",), report={}
    )
    read = artifacts.read(out, trust=True)
    return backend.load_on(INTERPRET, out, out / read.manifest["weights"], read.program)


def expected(made: Program, name: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the interpreter of the IR gives."""
    (result,) = Interpreter(made).run(name, dict(given)).values()
    return result


def assembly(made: Program, target: str, folder: Path) -> dict[str, str]:
    """The PTX or AMDGCN of the last kernel of each entry, compiled in a process of its own."""
    lowered, sources = lower_program(made, target)
    for name, text in with_templates(lowered, sources).items():
        (folder / f"{name}.py").write_text(text)
    last = {name: entry.launches[-1].kernel for name, entry in lowered.entries.items()}
    kernels = {name: lowered.kernels[key].as_json() for name, key in last.items()}
    kind, _, arch = target.partition(":")
    request = json.dumps({"kernels": kernels, "kind": kind, "arch": arch, "folder": str(folder)})
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], input=request, env=compiler_environment(folder / "cache"),
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


_COMPILE = """
import json, sys
from pathlib import Path
from dsc.backends.triton.compile_worker import compile_kernel
from dsc.backends.triton.interpret import Kernels
from dsc.backends.triton.launch import Kernel
asked = json.load(sys.stdin)
sources, found = Kernels(Path(asked["folder"])), {}
for name, data in asked["kernels"].items():
    kernel = Kernel.from_json(data)
    function = sources.function(kernel.module, kernel.function)
    made, _ = compile_kernel(kernel, asked["kind"], asked["arch"], function)
    found[name] = made.asm["ptx" if asked["kind"] == "cuda" else "amdgcn"]
print(json.dumps(found))
"""
