"""The backends that need no toolchain: reference computes by the book, null counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import Backend, Capabilities, EmitOptions, Yes
from dsc.backends.reference import ReferenceBackend
from dsc.errors import UsageError
from dsc.frontends.load import load_program
from dsc.ir.analyses import total_cost
from dsc.ir.dims import Range, evaluate
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import DType
from dsc.ir.weights import MetaSource, sources
from dsc.runtime import artifact
from dsc.runtime.executable import Executable
from dsc.runtime.session import Session
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

FP8 = Path(__file__).resolve().parent.parent / "data" / "tiny-v3-fp8"


def _prepared(backend: Backend) -> Program:
    options = pipeline.PipelineOptions()
    program, _ = pipeline.run(canonical_lm(Sizes()), backend, Target("cpu"), options)
    return program


def _loaded(
    backend: Backend, program: Program, folder: Path, with_weights: bool = True
) -> Executable:
    emission = backend.emit(program, EmitOptions())
    artifact.write(
        folder,
        program,
        emission,
        backend=backend.name,
        targets=("cpu",),
        report={},
        with_weights=with_weights,
    )
    opened = artifact.read(folder)
    return backend.load(folder, opened.manifest, opened.program)


class Plain(ReferenceBackend):
    """The same, of weights that are in no format."""

    def capabilities(self, target: Target) -> Capabilities:
        """Without formats."""
        return replace(super().capabilities(target), formats=())


def test_official_fp8_bytes_reach_the_artifact_and_mean_what_dequantised_ones_do(
    tmp_path: Path,
) -> None:
    """Codes and scales bit for bit, and the same bits of logits: weights are rounded once."""
    official = load_program(FP8, max_batch=1, max_context=32, prefill_chunk=16).program
    options = pipeline.PipelineOptions()
    programs: list[Program] = []
    runs: list[Executable] = []
    for backend in (ReferenceBackend(), Plain()):
        program, _ = pipeline.run(official, backend, Target("cpu"), options)
        programs.append(program)
        runs.append(_loaded(backend, program, tmp_path / f"{len(runs)}"))
    files = [tmp_path / f"{i}/weights/model.safetensors" for i in range(2)]
    stored, given = open_safetensors(files[0]), open_safetensors(FP8)
    kept = [name for name, t in programs[0].weight_types().items() if t.format is not None]
    assert len(kept) == 30
    joined = 0
    for name in kept:
        keys = [s.key for s in sources(programs[0].weights[name])]
        half = len(keys) // 2
        joined += half > 1
        for part, read in ((name, keys[:half]), (f"{name}.scale", keys[half:])):
            wanted = torch.cat([given.load(key).view(torch.uint8).reshape(-1) for key in read])
            assert torch.equal(stored.load(part).view(torch.uint8).reshape(-1), wanted)
    assert joined == 4 + 4 + 6, "q_a and kv_a; gate and up of MLPs; experts"
    assert not any(t.format for t in programs[1].weight_types().values())
    assert files[0].stat().st_size < 0.6 * files[1].stat().st_size
    ids = _ids(1, 9)
    sessions = [Session(x, p) for x, p in zip(runs, programs, strict=True)]
    assert torch.equal(*(s.prefill(ids, all_logits=True) for s in sessions))
    assert torch.equal(*(s.decode(ids[:, 0]) for s in sessions))


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_reference_runs_an_artifact_as_the_interpreter_runs_its_program(tmp_path: Path) -> None:
    backend = get("reference")
    program = _prepared(backend)
    runs = _loaded(backend, program, tmp_path / "a")
    entry = program.entries["prefill"]
    inputs = {
        "input_ids": _ids(2, 3),
        "positions": torch.tensor([[4, 5, 6], [1, 2, 3]]),
        "lengths": torch.tensor([4, 1]),
        "logits_at": torch.tensor([[2], [1]]),
    }
    for value in entry.inputs[4:]:
        inputs[value.name] = torch.randn(2, 4, int(str(value.type.shape[2])))
    got = runs.run("prefill", inputs)
    wanted = Interpreter(program).run("prefill", inputs)
    assert got.keys() == wanted.keys()
    for name, result in wanted.items():
        assert torch.equal(got[name], result)


def test_reference_refuses_nothing_and_no_entry_it_lacks(tmp_path: Path) -> None:
    backend = get("reference")
    program = _prepared(backend)
    for graph in program.entries.values():
        assert all(backend.supports(node) == Yes() for node in graph.nodes)
    with pytest.raises(UsageError, match="no entry nowhere"):
        _loaded(backend, program, tmp_path / "a").run("nowhere", {})


def test_null_generates_zeros_without_weights(tmp_path: Path) -> None:
    backend = get("null")
    program = _prepared(backend)
    program = replace(program, source=MetaSource(program.weight_types()))
    runs = _loaded(backend, program, tmp_path / "a", with_weights=False)
    session = Session(runs, program, max_batch=4, max_context=60)
    logits = session.prefill(_ids(3, 9), [9, 4, 6])
    assert logits.shape == (3, 50)
    assert not logits.any()
    assert session.decode(_ids(3)).shape == (3, 50)
    assert session.lengths == [10, 5, 7]


def test_null_writes_what_a_step_costs(tmp_path: Path) -> None:
    backend = get("null")
    program = _prepared(backend)
    _loaded(backend, program, tmp_path / "a")
    costs = json.loads((tmp_path / "a" / "null" / "costs.json").read_text())
    assert costs.keys() == {"decode", "extend", "prefill"}
    most = {name: bounds.hi for name, bounds in program.symbols.items()}
    for name, graph in program.entries.items():
        cost = total_cost(graph.nodes)
        assert costs[name]["cost"]["flops"] == str(cost.flops)
        assert costs[name]["most"]["weights"] == evaluate(cost.weights, most) > 0
    assert costs["decode"]["most"]["flops"] < costs["prefill"]["most"]["flops"]


def test_null_gives_a_cache_in_place_back_as_it_is(tmp_path: Path) -> None:
    text = """graph main(%c: bf16[B,8,2], %new: bf16[B,S,2], %n: i64[B]) {
      %w = cache_write %c, %new, %n
      %g = append %new, %new, %n
      return %w updates %c, %g
    }"""
    symbols = {"B": Range(1, 4), "S": Range(1, 8)}
    program = Program("cache", {"main": parse_graph(text)}, symbols=symbols)
    runs = _loaded(get("null"), program, tmp_path / "a")
    inputs = {
        "c": torch.ones(2, 8, 2, dtype=DType.bf16.torch),
        "new": torch.ones(2, 3, 2, dtype=DType.bf16.torch),
        "n": torch.zeros(2, dtype=torch.int64),
    }
    got = runs.run("main", inputs)
    assert got["w"] is inputs["c"]
    assert got["g"].shape == (2, 6, 2)
    assert got["g"].dtype == torch.bfloat16
    with pytest.raises(UsageError, match="needs the inputs new"):
        runs.run("main", {"c": inputs["c"], "n": inputs["n"]})
    with pytest.raises(UsageError, match="no entry nowhere"):
        runs.run("nowhere", inputs)
    with pytest.raises(UsageError, match="declared"):
        runs.run("main", {**inputs, "new": inputs["new"].float()})
