"""Fused regions through the triton backend: what they cost, and that they are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsc.backends.base import EmitOptions, No
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.compile import compile_kernels
from dsc.backends.triton.program import lower_program
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.weights import random_tensor
from dsc.runtime.executable import Executable
from dsc.runtime.plan import Ref
from dsc.targets import Target

REGIONS = {
    # Broadcasting, a literal, two results and views where values come in and go out.
    "chain": """(%x: f32[3,1,7], %y: f32[5,1], %z: f32[7,5]) {
      %h = full {shape=[], value=0.5, dtype=f32}
      %t = permute %z {dims=[1,0]}
      %a = add %x, %y
      %s = mul %a, %h
      %g = gt %s, %h
      %u = silu %s
      %w = where %g, %u, %t
      %p = permute %w {dims=[2,0,1]}
      return %s, %p
    }""",
    # A cast to bf16 and back rounds, though no value leaves its register.
    "rounded": """(%x: f32[33]) {
      %n = cast %x {dtype=bf16}
      %y = cast %n {dtype=f32}
      return %y
    }""",
    "residual": """(%x: f32[2,5,11], %w: f32[13,11], %r: f32[2,5,13]) {
      %y = linear %x, %w
      %z = add %r, %y
      return %z
    }""",
    # A column vector, a row vector, a literal and a bias.
    "activated": """(%x: f32[6,11], %w: f32[40,11], %b: f32[40], %c: f32[6,1], %m: f32[40]) {
      %y = linear %x, %w, %b
      %s = mul %y, %c
      %a = silu %s
      %t = full {shape=[], value=2.0, dtype=f32}
      %d = mul %a, %t
      %z = maximum %d, %m
      return %z
    }""",
    # Gate and up of one product: every other column of a tile is a column from the second half.
    "gated": """(%x: bf16[6,11], %w: bf16[74,11], %b: bf16[74], %r: bf16[6,37]) {
      %y = linear %x, %w, %b
      %g, %u = split %y {sizes=[37,37]}
      %s = swiglu %g, %u
      %z = add %r, %s
      return %z
    }""",
    # The half that is activated lies behind the other, and is read at two places.
    "gated from behind": """(%x: f32[6,11], %w: f32[26,11]) {
      %y = linear %x, %w
      %u, %g = split %y {sizes=[13,13]}
      %s = gelu %g
      %t = silu %u
      %p = mul %s, %t
      %z = add %p, %g
      return %z
    }""",
    # Rows of groups: gate and up of each expert in a tile, and a factor behind them.
    "gated groups": """(%x: bf16[11,20], %w: bf16[4,26,20], %o: i64[5], %r: bf16[11,13]) {
      %y = grouped_linear %x, %w, %o
      %g, %u = split %y {sizes=[13,13]}
      %s = swiglu %g, %u
      %z = mul %r, %s
      return %z
    }""",
    "experts and residual": """(%x: f32[2,3,24], %i: i64[2,3,2], %s: f32[2,3,2],
        %a: f32[4,28,24], %b: f32[4,24,14], %r: f32[2,3,24]) {
      %y = experts %x, %i, %s, %a, %b
      %z = add %r, %y
      return %z
    }""",
    "normed": """(%x: f32[6,40], %y: f32[6,40], %g: f32[40]) {
      %s = add %x, %y
      %n = rms_norm %s, %g {eps=1e-06}
      return %s, %n
    }""",
    # What a decode step does between the first projections and the attention.
    "latent": """(%kv: bf16[2,3,64], %g: bf16[48], %c0: bf16[2,9,48], %n: i64[2], %p: i64[2,3],
        %f: f32[8], %c1: bf16[2,9,16], %q: bf16[2,3,3,16]) {
      %l, %k = split %kv {sizes=[48,16]}
      %a = rms_norm %l, %g {eps=1e-06}
      %u = cache_write %c0, %a, %n
      %r = rope %k, %p, %f {layout="deinterleave", scale=1.5}
      %v = cache_write %c1, %r, %n
      %qr = rope %q, %p, %f {layout="half", scale=1.5}
      return %u updates %c0, %v updates %c1, %qr
    }""",
    "turned": """(%k: f32[2,3,16], %p: i64[2,3], %f: f32[8], %c: f32[2,9,16], %n: i64[2]) {
      %r = rope %k, %p, %f {layout="interleaved", scale=1.0}
      %v = cache_write %c, %r, %n
      return %v updates %c, %r
    }""",
    "centred": """(%x: bf16[6,40], %y: bf16[6,40], %g: bf16[40], %b: bf16[40], %w: f32[40]) {
      %s = add %x, %y
      %n = layer_norm %s, %g, %b {eps=1e-05}
      %m = layer_norm %n, %w {eps=1e-05}
      return %s, %n, %m
    }""",
    "partly": """(%q: bf16[2,3,3,20], %p: i64[2,3], %f: f32[6]) {
      %a = rope %q, %p, %f {layout="half", scale=1.5, dims=12}
      %b = rope %q, %p, %f {layout="interleaved", dims=12}
      return %a, %b
    }""",
    "softmax": """(%x: f32[7,24], %m: f32[7,24]) {
      %a = add %x, %m
      %s = softmax %a {axis=-1}
      %t = sum %s {axes=[-1], keepdims=true}
      %d = div %a, %t
      %u = amax %d {axes=[-1]}
      %f = permute %d {dims=[1,0]}
      return %s, %u, %f
    }""",
    "integers": """(%x: i64[5,12], %y: i64[12]) {
      %a = sub %x, %y
      %s = amin %a {axes=[-1], keepdims=true}
      %d = sub %a, %s
      return %d
    }""",
}
REFUSED = {
    "several results of a product": """(%x: f32[6,11], %w: f32[40,11]) {
      %y = linear %x, %w
      %z = silu %y
      return %y, %z
    }""",
    "rows that are not evenly spaced": """(%x: f32[3,5,2,11], %w: f32[7,11], %r: f32[3,1,2,7]) {
      %y = linear %x, %w
      %z = add %y, %r
      return %z
    }""",
    "an epilogue on other columns than a tile's": """(%x: f32[6,11], %w: f32[27,11]) {
      %y = linear %x, %w
      %g, %u, %v = split %y {sizes=[9,9,9]}
      %z = swiglu %g, %u
      return %z
    }""",
    "or than two halves": """(%x: f32[6,11], %w: f32[18,11]) {
      %y = linear %x, %w
      %g, %u, %v = split %y {sizes=[6,6,6]}
      %a = swiglu %g, %u
      %z = mul %a, %v
      return %z
    }""",
    "columns of experts that meet others": """(%x: f32[6,8], %i: i64[6,2], %s: f32[6,2],
        %a: f32[4,6,8], %b: f32[4,8,3]) {
      %y = experts %x, %i, %s, %a, %b
      %g, %u = split %y {sizes=[4,4]}
      %z = mul %g, %u
      return %z
    }""",
    "a region around einsum": """(%x: f32[6,11], %w: f32[11,4]) {
      %y = einsum %x, %w {eq="md,dk->mk"}
      %z = silu %y
      return %z
    }""",
    "rope of what the region computes": """(%x: f32[1,3,8], %g: f32[8], %p: i64[1,3], %f: f32[4]) {
      %a = rms_norm %x, %g {eps=1e-06}
      %r = rope %a, %p, %f {layout="half"}
      return %r
    }""",
    "an operator on what rope computes": """(%x: f32[1,3,8], %p: i64[1,3], %f: f32[4]) {
      %r = rope %x, %p, %f {layout="half"}
      %z = silu %r
      return %z
    }""",
    "a row of symbolic width between two operators": """(%x: f32[4,N]) {
      %s = softmax %x {axis=-1}
      %z = amax %s {axes=[-1]}
      return %z
    }""",
    "too many to hold": """(%x: f32[4,20000], %g: f32[20000]) {
      %y = silu %x
      %z = rms_norm %y, %g {eps=1e-06}
      return %z
    }""",
    "a reshape that moves elements": """(%x: f32[4,6]) {
      %y = silu %x
      %r = reshape %y {shape=[4,2,3]}
      %z = permute %r {dims=[1,0,2]}
      return %z
    }""",
}
OF_A_CONSTANT = """graph constant(%x: f32[2,7]) {
  %c = full {shape=[5,2,7], value=3.0, dtype=f32}
  %m = mean %c {axes=[0]}
  %y = add %x, %m
  return %y
}"""
"""What goes over another axis than the last reads a view of a number that is in no memory."""
HIGH = {"n": 6, "p": 50, "i": 4, "o": 1}
"""What integers of an input stay below, if not 90."""


def region(name: str, text: str) -> Graph:
    """A graph of one fused node."""
    body = parse_graph(f"graph body{text}")
    outer = GraphBuilder(name)
    inputs = [outer.input(v.name, v.type) for v in body.inputs]
    results = outer.call("fused", *inputs, body=body)
    return outer.finish(results, tuple(f"y{i}" for i in range(len(results))), body.aliases)


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {name: region(name, text) for name, text in REGIONS.items()}


def test_a_region_is_one_launch(graphs: dict[str, Graph]) -> None:
    """But for the experts, whose two products are two."""
    lowered, _ = lower_program(Program("regions", graphs), "cuda:sm_90")
    counts = {name: len(entry.launches) for name, entry in lowered.entries.items()}
    assert counts == dict.fromkeys(REGIONS, 1) | {"experts and residual": 2}


def test_a_launch_says_what_it_writes(graphs: dict[str, Graph]) -> None:
    """The cache and the result, by the kernel's own text."""
    lowered, _ = lower_program(Program("regions", {"e": graphs["turned"]}), "cuda:sm_90")
    (launch,) = lowered.entries["e"].launches
    refs = [x for x in launch.arguments if isinstance(x, Ref)]
    buffers = lowered.entries["e"].buffers
    assert sorted((buffers[r.buffer].name, r.access) for r in refs) == [
        ("c", "w"), ("f", "r"), ("k", "r"), ("n", "r"), ("p", "r"), ("y1", "w"),
    ]  # fmt: skip


def test_one_launch_reads_views_of_other_values() -> None:
    """What a split and a permutation leave is read where it lies."""
    text = "graph g" + REGIONS["normed"]
    body = parse_graph(text)
    outer = GraphBuilder("strided")
    both = outer.split(outer.input("x", body.inputs[0].type.with_shape((6, 80))), sizes=[40, 40])
    results = outer.call("fused", *both, outer.input("g", body.inputs[2].type), body=body)
    lowered, _ = lower_program(Program("p", {"e": outer.finish(results)}), "cuda:sm_90")
    assert len(lowered.entries["e"].launches) == 1


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_kernel_takes_is_refused_with_a_reason(why: str) -> None:
    (node,) = region("refused", REFUSED[why]).nodes
    answer = TritonBackend().supports(node)
    assert isinstance(answer, No)
    assert why in answer.reason


def agree(executable: Executable, name: str, graph: Graph) -> None:
    """Hold what a region gives on random inputs against the interpreter."""
    inputs = {
        v.name: random_tensor(v.type, f"{name}{v.name}", HIGH.get(v.name, 90)) for v in graph.inputs
    }
    if "o" in inputs:
        inputs["o"] = torch.tensor([0, 3, 3, 9, 11])
    expected = run_graph(graph, [x.clone() for x in inputs.values()])
    for result, wanted in zip(executable.run(name, inputs).values(), expected, strict=True):
        atol = 2e-2 if result.dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(result, wanted, rtol=0, atol=atol, msg=name)


def test_regions_agree_with_their_bodies(graphs: dict[str, Graph], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    graphs = {**graphs, "constant": parse_graph(OF_A_CONSTANT)}
    backend, program = TritonBackend(), Program("regions", graphs)
    for name, data in backend.emit(program, EmitOptions(extra={"compile": False})).files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    executable = backend.load(tmp_path, {}, program)
    for name, graph in graphs.items():
        agree(executable, name, graph)
    executable.close()  # type: ignore[attr-defined]


def test_regions_compile(graphs: dict[str, Graph]) -> None:
    pytest.importorskip("triton")
    program, generated = lower_program(Program("regions", graphs), "cuda:sm_90")
    texts = with_templates(program, generated)
    _, records = compile_kernels(program.kernels, Target("cuda", "sm_90"), texts)
    assert any(k.startswith("gemm_mul_silu_maximum") for k in records)
