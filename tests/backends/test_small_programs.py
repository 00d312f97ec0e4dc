"""Programs with little in them: one node or none, no elements, values that are no numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from dsc import pipeline
from dsc.api import CompiledModel, compile_program
from dsc.errors import ParseError
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import random_source, random_tensor, sources

BACKENDS = ("reference", "tvm", "onnxruntime", "triton")
GRAPHS = {
    "one_layer": "(%x: f32[3,2]) { %y = linear %x, @weight\n return %y }",
    "from_a_line": '(%x: f32[3,2], %w: f32[4,2]) { %a = linear %x, %w loc "file.py:382"\n'
    " %y = relu %a\n return %y }",
    "one_reduction": "(%x: f32[3,2]) { %y = softmax %x\n return %y }",
    "one_view": "(%x: f32[3,2]) { %y = permute %x {dims=[1,0]}\n return %y }",
    "identity": "(%x: f32[3,2]) { return %x }",
    "inputs_and_weights": "(%x: f32[3,2]) { %y = neg %x\n"
    ' return %y as "a", @weight as "b", %x as "c", %y as "d", @weight as "e" }',
    "weight_alone": "(%x: f32[3,2]) { return @weight }",
    "views_of_what_is_given": "(%x: f32[3,2]) {"
    " %y = reshape %x {shape=[6]}\n %z = reshape @weight {shape=[8]}\n"
    ' return %y as "y", %z as "z" }',
    "no_inputs": "() { %y = arange {start=2, end=6, dtype=i64}\n return %y }",
    "constant": "() { %y = full {shape=[3], value=2.0, dtype=f32}\n"
    ' return %y as "a", %y as "b" }',
    "unread_input": "(%x: f32[3,2], %n: i64[0]) { %y = exp %x\n return %y }",
    "no_axes": "(%x: f32[]) { %y = exp %x\n return %y }",
    "truth_values": "(%x: bool[3,2], %y: bool[3,2]) { %z = logical_not %x\n %e = eq %x, %y\n"
    ' %n = ne %z, %y\n return %z as "a", %e as "b", %n as "c" }',
    "short_integers": "(%x: i16[3,2]) { %y = mul %x, %x\n %z = neg %y\n return %z }",
    "empty_input": "(%x: f32[0,2]) { return %x }",
    "empty_values": "(%x: f32[0,2], %y: f32[3,2]) { %a = exp %x\n %c = concat %a, %y {axis=0}\n"
    " %b = sum %x {axes=[0]}\n %z = add %c, %b\n return %z as \"z\", %a as \"a\" }",
    "empty_contraction": "(%x: f32[3,0], %y: f32[0,2], %b: f32[2], %w: f32[2,0]) {"
    " %m = matmul %x, %y\n %l = linear %x, %w, %b\n %z = add %m, %l\n return %z }",
    "empty_parts": "(%x: f32[3,2]) { %a, %b, %c = split %x {sizes=[0,2,0], axis=1}\n"
    " %y = exp %b\n %z = neg %a\n return %y as \"y\", %z as \"z\" }",
    "empty_attention": "(%q: f32[2,4,0,8], %k: f32[2,4,3,8], %p: f32[2,4,5,8], %e: f32[2,4,0,8]) {"
    " %y = sdpa %q, %k, %k {scale=0.5, causal=true}\n %z = sdpa %p, %e, %e {scale=0.5}\n"
    ' return %y as "y", %z as "z" }',
}  # fmt: skip
NO_NUMBERS = """(%x: f32[4,4], %y: f32[4,4]) {
  %n = ne %x, %x
  %l = le %x, %x
  %g = maximum %x, %y
  %s = minimum %y, %x
  %r = relu %x
  %e = exp %x
  %d = sigmoid %x
  %a = amax %x {axes=[1]}
  %i = amin %y {axes=[0]}
  %m = argmax %x {axis=1}
  %p = softmax %x
  return %n as "n", %l as "l", %g as "g", %s as "s", %r as "r", %e as "e", %d as "d", %a as "a",
    %i as "i", %m as "m", %p as "p"
}"""


def program(graphs: dict[str, str]) -> Program:
    """Entries of these texts, with seeded weights, at stage TRACED."""
    text = 'program "p" {stage=TRACED}\nweights {@weight : f32[4,2] = source "weight" : f32[4,2]}\n'
    text += "\n".join(f"graph {name}{body}" for name, body in graphs.items())
    bare = parse_program(text)
    keys = {s.key: s.type for e in bare.weights.values() for s in sources(e)}
    return replace(bare, source=random_source(keys))


def made(traced: Program, backend: str, level: int = 3) -> CompiledModel:
    """A compiled program."""
    if backend == "triton":
        pytest.importorskip("triton")
    return compile_program(traced, backend, level)


@cache
def compiled(backend: str) -> CompiledModel:
    """All of `GRAPHS` as the entries of one program."""
    return made(program(GRAPHS), backend)


def inputs_of(entry: str) -> dict[str, Tensor]:
    """Seeded inputs."""
    graph = program(GRAPHS).entries[entry]
    return {v.name: random_tensor(v.type, v.name) for v in graph.inputs}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", GRAPHS)
def test_a_small_program_computes_what_it_says(entry: str, backend: str) -> None:
    given = inputs_of(entry)
    found = compiled(backend).run(given, entry)
    right = Interpreter(program(GRAPHS)).run(entry, given)
    assert list(found) == list(right)
    for name, wanted in right.items():
        torch.testing.assert_close(found[name], wanted)


def test_results_are_tensors_of_their_own() -> None:
    found = compiled("tvm").run(inputs_of("inputs_and_weights"), "inputs_and_weights")
    found["a"].fill_(7)
    found["b"].fill_(7)
    again = compiled("tvm").run(inputs_of("inputs_and_weights"), "inputs_and_weights")
    assert not torch.equal(found["d"], found["a"])
    assert not torch.equal(again["b"], found["b"])


@pytest.mark.parametrize("backend", ["tvm", "triton"])
@pytest.mark.parametrize("level", [0, 3])
def test_what_is_no_number_stays_none(level: int, backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    given = {
        "x": torch.tensor([[nan, 1, 2, 3], [1, inf, nan, -inf], [0, -1, 5, 5], [-inf] * 4]),
        "y": torch.tensor([[0.0] * 4, [1, 2, nan, 4], [nan] * 4, [1, 2, 3, inf]]),
    }
    traced = program({"main": NO_NUMBERS})
    found = made(traced, backend, level).run(given)
    right = Interpreter(traced).run("main", given)
    for name, wanted in right.items():
        torch.testing.assert_close(found[name], wanted, equal_nan=True, msg=name)


def test_nothing_without_elements_reaches_a_kernel() -> None:
    after = pipeline.apply(program(GRAPHS), list(pipeline.RAISE))
    for graph in after.entries.values():
        for node in graph.nodes:
            assert node.op == "full" or not any(0 in x.type.shape for x in node.operands), node


def test_tvm_finds_the_largest_of_a_row() -> None:
    text = {"main": "(%x: f32[3,5]) { %v, %i = topk %x {k=2}\n return %v, %i }"}
    given = {"x": random_tensor(program(text).entries["main"].inputs[0].type, "x")}
    found = compile_program(program(text), backend="tvm").run(given)
    values, indices = given["x"].topk(2)
    assert torch.equal(found["v"], values)
    assert torch.equal(found["i"], indices)


def test_triton_finds_the_largest_of_any_row() -> None:
    """NaN is the largest, no index comes twice, and whole numbers keep all their bits."""
    text = """(%x: f32[4,3], %n: i64[2,3]) {
      %v, %i = topk %x {k=2}
      %w, %j = topk %n {k=2}
      %m = argmax %n {axis=1}
      return %v as "v", %i as "i", %w as "w", %j as "j", %m as "m"
    }"""
    nan, inf, wide = float("nan"), float("inf"), 2**53
    x = torch.tensor([[1, nan, 3], [-inf] * 3, [2, -inf, -inf], [-0.0, -1, 0]])
    n = torch.tensor([[wide, wide + 1, wide - 1], [-wide, -wide - 1, -wide]])
    found = made(program({"main": text}), "triton").run({"x": x, "n": n})
    wanted = [[nan, 3], [-inf, -inf], [2, -inf], [0, 0]]
    torch.testing.assert_close(found["v"], torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)
    assert found["i"].tolist() == [[1, 2], [0, 1], [0, 1], [0, 2]]
    assert found["w"].tolist() == [[wide + 1, wide], [-wide, -wide]]
    assert found["j"].tolist() == [[1, 0], [0, 2]]
    assert found["m"].tolist() == [1, 0]


def test_long_sums_do_not_drift_on_tvm() -> None:
    """Sums of 2^22 equal terms, within 2e-6 of fp64; a plain fp32 sum is off by 1e-3."""
    text = """(%x: f32[4194304], %y: f32[1048576,4]) {
      %s = sum %x {axes=[0]}
      %m = mean %y {axes=[0]}
      %e = exp %x
      %w = sum %e {axes=[0]}
      %c = cumsum %x {axis=0}
      %d = einsum %x, %x {eq="k,k->"}
      return %s as "s", %m as "m", %w as "w", %c as "c", %d as "d"
    }"""
    given = {"x": torch.full((2**22,), 1.541), "y": torch.full((2**20, 4), 1.541)}
    found = compile_program(program({"main": text}), backend="tvm").run(given)
    x, y = (v.double() for v in given.values())
    right = {"s": x.sum(), "m": y.mean(0), "w": x.exp().sum(), "c": x.cumsum(0), "d": x @ x}
    for name, wanted in right.items():
        assert ((found[name].double() - wanted).abs() / wanted).max() <= 2e-6, name


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_what_is_no_number_is_true_on_tvm(dtype: str) -> None:
    traced = program({"main": f"(%x: {dtype}[4]) {{ %y = cast %x {{dtype=bool}}\n return %y }}"})
    given = torch.tensor([float("nan"), 0.0, -0.0, 0.5])
    kind = traced.entries["main"].inputs[0].type.dtype.torch
    found = compile_program(traced, backend="tvm").run({"x": given.to(kind)})
    assert found["y"].tolist() == [True, False, False, True]


SHORT = """(%x: {t}[6], %y: {t}[6], %m: {t}[2,3]) {{
  %less = lt %x, %y
  %more = gt %x, %y
  %most = maximum %x, %y
  %least = minimum %x, %y
  %sum = add %x, %y
  %product = mul %x, %y
  %kept = where %less, %sum, %product
  return %less as "less", %more as "more", %most as "most", %least as "least", %kept as "kept"{more}
}}"""
SUMS = """
  %along = cumsum %m {axis=1}
  %total = sum %m {axes=[0]}
  %turned = sub %m, %along
  %top = amax %turned {axes=[1]}"""
WHOLE = """(%x: i64[4], %y: i64[4], %z: i64[4]) {
  %d = div %x, %y
  %r = remainder %x, %y
  %never = div %x, %z
  return %d as "d", %r as "r", %never as "never"
}"""
PARTS = "(%x: f32[5], %y: f32[5]) { %r = remainder %x, %y\n return %r }"


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        pytest.param(d, b, marks=pytest.mark.exhaustive if b == "triton" and d != "i8" else ())
        for d in ("bool", "u8", "i8", "i16", "i32") for b in BACKENDS[1:]
    ],
)  # fmt: skip
def test_short_integers_wrap_and_truth_values_are_ordered(dtype: str, backend: str) -> None:
    sums = "" if dtype == "bool" else SUMS
    names = "".join(f', %{n} as "{n}"' for n in ("along", "total", "turned", "top") if sums)
    text = SHORT.format(t=dtype, more=names).replace("\n  return", f"{sums}\n  return")
    traced = program({"main": text})
    kind = traced.entries["main"].inputs[0].type.dtype.torch
    x = torch.tensor([0, 1, 1, 100, 127, -128]).to(kind)
    y = torch.tensor([1, 0, 1, 100, 3, -128]).to(kind)
    given = {"x": x, "y": y, "m": x.reshape(2, 3)}
    right = Interpreter(traced).run("main", given)
    for level in (0, 3):
        found = made(traced, backend, level).run(given)
        assert {k: v.tolist() for k, v in found.items()} == {
            k: v.tolist() for k, v in right.items()
        }


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_no_divisor_ends_the_process(backend: str) -> None:
    lowest = -(2**63)
    given = {"x": torch.tensor([lowest, 5, -5, 7]), "y": torch.tensor([-1, 1, 2, 3])}
    found = made(program({"main": WHOLE}), backend).run(
        given | {"z": torch.zeros(4, dtype=torch.int64)}
    )
    assert found["d"].tolist() == [lowest, 5, -3, 2]
    assert found["r"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_remainders_are_exact_whatever_the_quotient(backend: str) -> None:
    x = torch.tensor([1e8, -3e9, 7, -7, 6])
    y = torch.tensor([3.0, 11, float("inf"), float("inf"), -4])
    found = made(program({"main": PARTS}), backend).run({"x": x, "y": y})
    assert found["r"].tolist() == [1, 3, 7, float("inf"), -2]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("i64", "9007199254740993"), ("i64", "9223372036854775807"), ("i64", "1.5"),
        ("i64", "inf"), ("i32", "2147483648"), ("i8", "128"), ("u8", "-1"), ("bool", "2"),
    ],
)  # fmt: skip
def test_a_constant_that_its_type_does_not_hold_is_refused(dtype: str, value: str) -> None:
    with pytest.raises(ParseError, match=r"not a number that fp64 holds|is no (i|u|b)"):
        program(
            {"main": f"() {{ %c = full {{shape=[2], value={value}, dtype={dtype}}}\n return %c }}"}
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fp64_does_not_hold_is_computed_exactly(backend: str) -> None:
    text = """(%x: i64[2]) {
      %c = full {shape=[], value=9007199254740992, dtype=i64}
      %one = full {shape=[], value=1, dtype=i64}
      %d = add %c, %one
      %y = add %x, %d
      %z = maximum %y, %x
      return %z
    }"""
    for level in (0, 3):
        found = made(program({"main": text}), backend, level)
        z = found.run({"x": torch.tensor([0, -4])})["z"]
        assert z.tolist() == [2**53 + 1, 2**53 - 3]


@pytest.mark.parametrize("op", ["softmax %x", "swiglu %x, %x", "mean %x {axes=[0]}", "exp %x"])
def test_what_is_of_floats_alone_refuses_integers(op: str) -> None:
    with pytest.raises(ParseError, match="i32; cast to a float type first"):
        program({"main": f"(%x: i32[3]) {{ %y = {op}\n return %y }}"})
