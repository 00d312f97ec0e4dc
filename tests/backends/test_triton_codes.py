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
from dsc.ir.program import Program
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.backends.triton_coded import Case, assembly, expected, inputs, loaded, program

pytest.importorskip("triton")

NEAR = 2e-2
"""A code more or less where sums have another order, on logits of size 1."""
ROWS = '{activations="f8e4m3:128"}'


def _linear(weight: str, rows: int, columns: int, depth: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[{columns},{depth}]",),
        {"x": f"{dtype}[{rows},{depth}]"},
        "%y = linear %x, %w",
        f"{dtype}[{rows},{columns}]",
    )


def _grouped(weight: str, rows: int, columns: int, depth: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[3,{columns},{depth}]",),
        {"x": f"{dtype}[{rows},{depth}]", "offsets": "i64[4]"},
        "%y = grouped_linear %x, %w, %offsets",
        f"{dtype}[{rows},{columns}]",
    )


def _experts(weight: str, tokens: int, width: int, inner: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[3,{2 * inner},{width}]", f"{weight}[3,{width},{inner}]"),
        {"x": f"{dtype}[{tokens},{width}]", "i": f"i64[{tokens},2]", "s": f"f32[{tokens},2]"},
        "%y = experts %x, %i, %s, %w, %v",
        f"{dtype}[{tokens},{width}]",
    )


def _coded(case: Case, rows: str = "f8e4m3:128") -> Case:
    return replace(case, call=f'{case.call} {{activations="{rows}"}}')


def _taken(weight: str, rows: int) -> Case:
    """Of each of two sequences of 40 rows some, of 3 that are taken again and again."""
    return Case(
        (f"{weight}[150,140]",), {"x": "f32[2,40,140]", "at": f"i64[2,{rows}]"},
        f"""%a = select_rows %x, %at : f32[2,{rows},140]
        %y = linear %a, %w {ROWS}""",
        f"f32[2,{rows},150]",
    )  # fmt: skip


def _cached(
    codes: str, call: str, result: str, dtype: str = "f32", width: int = 130, rows: str = "2,40"
) -> Case:
    """Attention of 2 sequences of 3 new tokens and 4 heads over a cache of 40 rows."""
    shapes = {
        "q": f"[2,3,4,{width}]", "n": "[2,3,4,16]", "r": "[2,3,4,8]", "new": f"[2,3,{width}]",
        "rope": f"[{rows},8]", "kv_b": f"[112,{width}]",
    }  # fmt: skip
    given = {name: f"{dtype}{shape}" for name, shape in shapes.items() if f"%{name}," in call}
    given |= {"cache": f"{codes}[{rows},{width}]", "lengths": "i64[2]"}
    given |= {"table": "i64[2,3]"} if "%table" in call else {}
    return Case((), given, call, result, ' as "y" updates %cache' * (result == given["cache"]))


WRITE = "%y = cache_write %cache, %new, %lengths"
ABSORBED = "%y = latent_attention %q, %r, %cache, %rope, %lengths {scale=0.1}"
EXPANDED = "%y = mla_attention %n, %r, %cache, %rope, %kv_b, %lengths {scale=0.1}"
IN_PAGES = [call.replace("%lengths", "%lengths, %table") for call in (WRITE, ABSORBED, EXPANDED)]
F8_CACHE, I8_CACHE = (f"{codes}{{1x128,f32,behind}}" for codes in ("f8e4m3", "i8"))


def _table(weight: str, width: int) -> Case:
    call, result = "%y = embedding %i, %w", f"f32[2,3,{width}]"
    return Case((f"{weight}[9,{width}]",), {"i": "i64[2,3]"}, call, result)


def _halves(weight: str, eq: str, q: str, w: str, result: str) -> Case:
    return Case(
        (f"{weight}[{w}]",), {"x": f"f32[{q}]"}, f'%y = einsum %x, %w {{eq="{eq}"}}',
        f"f32[{result}]",
    )  # fmt: skip


CASES = {
    "i8_rows": _linear("i8{1x32,f16}", 5, 70, 200),
    "i8_bf16": _linear("i8{1x32,f16}", 3, 40, 96, "bf16"),
    "i8_odd_groups": _linear("i8{1x24,f16}", 3, 33, 100),
    "i8_zeros": _linear("i8{1x64,bf16,i8}", 2, 20, 130),
    "i8_whole": _linear("i8{1x*,f32}", 2, 40, 100),
    "i8_one": _linear("i8{*x*,f32}", 2, 40, 100),
    "i4": _linear("i4{1x32,f16}", 5, 70, 200),
    "i4_zeros": _linear("i4{1x128,f16,i8}", 2, 33, 264, "bf16"),
    "f8": _linear("f8e4m3{128x128,f32}", 4, 190, 300),
    "f8_bf16": _linear("f8e4m3{128x128,f32}", 70, 130, 200, "bf16"),
    "f8_small": _linear("f8e4m3{16x16,f32}", 3, 40, 72),
    "k_halves": _halves("f8e4m3{32x64,f32}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "v_halves": _halves("f8e4m3{32x64,f32}", "bshc,hdc->bshd", "1,2,3,70", "3,32,70", "1,2,3,32"),
    "k_integers": _halves("i8{1x32,f16}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "k_nibbles": _halves("i4{1x32,f16}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "rows_f8": _coded(_linear("f8e4m3{128x128,f32}", 4, 190, 300)),
    "rows_f8_bf16": _coded(_linear("f8e4m3{128x128,f32}", 5, 130, 256, "bf16")),
    "rows_f8_many": _coded(_linear("f8e4m3{128x128,f32}", 70, 130, 300)),
    "rows_f8_whole": _coded(_linear("f8e4m3{1x*,f8e8m0}", 70, 33, 300)),
    "rows_f8_powers": _coded(_linear("f8e4m3{128x128,f8e8m0}", 3, 40, 300), "f8e4m3:128:f8e8m0"),
    "rows_f8_fine": _coded(_linear("f8e4m3{16x16,f32}", 70, 33, 72)),
    "rows_f8_narrow": _coded(_linear("f8e4m3{128x128,f32}", 3, 33, 130), "f8e4m3:32"),
    "rows_f8_taken": _taken("f8e4m3{128x128,f32}", 5),
    "rows_f8_many_taken": _taken("f8e4m3{128x128,f32}", 35),
    "grouped_rows_f8": _coded(_grouped("f8e4m3{128x128,f32}", 11, 150, 140)),
    "grouped_rows_f8_many": _coded(_grouped("f8e4m3{128x128,f32}", 81, 150, 140)),
    "write_f8": _cached(F8_CACHE, WRITE, f"{F8_CACHE}[2,40,130]"),
    "write_i8": _cached(I8_CACHE, WRITE, f"{I8_CACHE}[2,40,130]"),
    "write_bf16": _cached(F8_CACHE, WRITE, f"{F8_CACHE}[2,40,30]", "bf16", 30),
    "absorbed_f8": _cached(F8_CACHE, ABSORBED, "bf16[2,3,4,130]", "bf16"),
    "absorbed_i8": _cached(I8_CACHE, ABSORBED, "f32[2,3,4,130]"),
    "expanded_f8": _cached(F8_CACHE, EXPANDED, "f32[2,3,4,12]"),
    "expanded_i8": _cached(I8_CACHE, EXPANDED, "f32[2,3,4,12]", width=30),
    "pages_write_f8": _cached(F8_CACHE, IN_PAGES[0], f"{F8_CACHE}[7,16,130]", rows="7,16"),
    "pages_absorbed_f8": _cached(F8_CACHE, IN_PAGES[1], "bf16[2,3,4,130]", "bf16", rows="7,16"),
    "pages_absorbed_i8": _cached(I8_CACHE, IN_PAGES[1], "f32[2,3,4,130]", rows="7,32"),
    "pages_expanded_i8": _cached(I8_CACHE, IN_PAGES[2], "f32[2,3,4,12]", width=30, rows="7,16"),
    "rows_i4": _coded(_linear("i4{1x32,f16}", 4, 40, 100), "i8:32"),
    "rows_i4_many": _coded(_linear("i4{1x128,f16}", 70, 40, 300, "bf16"), "i8:128"),
    "rows_i8": _coded(_linear("i8{1x32,f16}", 3, 40, 96), "i8:32"),
    "rows_i8_zeros": _coded(_linear("i8{1x32,f16,i8}", 3, 40, 96), "i8:32"),
    "rows_i8_by_f8": _coded(_linear("f8e4m3{128x128,f32}", 3, 40, 130), "i8:64"),
    "experts_rows_i4": _coded(_experts("i4{1x32,f16}", 3, 80, 40), "i8:32"),
    "grouped_rows_i4": _coded(_grouped("i4{1x32,f16}", 11, 40, 70), "i8:32"),
    "experts_i8": _experts("i8{1x32,f16}", 3, 70, 33),
    "experts_i4": _experts("i4{1x32,f16}", 3, 72, 34, "bf16"),
    "experts_f8": _experts("f8e4m3{128x128,f32}", 3, 150, 140),
    "experts_rows": _coded(_experts("f8e4m3{128x128,f32}", 1, 300, 140)),
    "experts_fine": _coded(_experts("f8e4m3{16x16,f32}", 3, 80, 40)),
    "table_i8": _table("i8{1x32,f16}", 70),
    "table_i4": _table("i4{1x32,f16,i8}", 40),
    "table_f8": _table("f8e4m3{128x128,f32}", 150),
    "grouped_i8": _grouped("i8{1x32,f16}", 11, 40, 70),
    "grouped_i4": _grouped("i4{1x32,f16}", 11, 40, 70),
    "grouped_f8": _grouped("f8e4m3{128x128,f32}", 11, 150, 140),
}  # fmt: skip

PRODUCED = {
    "norm": Case(
        ("f8e4m3{128x128,f32}[40,256]", "f8e4m3{128x128,f32}[24,256]"),
        {"x": "bf16[1,70,256]", "g": "bf16[256]"},
        f"""%a = rms_norm %x, %g {{eps=1e-06}} : bf16[1,70,256]
        %b = linear %a, %w {ROWS} : bf16[1,70,40]
        %c = linear %a, %v {ROWS} : bf16[1,70,24]
        %y = concat %b, %c {{axis=2}}""",
        "bf16[1,70,64]",
    ),
    "norm_and_reader": Case(
        ("f8e4m3{128x128,f32}[256,256]",), {"x": "f32[70,256]", "g": "f32[256]"},
        f"""%a = rms_norm %x, %g {{eps=1e-06}} : f32[70,256]
        %b = linear %a, %w {ROWS} : f32[70,256]
        %y = add %a, %b""",
        "f32[70,256]",
    ),
    "swiglu": Case(
        ("f8e4m3{128x128,f32}[3,512,256]", "f8e4m3{128x128,f32}[3,40,256]"),
        {"x": "f32[80,256]", "offsets": "i64[4]"},
        f"""%a = grouped_linear %x, %w, %offsets {ROWS} : f32[80,512]
        %b, %c = split %a {{axis=1, sizes=[256,256]}} : f32[80,256], f32[80,256]
        %d = swiglu %b, %c : f32[80,256]
        %y = grouped_linear %d, %v, %offsets {ROWS}""",
        "f32[80,40]",
    ),
    "gated": Case(
        ("f8e4m3{128x128,f32}[3,512,256]", "f8e4m3{128x128,f32}[3,40,256]"),
        {"x": "f32[80,256]", "offsets": "i64[4]"},
        f"""%a = fused %x, %w, %offsets {{body=graph body(%x: f32[80,256],
            %u: f8e4m3{{128x128,f32}}[3,512,256], %offsets: i64[4]) {{
          %b = grouped_linear %x, %u, %offsets {ROWS}
          %c, %d = split %b {{axis=1, sizes=[256,256]}}
          %e = swiglu %c, %d
          return %e
        }}}} : f32[80,256]
        %y = grouped_linear %a, %v, %offsets {ROWS}""",
        "f32[80,40]",
    ),
    "halves": Case(
        ("f8e4m3{128x128,f32}[40,256]", "bf16[2,128,32]"), {"x": "bf16[1,70,2,32]"},
        f"""%a = einsum %x, %v {{eq="bshc,hdc->bshd"}} : bf16[1,70,2,128]
        %b = reshape %a {{shape=[1,70,256]}} : bf16[1,70,256]
        %y = linear %b, %w {ROWS}""",
        "bf16[1,70,40]",
    ),
    "taken": Case(
        ("f8e4m3{128x128,f32}[40,256]", "bf16[2,128,32]"),
        {"x": "bf16[2,40,2,32]", "at": "i64[2,3]", "r": "bf16[2,40,40]"},
        f"""%a = einsum %x, %v {{eq="bshc,hdc->bshd"}} : bf16[2,40,2,128]
        %b = reshape %a {{shape=[2,40,256]}} : bf16[2,40,256]
        %c = select_rows %b, %at : bf16[2,3,256]
        %d = select_rows %r, %at : bf16[2,3,40]
        %y = fused %c, %w, %d {{body=graph body(%c: bf16[2,3,256],
            %u: f8e4m3{{128x128,f32}}[40,256], %d: bf16[2,3,40]) {{
          %e = linear %c, %u {ROWS}
          %f = add %d, %e
          return %f
        }}}}""",
        "bf16[2,3,40]",
    ),
    "flash": Case(
        ("f8e4m3{128x128,f32}[40,256]",),
        {"q": "bf16[2,40,2,16]", "k": "bf16[2,40,2,16]", "v": "bf16[2,40,2,128]"},
        f"""%a = attention %q, %k, %v {{scale=0.2, causal=true}} : bf16[2,40,2,128]
        %b = reshape %a {{shape=[2,40,256]}} : bf16[2,40,256]
        %y = linear %b, %w {ROWS}""",
        "bf16[2,40,40]",
    ),
}  # fmt: skip
"""Rows that become codes where they are computed."""
CASES |= PRODUCED
CONVERTED = (
    "f8_bf16", "rows_f8_bf16", "rows_f8_many", "rows_f8_fine", "experts_rows", "absorbed_f8",
    "pages_absorbed_f8",
)  # fmt: skip
"""Cases whose kernels differ by what the target itself converts and multiplies."""
BLOCKS = "f8e4m3{128x128,f32}"
COMPILED = {
    "many": (
        _coded(_linear(BLOCKS, 200, 256, 256, "bf16")),
        {
            "cuda:sm_80": "mma.sync.*f16.f16",
            "cuda:sm_90": "wgmma.*e4m3.e4m3",
            "cuda:sm_100": "tcgen05.mma.*f8f6f4",
            "hip:gfx942": "v_mfma.*fp8_fp8",
            "hip:gfx950": "v_mfma.*f8f6f4",
        },
    ),
    "few": (
        _coded(_linear(BLOCKS, 4, 256, 256, "bf16")),
        {
            "cuda:sm_80": "mma.sync.*f16.f16",
            "cuda:sm_90": "mma.sync.*f16.f16",
            "cuda:sm_100": "mma.sync.*f16.f16",
            "hip:gfx942": "v_mfma.*fp8_fp8",
            "hip:gfx950": "v_mfma.*f8f6f4",
        },
    ),
    "table": (_table(BLOCKS, 256), {}),
    "widened": (_cached(F8_CACHE, EXPANDED, "bf16[2,3,4,12]", "bf16"), {}),
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


def check(made: Program, executable: Any, name: str) -> None:
    """Hold a case against the interpreter of the IR; caches are to have the same bytes."""
    given = inputs(CASES[name])
    wanted = expected(made, name, {k: v.clone() for k, v in given.items()})
    (found,) = executable.run(name, given).values()
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if found.dtype is torch.uint8:
        assert torch.equal(found, wanted)
        return
    off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert off < (2**-6 if found.dtype is torch.bfloat16 else 2**-20), off


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
