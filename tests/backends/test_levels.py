"""Fusion levels on every backend: 0 to 3 give the same logits, and random regions their bodies'."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from bench.parity import randomise
from dsc import pipeline
from dsc.api import compile_program
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.frontends.huggingface import stock_causal_lm
from dsc.ir.dims import Range
from dsc.ir.graph import Attrs, Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import PRECISIONS
from dsc.rewrite.base import PassReport
from dsc.runtime.executable import Executable
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.family import small, small_v2
from tests.rewrite.test_regions import tangle

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
"""Of the largest logit; a product of 16-bit values is rounded once more where it is not fused."""
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
V2_ROUTER = {"score": "softmax", "normalise": False, "group_score": "max"}


def written(model: str, dtype: str) -> Program:
    """Two layers, as passes leave a V3; of a V2 the router is another."""
    program = canonical_lm(Sizes(dtype=PRECISIONS[dtype]))
    if model == "v3":
        return program
    (graph,) = program.entries.values()
    nodes = tuple(
        replace(n, attrs=Attrs({**n.attrs, **V2_ROUTER})) if n.op == "route" else n
        for n in graph.nodes
    )
    return replace(program, entries={graph.name: replace(graph, nodes=nodes)})


@cache
def stock(model: str) -> torch.nn.Module:
    """transformers' model of three layers."""
    config = small() if model == "stock v3" else small_v2()
    return randomise(stock_causal_lm(config, device="cpu"), 0)


@cache
def logits(model: str, backend: str, dtype: str, level: int) -> torch.Tensor:
    """Of a prefill of two lengths and a decode step, no expert forced."""
    options: dict[str, Any] = {"backend": backend, "fusion_level": level}
    if model.startswith("stock"):
        module = deepcopy(stock(model)).to(PRECISIONS[dtype].torch)
        compiled = dsc.compile(module, max_batch=2, max_context=64, **options)
    else:
        compiled = compile_program(written(model, dtype), **options)
    session = compiled.session(2, 60)
    parts = [session.prefill(IDS, lengths=[9, 4]), session.decode(torch.tensor([1, 2]))]
    return torch.stack(parts).float()


def agree(model: str, backend: str, dtype: str, level: int) -> None:
    """Compare a level with level 0 of the reference."""
    wanted = logits(model, "reference", dtype, 0)
    found = logits(model, backend, dtype, level)
    atol = TOLERANCE[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


SAMPLED = [
    *(("v3", "reference", "fp32", level) for level in (1, 2, 3)),
    *(("v2", "reference", "bf16", level) for level in (1, 2, 3)),
    *(("v3", "tvm", "fp32", level) for level in (0, 3)),
    *(("v2", "tvm", "bf16", level) for level in (1, 3)),
    ("v3", "tvm", "fp16", 2),
    ("v2", "onnxruntime", "fp32", 3),
    ("v3", "triton", "bf16", 3),
]
BACKENDS = ("reference", "tvm", "onnxruntime")
EVERY = list(product(("stock v3", "stock v2"), BACKENDS, ("fp32", "bf16"), range(4)))
EVERY += [("stock v3", "tvm", "fp16", level) for level in range(4)]
EVERY += [("v3", "triton", dtype, level) for dtype in ("fp32", "bf16") for level in range(4)]
TOOLCHAIN = {"tvm": "tvm", "onnxruntime": "onnxruntime", "triton": "triton"}


@pytest.mark.parametrize("case", SAMPLED, ids=lambda c: "-".join(map(str, c)))
def test_levels_agree(case: tuple[str, str, str, int]) -> None:
    pytest.importorskip(TOOLCHAIN.get(case[1], "torch"))
    agree(*case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", EVERY, ids=lambda c: "-".join(map(str, c)))
def test_every_level_agrees(case: tuple[str, str, str, int]) -> None:
    pytest.importorskip(TOOLCHAIN.get(case[1], "torch"))
    agree(*case)


# --- random regions -------------------------------------------------------------------------------

SEEDS = range(12)
RANGES = {"B": Range(1, 8), "S": Range(1, 64)}


def fused(seeds: range) -> tuple[dict[str, Graph], Program]:
    """Random graphs by name, and the program of what tvm fuses of them; weights are inputs."""
    graphs = {}
    for seed in seeds:
        text = print_graph(tangle(seed)).replace("@", "%").replace("graph main", f"graph t{seed}")
        graphs[f"t{seed}"] = parse_graph(text)
    program = Program("tangles", graphs, symbols=RANGES, stage=Stage.OPTIMIZED)
    limits = get("tvm").capabilities(Target("cpu")).regions
    made = pipeline.make("fuse", limits=limits)
    return graphs, pipeline.apply(made.run(program, PassReport()), ["own_outputs"])


def built(program: Program, folder: Path) -> Executable:
    emission = get("tvm").emit(program, EmitOptions())
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return get("tvm").load(folder, {"meta": emission.meta, "weights": None}, program)


@pytest.mark.parametrize(
    "seeds", [SEEDS, pytest.param(range(12, 120), marks=pytest.mark.exhaustive)]
)
def test_random_regions_compute_their_bodies(seeds: range, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    graphs, program = fused(seeds)
    bodies = [n for g in program.entries.values() for n in g.nodes if n.body is not None]
    assert len(bodies) >= len(seeds), "most graphs have something to fuse"
    library = built(program, tmp_path)
    random = torch.Generator().manual_seed(1)
    for name, graph in graphs.items():
        sizes = {"B": 2, "S": 3}
        given = {
            v.name: torch.randn(
                [d if isinstance(d, int) else sizes[str(d)] for d in v.type.shape], generator=random
            )
            for v in graph.inputs
        }
        given["n"] = torch.zeros(2, dtype=torch.int64)
        wanted = run_graph(graph, [x.clone() for x in given.values()])
        found = library.run(name, {k: x.clone() for k, x in given.items()})
        for got, reference in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)
