"""Every TVM kernel against its operator's reference, at a decode step's and at ragged sizes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dsc import pipeline
from dsc.api import compile_program
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.backends.tvm import machine as machines
from dsc.backends.tvm.machine import machine_for
from dsc.backends.tvm.tuning import WAYS, Tiling, ways
from dsc.ir.interpreter import run_graph
from dsc.ir.parser import parse_program
from dsc.rewrite.verify import same_bits
from dsc.runtime.executable import Executable, set_threads
from dsc.targets import parse_target
from tests.backends.tvm_bounds import RULES, excess
from tests.backends.tvm_cases import POINTS, WIDE, Case, cases, program

pytest.importorskip("tvm")
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}
"""Largest |difference| relative to the largest |value|, or to 1. In bf16 one step of the last place
is 2^-8 = 4e-3; a kernel may round where the reference does not, and the other way round."""
EXACT = frozenset(
    {"embedding", "append", "cache_write", "select_rows", "cast", "full", "arange", "permute"}
    | {"expand", "slice", "concat", "stack", "split", "gather", "take", "amax", "amin", "argmax"}
    | {"maximum", "minimum", "where", "dispatch", "neg", "abs", "relu", "topk", "lt", "eq", "ne"}
    | {"logical_and", "logical_or", "logical_not"}
)
"""Operators that place, choose or round once: every bit must be the reference's."""
IN_FP32 = frozenset({"route"})
"""Operators whose results are fp32 whatever their operands are."""
FOUND = [case for dtype in TOLERANCE for case in cases(dtype)]


WIDE_ONLY = [c for c in cases("bf16") if c.op in WIDE and "_0_" not in c.id]
PRODUCTS = frozenset({"linear", "experts", "einsum", "grouped_linear"})
SAMPLED = [
    c for i, c in enumerate(WIDE_ONLY)
    if c.op in PRODUCTS or i % 3 == 0 or os.environ.get("DSC_EXHAUSTIVE")
]  # fmt: skip
"""Products, and of what else other machines and ways compute otherwise a third."""


def compiled(found: list[Case], target: str, folder: Path) -> Executable:
    """The kernels of some cases, built for a target."""
    planned = pipeline.apply(program(found), ["own_outputs"])
    emission = get("tvm").emit(planned, EmitOptions((parse_target(target),)))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return get("tvm").load(folder, {"meta": emission.meta, "weights": None}, planned)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    return compiled(FOUND, "cpu", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    return compiled(SAMPLED, "cpu:x86-64", tmp_path_factory.mktemp("portable"))


@pytest.fixture(scope="module", params=WAYS)
def by_way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Executable:
    """The products of bf16 by one of the ways that this machine has."""
    host = machine_for(parse_target("cpu"))
    if not host.bf16 or request.param not in ways(host):
        pytest.skip(f"this CPU does not multiply bf16 by {request.param}")
    if request.param == Tiling.of(host).way:  # the cases are compiled so already
        return request.getfixturevalue("loaded")  # type: ignore[no-any-return]
    chosen = replace(Tiling.of(host), way=request.param).on(host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machines, "machine_for", lambda target: chosen)
        model: Any = compiled(SAMPLED, "cpu", tmp_path_factory.mktemp(request.param))
    assert model.meta["tiling"]["way"] == request.param
    return cast("Executable", model)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest |difference| over max(1, |wanted|max)."""
    if wanted.numel() == 0:
        return 0.0
    scale = max(1.0, float(wanted.double().abs().max()))
    return float((got.double() - wanted.double()).abs().max()) / scale


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.id)
def test_kernel_matches_the_reference(case: Case, loaded: Executable) -> None:
    rounds = case.low_precision and case.op not in IN_FP32
    tolerance = TOLERANCE["bf16" if rounds else "f32"]
    if case.op in EXACT:
        tolerance = 0.0
    for env in POINTS:
        inputs = case.inputs(env)
        wanted = run_graph(case.graph, [x.clone() for x in inputs.values()])
        got = loaded.run(case.id, {k: x.clone() for k, x in inputs.items()})
        for (name, tensor), reference in zip(got.items(), wanted, strict=True):
            assert tensor.shape == reference.shape
            assert tensor.dtype == reference.dtype
            error = relative_error(tensor, reference)
            assert error <= tolerance, f"{name} at {env}: {error:.2e} > {tolerance}"


@pytest.mark.parametrize("case", [c for c in FOUND if c.op in RULES], ids=lambda case: case.id)
def test_errors_stay_within_their_bounds(case: Case, loaded: Executable) -> None:
    """Every element, against fp64, within what the kernel's sums and roundings allow."""
    (node,) = case.graph.nodes
    for env in POINTS:
        inputs = case.inputs(env)
        got = loaded.run(case.id, {k: x.clone() for k, x in inputs.items()})["y0"]
        if got.numel():
            assert excess(case.op, node.attrs, list(inputs.values()), got) <= 1


@pytest.mark.parametrize("op", ["linear", "grouped_linear", "einsum", "experts", "mla_attention"])
def test_bounds_see_a_lost_term(op: str, loaded: Executable) -> None:
    """The kernels on operands whose last term is 0, held against operands that have it."""
    for case in (c for c in FOUND if c.op == op and c.low_precision):
        (node,) = case.graph.nodes
        inputs = case.inputs(POINTS[1])
        first = next(iter(inputs))
        cut = inputs | {first: inputs[first].clone()}
        cut[first][..., -1] = 0
        got = loaded.run(case.id, cut)["y0"]
        assert excess(op, node.attrs, list(inputs.values()), got) > 1


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: case.id)
def test_portable_bf16_kernel_matches_the_reference(case: Case, portable: Executable) -> None:
    inputs = case.inputs(POINTS[1])
    wanted = run_graph(case.graph, [x.clone() for x in inputs.values()])
    got = portable.run(case.id, inputs)
    for tensor, reference in zip(got.values(), wanted, strict=True):
        assert relative_error(tensor, reference) <= TOLERANCE["bf16"]


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: case.id)
def test_every_way_to_multiply_matches_the_reference(case: Case, by_way: Executable) -> None:
    test_kernel_matches_the_reference(case, by_way)


@pytest.mark.parametrize("entry", [*(f"linear_{i}_bf16" for i in (1, 2, 3, 4)), "experts_1_bf16"])
def test_a_token_is_the_same_alone_and_in_a_batch(entry: str, by_way: Executable) -> None:
    """Each sum has one order, whatever the number of rows; so no bit depends on the batch."""
    case = next(c for c in FOUND if c.id == entry)
    inputs = case.inputs({"B": 1, "S": 23, "N": 23})
    rows = [v.name for v in case.graph.inputs if v.type.symbols]
    together = by_way.run(entry, inputs)["y0"].reshape(23, -1)
    for i in range(23):
        alone = {k: x.reshape(23, -1)[i : i + 1] for k, x in inputs.items() if k in rows}
        shaped = {k: x.reshape(1, 1, -1) if inputs[k].dim() == 3 else x for k, x in alone.items()}
        got = by_way.run(entry, inputs | shaped)["y0"]
        assert torch.equal(got.reshape(-1), together[i])


def test_one_and_two_threads_give_the_same_bits(loaded: Executable) -> None:
    """No sum is split by the number of threads."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    results: dict[int, list[torch.Tensor]] = {}
    for threads in (1, 2):
        set_threads(loaded, threads, None)
        runs = (loaded.run(case.id, case.inputs(POINTS[1])) for case in WIDE_ONLY)
        results[threads] = [y.clone() for made in runs for y in made.values()]
    set_threads(loaded, None, None)
    for one, two in zip(results[1], results[2], strict=True):
        assert same_bits(one, two)


def test_bf16_stores_round_ties_to_even(loaded: Executable) -> None:
    tie = 2.0**-8
    row = [1 + tie, 1 + 3 * tie, -1 - tie, 1 + tie * 1.01, 3.4e38, float("inf"), -0.0, 1e-40, 0.5]
    x = torch.tensor([row])
    got = loaded.run("cast_1_f32", {"x": x})["y0"]
    assert torch.equal(got.view(torch.int16), x.bfloat16().view(torch.int16))
    nan = loaded.run("cast_1_f32", {"x": torch.full((1, 9), float("nan"))})["y0"]
    assert bool(nan.isnan().all())


@pytest.mark.parametrize("op", ["permute", "concat", "split"])
def test_what_moves_elements_keeps_the_bits_of_a_nan(op: str, loaded: Executable) -> None:
    case = next(c for c in FOUND if c.id == f"{op}_0_bf16")
    inputs = case.inputs(POINTS[1])
    for x in inputs.values():
        x.view(torch.int16)[..., ::2] = 0x7FA5  # arithmetic would make it the quiet one
    wanted = run_graph(case.graph, [x.clone() for x in inputs.values()])
    for got, reference in zip(loaded.run(case.id, inputs).values(), wanted, strict=True):
        assert torch.equal(got.view(torch.int16), reference.view(torch.int16))


def test_no_division_of_integers_ends_the_process() -> None:
    """Neither by 0 nor of the least integer by -1, whose quotient no register holds."""
    text = """
    program "p" {stage=CANONICAL}
    graph main(%a: i64[8], %b: i64[8]) {
      %q = div %a, %b : i64[8]
      %r = remainder %a, %b : i64[8]
      return %q as "q", %r as "r"
    }
    """
    least = -(1 << 63)
    a, b = torch.tensor([[least, 7, -7, 9, 9, 0, 5, least], [-1, -1, 2, -2, 2, 3, 0, 0]])
    found = compile_program(parse_program(text), backend="tvm").run({"a": a, "b": b})
    assert found["q"][:6].tolist() == [least, -7, -4, -5, 4, 0]
    assert found["r"][:6].tolist() == [0, 0, 1, -1, 1, 0]
