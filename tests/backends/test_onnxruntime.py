"""The onnxruntime backend: every operator against its reference, models against the interpreter."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model

from dsc.backends.base import EmitOptions, No, Yes
from dsc.backends.onnxruntime.emit import EMITTERS
from dsc.backends.onnxruntime.forms import halves
from dsc.backends.onnxruntime.model import build_model, shared_entries
from dsc.backends.reference import ReferenceExecutable
from dsc.errors import BackendUnavailable, UnsupportedOperator, UsageError
from dsc.ir.dims import Range, evaluate
from dsc.ir.graph import Graph, GraphBuilder, Node, Value
from dsc.ir.interpreter import Interpreter, run_graph
from dsc.ir.op import named, registry
from dsc.ir.parser import parse_graph, parse_operands, parse_program
from dsc.ir.program import Program
from dsc.ir.traits import Form, Role
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import apply, random_source, random_tensor
from dsc.ir.weights import evaluate as evaluate_weight
from dsc.runtime.session import Session
from tests.backends.onnx_artifacts import (
    BACKEND,
    PROMPT_LENGTHS,
    conversation,
    drawn_ids,
    executable,
    loaded,
    prepared,
)  # fmt: skip
from tests.run_module import run_module

POINTS = ({"B": 1, "S": 1, "T": 6, "N": 1}, {"B": 3, "S": 4, "T": 9, "N": 11})
COLLECTIVES = named(Role.COLLECTIVE)
OF_WEIGHTS = {n for n, o in registry().items() if o.traits.form is Form.WEIGHT}
REFUSED = {"sdpa", "grouped_mm", "sample"} | OF_WEIGHTS | COLLECTIVES
"""Collectives cannot be said in ONNX; weights are packed dequantised; tokens are chosen outside of
the model; the others go when a trace is raised."""
POSITIVE = {"log", "sqrt", "rsqrt", "pow"}
TOLERANCE = {DType.f32: 1e-5, DType.bf16: 2e-2, DType.f16: 2e-3}

# Beside each operator's own example: odd widths, symbolic shapes, every variant. F is the type
# under test; `=n` after an integer type bounds it.
_ROUTE = 'top_k=3, scale=2.5, groups=4, keep=2, group_score="{}", fill={}, normalise={}'
_EXPERTS = "F[B,S,10], i64[B,S,3]=6, f32[B,S,3], F[7,14,10], F[7,10,7]"
MORE = {
    "embedding": ["i64[B,S]=10, F[11,7]"],
    "linear": ["F[B,S,7], F[5,7], F[5]", "F[N,7], F[3,7]", "F[B,S,2,7], F[3,7]"],
    "layer_norm": [
        "F[B,S,3,7], F[7], F[7] {eps=1e-05}", "F[B,S,7], f32[7] {eps=1e-05}",
    ],
    "rms_norm": ["F[B,S,3,7], F[7] {eps=1e-05}", "F[B,S,7], f32[7] {eps=1e-05}"],
    "rope": [
        f'F[B,S{heads},6], i64[B,S]=900, f32[3] {{layout="{layout}", scale={scale}}}'
        for layout in ("interleaved", "deinterleave", "half")
        for heads, scale in (("", 1.0), (",3", 1.25))
    ]
    + [
        f'F[B,S{heads},10], i64[B,S]=900, f32[3] {{layout="{layout}", scale=1.25, dims=6}}'
        for layout in ("interleaved", "deinterleave", "half")
        for heads in ("", ",3")
    ],
    "append": ["F[B,T,5], F[B,S,5], i64[B]=6"],
    "attention": [
        "F[B,S,4,5], F[B,T,2,5], F[B,T,2,6], i64[B]=2 {scale=0.3, causal=true}",
        "F[B,S,3,5], F[B,T,3,5], F[B,T,3,6] {scale=1.0, causal=true}",
        "F[B,S,3,5], F[B,T,1,5], F[B,T,1,6] {scale=0.3, causal=false}",
        "F[B,S,4,5], F[B,T,2,5], F[B,T,2,6], i64[B]=2 {scale=0.3, causal=true, window=2}",
        "F[B,S,4,5], F[B,T,2,5], F[B,T,2,6], i64[B]=2, F[4]"
        " {scale=0.3, causal=true, chunk=2, softcap=1.5}",
        "F[B,S,3,5], F[B,T,3,5], F[B,T,3,6] {scale=1.0, causal=false, softcap=2.0}",
    ],
    "mla_attention": [
        "F[B,S,3,5], F[B,S,3,6], F[B,T,10], F[B,T,6], F[36,10], i64[B]=2 {scale=0.3}",
        "F[B,S,3,1], F[B,S,3,6], F[B,T,40], F[B,T,6], F[6,40], i64[B]=2 {scale=0.3}",
        "F[B,1,3,5], F[B,1,3,6], F[B,T,10], F[B,T,6], F[36,10], i64[B]=2 {scale=0.3}",
    ],
    "latent_attention": ["F[B,S,3,10], F[B,S,3,6], F[B,T,10], F[B,T,6], i64[B]=2 {scale=0.3}"],
    "route": [
        f'F[B,S,9], F[12,9], f32[12] {{score="sigmoid", {_ROUTE.format("top2", "-inf", "true")}}}',
        f'F[N,9], F[12,9], f32[12] {{score="sigmoid", {_ROUTE.format("top2", "0.0", "true")}}}',
        f'F[N,9], f32[12,9] {{score="softmax", {_ROUTE.format("max", "-inf", "false")}}}',
        'F[N,9], F[5,9] {score="softmax", top_k=2, normalise=false}',
        'F[B,S,9], F[5,9] {score="sigmoid", top_k=2, normalise=true, scale=2.0, shared=2}',
        'F[N,9], F[5,9], f32[5], f32[5] {score="softmax", top_k=2, normalise=true}',
    ],
    "experts": [
        _EXPERTS,
        _EXPERTS + ' {act="gelu"}',
        _EXPERTS + ' {act="relu"}',
        _EXPERTS + ", F[7,14], F[7,10] {limit=0.5, alpha=1.702, shift=1.0}",
        _EXPERTS + ' {act="gelu_tanh"}',
    ],
    "dispatch": ["F[N,10], i64[N,3]=6 {experts=7}"],
    "grouped_linear": ["F[8,10], F[4,6,10], i64[5]=8"],
    "combine": ["F[3*N,10], i64[3*N]=1, f32[N,3]"],
    "select_rows": ["F[B,S,5], i64[B,2]=0"],
    "einsum": [
        'F[B,S,3,5], F[3,5,4] {eq="bshn,hnc->bshc"}',
        'F[B,S,3,4], F[3,5,4] {eq="bshc,hvc->bshv"}',
        'F[3,5], F[N,5] {eq="ac,bc->ba"}',
        'F[B,S,5] {eq="bsd->bd"}',
    ],
    "div": ["i64[N]=90, i64[1]=9"],
    "remainder": ["i64[N]=90, i64[1]=9"],
    "relu": ["i64[N]=5"],
    "where": ["bool[N], bool[N], bool[1]", "bool[N,1], F[4], F[]"],
    "add": ["F[B,S,5], F[B,1,5]", "i64[N], i64[]"],
    "cast": ["f32[N] {dtype=f16}", "f32[N] {dtype=i64}", "bool[N] {dtype=bf16}"],
    "reshape": [
        "F[B,S,6] {shape=[B*S,2,3]}",
        "F[B,S,6] {shape=[S,B,6]}",
        "F[B,S,6] {shape=[B,S,6]}",
    ],
    "expand": ["F[B,1,6] {shape=[B,S,6]}", "F[S,1] {shape=[B,S,9]}"],
    "slice": ["F[T,5] {axis=0, start=1, end=T}", "F[N,9] {axis=-1, start=1, end=8, step=3}"],
    "split": ["F[B,S,7] {sizes=[3,4]}", "F[6,N] {sizes=[2,4], axis=0}"],
    "gather": ["F[N,9], i64[N,4]=8 {axis=1}"],
    "take": ["F[9,4], i64[B,S]=8 {axis=0}", "F[N,9], i64[4]=8 {axis=-1}"],
    "full": [" {shape=[B,S], value=0.5, dtype=bf16}", " {shape=[], value=3, dtype=i64}"],
    "arange": [" {start=2, end=N+2, dtype=i64}", " {start=0, end=(T+1)//2, dtype=f32}"],
    "sum": ["F[B,S,5] {axes=[0,2], keepdims=true}", "i64[N,5]=4 {axes=[-1]}"],
    "histc": ["i64[N]=4 {bins=5}"],
    "sort": ["i64[N]=3 {axis=0}", "F[N,5] {axis=-1, descending=true}"],
    "index_put": ["F[5,3], i64[4]=3, F[4,3]"],
    "fused": [],
}  # fmt: skip


def _cases() -> Iterator[Any]:
    for name, definition in registry().items():
        if name in REFUSED:
            continue
        texts = [definition.example] if definition.example else []
        for number, text in enumerate([*texts, *MORE.get(name, ())]):
            types = (DType.f32, DType.bf16, DType.f16) if "F[" in text else (DType.f32,)
            for dtype in types:
                yield pytest.param(
                    name, text.replace("F[", f"{dtype}["), dtype, id=f"{name}-{number}-{dtype}"
                )


def _operand(
    name: str, index: int, declared: TensorType, bound: int | None, env: Mapping[str, int]
) -> torch.Tensor:
    shape = tuple(evaluate(d, env) for d in declared.shape)
    if name == "combine" and index == 1:
        return torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    if name == "grouped_linear" and index == 2:
        return (
            torch.tensor([0, 3, 3, 7, 8]) if bound == 8 else torch.zeros(shape, dtype=torch.int64)
        )
    if name == "index_put" and index == 1:
        return torch.randperm(4, generator=torch.Generator().manual_seed(3))[: shape[0]]
    high = 2 if bound is None else bound + 1
    tensor = random_tensor(TensorType(declared.dtype, shape), f"{name}{index}", high)
    if name in POSITIVE:
        tensor = tensor.abs() + 0.5
    if name in ("div", "remainder") and bound:
        return tensor + 3 if index else tensor - 45
    return tensor


def _graph_of(name: str, text: str) -> tuple[Graph, list[tuple[TensorType, int | None]]]:
    operands, attrs = parse_operands(text)
    b = GraphBuilder()
    # B, S and T are read off shapes: an unused input gives those that no operand has.
    sizes = b.input(
        "sizes", TensorType(DType.f32, tuple(parse_operands("f32[B,S,T,N]")[0][0][0].shape))
    )
    inputs = [b.input(f"x{i}", t) for i, (t, _) in enumerate(operands)]
    results = b.call(name, *inputs, **attrs)
    names = tuple(f"y{i}" for i in range(len(results)))
    assert sizes.type.rank == 4
    return b.finish(results, names), operands


def _assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if not got.is_floating_point():
        assert torch.equal(got, wanted)
    elif got.numel():
        error = (got.double() - wanted.double()).abs().max()
        assert error <= tolerance * max(1.0, float(wanted.double().abs().max()))


@pytest.mark.parametrize(("name", "text", "dtype"), list(_cases()))
def test_an_operator_is_its_reference(name: str, text: str, dtype: DType, tmp_path: Path) -> None:
    graph, operands = _graph_of(name, text)
    symbols = {s: Range(1, 64) for s in "BSTN"}
    runs = executable(Program(name, {"main": graph}, symbols=symbols), tmp_path / "a")
    for env in POINTS:
        tensors = [_operand(name, i, t, bound, env) for i, (t, bound) in enumerate(operands)]
        inputs = [torch.zeros(tuple(env[s] for s in "BSTN")), *tensors]
        wanted = run_graph(graph, inputs)
        got = runs.run("main", {v.name: x for v, x in zip(graph.inputs, inputs, strict=True)})
        for key, value in zip(graph.output_names, wanted, strict=True):
            _assert_close(got[key], value, TOLERANCE[dtype])


def test_every_operator_is_emitted_or_refused_for_a_reason() -> None:
    assert set(EMITTERS) | REFUSED | {"fused"} == set(registry())
    assert not set(EMITTERS) & REFUSED
    cache = Value("c", TensorType(DType.f32, (1, 4, 2)))
    for name in REFUSED:
        answer = BACKEND.supports(Node(name, (cache,), _NO_ATTRS, (cache,)))
        assert isinstance(answer, No)
        assert name in answer.reason
    assert BACKEND.supports(Node("neg", (cache,), _NO_ATTRS, (cache,))) == Yes()
    narrow = Value("f", TensorType(DType.f8e4m3, (2,)))
    answer = BACKEND.supports(Node("neg", (narrow,), _NO_ATTRS, (narrow,)))
    assert isinstance(answer, No)
    assert "f8e4m3" in answer.reason


_NO_ATTRS = parse_graph("graph g(%x: f32[1]) { %y = neg %x return %y }").nodes[0].attrs


def test_a_fused_body_is_written_out(tmp_path: Path) -> None:
    text = """graph main(%x: f32[B,3], %w: f32[3]) {
      %y = fused %x, %w {body=graph body(%a: f32[B,3], %b: f32[3]) {
        %n = rms_norm %a, %b {eps=1e-06}
        %s = silu %n
        return %s
      }}
      %z = add %y, %x
      return %z
    }"""
    graph = parse_graph(text)
    program = Program("fused", {"main": graph}, symbols={"B": Range(1, 64)})
    runs = executable(program, tmp_path / "a")
    inputs = [torch.randn(5, 3), torch.randn(3)]
    got = runs.run("main", {"x": inputs[0], "w": inputs[1]})
    _assert_close(got["z"], run_graph(graph, inputs)[0], 1e-5)


def test_outputs_may_be_inputs_or_named_twice(tmp_path: Path) -> None:
    text = """graph main(%x: f32[B,3]) {
      %y = neg %x
      %out = neg %y
      return %y as "out", %x as "same", %y as "again", %out as "y"
    }"""
    runs = executable(Program("names", {"main": parse_graph(text)}), tmp_path / "a")
    x = torch.randn(2, 3)
    got = runs.run("main", {"x": x})
    for name, wanted in {"out": -x, "same": x, "again": -x, "y": x}.items():
        assert torch.equal(got[name], wanted)


@pytest.mark.parametrize("lengths", [[5, 5], [0, 3], [5, 1]])
def test_append_is_ragged_and_exact(lengths: list[int], tmp_path: Path) -> None:
    text = """graph main(%past: bf16[B,P,3], %new: bf16[B,S,3], %n: i64[B]) {
      %y = append %past, %new, %n
      return %y
    }"""
    graph = parse_graph(text)
    runs = executable(Program("append", {"main": graph}), tmp_path / "a")
    for past in (5, 0) if lengths == [0, 3] else (5,):
        n = torch.tensor(lengths).clamp(max=past)
        inputs = [torch.randn(2, past, 3).bfloat16(), torch.randn(2, 2, 3).bfloat16(), n]
        got = runs.run("main", dict(zip(("past", "new", "n"), inputs, strict=True)))
        assert torch.equal(got["y"], run_graph(graph, inputs)[0])


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        (DType.f32, "contiguous"), (DType.bf16, "contiguous"), (DType.f16, "contiguous"),
        (DType.f32, "in-place"), (DType.bf16, "in-place"),
    ],
    ids=str,
)  # fmt: skip
def test_prefill_and_decode_are_the_interpreters(dtype: DType, cache: str, tmp_path: Path) -> None:
    """A session looks at no caches that come back where they are written in place."""
    program = prepared(dtype, cache)
    got = conversation(executable(program, tmp_path / "a"), program)
    wanted = conversation(ReferenceExecutable(program), program)
    tolerance = {DType.f32: 1e-5, DType.bf16: 1e-1, DType.f16: 1e-2}[dtype]
    for ours, theirs in zip(got, wanted, strict=True):
        _assert_close(ours, theirs, tolerance)


def test_a_decoder_in_text_runs(tmp_path: Path) -> None:
    program = parse_program(_DECODER)
    types = {k: e.type for k, e in program.weights.items()}
    program = replace(program, source=random_source(types))
    runs = executable(program, tmp_path / "a")
    interpreter = Interpreter(program)
    past = {"past.0.k": torch.zeros(2, 0, 8), "past.0.v": torch.zeros(2, 0, 6)}
    lengths = torch.tensor([0, 0])
    for new, kept in ((3, [3, 2]), (1, [1, 1]), (1, [1, 1])):
        tokens = {"input_ids": drawn_ids(2, new) % 11, "lengths": lengths}
        tokens["positions"] = lengths[:, None] + torch.arange(new)
        got, wanted = (x.run("main", {**tokens, **past}) for x in (runs, interpreter))
        for name, value in wanted.items():
            _assert_close(got[name], value, 1e-5)
        past = {k.replace("present", "past"): v for k, v in got.items() if k != "logits"}
        lengths = lengths + torch.tensor(kept)


_DECODER = """program "grouped" {stage=CANONICAL}
symbols {B=[1,64], S=[1,64], P=[0,64]}
weights {
  @embed : f32[11,10] = source "embed" : f32[11,10]
  @norm : f32[10] = source "norm" : f32[10]
  @q : f32[16,10] = source "q" : f32[16,10]
  @k : f32[8,10] = source "k" : f32[8,10]
  @v : f32[6,10] = source "v" : f32[6,10]
  @o : f32[10,12] = source "o" : f32[10,12]
  @freq : f32[2] = source "freq" : f32[2]
}
graph main(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B],
           %past.0.k: f32[B,P,8], %past.0.v: f32[B,P,6]) {
  %x = embedding %input_ids, @embed : f32[B,S,10]
  %h = rms_norm %x, @norm {eps=1e-06} : f32[B,S,10]
  %q = linear %h, @q : f32[B,S,16]
  %qh = reshape %q {shape=[B,S,4,4]} : f32[B,S,4,4]
  %qr = rope %qh, %positions, @freq {layout="half"} : f32[B,S,4,4]
  %k = linear %h, @k : f32[B,S,8]
  %kh = reshape %k {shape=[B,S,2,4]} : f32[B,S,2,4]
  %kr = rope %kh, %positions, @freq {layout="half"} : f32[B,S,2,4]
  %kf = reshape %kr {shape=[B,S,8]} : f32[B,S,8]
  %v = linear %h, @v : f32[B,S,6]
  %pk = append %past.0.k, %kf, %lengths : f32[B,P+S,8]
  %pv = append %past.0.v, %v, %lengths : f32[B,P+S,6]
  %ka = reshape %pk {shape=[B,P+S,2,4]} : f32[B,P+S,2,4]
  %va = reshape %pv {shape=[B,P+S,2,3]} : f32[B,P+S,2,3]
  %a = attention %qr, %ka, %va, %lengths {scale=0.5, causal=true} : f32[B,S,4,3]
  %f = reshape %a {shape=[B,S,12]} : f32[B,S,12]
  %y = linear %f, @o : f32[B,S,10]
  %z = add %x, %y : f32[B,S,10]
  %logits = linear %z, @embed : f32[B,S,11]
  return %logits, %pk as "present.0.k" updates %past.0.k, %pv as "present.0.v" updates %past.0.v
}
"""


def test_models_pass_the_checker_and_point_at_their_weights(lm: Program, exported: Path) -> None:
    models = sorted(exported.rglob("*.onnx"))
    assert [path.stem for path in models] == ["prefill"]
    for path in models:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""}
        load_external_data_for_model(model, str(path.parent))
        held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        assert "model.layers.1.mlp.experts.gate_up_proj" not in held
        for name, expr in lm.weights.items():
            wanted = evaluate_weight(expr, lm.source).numpy()
            if name in held:
                np.testing.assert_array_equal(held[name], wanted)
            elif f"{name}/5" in held:
                np.testing.assert_array_equal(held[f"{name}/5"], wanted[5])


def test_axes_are_named_by_the_symbols(exported: Path) -> None:
    graph = onnx.load(str(exported / "onnx/prefill.onnx"), load_external_data=False).graph
    axes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes["input_ids"] == ["B", "S"]
    assert axes["past.1.latent"] == ["B", "P", 20]
    assert axes["present.1.rope"] == ["B", "P+S", 8]


def test_what_layers_share_is_computed_once(lm: Program) -> None:
    nodes = build_model(lm.entries["prefill"], "prefill").proto.graph.node
    count = {
        kind: sum(n.op_type == kind for n in nodes) for kind in ("Cos", "LessOrEqual", "Shape")
    }
    assert count["Cos"] == count["LessOrEqual"] == 1
    assert count["Shape"] <= 4
    assert sum(n.op_type == "RotaryEmbedding" for n in nodes) == 4


def test_absorbed_weights_are_never_transposed(lm: Program) -> None:
    graph = build_model(lm.entries["prefill"], "g", halves=halves(lm)).proto.graph
    arms = [a.g.node for n in graph.node if n.op_type == "If" for a in n.attribute]
    used = [n for nodes in arms for n in nodes if any("kv_b" in name for name in n.input)]
    kinds = Counter((n.op_type, x[-1]) for n in used for x in n.input if "kv_b" in x)
    assert kinds == {("MatMul", end): 2 for end in ("k", "v", "t")}, "W_UK, W_UV, kv_b.weight"


def test_an_entry_with_other_halves_than_of_its_kv_b_has_a_model_of_its_own(
    lm: Program,
) -> None:
    other = dict(lm.weights)
    first = next(name for name in halves(lm))
    other[f"{first}.k"] = apply("mul", other[f"{first}.k"], other[f"{first}.k"])
    shared = shared_entries(replace(lm, weights=other))
    assert shared == {"decode": "extend", "extend": "extend", "prefill": "prefill"}


def test_experts_are_branches_or_a_loop(lm: Program, tmp_path: Path) -> None:
    graph, attentions = lm.entries["prefill"], 2
    known = halves(lm)
    kinds = [n.op_type for n in build_model(graph, "g", halves=known).proto.graph.node]
    assert kinds.count("If") == 6 + attentions
    assert "Loop" not in kinds
    looped = build_model(graph, "g", max_branches=5, halves=known)
    kinds = [n.op_type for n in looped.proto.graph.node]
    assert kinds.count("Loop") == 1
    assert kinds.count("If") == attentions


def test_a_looped_model_is_the_branched_one(
    lm: Program, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsc.backends.onnxruntime import model

    def looped(*given: Any, **named: Any) -> Any:
        return build_model(*given, **{**named, "max_branches": 0})

    monkeypatch.setattr(model, "build_model", looped)
    got = conversation(executable(lm, tmp_path / "a"), lm)
    wanted = conversation(loaded(exported), lm)
    for path in (tmp_path / "a").rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    for ours, theirs in zip(got, wanted, strict=True):
        _assert_close(ours, theirs, 1e-5)


# --- entries, errors ------------------------------------------------------------------------------


def test_an_entry_that_is_another_with_sizes_put_in_shares_its_model(lm: Program) -> None:
    expected = dict.fromkeys(["decode", "extend", "prefill"], "prefill")
    assert shared_entries(lm) == expected
    unbounded = tuple(replace(guard, step=None) for guard in lm.guards)
    dense = replace(lm, interface=replace(lm.interface, guards=unbounded))
    assert shared_entries(dense) == expected, "as in models without latents"
    same = replace(lm, entries={**lm.entries, "again": lm.entries["prefill"]})
    assert shared_entries(same)["again"] == "prefill"


def test_entries_over_other_weights_share_nothing() -> None:
    def entry(weight: str) -> Graph:
        return parse_graph(
            f"graph g(%x: f32[B,3], @{weight}: f32[3]) {{ %y = add %x, @{weight} return %y }}"
        )

    both = Program("two", {"a": entry("u"), "b": entry("w")})
    assert shared_entries(both) == {"a": "a", "b": "b"}
    assert shared_entries(Program("one", {"a": entry("u"), "b": entry("u")})) == {
        "a": "a",
        "b": "a",
    }


def test_what_cannot_be_emitted_is_listed_in_one_error() -> None:
    text = """graph main(%x: f32[4,3]) {
      %y = all_reduce %x {ranks=2} loc "model.layers.0"
      return %y
    }"""
    with pytest.raises(UnsupportedOperator, match="no ONNX form of all_reduce") as caught:
        BACKEND.emit(Program("bad", {"main": parse_graph(text)}), EmitOptions())
    assert "model.layers.0" in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install onnx onnxruntime"):
        BACKEND.load(Path(), {"meta": {}}, Program("none", {}))


def test_inputs_that_do_not_fit_are_refused(exported: Path) -> None:
    runs = loaded(exported)
    with pytest.raises(UsageError, match="no entry nowhere"):
        runs.run("nowhere", {})
    with pytest.raises(UsageError, match="needs the inputs input_ids"):
        runs.run("decode", {})


# --- run.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16, DType.f16], ids=str)
def test_run_py_gives_the_sessions_logits(dtype: DType, tmp_path: Path) -> None:
    program = prepared(dtype)
    session = Session(executable(program, tmp_path / "a"), program, max_batch=4, max_context=60)
    model = run_module(tmp_path / "a").Model(tmp_path / "a")
    lengths = np.zeros(3, np.int64)
    after_a_cut = [(3, [1, 2, 3]), (1, [1, 1, 1])]  # padding was cut off
    for count, new in [(9, PROMPT_LENGTHS), (1, [1, 1, 1]), (4, [2, 4, 1]), *after_a_cut]:
        ids = drawn_ids(3, count)
        wanted = session.prefill(ids, new) if ids.shape[1] > 1 else session.decode(ids)
        positions = lengths[:, None] + np.arange(ids.shape[1])
        got = model.step(ids.numpy(), positions, lengths, np.array(new)[:, None] - 1)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got[:, 0], wanted.float().numpy())
        lengths = lengths + np.array(new)


def test_run_py_needs_neither_dsc_nor_torch(exported: Path) -> None:
    text = (exported / "run.py").read_text()
    modules = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "onnxruntime" in modules
    assert not modules & {"dsc", "torch", "onnx", "transformers"}


def test_a_model_opened_by_import_has_the_files_that_were_written(
    exported: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    cut = next(path for path in copy.rglob("*.onnx"))
    os.truncate(cut, cut.stat().st_size - 1)
    with pytest.raises(ValueError, match="recorded: compile or copy it again"):
        run_module(copy).Model(copy)
