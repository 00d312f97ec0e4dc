"""Fused regions through the tvm backend: one kernel each, the bits of their parts, all levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions, No, Yes
from dsc.ir.dims import Range, evaluate
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import TensorType
from dsc.ir.weights import random_tensor
from dsc.rewrite.base import PassReport
from dsc.runtime.executable import Executable
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("tvm")
POINTS = ({"B": 1, "S": 1, "C": 5, "N": 1}, {"B": 3, "S": 7, "C": 77, "N": 50})
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2, "f16": 2e-3}

REGIONS = {
    "chain": """(%x: F[B,S,40], %y: F[40], %z: F[B,S,1]) {
      %a = add %x, %y
      %c = full {shape=[], value=0.5, dtype=F}
      %b = mul %a, %c
      %s = silu %b
      %d = mul %s, %z
      return %b, %d
    }""",
    "rows": """(%kv: F[B,S,64], %g: F[48], %c0: F[B,C,48], %n: i64[B], %p: i64[B,S], %f: f32[8],
        %c1: F[B,C,16], %q: F[B,S,3,16]) {
      %l, %k = split %kv {sizes=[48,16]}
      %a = rms_norm %l, %g {eps=1e-06}
      %u = cache_write %c0, %a, %n
      %r = rope %k, %p, %f {layout="deinterleave", scale=1.5}
      %v = cache_write %c1, %r, %n
      %qr = rope %q, %p, %f {layout="deinterleave", scale=1.5}
      return %u updates %c0, %v updates %c1, %qr
    }""",
    "centred": """(%x: F[B,S,40], %y: F[B,S,40], %g: F[40], %b: F[40], %w: f32[40]) {
      %s = add %x, %y
      %n = layer_norm %s, %g, %b {eps=1e-05}
      %m = layer_norm %n, %w {eps=1e-05}
      return %s, %n, %m
    }""",
    "partly": """(%q: F[B,S,3,20], %k: F[B,S,20], %g: F[20], %p: i64[B,S], %f: f32[6],
        %c: F[B,C,20], %n: i64[B]) {
      %a = rms_norm %k, %g {eps=1e-06}
      %r = rope %a, %p, %f {layout="half", scale=1.5, dims=12}
      %v = cache_write %c, %r, %n
      %b = rope %q, %p, %f {layout="interleaved", dims=12}
      return %v updates %c, %b
    }""",
    "softmax": """(%x: F[N,24], %m: F[N,24]) {
      %a = add %x, %m
      %s = softmax %a {axis=-1}
      %t = sum %s {axes=[-1], keepdims=true}
      %d = div %a, %t
      %u = amax %d {axes=[-1]}
      %f = permute %d {dims=[1,0]}
      return %s, %u, %f
    }""",
    "residual": """(%x: F[B,S,64], %w: F[40,64], %r: F[B,S,40], %q: F[B,S,40]) {
      %y = linear %x, %w
      %a = add %r, %y
      %b = add %a, %q
      return %a, %b
    }""",
    "biased": """(%x: F[N,96], %w: F[37,96], %b: F[37], %m: F[37], %c: F[N,1]) {
      %y = linear %x, %w, %b
      %a = mul %y, %m
      %s = silu %a
      %z = mul %s, %c
      %q = cast %z {dtype=f32}
      return %q
    }""",
    "gated": """(%x: F[B,S,64], %w: F[140,64]) {
      %y = linear %x, %w
      %g, %u = split %y {sizes=[70,70]}
      %a = swiglu %g, %u
      return %a
    }""",
    "heads": """(%x: F[B,S,64], %w: F[376,64], %m: F[B,S,3,32]) {
      %y = linear %x, %w
      %q, %l, %k = split %y {sizes=[288,68,20]}
      %h = reshape %q {shape=[B,S,3,96]}
      %n, %r = split %h {sizes=[64,32]}
      %t = mul %r, %m
      return %l, %k, %n, %t
    }""",
    "grouped": """(%x: F[8,64], %w: F[3,96,64], %o: i64[4]) {
      %y = grouped_linear %x, %w, %o
      %g, %u = split %y {sizes=[48,48]}
      %a = swiglu %g, %u
      return %a
    }""",
}
REFUSED = {
    "columns of the product that are wanted in two forms": """(%x: F[N,8], %w: F[8,8]) {
      %y = linear %x, %w
      %a, %b = split %y {sizes=[4,4]}
      return %y, %a
    }""",
    "a reshape that moves elements": """(%x: F[N,24]) {
      %d = silu %x
      %e = reshape %d {shape=[N,4,6]}
      %f = permute %e {dims=[1,0,2]}
      return %f
    }""",
    "a region of kind attention around attention": """(%q: F[B,2,S,4], %k: F[B,S,2,4]) {
      %p = permute %q {dims=[0,2,1,3]}
      %y = attention %p, %k, %k {scale=0.5, causal=true}
      return %y
    }""",
}
CASES = {f"{n}_{d}": t.replace("F[", f"{d}[").replace("=F}", f"={d}}}")
         for n, t in REGIONS.items() for d in ("f32", "bf16")}  # fmt: skip
CASES["gated_f16"] = REGIONS["gated"].replace("F[", "f16[")


WIDE = {
    "wide_rows_bf16": """(%x: bf16[B,S,256], %y: bf16[B,S,256], %g: bf16[256]) {
      %a = add %x, %y
      %n = rms_norm %a, %g {eps=1e-06}
      return %a, %n
    }""",
    "wide_gated_bf16": """(%x: bf16[B,S,512], %w: bf16[512,512]) {
      %y = linear %x, %w
      %g, %u = split %y {sizes=[256,256]}
      %a = swiglu %g, %u
      return %a
    }""",
}
"""Enough work for a second thread."""


def region(name: str, text: str) -> tuple[Graph, Graph]:
    """A graph of one fused node, and its body as a graph of parts."""
    body = replace(parse_graph(f"graph body{text}"), name=f"{name}_parts")
    outer = GraphBuilder(name)
    inputs = [outer.input(v.name, v.type) for v in body.inputs]
    found = outer.call("fused", *inputs, body=body)
    return outer.finish(found, tuple(f"y{i}" for i in range(len(found))), body.aliases), body


def compiled(graphs: Iterable[Graph], folder: Path) -> Executable:
    """Graphs as entries of one library."""
    entries = {g.name: g for g in graphs}
    ranges = {s: Range(1, 128) for s in "BSCN"}
    program = Program("regions", entries, symbols=ranges, stage=Stage.LOWERED)
    planned = pipeline.apply(program, ["own_outputs"])
    emission = get("tvm").emit(planned, EmitOptions())
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return get("tvm").load(folder, {"meta": emission.meta, "weights": None}, planned)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    graphs = (g for name, text in CASES.items() for g in region(name, text))
    return compiled(graphs, tmp_path_factory.mktemp("regions"))


def sampled(graph: Graph, env: Mapping[str, int], seed: str) -> dict[str, torch.Tensor]:
    """Inputs of a region at sizes `env`."""
    given = {}
    for v in graph.inputs:
        kind = TensorType(v.type.dtype, tuple(evaluate(d, env) for d in v.type.shape))
        given[v.name] = random_tensor(kind, v.name + seed, 4)
    return given | ({"o": torch.tensor([0, 5, 5, 8])} if "o" in given else {})


@pytest.mark.parametrize("name", CASES)
def test_a_region_agrees_with_its_body_and_its_parts(name: str, loaded: Executable) -> None:
    graph, body = region(name, CASES[name])
    dtype = name.rpartition("_")[2]
    for env in POINTS:
        given = sampled(graph, env, name)
        wanted = run_graph(body, [x.clone() for x in given.values()])
        alone = loaded.run(body.name, {k: x.clone() for k, x in given.items()})
        found = loaded.run(name, {k: x.clone() for k, x in given.items()})
        for got, part, reference in zip(found.values(), alone.values(), wanted, strict=True):
            torch.testing.assert_close(got, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            # The compiler may contract fp32 products and sums that are rounded apart otherwise.
            torch.testing.assert_close(got, part, rtol=1e-6, atol=1e-6)


def test_a_view_that_moves_nothing_is_no_launch(tmp_path: Path) -> None:
    """Yet an output of its own, though it is the input's bytes."""
    from dsc.backends.tvm.machine import GENERIC
    from dsc.backends.tvm.schedule import plan_program

    text = """graph still(%x: f32[N,1,4]) {
      %p = permute %x {dims=[1,0,2]}
      %y = silu %p
      return %y, %p
    }"""
    graph = parse_graph(text)
    x = torch.randn(5, 1, 4)
    model: Any = compiled([graph], tmp_path)
    (plan,) = plan_program(model.program, GENERIC)[0].values()
    assert [launch.op for launch in plan.launches] == ["silu", "cast"]
    found = model.run("still", {"x": x.clone()})
    for got, wanted in zip(found.values(), run_graph(graph, [x]), strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_and_two_threads_give_the_same_bits(tmp_path: Path) -> None:
    """Threads share out rows and blocks of columns; no sum is split between them."""
    graphs = [region(name, text)[0] for name, text in WIDE.items()]
    model: Any = compiled(graphs, tmp_path)
    for graph in graphs:
        given, found = sampled(graph, POINTS[1], graph.name), []
        for threads in (1, 2):
            model.set_threads(threads, None)
            found.append([y.clone() for y in model.run(graph.name, dict(given)).values()])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_kernel_takes_is_refused_with_a_reason(why: str) -> None:
    (node,) = region("refused", REFUSED[why].replace("F[", "f32["))[0].nodes
    answer = get("tvm").supports(node)
    assert isinstance(answer, No)
    assert why in answer.reason


def test_refused_regions_are_put_back() -> None:
    text = "graph main" + next(iter(REFUSED.values())).replace("F[", "f32[")
    symbols = {"N": Range(1, 8)}
    program = Program("m", {"main": parse_graph(text)}, symbols=symbols, stage=Stage.OPTIMIZED)
    limits = get("tvm").capabilities(Target("cpu")).regions
    done = pipeline.make("fuse", limits=limits).run(program, PassReport())
    assert [n.op for n in done.entries["main"].nodes] == ["linear", "split"]


def test_each_level_has_fewer_kernels_and_all_are_taken() -> None:
    counts = []
    for level in range(4):
        options = pipeline.PipelineOptions(fusion_level=level)
        done, _ = pipeline.run(canonical_lm(Sizes()), get("tvm"), Target("cpu"), options)
        nodes = done.entries["decode"].nodes
        assert all(isinstance(get("tvm").supports(n), Yes) for n in nodes)
        counts.append(len(nodes))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4, counts
