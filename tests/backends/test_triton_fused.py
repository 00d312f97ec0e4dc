"""Fused regions through the triton backend: what they cost, and that they are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.compile import compile_kernels
from dsc.backends.triton.program import lower_program
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.interpreter import run_graph
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_tensor
from dsc.targets import Target

F32 = DType.f32
Body = Callable[[GraphBuilder, list[Any]], list[Any]]


def region(name: str, types: list[TensorType], body: Body) -> Graph:
    """A graph of one fused node."""
    inner = GraphBuilder("body")
    results = body(inner, [inner.input(f"a{i}", t) for i, t in enumerate(types)])
    outer = GraphBuilder(name)
    inputs = [outer.input(f"x{i}", t) for i, t in enumerate(types)]
    outputs = outer.call("fused", *inputs, body=inner.finish(results))
    return outer.finish(outputs, tuple(f"y{i}" for i in range(len(outputs))))


def tensors(*shapes: tuple[int, ...], dtype: DType = F32) -> list[TensorType]:
    return [TensorType(dtype, s) for s in shapes]


def pointwise_chain(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """Broadcasting, a literal, two results and a view at the end of the region's inputs."""
    half = b.full(shape=(), value=0.5, dtype=F32)
    scaled = b.mul(b.add(x[0], x[1]), half)
    return [scaled, b.where(b.gt(scaled, half), b.silu(scaled), b.neg(scaled))]


def with_residual(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """A projection whose result is added to a residual."""
    return [b.add(x[2], b.linear(x[0], x[1]))]


def scaled_and_activated(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """An epilogue with a column vector, a row vector and a literal; a bias before it."""
    two = b.full(shape=(), value=2.0, dtype=F32)
    y = b.mul(b.linear(x[0], x[1], x[2]), x[3])
    return [b.maximum(b.mul(b.silu(y), two), x[4])]


def read_twice(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """A product that is also returned is no epilogue's alone."""
    y = b.linear(x[0], x[1])
    return [y, b.silu(y)]


def broadcast_inside(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """An operand that does not fold to rows keeps its kernel."""
    return [b.add(b.linear(x[0], x[1]), x[2])]


def gated(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """A merged projection, its halves, and the activation between them."""
    gate, up = b.split(b.linear(x[0], x[1]), sizes=(9, 9))
    return [b.swiglu(gate, up)]


def normed(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """A residual add before a norm, both results wanted."""
    total = b.add(x[0], x[1])
    return [total, b.rms_norm(total, x[2], eps=1e-6)]


def rounded(b: GraphBuilder, x: list[Any]) -> list[Any]:
    """A cast to bf16 and back rounds, though no value leaves its register."""
    return [b.cast(b.cast(x[0], dtype=DType.bf16), dtype=F32)]


REGIONS: dict[str, tuple[list[TensorType], Body, int]] = {
    "pointwise_chain": (tensors((3, 1, 7), (5, 1)), pointwise_chain, 1),
    "with_residual": (tensors((2, 5, 11), (13, 11), (2, 5, 13)), with_residual, 1),
    "scaled_and_activated": (
        tensors((6, 11), (40, 11), (40,), (6, 1), (40,)), scaled_and_activated, 1,
    ),
    "read_twice": (tensors((6, 11), (40, 11)), read_twice, 2),
    "broadcast_inside": (tensors((3, 5, 2, 11), (7, 11), (3, 1, 2, 7)), broadcast_inside, 2),
    "gated": (tensors((6, 11), (18, 11)), gated, 2),
    "normed": (tensors((6, 40), (6, 40), (40,)), normed, 2),
    "rounded": (tensors((33,)), rounded, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {name: region(name, types, body) for name, (types, body, _) in REGIONS.items()}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_costs_one_launch_an_anchor_and_a_run(graphs: dict[str, Graph], name: str) -> None:
    lowered, _ = lower_program(Program("regions", {name: graphs[name]}), "cuda:sm_90")
    assert len(lowered.entries[name].launches) == REGIONS[name][2]


def test_regions_agree_with_their_bodies(graphs: dict[str, Graph], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    backend, program = TritonBackend(), Program("regions", graphs)
    for name, data in backend.emit(program, EmitOptions(extra={"compile": False})).files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    executable = backend.load(tmp_path, {}, program)
    for name, graph in graphs.items():
        inputs = [random_tensor(v.type, f"{name}{v.name}") for v in graph.inputs]
        names = [v.name for v in graph.inputs]
        found = executable.run(name, dict(zip(names, inputs, strict=True)))
        expected = run_graph(graph, inputs)
        for result, wanted in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=1e-4)
    executable.close()  # type: ignore[attr-defined]


def test_regions_compile(graphs: dict[str, Graph]) -> None:
    pytest.importorskip("triton")
    program, generated = lower_program(Program("regions", graphs), "cuda:sm_90")
    texts = with_templates(program, generated)
    _, records = compile_kernels(program.kernels, Target("cuda", "sm_90"), texts)
    assert any(k.startswith("gemm_mul_silu_maximum") for k in records)
