"""Attention of every backend against a plain formula in fp64, with all of its attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsc.ir.interpreter import run_graph
from dsc.ir.types import DType
from dsc.runtime.executable import Executable, set_threads
from tests.backends.attention_cases import (
    CASES,
    TOLERANCE,
    Case,
    error,
    formula,
    loaded,
    of_types,
)

TYPED = [*of_types(CASES, DType.f32, DType.bf16), *of_types(CASES[8:9], DType.f16)]
PORTABLE = [
    c for c in of_types(CASES, DType.f32) if c.page or c.attrs.keys() & {"chunk", "softcap"}
]
"""Chunks, caps, sinks and windows with and without pages, in fp32."""
IN_ORDER = [c for c in of_types(CASES, DType.f32) if not c.page]


def check(case: Case, model: Executable) -> None:
    given = case.inputs()
    got = model.run(case.id, {k: x.clone() for k, x in given.items()})["y"]
    found = error(got, formula(given, **case.attributes()))
    assert found <= TOLERANCE[case.dtype], f"{found:.2e}"


@pytest.mark.parametrize("case", TYPED, ids=lambda c: c.id)
def test_the_reference_is_the_formula(case: Case) -> None:
    given = case.inputs()
    operands = [given[v.name] for v in case.graph().inputs]
    (got,) = run_graph(case.graph(), operands)
    assert error(got, formula(given, **case.attributes())) <= TOLERANCE[case.dtype]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    pytest.importorskip("tvm")
    return loaded("tvm", TYPED, tmp_path_factory.mktemp("attention") / "out")


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    pytest.importorskip("tvm")
    return loaded("tvm", PORTABLE, tmp_path_factory.mktemp("portable") / "out", "cpu:x86-64")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    pytest.importorskip("onnxruntime")
    return loaded("onnxruntime", IN_ORDER, tmp_path_factory.mktemp("onnx") / "out")


@pytest.mark.parametrize("case", TYPED, ids=lambda c: c.id)
def test_a_kernel_is_the_formula(case: Case, kernels: Executable) -> None:
    check(case, kernels)


@pytest.mark.parametrize("case", PORTABLE, ids=lambda c: c.id)
def test_a_portable_kernel_is_the_formula(case: Case, portable: Executable) -> None:
    check(case, portable)


@pytest.mark.parametrize("case", IN_ORDER, ids=lambda c: c.id)
def test_onnx_operators_are_the_formula(case: Case, onnx: Executable) -> None:
    check(case, onnx)


def other_calls(case: Case) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The call without its sinks, and with another window, chunk or cap, as far as it has these."""
    given, attrs = case.inputs(), case.attributes()
    changed = []
    if case.sinks and case.total:
        changed.append(({k: x for k, x in given.items() if k != "sinks"}, attrs))
    for name, step in (("window", 1), ("window", -1), ("chunk", 1), ("softcap", 0.5)):
        if attrs.get(name, 0) > 1:
            changed.append((given, attrs | {name: attrs[name] + step}))
    return changed


@pytest.mark.parametrize("case", [c for c in TYPED if other_calls(c)], ids=lambda c: c.id)
def test_a_lost_term_is_seen(case: Case, kernels: Executable) -> None:
    """The same kernels held against the formula of another call."""
    got = kernels.run(case.id, {k: x.clone() for k, x in case.inputs().items()})["y"]
    for operands, others in other_calls(case):
        assert error(got, formula(operands, **others)) > TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [c for c in TYPED if c.batch > 1], ids=lambda c: c.id)
def test_a_sequence_is_the_same_alone_and_on_any_threads(case: Case, kernels: Executable) -> None:
    given = case.inputs()
    several = kernels.run(case.id, given)["y"]
    set_threads(kernels, 2, None)
    try:
        assert torch.equal(kernels.run(case.id, given)["y"], several)
    finally:
        set_threads(kernels, 1, None)
    turned = {k: x if (case.page and k in ("k", "v")) or k == "sinks" else x.flip(0)
              for k, x in given.items()}  # fmt: skip
    assert torch.equal(kernels.run(case.id, turned)["y"], several.flip(0))
