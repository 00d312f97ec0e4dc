"""Products, caches and tables in codes over odd shapes: what triton's kernels are held to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dsc.ir.program import Program
from tests.backends.triton_coded import Case, expected, inputs

ROWS = '{activations="f8e4m3:128"}'


def linear(weight: str, rows: int, columns: int, depth: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[{columns},{depth}]",),
        {"x": f"{dtype}[{rows},{depth}]"},
        "%y = linear %x, %w",
        f"{dtype}[{rows},{columns}]",
    )


def grouped(weight: str, rows: int, columns: int, depth: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[3,{columns},{depth}]",),
        {"x": f"{dtype}[{rows},{depth}]", "offsets": "i64[4]"},
        "%y = grouped_linear %x, %w, %offsets",
        f"{dtype}[{rows},{columns}]",
    )


def experts(weight: str, tokens: int, width: int, inner: int, dtype: str = "f32") -> Case:
    return Case(
        (f"{weight}[3,{2 * inner},{width}]", f"{weight}[3,{width},{inner}]"),
        {"x": f"{dtype}[{tokens},{width}]", "i": f"i64[{tokens},2]", "s": f"f32[{tokens},2]"},
        "%y = experts %x, %i, %s, %w, %v",
        f"{dtype}[{tokens},{width}]",
    )


def coded(case: Case, rows: str = "f8e4m3:128") -> Case:
    return replace(case, call=f'{case.call} {{activations="{rows}"}}')


def taken(weight: str, rows: int) -> Case:
    """Of each of two sequences of 40 rows some, of 3 that are taken again and again."""
    return Case(
        (f"{weight}[150,140]",), {"x": "f32[2,40,140]", "at": f"i64[2,{rows}]"},
        f"""%a = select_rows %x, %at : f32[2,{rows},140]
        %y = linear %a, %w {ROWS}""",
        f"f32[2,{rows},150]",
    )  # fmt: skip


def cached(
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


def table(weight: str, width: int) -> Case:
    call, result = "%y = embedding %i, %w", f"f32[2,3,{width}]"
    return Case((f"{weight}[9,{width}]",), {"i": "i64[2,3]"}, call, result)


def halves(weight: str, eq: str, q: str, w: str, result: str) -> Case:
    return Case(
        (f"{weight}[{w}]",), {"x": f"f32[{q}]"}, f'%y = einsum %x, %w {{eq="{eq}"}}',
        f"f32[{result}]",
    )  # fmt: skip


CASES = {
    "i8_rows": linear("i8{1x32,f16}", 5, 70, 200),
    "i8_bf16": linear("i8{1x32,f16}", 3, 40, 96, "bf16"),
    "i8_odd_groups": linear("i8{1x24,f16}", 3, 33, 100),
    "i8_zeros": linear("i8{1x64,bf16,i8}", 2, 20, 130),
    "i8_whole": linear("i8{1x*,f32}", 2, 40, 100),
    "i8_one": linear("i8{*x*,f32}", 2, 40, 100),
    "i4": linear("i4{1x32,f16}", 5, 70, 200),
    "i4_zeros": linear("i4{1x128,f16,i8}", 2, 33, 264, "bf16"),
    "f8": linear("f8e4m3{128x128,f32}", 4, 190, 300),
    "f8_bf16": linear("f8e4m3{128x128,f32}", 70, 130, 200, "bf16"),
    "f8_small": linear("f8e4m3{16x16,f32}", 3, 40, 72),
    "k_halves": halves("f8e4m3{32x64,f32}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "v_halves": halves("f8e4m3{32x64,f32}", "bshc,hdc->bshd", "1,2,3,70", "3,32,70", "1,2,3,32"),
    "k_integers": halves("i8{1x32,f16}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "k_nibbles": halves("i4{1x32,f16}", "bshd,hdc->bshc", "1,2,3,32", "3,32,70", "1,2,3,70"),
    "rows_f8": coded(linear("f8e4m3{128x128,f32}", 4, 190, 300)),
    "rows_f8_bf16": coded(linear("f8e4m3{128x128,f32}", 5, 130, 256, "bf16")),
    "rows_f8_many": coded(linear("f8e4m3{128x128,f32}", 70, 130, 300)),
    "rows_f8_whole": coded(linear("f8e4m3{1x*,f8e8m0}", 70, 33, 300)),
    "rows_f8_powers": coded(linear("f8e4m3{128x128,f8e8m0}", 3, 40, 300), "f8e4m3:128:f8e8m0"),
    "rows_f8_fine": coded(linear("f8e4m3{16x16,f32}", 70, 33, 72)),
    "rows_f8_narrow": coded(linear("f8e4m3{128x128,f32}", 3, 33, 130), "f8e4m3:32"),
    "rows_f8_taken": taken("f8e4m3{128x128,f32}", 5),
    "rows_f8_many_taken": taken("f8e4m3{128x128,f32}", 35),
    "grouped_rows_f8": coded(grouped("f8e4m3{128x128,f32}", 11, 150, 140)),
    "grouped_rows_f8_many": coded(grouped("f8e4m3{128x128,f32}", 81, 150, 140)),
    "write_f8": cached(F8_CACHE, WRITE, f"{F8_CACHE}[2,40,130]"),
    "write_i8": cached(I8_CACHE, WRITE, f"{I8_CACHE}[2,40,130]"),
    "write_bf16": cached(F8_CACHE, WRITE, f"{F8_CACHE}[2,40,30]", "bf16", 30),
    "absorbed_f8": cached(F8_CACHE, ABSORBED, "bf16[2,3,4,130]", "bf16"),
    "absorbed_i8": cached(I8_CACHE, ABSORBED, "f32[2,3,4,130]"),
    "expanded_f8": cached(F8_CACHE, EXPANDED, "f32[2,3,4,12]"),
    "expanded_i8": cached(I8_CACHE, EXPANDED, "f32[2,3,4,12]", width=30),
    "pages_write_f8": cached(F8_CACHE, IN_PAGES[0], f"{F8_CACHE}[7,16,130]", rows="7,16"),
    "pages_absorbed_f8": cached(F8_CACHE, IN_PAGES[1], "bf16[2,3,4,130]", "bf16", rows="7,16"),
    "pages_absorbed_i8": cached(I8_CACHE, IN_PAGES[1], "f32[2,3,4,130]", rows="7,32"),
    "pages_expanded_i8": cached(I8_CACHE, IN_PAGES[2], "f32[2,3,4,12]", width=30, rows="7,16"),
    "rows_i4": coded(linear("i4{1x32,f16}", 4, 40, 100), "i8:32"),
    "rows_i4_many": coded(linear("i4{1x128,f16}", 70, 40, 300, "bf16"), "i8:128"),
    "rows_i8": coded(linear("i8{1x32,f16}", 3, 40, 96), "i8:32"),
    "rows_i8_zeros": coded(linear("i8{1x32,f16,i8}", 3, 40, 96), "i8:32"),
    "rows_i8_by_f8": coded(linear("f8e4m3{128x128,f32}", 3, 40, 130), "i8:64"),
    "experts_rows_i4": coded(experts("i4{1x32,f16}", 3, 80, 40), "i8:32"),
    "grouped_rows_i4": coded(grouped("i4{1x32,f16}", 11, 40, 70), "i8:32"),
    "experts_i8": experts("i8{1x32,f16}", 3, 70, 33),
    "experts_i4": experts("i4{1x32,f16}", 3, 72, 34, "bf16"),
    "experts_f8": experts("f8e4m3{128x128,f32}", 3, 150, 140),
    "experts_rows": coded(experts("f8e4m3{128x128,f32}", 1, 300, 140)),
    "experts_fine": coded(experts("f8e4m3{16x16,f32}", 3, 80, 40)),
    "table_i8": table("i8{1x32,f16}", 70),
    "table_i4": table("i4{1x32,f16,i8}", 40),
    "table_f8": table("f8e4m3{128x128,f32}", 150),
    "grouped_i8": grouped("i8{1x32,f16}", 11, 40, 70),
    "grouped_i4": grouped("i4{1x32,f16}", 11, 40, 70),
    "grouped_f8": grouped("f8e4m3{128x128,f32}", 11, 150, 140),
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


def check(made: Program, executable: Any, name: str, exact: float = 2**-20) -> None:
    """Hold a case against the interpreter of the IR; caches are to have the same bytes.

    `exact` is what fp32 may be off by, as a share of the largest number.
    """
    given = inputs(CASES[name])
    wanted = expected(made, name, {k: v.clone() for k, v in given.items()})
    (found,) = executable.run(name, given).values()
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if found.dtype is torch.uint8:
        assert torch.equal(found, wanted)
        return
    off = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert off < (2**-6 if found.dtype is torch.bfloat16 else exact), off
