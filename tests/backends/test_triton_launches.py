"""Launches that are really made: a driver that only counts, and the interpreter, are asked.

The driver's steps are those of a model of V3's widths, a dense layer and two of experts; no kernel
runs and no weight exists there. The interpreter's are those of such plans at small widths.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.compile import kernel_environment
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.program import lower_program
from dsc.ir.costs import step_sizes
from dsc.ir.graph import Graph
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.report import launches_by_layer
from dsc.runtime.plan import EntryPlan, Plan
from tests.backends.canonical_lm import Sizes
from tests.backends.test_triton_driver import SOURCE, built, run_with
from tests.backends.test_triton_steps import planned

DENSE, SPARSE, GROUPED = 10, 12, 16
"""Launches of a layer at most: dense, of experts up to 4 sequences, of experts in groups."""
STEPS = """
import json
import os
import sys
from pathlib import Path
from dsc.backends.triton.device import DeviceExecutable
from dsc.ir.parser import parse_program
from dsc.runtime.session import Session

log = Path(os.environ["FAKE_CUDA_LOG"])
found = []
for folder in map(Path, sys.argv[1:]):
    program = parse_program((folder / "program.dsc").read_text())
    placed = {name: 1 << 20 for name in json.loads((folder / "weights.json").read_text())}
    executable = DeviceExecutable(folder / "sm_90", placed, program)

    def launched(batch, new, step):
        log.write_text("")
        step()
        entry = program.choose_entry(new, executable.rows(batch), 600)
        made = [line.split()[0] for line in log.read_text().splitlines()]
        found.append([folder.name, batch, entry, made])

    for batch in map(int, (folder / "batches").read_text().split()):
        session = Session(executable, program, batch, 600)
        launched(batch, 3, lambda: session.prefill([[1, 2, 3]] * batch))
        for _ in range(3):  # one by one, captured, and as that graph again
            launched(batch, 1, lambda: session.decode([0] * batch))
        if batch == 4:
            launched(batch, 300, lambda: session.prefill([[1] * 300] * batch))
    executable.close()
print(json.dumps(found))
"""


SMALL = Sizes(
    vocab=16, hidden=128, heads=4, q_lora=128, kv_lora=128, nope=32, rope=16, value=32,
    inner=128, experts=4, expert_inner=128, top_k=2, groups=2, keep=1, dtype=DType.bf16,
)  # fmt: skip
RUNS = """
import json
import sys
from pathlib import Path
import torch
from dsc.backends.triton.interpret import InterpretedProgram, Kernels
from dsc.backends.triton.launch import LaunchProgram
from dsc.ir.dims import evaluate
from dsc.runtime.plan import Plan

class Counted(InterpretedProgram):
    def _bound(self, call, addresses):
        run = super()._bound(call, addresses)
        made.append([call.kernel, 0])
        def program(place):
            made[-1][1] += 1
            run(place)
        return program

folder, found = Path(sys.argv[1]), []
for name, steps in json.loads((folder / "steps.json").read_text()).items():
    plan = Plan.from_json((folder / name / "plan.json").read_bytes())
    weights = {
        b.name: torch.zeros(b.size, dtype=torch.uint8)
        for e in plan.entries.values() for b in e.buffers if b.region == "weight"
    }
    program = Counted(LaunchProgram.of(plan), Kernels(folder / "kernels"), weights)
    for batch, entry, sizes in steps:
        given = {
            p.name: torch.zeros([evaluate(d, sizes) for d in p.type.shape]).to(p.type.dtype.torch)
            for p in plan.entries[entry].inputs
        }
        given["lengths"] += 70
        made = []
        program.run(entry, sizes, given)
        found.append([name, batch, entry, [kernel for kernel, programs in made if programs]])
print(json.dumps(found))
"""


def written(program: Program, plan: Plan, folder: Path) -> None:
    """What the driver loads of an artifact: a plan, and stand-ins for the binaries."""
    place = folder / "sm_90"
    place.mkdir(parents=True)
    (folder / "program.dsc").write_text(print_program(program))
    (place / "plan.json").write_bytes(plan.to_json())
    names = {b.name for e in plan.entries.values() for b in e.buffers if b.region == "weight"}
    (folder / "weights.json").write_text(json.dumps(sorted(names)))
    records = {
        key: {
            "file": "stub.cubin", "symbol": key, "warps": kernel.warps, "shared": 0,
            "global_scratch": 0, "profile_scratch": 0, "dependent": True,
            "parameters": 2 + sum(kind != "constexpr" for kind in kernel.signature.values()),
        }
        for key, kernel in LaunchProgram.of(plan).kernels.items()
    }  # fmt: skip
    (place / "kernels.json").write_text(json.dumps(records))
    (place / "stub.cubin").write_bytes(b"\x7fELF")


def by_layer(graph: Graph, entry: EntryPlan, made: Sequence[str]) -> list[int]:
    """Launches that were made, layer by layer; in the plan's order, some left out."""
    found, rest = [], iter(entry.launches)
    for kernel in made:
        found.append(next(launch for launch in rest if launch.kernel == kernel))
    counts = launches_by_layer(graph, [replace(entry, launches=tuple(found))])
    assert sum(counts.values()) == len(made)
    return [number for name, number in sorted(counts.items()) if name.startswith("model.layers")]


def test_no_step_of_v3s_widths_makes_more_launches_than_it_may(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")
    built(compiler, SOURCE, tmp_path / "libcuda.so.1")
    cases = {}
    batches = {"none 4": (1, 2, 3, 4), "fp8 64": (1, 4, 5, 32), "int4 64": (1, 4)}
    for name, each in batches.items():
        quant, most = name.split()
        cases[name] = planned(quant, int(most))
        written(*cases[name], tmp_path / name)
        (tmp_path / name / "batches").write_text(" ".join(map(str, each)))
    folders = [str(tmp_path / name) for name in cases]
    done = run_with(tmp_path, tmp_path / "log", [sys.executable, "-c", STEPS, *folders])
    assert done.returncode == 0, done.stderr
    held(cases, json.loads(done.stdout), {"decode", "decode_few", "extend", "prefill"})


SAMPLE = {"none 4": [(2, 1)], "fp8 6": [(1, 1), (1, 2)], "int4 4": [(1, 1)]}
"""Of the interpreter's steps by case, the sequences and new tokens of each."""
EVERY = {name: [(1, 1), (2, 1), (3, 1), (4, 1), (int(name[-1]), 1), (1, 2)] for name in SAMPLE}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(SAMPLE, id="sample"),
        pytest.param(EVERY, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_no_step_in_the_interpreter_makes_more_launches_than_it_may(
    tmp_path: Path, asked: Mapping[str, Sequence[tuple[int, int]]]
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernels").mkdir()
    cases, steps = {}, {}
    for name, sizes in asked.items():
        quant, most = name.split()
        cases[name] = program, plan = planned(quant, int(most), 2, SMALL, 128)
        lowered, sources = lower_program(program, "cuda:sm_90")
        for module, text in with_templates(lowered, sources).items():
            (tmp_path / "kernels" / f"{module}.py").write_text(text)
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_bytes(plan.to_json())
        entries = [program.choose_entry(new, batch, 80) for batch, new in sizes]
        steps[name] = [
            (batch, entry, step_sizes(program.entries[entry], batch, new, 80, program.symbols))
            for (batch, new), entry in zip(sizes, entries, strict=True)
        ]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    environment = {**kernel_environment(), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RUNS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held(cases, json.loads(done.stdout), {"decode", "decode_few", "extend"})


def held(
    cases: Mapping[str, tuple[Program, Plan]], found: Sequence[Any], entries: Collection[str]
) -> None:
    """Hold steps (a case, its sequences, its entry and the kernels that ran) to their bars."""
    for name, batch, entry, made in found:
        program, plan = cases[name]
        dense, *sparse = by_layer(program.entries[entry], plan.entries[entry], made)
        few = batch <= 4 and entry.startswith("decode")
        assert dense <= (DENSE if few else GROUPED), (name, batch, entry)
        assert max(sparse) <= (SPARSE if few else GROUPED), (name, batch, entry)
    assert {entry for _, _, entry, _ in found} == set(entries)
