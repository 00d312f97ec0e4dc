"""Products over weights in codes on triton: in the interpreter against the IR's, and compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc.backends.triton.program import lower_program
from dsc.ir.formats import SCALE_FMT, UE8M0
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.backends.triton_coded import assembly, loaded, program
from tests.backends.triton_coded_cases import (
    CASES,
    EXPANDED,
    F8_CACHE,
    PRODUCED,
    cached,
    check,
    coded,
    linear,
    table,
)

pytest.importorskip("triton")

NEAR = 2e-2
"""A code more or less where sums have another order, on logits of size 1."""


CONVERTED = (
    "f8_bf16", "rows_f8_bf16", "rows_f8_many", "rows_f8_fine", "experts_rows", "absorbed_f8",
    "pages_absorbed_f8",
)  # fmt: skip
"""Cases whose kernels differ by what the target itself converts and multiplies."""
BLOCKS = "f8e4m3{128x128,f32}"
COMPILED = {
    "many": (
        coded(linear(BLOCKS, 200, 256, 256, "bf16")),
        {
            "cuda:sm_80": "mma.sync.*f16.f16",
            "cuda:sm_90": "wgmma.*e4m3.e4m3",
            "cuda:sm_100": "tcgen05.mma.*f8f6f4",
            "hip:gfx942": "v_mfma.*fp8_fp8",
            "hip:gfx950": "v_mfma.*f8f6f4",
        },
    ),
    "few": (
        coded(linear(BLOCKS, 4, 256, 256, "bf16")),
        {
            "cuda:sm_80": "mma.sync.*f16.f16",
            "cuda:sm_90": "mma.sync.*f16.f16",
            "cuda:sm_100": "mma.sync.*f16.f16",
            "hip:gfx942": "v_mfma.*fp8_fp8",
            "hip:gfx950": "v_mfma.*f8f6f4",
        },
    ),
    "w4a8": (
        coded(linear("i4{1x128,f16}", 200, 256, 256, "bf16"), "i8:128"),
        {
            "cuda:sm_80": "mma.sync.*s8.s8",
            "cuda:sm_90": "wgmma.*s8.s8",
            "cuda:sm_100": "tcgen05.mma.*i8",
            "hip:gfx942": "v_mfma_i32.*i8",
            "hip:gfx950": "v_mfma_i32.*i8",
        },
    ),
    "table": (table(BLOCKS, 256), {}),
    "widened": (cached(F8_CACHE, EXPANDED, "bf16[2,3,4,12]", "bf16"), {}),
}
"""What is compiled: of products of rows in codes with the instructions that multiply them."""


@pytest.fixture(scope="module")
def made() -> Program:
    return program(CASES)


@pytest.fixture(scope="module")
def interpreted(made: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    executable = loaded(made, tmp_path_factory.mktemp("codes"))
    yield executable
    executable.close()


@pytest.mark.parametrize("name", CASES)
def test_codes_are_the_numbers_that_the_interpreter_unpacks(
    made: Program, interpreted: Any, name: str
) -> None:
    check(made, interpreted, name)


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_codes_that_a_target_converts_are_the_same_numbers(target: str, tmp_path: Path) -> None:
    some = {name: case for name, case in CASES.items() if name in CONVERTED}
    made = program(some)
    executable = loaded(made, tmp_path, target)
    for name in some:
        check(made, executable, name)
    executable.close()


def test_what_computes_rows_makes_their_codes() -> None:
    for target in ("interpret", "cuda:sm_90"):
        lowered, _ = lower_program(program(PRODUCED), target)
        for name, entry in lowered.entries.items():
            kernels = [lowered.kernels[launch.kernel].function for launch in entry.launches]
            apart = [k for k in kernels if k.startswith("quantise_rows")]
            assert len(apart) == (name in ("swiglu", "gated")), f"{name} on {target}: {kernels}"


@pytest.mark.parametrize(
    "target",
    [
        "cuda:sm_90",
        *(
            pytest.param(target, marks=pytest.mark.exhaustive)
            for target in ("cuda:sm_80", "cuda:sm_100", "hip:gfx942", "hip:gfx950")
        ),
    ],
)
def test_codes_are_multiplied_by_the_units_for_them(target: str, tmp_path: Path) -> None:
    some = {name: case for name, (case, wanted) in COMPILED.items() if wanted}
    found = assembly(program(some), target, tmp_path)
    for name in some:
        wanted = COMPILED[name][1][target]
        assert re.search(wanted, found[name]), f"no {wanted} of {name} on {target}"


@pytest.mark.parametrize(
    ("quant", "kept"),
    [("fp8", "fp8"), pytest.param("int4", "int8", marks=pytest.mark.exhaustive)],
)
def test_a_language_model_in_codes_says_what_its_program_says(quant: str, kept: str) -> None:
    """Prefill in two steps, and a step of one token, over caches in codes."""
    found = []
    for backend, more in (("triton", {"compile": False}), ("reference", {})):
        made = dsc.compile(
            canonical_lm(Sizes(layers=1, dense=0), 2, 32), backend=backend, quant=quant,
            cache_format=kept, max_batch=2, max_context=32, prefill_chunk=4, backend_options=more,
        )  # fmt: skip
        session = made.session(2)
        logits = [session.prefill(torch.arange(10).reshape(2, 5), lengths=[5, 3])]
        found.append(torch.stack([*logits, session.decode(torch.tensor([7, 9]))]))
    assert (found[0] - found[1]).abs().max() < NEAR
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))


@pytest.mark.parametrize("said", ["float32", UE8M0])
def test_rows_have_powers_of_two_where_a_checkpoint_was_trained_so(said: str) -> None:
    """DeepSeek-V3.1: scales of weights are powers of two, stored in fp32."""
    model = canonical_lm(Sizes(layers=1, dense=0), 2, 32)
    made = dsc.compile(
        replace(model, meta={**model.meta, SCALE_FMT: said}), backend="triton", quant="fp8",
        max_batch=2, max_context=32, backend_options={"compile": False},
    )  # fmt: skip
    rows = "f8e4m3:128:f8e8m0" if said == UE8M0 else "f8e4m3:128"
    assert set(re.findall('activations="(.*?)"', print_program(made.program))) == {rows}
