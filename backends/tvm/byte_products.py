"""Products of bytes, a form for each instruction set: `dot4` in LLVM IR (see `codes`).

16 lanes are as many of the machine's vectors as they take: one of 64 bytes, two of 32, four of 16.

    wide, half     vpdpbusd, of AVX512_VNNI or AVX-VNNI: unsigned bytes with signed ones
    signs          vpmaddubsw, which adds two products in 16 bits and saturates. Codes of 4 bits
                   reach 2 * 15 * 127 = 3810. Of 8 bits the magnitudes are taken, at most 128, and
                   the other byte gets the sign: 2 * 128 * 127 = 32512 at most. Both are exact.
    sdot           NEON's dot product of signed bytes
    adds           NEON without it: products in 16 bits, added once there (at most 32512 again)
    words          pairs of 16-bit products, of which LLVM makes what the machine has

Where codes of 8 bits stay signed (`SIGNED`), `dot4_signed` takes them; no code of x is -128.
"""

from __future__ import annotations

LANES = 16
WIDE, HALF, SIGNS, WIDE_SIGNS, SDOT, ADDS, WORDS = (
    "wide", "half", "signs", "wide signs", "sdot", "adds", "words",
)  # fmt: skip
SIGNED = (SIGNS, WIDE_SIGNS, SDOT, ADDS, WORDS)
"""Forms that take 8-bit codes as they are stored; the others take them with the highest bit turned
over."""


def listed(lanes: list[int]) -> str:
    """A shuffle's mask."""
    return f"<{len(lanes)} x i32> <" + ", ".join(f"i32 {i}" for i in lanes) + ">"


def _vpdpbusd(lanes: int) -> str:
    words, bytes = f"<{lanes} x i32>", f"<{4 * lanes} x i8>"
    call = f"{words} @llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return f"""
declare {call}({words}, {bytes}, {bytes})

define linkonce_odr {words} @dsc_dot4_part({words} %acc, {words} %a, {words} %b) #3 {{
  %x = bitcast {words} %a to {bytes}
  %y = bitcast {words} %b to {bytes}
  %r = call {call}({words} %acc, {bytes} %x, {bytes} %y)
  ret {words} %r
}}
{_in_parts("dot4", lanes)}"""


def _signs(lanes: int) -> str:
    words, pairs, bytes = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{4 * lanes} x i8>"
    names = ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512")
    if lanes < LANES:
        names = ("avx2.pmadd.ub.sw", "avx2.pmadd.wd")
    by_bytes, by_pairs = (
        f"{kind} @llvm.x86.{n}" for kind, n in zip((pairs, words), names, strict=True)
    )
    # Of 64 bytes there is no vpsignb; LLVM makes a mask and a subtraction of this.
    turned = f"""  %n = icmp slt {bytes} %x, zeroinitializer
  %m = sub {bytes} zeroinitializer, %y
  %s = select <{4 * lanes} x i1> %n, {bytes} %m, {bytes} %y"""
    declared = ""
    if lanes < LANES:
        declared = f"declare {bytes} @llvm.x86.avx2.psign.b({bytes}, {bytes})\n"
        turned = f"  %s = call {bytes} @llvm.x86.avx2.psign.b({bytes} %y, {bytes} %x)"
    return f"""
declare {pairs} @llvm.x86.{names[0]}({bytes}, {bytes})
declare {words} @llvm.x86.{names[1]}({pairs}, {pairs})
declare {bytes} @llvm.abs.v{4 * lanes}i8({bytes}, i1 immarg)
{declared}
define linkonce_odr {words} @dsc_dot4_bytes({words} %acc, {bytes} %x, {bytes} %y) #3 {{
  %p = call {by_bytes}({bytes} %x, {bytes} %y)
  %q = call {by_pairs}({pairs} %p, {pairs} splat (i16 1))
  %r = add {words} %acc, %q
  ret {words} %r
}}

define linkonce_odr {words} @dsc_dot4_part({words} %acc, {words} %a, {words} %b) #3 {{
  %x = bitcast {words} %a to {bytes}
  %y = bitcast {words} %b to {bytes}
  %r = call {words} @dsc_dot4_bytes({words} %acc, {bytes} %x, {bytes} %y)
  ret {words} %r
}}

define linkonce_odr {words} @dsc_dot4_signed_part({words} %acc, {words} %a, {words} %b) #3 {{
  %x = bitcast {words} %a to {bytes}
  %y = bitcast {words} %b to {bytes}
  %u = call {bytes} @llvm.abs.v{4 * lanes}i8({bytes} %x, i1 false)
{turned}
  %r = call {words} @dsc_dot4_bytes({words} %acc, {bytes} %u, {bytes} %s)
  ret {words} %r
}}
{_in_parts("dot4", lanes)}{_in_parts("dot4_signed", lanes)}"""


def _sdot() -> str:
    call = "<4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8"
    return f"""
declare {call}(<4 x i32>, <16 x i8>, <16 x i8>)

define linkonce_odr <4 x i32> @dsc_dot4_part(<4 x i32> %acc, <4 x i32> %a, <4 x i32> %b) #3 {{
  %x = bitcast <4 x i32> %a to <16 x i8>
  %y = bitcast <4 x i32> %b to <16 x i8>
  %r = call {call}(<4 x i32> %acc, <16 x i8> %x, <16 x i8> %y)
  ret <4 x i32> %r
}}
{_in_parts("dot4", 4)}{_in_parts("dot4_signed", 4, of="dot4")}"""


def _adds() -> str:
    low, high = (listed(list(range(first, first + 8))) for first in (0, 8))
    return f"""
declare <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8>, <8 x i8>)
declare <8 x i16> @llvm.aarch64.neon.addp.v8i16(<8 x i16>, <8 x i16>)
declare <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16(<8 x i16>)

define linkonce_odr <4 x i32> @dsc_dot4_part(<4 x i32> %acc, <4 x i32> %a, <4 x i32> %b) #3 {{
  %x = bitcast <4 x i32> %a to <16 x i8>
  %y = bitcast <4 x i32> %b to <16 x i8>
  %x0 = shufflevector <16 x i8> %x, <16 x i8> poison, {low}
  %y0 = shufflevector <16 x i8> %y, <16 x i8> poison, {low}
  %x1 = shufflevector <16 x i8> %x, <16 x i8> poison, {high}
  %y1 = shufflevector <16 x i8> %y, <16 x i8> poison, {high}
  %p0 = call <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8> %x0, <8 x i8> %y0)
  %p1 = call <8 x i16> @llvm.aarch64.neon.smull.v8i16(<8 x i8> %x1, <8 x i8> %y1)
  %p = call <8 x i16> @llvm.aarch64.neon.addp.v8i16(<8 x i16> %p0, <8 x i16> %p1)
  %s = call <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16(<8 x i16> %p)
  %r = add <4 x i32> %acc, %s
  ret <4 x i32> %r
}}
{_in_parts("dot4", 4)}{_in_parts("dot4_signed", 4, of="dot4")}"""


def _words() -> str:
    even, odd = (listed([2 * i + first for i in range(LANES)]) for first in (0, 1))
    return f"""
define linkonce_odr <16 x i32> @dsc_pairs16(<32 x i16> %a, <32 x i16> %b) #3 {{
  %x = sext <32 x i16> %a to <32 x i32>
  %y = sext <32 x i16> %b to <32 x i32>
  %p = mul nsw <32 x i32> %x, %y
  %e = shufflevector <32 x i32> %p, <32 x i32> poison, {even}
  %o = shufflevector <32 x i32> %p, <32 x i32> poison, {odd}
  %r = add nsw <16 x i32> %e, %o
  ret <16 x i32> %r
}}

define linkonce_odr <16 x i32> @dsc_dot4_part(
    <16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) #3 {{
  %a16 = bitcast <16 x i32> %a to <32 x i16>
  %b16 = bitcast <16 x i32> %b to <32 x i16>
  %t = shl <32 x i16> %a16, splat (i16 8)
  %u = shl <32 x i16> %b16, splat (i16 8)
  %a0 = ashr <32 x i16> %t, splat (i16 8)
  %b0 = ashr <32 x i16> %u, splat (i16 8)
  %a1 = ashr <32 x i16> %a16, splat (i16 8)
  %b1 = ashr <32 x i16> %b16, splat (i16 8)
  %p0 = call <16 x i32> @dsc_pairs16(<32 x i16> %a0, <32 x i16> %b0)
  %p1 = call <16 x i32> @dsc_pairs16(<32 x i16> %a1, <32 x i16> %b1)
  %p = add <16 x i32> %p0, %p1
  %r = add <16 x i32> %acc, %p
  ret <16 x i32> %r
}}
{_in_parts("dot4", LANES)}{_in_parts("dot4_signed", LANES, of="dot4")}"""


def _in_parts(name: str, lanes: int, of: str = "") -> str:
    """A function of 16 lanes that does it by parts."""
    part, lines, found = f"<{lanes} x i32>", [], []
    for first in range(0, LANES, lanes):
        mask = listed(list(range(first, first + lanes)))
        for x in ("acc", "a", "b"):
            lines.append(
                f"  %{x}{first} = shufflevector <16 x i32> %{x}, <16 x i32> poison, {mask}"
            )
        given = ", ".join(f"{part} %{x}{first}" for x in ("acc", "a", "b"))
        lines.append(f"  %p{first} = call {part} @dsc_{of or name}_part({given})")
        found.append(f"%p{first}")
    while len(found) > 1:
        mask, joined = listed(list(range(2 * lanes))), []
        for low, high in zip(found[::2], found[1::2], strict=True):
            lines.append(
                f"  {low}_{lanes} = shufflevector <{lanes} x i32> {low}, <{lanes} x i32> {high},"
                f" {mask}"
            )
            joined.append(f"{low}_{lanes}")
        found, lanes = joined, 2 * lanes
    body = "\n".join(lines)
    return f"""
define linkonce_odr <16 x i32> @dsc_{name}(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) #3 {{
{body}
  ret <16 x i32> {found[0]}
}}
"""


DOTS = {
    WIDE: _vpdpbusd(16),
    HALF: _vpdpbusd(8),
    SIGNS: _signs(8),
    WIDE_SIGNS: _signs(16),
    SDOT: _sdot(),
    ADDS: _adds(),
    WORDS: _words(),
}
"""The LLVM IR of `dot4`, and where codes may be signed of `dot4_signed`."""
