"""bf16 products on AVX-512: a vector holds 32 bf16 values, an accumulator 16 fp32 sums of pairs.

TVM's bfloat16 vectors are widened before an instruction could see them, so bf16 stays `uint16x32`
and the few operations on it are LLVM IR functions, linked into the library by a pragma and inlined.

    pair_dot    acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1]
    even, odd   lanes 0, 2, .. and 1, 3, .. as fp32: a shift, and a mask
    fma         acc + a b in fp32
    sum4        the lane sums of four accumulators as four floats: 13 instructions instead of 32
    zip_low, zip_high   two rows as pairs of one column each, so that a sum over rows is a pair_dot
    unzip_low, unzip_high   fp32 sums of zipped columns, back in the order of columns
    mesh_low, mesh_high     fp32 sums of even and of odd columns, back in the order of columns
    narrow      fp32 to bf16, to nearest even (where it is vcvtneps2bf16, subnormals become 0)
    exp2        2^x of fp32

There are two ways to multiply vectors, and which is faster is the CPU's affair (`Machine.pairs`):

    pairs       vdpbf16ps, 64 flops an instruction. Zen 4 and 5 start one or two a cycle.
    widened     even and odd lanes by two fp32 FMAs. Intel's cores start a vdpbf16ps every second
                cycle but two FMAs a cycle, so that this is twice as fast there (measured on
                Sapphire Rapids, two threads: 160 and 330 GFLOP/s); without AVX512_BF16 it is all
                there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from dsc.backends.tvm import amx
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import Expr, Local, T, Tensor, bind, span, splat, tirx
from dsc.ir.types import DType

LANES = 32
"""bf16 values in a vector."""
SUMS = LANES // 2
"""fp32 sums in an accumulator."""

_EVERYTHING = Machine("x86-64", lanes=16, rows=4, columns=4, bf16=True, narrows=True, pairs=True)
_machine: ContextVar[Machine] = ContextVar("machine", default=_EVERYTHING)
"""What the kernels that are being built run on."""
_FEATURES = '"target-features"="+avx512f,+avx512bw,+avx512vl"'
_PAIRS = '"target-features"="+avx512f,+avx512bw,+avx512vl,+avx512bf16"'
_QUARTERS = range(0, SUMS, 4)


def _mask(lanes: Iterable[int]) -> str:
    """A shuffle mask of LLVM IR."""
    found = list(lanes)
    return f"<{len(found)} x i32> <" + ", ".join(f"i32 {i}" for i in found) + ">"


def _quarters(pattern: Iterable[int]) -> str:
    """A shuffle of two 16-lane vectors that treats each group of four lanes alike."""
    chosen = list(pattern)
    return _mask(q + i for q in _QUARTERS for i in chosen)


def _zip(first: int) -> str:
    return _mask(
        lane for start in range(0, 32, 8) for i in range(4)
        for lane in (start + first + i, start + first + i + 32)
    )  # fmt: skip


def _unzip(first: int) -> str:
    quarters = [first, first + 16, first + 4, first + 20]
    return _mask(q + i for q in quarters for i in range(4))


def _mesh(first: int) -> str:
    return _mask(lane for i in range(first, first + 8) for lane in (i, i + 16))


def _shuffle(name: str, kind: str, mask: str) -> str:
    result = mask.split(">", 1)[0].split(" x ")[0].removeprefix("<")
    out = f"<{result} x {kind.split(' x ')[1]}"
    return f"""
define linkonce_odr {out} @{name}({kind} %a, {kind} %b) #0 {{
  %r = shufflevector {kind} %a, {kind} %b, {mask}
  ret {out} %r
}}"""


_PAIR_DOT = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
  <16 x float>, <32 x bfloat>, <32 x bfloat>)

define linkonce_odr <16 x float> @dsc_pair_dot(
    <16 x float> %acc, <32 x i16> %a, <32 x i16> %b) #1 {
  %x = bitcast <32 x i16> %a to <32 x bfloat>
  %y = bitcast <32 x i16> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

"""
_WIDENED_DOT = """
define linkonce_odr <16 x float> @dsc_pair_dot(
    <16 x float> %acc, <32 x i16> %a, <32 x i16> %b) #0 {
  %a0 = call <16 x float> @dsc_even(<32 x i16> %a)
  %b0 = call <16 x float> @dsc_even(<32 x i16> %b)
  %a1 = call <16 x float> @dsc_odd(<32 x i16> %a)
  %b1 = call <16 x float> @dsc_odd(<32 x i16> %b)
  %s = call <16 x float> @dsc_fma(<16 x float> %acc, <16 x float> %a0, <16 x float> %b0)
  %r = call <16 x float> @dsc_fma(<16 x float> %s, <16 x float> %a1, <16 x float> %b1)
  ret <16 x float> %r
}
"""
_NARROW = f"""
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)

define linkonce_odr <16 x i16> @dsc_narrow(<16 x float> %a) #1 {{
  %x = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %r = bitcast <16 x bfloat> %x to <16 x i16>
  ret <16 x i16> %r
}}

attributes #1 = {{ alwaysinline nounwind {_PAIRS} }}
"""
_ROUNDED = """
define linkonce_odr <16 x i16> @dsc_narrow(<16 x float> %a) #0 {
  %w = bitcast <16 x float> %a to <16 x i32>
  %h = lshr <16 x i32> %w, splat (i32 16)
  %o = and <16 x i32> %h, splat (i32 1)
  %s = add <16 x i32> %w, splat (i32 32767)
  %t = add <16 x i32> %s, %o
  %u = lshr <16 x i32> %t, splat (i32 16)
  %n = fcmp uno <16 x float> %a, %a
  %v = select <16 x i1> %n, <16 x i32> splat (i32 32704), <16 x i32> %u
  %r = trunc <16 x i32> %v to <16 x i16>
  ret <16 x i16> %r
}
"""
PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define linkonce_odr i32 @dsc_prefetch_far(ptr %p) alwaysinline nounwind {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret i32 0
}
"""
"""What `prefetch_far` calls; any CPU has it."""
_EXP2_TERMS = (
    1.3264727252756162e-3, 9.671512785858056e-3, 5.5507337444714706e-2,
    0.24022242083110568, 0.6931469775976777, 1.0,
)  # fmt: skip
"""2^x on -0.5 .. 0.5, highest power first: within 9.2e-8 of it, and 1 at 0."""
_EXP2_LEAST = -200.0
"""A power of two that is 0 in fp32; a NaN is not less."""


def _exp2() -> str:
    """2^x is 2^n times a polynomial of x - n, where n is the nearest integer."""

    def number(value: float) -> str:
        word = np.float64(np.float32(value)).view(np.uint64)
        return f"splat (float 0x{word:016X})"

    first, *terms = map(number, _EXP2_TERMS)
    kind = "<16 x float>"
    lines = [
        f"%c = fcmp olt {kind} %x, {number(_EXP2_LEAST)}",
        f"%i = select <16 x i1> %c, {kind} {number(_EXP2_LEAST)}, {kind} %x",
        f"%n = call {kind} @llvm.roundeven.v16f32({kind} %i)",
        f"%f = fsub {kind} %i, %n",
    ]
    last = first
    for i, term in enumerate(terms):
        given = f"{kind} %f, {kind} {last}, {kind} {term}"
        lines.append(f"%p{i} = call {kind} @llvm.fma.v16f32({given})")
        last = f"%p{i}"
    scale = "@llvm.x86.avx512.mask.scalef.ps.512"
    given = f"{kind} {last}, {kind} %n, {kind} zeroinitializer, i16 -1, i32 4"
    lines += [f"%r = call {kind} {scale}({given})", f"ret {kind} %r"]
    body = "\n  ".join(lines)
    return f"""
declare {kind} @llvm.roundeven.v16f32({kind})
declare {kind} {scale}({kind}, {kind}, {kind}, i16, i32)

define linkonce_odr {kind} @dsc_exp2({kind} %x) #0 {{
  {body}
}}"""


_COMMON = f"""{PREFETCH}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)

define linkonce_odr <16 x float> @dsc_even(<32 x i16> %a) #0 {{
  %w = bitcast <32 x i16> %a to <16 x i32>
  %s = shl <16 x i32> %w, splat (i32 16)
  %r = bitcast <16 x i32> %s to <16 x float>
  ret <16 x float> %r
}}

define linkonce_odr <16 x float> @dsc_odd(<32 x i16> %a) #0 {{
  %w = bitcast <32 x i16> %a to <16 x i32>
  %s = and <16 x i32> %w, splat (i32 -65536)
  %r = bitcast <16 x i32> %s to <16 x float>
  ret <16 x float> %r
}}

define linkonce_odr <16 x float> @dsc_fma(
    <16 x float> %acc, <16 x float> %a, <16 x float> %b) #0 {{
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %b, <16 x float> %acc)
  ret <16 x float> %r
}}

{_exp2()}

define linkonce_odr i32 @dsc_prefetch(ptr %p) #0 {{
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret i32 0
}}

define linkonce_odr <4 x float> @dsc_sum4(
    <16 x float> %a, <16 x float> %b, <16 x float> %c, <16 x float> %d) #0 {{
  %ab0 = shufflevector <16 x float> %a, <16 x float> %b, {_quarters((0, 16, 1, 17))}
  %ab1 = shufflevector <16 x float> %a, <16 x float> %b, {_quarters((2, 18, 3, 19))}
  %cd0 = shufflevector <16 x float> %c, <16 x float> %d, {_quarters((0, 16, 1, 17))}
  %cd1 = shufflevector <16 x float> %c, <16 x float> %d, {_quarters((2, 18, 3, 19))}
  %ab = fadd <16 x float> %ab0, %ab1
  %cd = fadd <16 x float> %cd0, %cd1
  %l = shufflevector <16 x float> %ab, <16 x float> %cd, {_quarters((0, 1, 16, 17))}
  %h = shufflevector <16 x float> %ab, <16 x float> %cd, {_quarters((2, 3, 18, 19))}
  %s = fadd <16 x float> %l, %h
  %s0 = shufflevector <16 x float> %s, <16 x float> poison, {_mask(range(8))}
  %s1 = shufflevector <16 x float> %s, <16 x float> poison, {_mask(range(8, 16))}
  %t = fadd <8 x float> %s0, %s1
  %t0 = shufflevector <8 x float> %t, <8 x float> poison, {_mask(range(4))}
  %t1 = shufflevector <8 x float> %t, <8 x float> poison, {_mask(range(4, 8))}
  %r = fadd <4 x float> %t0, %t1
  ret <4 x float> %r
}}
{_shuffle("dsc_zip_low", "<32 x i16>", _zip(0))}
{_shuffle("dsc_zip_high", "<32 x i16>", _zip(4))}
{_shuffle("dsc_mesh_low", "<16 x float>", _mesh(0))}
{_shuffle("dsc_mesh_high", "<16 x float>", _mesh(8))}
{_shuffle("dsc_unzip_low", "<16 x float>", _unzip(0))}
{_shuffle("dsc_unzip_high", "<16 x float>", _unzip(8))}

attributes #0 = {{ alwaysinline nounwind {_FEATURES} }}
"""


@contextmanager
def instructions_of(machine: Machine) -> Iterator[None]:
    """Kernels that are built inside use what is fast on a machine."""
    token = _machine.set(machine)
    try:
        yield
    finally:
        _machine.reset(token)


def by_pairs() -> bool:
    """Which way the kernel that is being built multiplies."""
    return _machine.get().pairs


def by_tiles() -> bool:
    """Whether products of rows with weights go by tile registers."""
    return _machine.get().tiles


def columns_of_tasks() -> tuple[int, int]:
    """Columns that a task of the kernel that is being built takes, with few rows and with many."""
    machine = _machine.get()
    return machine.narrow, machine.wide


@contextmanager
def instructions() -> Iterator[None]:
    """The rest of the kernel's body may use this module's operations."""
    machine = _machine.get()
    dot = _PAIR_DOT if machine.pairs else _WIDENED_DOT
    narrowed = _NARROW if machine.narrows else _ROUNDED
    tiles = amx.functions() if machine.tiles else ""
    text = _COMMON + dot + narrowed + amx.transpositions() + tiles
    with T.attr("bf16", "pragma_import_llvm", text):
        yield


def _call(name: str, kind: str, *operands: Expr) -> Expr:
    return tirx.call_pure_extern(kind, f"dsc_{name}", *operands)


def pair_dot(acc: Expr, a: Expr, b: Expr) -> Expr:
    """acc plus the products of a and b, summed by pairs of lanes."""
    return _call("pair_dot", "float32x16", acc, a, b)


def even(value: Expr) -> Expr:
    """Lanes 0, 2, .. as fp32."""
    return _call("even", "float32x16", value)


def odd(value: Expr) -> Expr:
    """Lanes 1, 3, .. as fp32."""
    return _call("odd", "float32x16", value)


def fma(acc: Expr, a: Expr, b: Expr) -> Expr:
    """acc + a b, rounded once."""
    return _call("fma", "float32x16", acc, a, b)


def sum4(accumulators: list[Expr]) -> Expr:
    """Four accumulators to the vector of their lane sums."""
    return _call("sum4", "float32x4", *accumulators)


def narrow(value: Expr) -> Expr:
    """16 floats as the bits of bf16."""
    return _call("narrow", "uint16x16", value)


def exp2(value: Expr) -> Expr:
    """2^x of 16 floats, within 2 ulp; 0 where fp32 has no such power, and a NaN stays one."""
    return _call("exp2", "float32x16", value)


def zipped(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Rows a and b as vectors of (a[i], b[i]) pairs, in the order that `unzipped` undoes."""
    return _call("zip_low", "uint16x32", a, b), _call("zip_high", "uint16x32", a, b)


def unzipped(low: Expr, high: Expr) -> tuple[Expr, Expr]:
    """Sums over zipped rows: columns 0 .. 15 and 16 .. 31."""
    return _call("unzip_low", "float32x16", low, high), _call("unzip_high", "float32x16", low, high)


def meshed(low: Expr, high: Expr) -> tuple[Expr, Expr]:
    """Sums of even and of odd columns: columns 0 .. 15 and 16 .. 31."""
    return _call("mesh_low", "float32x16", low, high), _call("mesh_high", "float32x16", low, high)


def prefetch(x: Tensor, position: Expr) -> None:
    """Ask for the cache line of an element; a position past the end does no harm."""
    T.evaluate(tirx.call_extern("int32", "dsc_prefetch", T.address_of(x.buffer[position])))


def prefetch_far(x: Tensor, position: Expr) -> None:
    """As `prefetch`, into the second-level cache."""
    far = tirx.call_extern("int32", "dsc_prefetch_far", T.address_of(x.buffer[position]))
    T.evaluate(far)


def bits(x: Tensor | Local, position: Expr, lanes: int = LANES) -> Expr:
    """Consecutive bf16 values, as they lie in memory."""
    return x.buffer[span(position, lanes)]


def put_bits(x: Tensor, position: Expr, value: Expr) -> None:
    """Write bf16 values, as they lie in memory."""
    T.buffer_store(x.buffer, value, [span(position, value.ty.dtype.lanes)])


class Pairs:
    """bf16 values as 32-bit words of two: a pair in all lanes is what `pair_dot` wants of a row."""

    def __init__(self, words: Tensor | Local) -> None:
        self.words = words.buffer

    @staticmethod
    def at(address: Expr, count: Expr) -> Pairs:
        """Tensor memory of `count` values."""
        return Pairs(Tensor(address, DType.i32, (count // 2,)))

    @staticmethod
    def local(count: int) -> Pairs:
        """A small array on the stack."""
        return Pairs(Local(count // 2, "int32"))

    def everywhere(self, position: Expr) -> Expr:
        """The pair at an even `position` in all lanes."""
        return self.pair(tirx.truncdiv(position, 2))

    def pair(self, number: Expr) -> Expr:
        """A pair, by its number, in all lanes."""
        return T.reinterpret("uint16x32", splat(bind(self.words[number]), SUMS))

    def put(self, position: Expr, value: Expr) -> None:
        """Write 16 floats at an even `position`, rounded."""
        words = T.reinterpret("int32x8", narrow(value))
        T.buffer_store(self.words, words, [span(tirx.truncdiv(position, 2), 8)])


class Widened:
    """fp32 values of which one in all lanes is what a widened product wants of a row."""

    def __init__(self, count: int) -> None:
        self.values = Local(count)

    def everywhere(self, position: Expr) -> Expr:
        """The value at a position in all lanes."""
        return splat(bind(self.values[position]), SUMS)

    def put(self, position: Expr, value: Expr) -> None:
        """Write 16 floats."""
        self.values.store(position, value)
