"""Products of codes: 16 columns of a result a vector, four of their codes a lane.

Weights lie 16 rows side by side (`dsc.ir.formats`), so a vector of 64 bytes holds four codes of
each of 16 columns, and four codes of a row of x in all lanes are what they are multiplied by. No
sum is ever taken across lanes. Codes of weights are unsigned here: 8-bit ones with their highest
bit turned over, 4-bit ones as they are stored, so that each is too large by 128 or by 8; what that
adds to a sum is as much times the sum of the codes of x, which is what sums begin with.

    dot4      acc + a0 b0 + a1 b1 + a2 b2 + a3 b3 in each lane; a unsigned, b signed bytes
    join      two vectors of 16 numbers as 32 bytes; `even_first`: of eight the even ones first,
              the order in which bytes of two 4-bit codes give them
    nearest   floats to the nearest integers, to even, of at most 127; NaN to 0
    largest   the largest magnitude of two vectors; NaN where there is one
    total     the sum of all lanes of two vectors

How `dot4` is done is the machine's affair (`byte_products`); the numbers are the same. Where it
takes signed bytes as they are, codes of 8 bits stay so.

FP8 codes (e4m3) are numbers of bf16, and of fp32:

    low, high     the 64 codes of a vector as two of bf16: of columns 0 and 1, and 2 and 3, of each
                  four, four codes a column. Tables in registers (AVX512_VBMI) give both bytes.
    gathered      sums over such pairs of lanes, in the order of columns
    from_f8       a byte a lane as fp32

Where there are no such tables but a conversion of fp16, a code moved by its sign is 2^-8 times its
number in fp16, subnormal ones too:

    of_f8         the 64 codes of a vector as four of fp32: of the first and of the last 8 columns,
                  codes 0 and 2, and 1 and 3, of each
    crossed       16 numbers of x in that order: of each four 0, 2, 1, 3
    gathered_f16  sums over such lanes, in the order of columns, and as large as they should be
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsc.backends.tvm import amx
from dsc.backends.tvm.bf16 import PREFETCH
from dsc.backends.tvm.byte_products import DOTS, listed
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import Expr, T, bind, cast, splat, tirx

LANES = 16
"""Columns of a vector, as many as rows lie side by side."""
_VBMI = '"target-features"="+avx512f,+avx512bw,+avx512vl,+avx512vbmi"'

_EVEN_FIRST = [8 * block + lane for block in range(4) for lane in (0, 2, 4, 6, 1, 3, 5, 7)]


def _join(name: str, order: list[int]) -> str:
    mask = "<32 x i32> <" + ", ".join(f"i32 {i}" for i in order) + ">"
    return f"""
define linkonce_odr <32 x i8> @dsc_{name}(<16 x i32> %a, <16 x i32> %b) #3 {{
  %x = trunc <16 x i32> %a to <16 x i8>
  %y = trunc <16 x i32> %b to <16 x i8>
  %r = shufflevector <16 x i8> %x, <16 x i8> %y, {mask}
  ret <32 x i8> %r
}}
"""


_COMMON = f"""{PREFETCH}
declare <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float>)
declare <16 x i32> @llvm.smax.v16i32(<16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.smin.v16i32(<16 x i32>, <16 x i32>)
declare i32 @llvm.vector.reduce.smax.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
{_join("join", list(range(32)))}
{_join("join_even_first", _EVEN_FIRST)}
define linkonce_odr <16 x i32> @dsc_nearest(<16 x float> %a) #3 {{
  %n = call <16 x float> @llvm.rint.v16f32(<16 x float> %a)
  %i = call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float> %n)
  %l = call <16 x i32> @llvm.smax.v16i32(<16 x i32> %i, <16 x i32> splat (i32 -127))
  %r = call <16 x i32> @llvm.smin.v16i32(<16 x i32> %l, <16 x i32> splat (i32 127))
  ret <16 x i32> %r
}}

define linkonce_odr float @dsc_largest(<16 x float> %a, <16 x float> %b) #3 {{
  %x = bitcast <16 x float> %a to <16 x i32>
  %y = bitcast <16 x float> %b to <16 x i32>
  %u = and <16 x i32> %x, splat (i32 2147483647)
  %v = and <16 x i32> %y, splat (i32 2147483647)
  %m = call <16 x i32> @llvm.smax.v16i32(<16 x i32> %u, <16 x i32> %v)
  %n = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %m)
  %r = bitcast i32 %n to float
  ret float %r
}}

define linkonce_odr i32 @dsc_total(<16 x i32> %a, <16 x i32> %b) #3 {{
  %s = add <16 x i32> %a, %b
  %r = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %s)
  ret i32 %r
}}
"""
_F8 = """
declare <16 x float> @llvm.rint.v16f32(<16 x float>)

define linkonce_odr <16 x float> @dsc_nearest_f8(<16 x float> %a) #3 {
  %x = bitcast <16 x float> %a to <16 x i32>
  %s = and <16 x i32> %x, splat (i32 -2147483648)
  %m = and <16 x i32> %x, splat (i32 2147483647)
  %h = lshr <16 x i32> %m, splat (i32 20)
  %o = and <16 x i32> %h, splat (i32 1)
  %t = add <16 x i32> %m, splat (i32 524287)
  %u = add <16 x i32> %t, %o
  %n = and <16 x i32> %u, splat (i32 -1048576)
  %f = bitcast <16 x i32> %m to <16 x float>
  %p = fmul <16 x float> %f, splat (float 512.0)
  %q = call <16 x float> @llvm.rint.v16f32(<16 x float> %p)
  %d = fmul <16 x float> %q, splat (float 0x3F60000000000000)
  %e = bitcast <16 x float> %d to <16 x i32>
  %c = icmp ult <16 x i32> %m, splat (i32 1015021568)
  %v = select <16 x i1> %c, <16 x i32> %e, <16 x i32> %n
  %w = or <16 x i32> %v, %s
  %r = bitcast <16 x i32> %w to <16 x float>
  ret <16 x float> %r
}

define linkonce_odr <16 x i32> @dsc_code_f8(<16 x float> %a) #3 {
  %n = call <16 x float> @dsc_nearest_f8(<16 x float> %a)
  %b = bitcast <16 x float> %n to <16 x i32>
  %m = and <16 x i32> %b, splat (i32 2147483647)
  %f = bitcast <16 x i32> %m to <16 x float>
  %p = fmul <16 x float> %f, splat (float 512.0)
  %t = fptosi <16 x float> %p to <16 x i32>
  %h = lshr <16 x i32> %m, splat (i32 20)
  %e = add <16 x i32> %h, splat (i32 -960)
  %c = icmp ult <16 x i32> %m, splat (i32 1015021568)
  %v = select <16 x i1> %c, <16 x i32> %t, <16 x i32> %e
  %k = icmp ugt <16 x i32> %m, splat (i32 2139095040)
  %w = select <16 x i1> %k, <16 x i32> splat (i32 127), <16 x i32> %v
  %g = lshr <16 x i32> %b, splat (i32 24)
  %s = and <16 x i32> %g, splat (i32 128)
  %r = or <16 x i32> %w, %s
  ret <16 x i32> %r
}

define linkonce_odr float @dsc_larger(float %a, float %b) #3 {
  %x = bitcast float %a to i32
  %y = bitcast float %b to i32
  %c = icmp sgt i32 %x, %y
  %m = select i1 %c, i32 %x, i32 %y
  %r = bitcast i32 %m to float
  ret float %r
}

define linkonce_odr <16 x float> @dsc_from_f8(<16 x i32> %a) #3 {
  %g = and <16 x i32> %a, splat (i32 128)
  %s = shl <16 x i32> %g, splat (i32 24)
  %m = and <16 x i32> %a, splat (i32 127)
  %e = shl <16 x i32> %m, splat (i32 20)
  %n = add <16 x i32> %e, splat (i32 1006632960)
  %f = uitofp <16 x i32> %m to <16 x float>
  %p = fmul <16 x float> %f, splat (float 0x3F60000000000000)
  %q = bitcast <16 x float> %p to <16 x i32>
  %c = icmp ult <16 x i32> %m, splat (i32 8)
  %v = select <16 x i1> %c, <16 x i32> %q, <16 x i32> %n
  %k = icmp eq <16 x i32> %m, splat (i32 127)
  %w = select <16 x i1> %k, <16 x i32> splat (i32 2143289344), <16 x i32> %v
  %o = or <16 x i32> %w, %s
  %r = bitcast <16 x i32> %o to <16 x float>
  ret <16 x float> %r
}
"""


def _table(values: list[int]) -> str:
    return "<64 x i8> <" + ", ".join(f"i8 {v}" for v in values) + ">"


def _bf16_of(code: int) -> int:
    """The bits of bf16 of an e4m3 code without its sign."""
    exponent, mantissa = code >> 3, code & 7
    if code == 127:
        return 0x7FC0
    if exponent:
        return (exponent + 120) << 7 | mantissa << 4
    if not mantissa:
        return 0
    top = mantissa.bit_length() - 1  # a subnormal: 2^(top - 9) times 1.xx
    return (top + 118) << 7 | (mantissa << (7 - top)) & 0x7F


def _unpacked(half: int) -> str:
    """Lanes of the low bytes and of the high ones, side by side, of half of each 16."""
    lanes = [lane for q in range(0, 64, 16) for i in range(8) for lane in (q + 8 * half + i,) * 2]
    mask = ", ".join(f"i32 {lane + 64 * (i % 2)}" for i, lane in enumerate(lanes))
    return f"<64 x i32> <{mask}>"


_EIGHTS = "<64 x i32> <" + ", ".join(
    f"i32 {32 * part + 8 * lane + i}" for lane in range(4) for part in range(2) for i in range(8)
) + ">"  # fmt: skip
"""Codes in the order in which `_unpacked` gives each half of them in order."""


def _half(half: int) -> str:
    return "<32 x i32> <" + ", ".join(f"i32 {32 * half + i}" for i in range(32)) + ">"


def _tables() -> str:
    bits = [_bf16_of(code) for code in range(128)]
    vector = "<64 x i8>"
    lookup = f"{vector} @llvm.x86.avx512.vpermi2var.qi.512"
    text = f"\ndeclare {lookup}({vector}, {vector}, {vector})\n"
    lookups = ""
    for part, shift in (("l", 0), ("h", 8)):
        tables = [[(b >> shift) & 255 for b in bits[i : i + 64]] for i in (0, 64)]
        first, second = map(_table, tables)
        lookups += f"  %{part} = call {lookup}(\n    {first}, {vector} %c, {second})\n"
    for half, name in enumerate(("low", "high")):
        unpacked = f"""{lookups}  %g = and <64 x i8> %c, splat (i8 -128)
  %s = or <64 x i8> %h, %g
  %u = shufflevector <64 x i8> %l, <64 x i8> %s, {_unpacked(half)}
"""
        text += f"""
define linkonce_odr <32 x i16> @dsc_{name}_f8(<16 x i32> %a) #5 {{
  %c = bitcast <16 x i32> %a to <64 x i8>
{unpacked}  %r = bitcast <64 x i8> %u to <32 x i16>
  ret <32 x i16> %r
}}

define linkonce_odr <32 x i16> @dsc_{name}_scaled_f8(<16 x i32> %a, <32 x i16> %k) #5 {{
  %b = bitcast <16 x i32> %a to <64 x i8>
  %c = shufflevector <64 x i8> %b, <64 x i8> poison, {_EIGHTS}
{unpacked}  %w = bitcast <64 x i8> %u to <32 x i16>
  %m = and <64 x i8> %b, splat (i8 127)
  %n = add <64 x i8> %m, splat (i8 -1)
  %i = icmp ult <64 x i8> %n, splat (i8 126)
  %f = shufflevector <64 x i1> %i, <64 x i1> poison, {_half(half)}
  %t = add <32 x i16> %w, %k
  %r = select <32 x i1> %f, <32 x i16> %t, <32 x i16> %w
  ret <32 x i16> %r
}}
"""
    lanes = [
        [16 * side + 4 * q + i for q in range(4) for side in (0, 1) for i in (first, first + 2)]
        for first in (0, 1)
    ]
    even, odd = ("<16 x i32> <" + ", ".join(f"i32 {i}" for i in each) + ">" for each in lanes)
    return f"""{text}
define linkonce_odr <16 x float> @dsc_gathered(<16 x float> %a, <16 x float> %b) #5 {{
  %e = shufflevector <16 x float> %a, <16 x float> %b, {even}
  %o = shufflevector <16 x float> %a, <16 x float> %b, {odd}
  %r = fadd <16 x float> %e, %o
  ret <16 x float> %r
}}

attributes #5 = {{ alwaysinline nounwind {_VBMI} }}
"""


def _half_widened(name: str, first: int) -> str:
    """16 of 32 numbers in fp16 as fp32."""
    return f"""
define linkonce_odr <16 x float> @dsc_{name}_f16(<32 x i16> %a) #3 {{
  %h = bitcast <32 x i16> %a to <32 x half>
  %x = shufflevector <32 x half> %h, <32 x half> poison, {listed(list(range(first, first + 16)))}
  %r = fpext <16 x half> %x to <16 x float>
  ret <16 x float> %r
}}
"""


_CROSSED = listed([4 * q + i for q in range(4) for i in (0, 2, 1, 3)])
_F16 = f"""
define linkonce_odr <64 x i8> @dsc_nan_f8(<16 x i32> %a) #3 {{
  %c = bitcast <16 x i32> %a to <64 x i8>
  %m = and <64 x i8> %c, splat (i8 127)
  %r = add <64 x i8> %m, splat (i8 1)
  ret <64 x i8> %r
}}

define linkonce_odr <32 x i16> @dsc_f16(<32 x i16> %a, <32 x i16> %n) #3 {{
  %s = ashr <32 x i16> %a, splat (i16 1)
  %h = and <32 x i16> %s, splat (i16 -16512)
  %f = ashr <32 x i16> %n, splat (i16 15)
  %r = or <32 x i16> %h, %f
  ret <32 x i16> %r
}}

define linkonce_odr <32 x i16> @dsc_even_f16(<16 x i32> %a) #3 {{
  %x = bitcast <16 x i32> %a to <32 x i16>
  %f = call <64 x i8> @dsc_nan_f8(<16 x i32> %a)
  %n = bitcast <64 x i8> %f to <32 x i16>
  %y = shl <32 x i16> %x, splat (i16 8)
  %m = shl <32 x i16> %n, splat (i16 8)
  %r = call <32 x i16> @dsc_f16(<32 x i16> %y, <32 x i16> %m)
  ret <32 x i16> %r
}}

define linkonce_odr <32 x i16> @dsc_odd_f16(<16 x i32> %a) #3 {{
  %x = bitcast <16 x i32> %a to <32 x i16>
  %f = call <64 x i8> @dsc_nan_f8(<16 x i32> %a)
  %n = bitcast <64 x i8> %f to <32 x i16>
  %r = call <32 x i16> @dsc_f16(<32 x i16> %x, <32 x i16> %n)
  ret <32 x i16> %r
}}
{_half_widened("first", 0)}{_half_widened("last", 16)}
define linkonce_odr <16 x float> @dsc_crossed(<16 x float> %a) #3 {{
  %r = shufflevector <16 x float> %a, <16 x float> poison, {_CROSSED}
  ret <16 x float> %r
}}

define linkonce_odr <16 x float> @dsc_gathered_f16(<16 x float> %a, <16 x float> %b) #3 {{
  %e = shufflevector <16 x float> %a, <16 x float> %b, {listed(list(range(0, 32, 2)))}
  %o = shufflevector <16 x float> %a, <16 x float> %b, {listed(list(range(1, 32, 2)))}
  %s = fadd <16 x float> %e, %o
  %r = fmul <16 x float> %s, splat (float 256.0)
  ret <16 x float> %r
}}
"""
_FMA = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)

define linkonce_odr <16 x float> @dsc_fma_codes(
    <16 x float> %acc, <16 x float> %a, <16 x float> %b) #3 {
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %b, <16 x float> %acc)
  ret <16 x float> %r
}
"""
_ADD = """
define linkonce_odr <16 x float> @dsc_fma_codes(
    <16 x float> %acc, <16 x float> %a, <16 x float> %b) #3 {
  %p = fmul <16 x float> %a, %b
  %r = fadd <16 x float> %acc, %p
  ret <16 x float> %r
}
"""


@contextmanager
def instructions(machine: Machine) -> Iterator[None]:
    """The rest of the kernel's body may use this module's operations."""
    text = _COMMON + _F8 + (_tables() if machine.vbmi else "") + (_F16 if machine.f16 else "")
    text += DOTS[machine.dots] + (_FMA if machine.fma else _ADD)
    text += amx.byte_functions() if machine.byte_tiles else ""
    # Where vectors are wide, LLVM must be told for a function that is to be inlined.
    wide = '"target-features"="+avx512f,+avx512bw,+avx512vl" ' if machine.lanes == LANES else ""
    with T.attr(
        "codes",
        "pragma_import_llvm",
        f"{text}\nattributes #3 = {{ alwaysinline nounwind {wide}}}\n",
    ):
        yield


def _call(name: str, kind: str, *operands: Expr) -> Expr:
    return tirx.call_pure_extern(kind, f"dsc_{name}", *operands)


def dot4(acc: Expr, a: Expr, b: Expr, signed: bool) -> Expr:
    """acc plus, in each lane, the products of four bytes of a with signed ones of b.

    Those of a are codes of 4 bits, or of 8: unsigned, or `signed` where the machine takes these.
    """
    return _call("dot4_signed" if signed else "dot4", "int32x16", acc, a, b)


def fma(acc: Expr, a: Expr, b: Expr) -> Expr:
    """acc + a b in fp32, rounded once where the machine does that."""
    return _call("fma_codes", "float32x16", acc, a, b)


def nearest(values: Expr) -> Expr:
    """16 floats to the nearest integers within +-127, ties to even.

    Only a scale that is a subnormal number makes codes beyond.
    """
    return _call("nearest", "int32x16", values)


def largest(a: Expr, b: Expr) -> Expr:
    """The largest magnitude of 32 floats."""
    return _call("largest", "float32", a, b)


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two numbers that are not negative; NaN where one is."""
    return _call("larger", "float32", a, b)


def nearest_f8(values: Expr) -> Expr:
    """16 floats of at most 448 to the nearest numbers of e4m3, ties to even; NaN stays one."""
    return _call("nearest_f8", "float32x16", values)


def code_f8(values: Expr) -> Expr:
    """The e4m3 codes, as integers, of what `nearest_f8` gives."""
    return _call("code_f8", "int32x16", values)


def total(a: Expr, b: Expr) -> Expr:
    """The sum of 32 integers."""
    return _call("total", "int32", a, b)


def from_f8(bytes: Expr) -> Expr:
    """The lowest byte of each lane, an e4m3 code, as fp32."""
    return _call("from_f8", "float32x16", bytes)


def bf16_of_f8(codes: Expr) -> tuple[Expr, Expr]:
    """64 e4m3 codes as bf16: of the first and of the last two columns of each four."""
    return _call("low_f8", "uint16x32", codes), _call("high_f8", "uint16x32", codes)


def scaled_f8(codes: Expr, exponent: Expr) -> tuple[Expr, Expr]:
    """64 e4m3 codes in order as bf16, times the power of two of an exponent, an int32.

    Every number must be one of bf16 that is not subnormal: exponents from -117 to 119.
    """
    moved = cast(exponent << tirx.const(7, "int32"), "int16")
    every = T.reinterpret("uint16x32", splat(bind(moved), 32))
    low, high = (f"{half}_scaled_f8" for half in ("low", "high"))
    return _call(low, "uint16x32", codes, every), _call(high, "uint16x32", codes, every)


def gathered(low: Expr, high: Expr) -> Expr:
    """Sums of pairs over what `bf16_of_f8` gives, in the order of columns."""
    return _call("gathered", "float32x16", low, high)


def of_f8(codes: Expr) -> list[tuple[Expr, Expr]]:
    """64 e4m3 codes as fp32 over 256: of the first and of the last columns, even and odd ones."""
    even, odd = (bind(_call(f"{name}_f16", "uint16x32", codes)) for name in ("even", "odd"))
    return [
        (_call(f"{part}_f16", "float32x16", even), _call(f"{part}_f16", "float32x16", odd))
        for part in ("first", "last")
    ]


def crossed(values: Expr) -> Expr:
    """16 floats in the order in which `of_f8` has codes: of each four 0, 2, 1, 3."""
    return _call("crossed", "float32x16", values)


def gathered_f16(low: Expr, high: Expr) -> Expr:
    """Sums over what `of_f8` gives, times 256, in the order of columns."""
    return _call("gathered_f16", "float32x16", low, high)


def join(a: Expr, b: Expr, even_first: bool) -> Expr:
    """32 integers as bytes; with `even_first` of each eight the even ones first."""
    return _call("join_even_first" if even_first else "join", "int8x32", a, b)
