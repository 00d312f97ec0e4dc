"""Products on AMX: 16 x 16 sums in a tile register, 16 x 16 x 32 products of bf16 an instruction.

A multiplication C += A B takes A as 16 rows of 32 values as they lie in memory and B as pairs: row
p holds values 2p and 2p + 1 of each of its columns. Rows of a weight are rows of A, so weights need
no packing; tokens are columns of B, so rows of x do (`pack`), and sums come out transposed
(`unpack`). With one token a row of x is its own B.

    tiles 0 .. 3   sums: [columns, tokens]
    tiles 4, 5     16 columns of the product each: rows of a weight
    tiles 6, 7     16 tokens each

A thread that multiplies configures its tiles first. The operating system must have given the
process leave (`lean.tiles_allowed`). An instruction starts every 16 cycles: 1024 flops a cycle,
where AVX-512 FMAs do 64. Every sum is taken over pairs of k in their order, whatever the number of
tokens and columns (Intel Architecture Instruction Set Extensions, TDPBF16PS).

Bytes (TDPBSSD) are multiplied the other way round: 16 rows of x are rows of A, and B takes of 16
columns four bytes each, then the next four, which is how weights in codes lie. Rows have 32 bytes,
since every 32 columns of x have a scale: 8 rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from dsc.backends.tvm.tir import Expr, Local, T, Tensor, integer, tirx

TOKENS = 16
"""Columns of B at most."""
COLUMNS = 16
"""Rows of A at most."""
DEPTH = 32
"""Values of k that an instruction takes."""
SUMS, WEIGHTS, PAIRS = (0, 1, 2, 3), (4, 5), (6, 7)
BYTES = 32
"""Bytes of a row that an instruction takes."""
_VECTORS = '"target-features"="+avx512f,+avx512bw,+avx512vl"'
_FEATURES = '"target-features"="+avx512f,+avx512bw,+avx512vl,+amx-tile,+amx-bf16"'
_BYTES = '"target-features"="+avx512f,+avx512bw,+avx512vl,+amx-tile,+amx-int8"'


def _function(signature: str, body: str) -> str:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return f"\ndefine linkonce_odr i32 {signature} #2 {{\n{lines}\n  ret i32 0\n}}\n"


def _configure() -> str:
    """Sizes for up to 16 tokens and 16 columns."""
    lines = ["%n = trunc i64 %columns to i8", "%s = shl i64 %tokens, 2", "%w = trunc i64 %s to i16"]
    sizes = {
        tile: ("16" if tile in PAIRS else "%n", "64" if tile in WEIGHTS else "%w")
        for tile in (*SUMS, *WEIGHTS, *PAIRS)
    }
    lines += _sized(sizes)
    return _function("@dsc_tiles(i64 %tokens, i64 %columns)", "\n".join(lines))


def _sized(sizes: Mapping[int, tuple[str, str]]) -> list[str]:
    """Write the 64 bytes that `ldtilecfg` reads: bytes of a row from 16 on, rows from 48 on."""
    lines = ["%c = alloca [64 x i8], align 64"]
    lines += ["store [64 x i8] zeroinitializer, ptr %c", "store i8 1, ptr %c"]
    for tile, (rows, width) in sizes.items():
        for kind, value, at in (("i16", width, 16 + 2 * tile), ("i8", rows, 48 + tile)):
            lines.append(f"%p{at} = getelementptr i8, ptr %c, i64 {at}")
            lines.append(f"store {kind} {value}, ptr %p{at}")
    return [*lines, "call void @llvm.x86.ldtilecfg(ptr %c)"]


def _tile_functions() -> str:
    """One function for each instruction and register: tile numbers are immediate operands."""
    text = _configure()
    for tile in SUMS:
        text += _function(f"@dsc_zero{tile}()", f"call void @llvm.x86.tilezero(i8 {tile})")
        text += _moving(f"save{tile}", f"call void @llvm.x86.tilestored64(i8 {tile}")
        for a in WEIGHTS:
            for b in PAIRS:
                line = f"call void @llvm.x86.tdpbf16ps(i8 {tile}, i8 {a}, i8 {b})"
                text += _function(f"@dsc_multiply{tile}{a}{b}()", line)
    for tile in (*SUMS, *WEIGHTS, *PAIRS):
        text += _moving(f"load{tile}", f"call void @llvm.x86.tileloadd64(i8 {tile}")
    return text


def _moving(name: str, call: str) -> str:
    """A function that moves a tile from or to memory, rows `stride` bytes apart."""
    lines = f"%p = inttoptr i64 %at to ptr\n{call}, ptr %p, i64 %stride)"
    return _function(f"@dsc_{name}(i64 %at, i64 %stride)", lines)


def _transposed(names: list[str]) -> tuple[list[str], list[str]]:
    """Lines that transpose 16 vectors of 16 words, and the names of the results.

    Blocks of 1, 2, 4 and 8 words change places across the diagonal, in turns.
    """
    lines: list[str] = []
    for step in (1, 2, 4, 8):
        fresh = list(names)
        for i in (i for i in range(16) if not i & step):
            low = [16 + lane - step if lane & step else lane for lane in range(16)]
            high = [16 + lane if lane & step else lane + step for lane in range(16)]
            for row, mask in ((i, low), (i + step, high)):
                fresh[row] = f"%t{step}_{row}"
                picked = ", ".join(f"i32 {lane}" for lane in mask)
                lines.append(
                    f"{fresh[row]} = shufflevector <16 x float> {names[i]},"
                    f" <16 x float> {names[i + step]}, <16 x i32> <{picked}>"
                )
        names = fresh
    return lines, names


def _pack() -> str:
    """16 rows of 16 words to 16 rows of `tokens` words."""
    lines = []
    for i in range(16):
        lines.append(f"%a{i} = inttoptr i64 %r{i} to ptr")
        lines.append(f"%v{i} = load <16 x float>, ptr %a{i}, align 4")
    moved, found = _transposed([f"%v{i}" for i in range(16)])
    lines += [*moved, "%n = trunc i64 %tokens to i32"]
    lines.append("%i = insertelement <16 x i32> poison, i32 %n, i32 0")
    lines.append("%s = shufflevector <16 x i32> %i, <16 x i32> poison, <16 x i32> zeroinitializer")
    every = ", ".join(f"i32 {i}" for i in range(16))
    lines += [f"%m = icmp ult <16 x i32> <{every}>, %s", "%w = shl i64 %tokens, 2"]
    for i, name in enumerate(found):
        lines.append(f"%o{i} = mul i64 %w, {i}")
        lines.append(f"%q{i} = add i64 %at, %o{i}")
        lines.append(f"%b{i} = inttoptr i64 %q{i} to ptr")
        store = f"<16 x float> {name}, ptr %b{i}, i32 4, <16 x i1> %m"
        lines.append(f"call void @llvm.masked.store.v16f32.p0({store})")
    rows = ", ".join(f"i64 %r{i}" for i in range(16))
    return _function(f"@dsc_pack({rows}, i64 %at, i64 %tokens)", "\n".join(lines))


def _unpack() -> str:
    """16 rows of 16 words to the other order, rows `stride` bytes apart."""
    lines = []
    for i in range(16):
        lines.append(f"%r{i} = add i64 %from, {64 * i}")
        lines.append(f"%a{i} = inttoptr i64 %r{i} to ptr")
        lines.append(f"%v{i} = load <16 x float>, ptr %a{i}, align 4")
    moved, found = _transposed([f"%v{i}" for i in range(16)])
    lines += moved
    for i, name in enumerate(found):
        lines.append(f"%o{i} = mul i64 %stride, {i}")
        lines.append(f"%q{i} = add i64 %to, %o{i}")
        lines.append(f"%b{i} = inttoptr i64 %q{i} to ptr")
        lines.append(f"store <16 x float> {name}, ptr %b{i}, align 4")
    return _function("@dsc_unpack(i64 %from, i64 %to, i64 %stride)", "\n".join(lines))


def _pair(half: int) -> str:
    """16 columns of two rows of 32 values, side by side."""
    lanes = [x for i in range(16 * half, 16 * half + 16) for x in (i, i + 32)]
    mask = ", ".join(f"i32 {lane}" for lane in lanes)
    return f"""
define linkonce_odr <16 x i32> @dsc_pair{half}(<32 x i16> %a, <32 x i16> %b) #2 {{
  %s = shufflevector <32 x i16> %a, <32 x i16> %b, <32 x i32> <{mask}>
  %r = bitcast <32 x i16> %s to <16 x i32>
  ret <16 x i32> %r
}}
"""


_ADDRESS = """
define linkonce_odr i64 @dsc_address(ptr %p) #2 {
  %r = ptrtoint ptr %p to i64
  ret i64 %r
}
"""
_DECLARED = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
"""
_MASKED = "\ndeclare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)\n"


@cache
def functions() -> str:
    """The LLVM IR of this module's operations on tiles of bf16."""
    text = _DECLARED + _tile_functions() + _pair(0) + _pair(1)
    return text + f"\nattributes #2 = {{ alwaysinline nounwind {_FEATURES} }}\n"


@cache
def transpositions() -> str:
    """The LLVM IR of `pack`, `unpack` and `address`, which AVX-512 is enough for."""
    text = (_MASKED + _ADDRESS + _pack() + _unpack()).replace(" #2 ", " #3 ")
    return text + f"\nattributes #3 = {{ alwaysinline nounwind {_VECTORS} }}\n"


@cache
def byte_functions() -> str:
    """The LLVM IR of this module's operations on bytes: two sums, of one tile of x and two of w."""
    sizes = {tile: ("16", "64") for tile in SUMS[:2]} | {PAIRS[0]: ("16", f"{BYTES}")}
    sizes |= {tile: (f"{BYTES // 4}", "64") for tile in WEIGHTS}
    text = _DECLARED + _ADDRESS + _function("@dsc_byte_tiles()", "\n".join(_sized(sizes)))
    text += "\ndeclare void @llvm.x86.tdpbssd(i8 immarg, i8 immarg, i8 immarg)\n"
    for tile, weights in zip(SUMS, WEIGHTS, strict=False):
        text += _function(f"@dsc_zero{tile}()", f"call void @llvm.x86.tilezero(i8 {tile})")
        text += _moving(f"save{tile}", f"call void @llvm.x86.tilestored64(i8 {tile}")
        line = f"call void @llvm.x86.tdpbssd(i8 {tile}, i8 {PAIRS[0]}, i8 {weights})"
        text += _function(f"@dsc_multiply_bytes{tile}()", line)
    for tile in (*WEIGHTS, PAIRS[0]):
        text += _moving(f"load{tile}", f"call void @llvm.x86.tileloadd64(i8 {tile}")
    return text + f"\nattributes #2 = {{ alwaysinline nounwind {_BYTES} }}\n"


def _call(name: str, *operands: Expr) -> None:
    T.evaluate(tirx.call_extern("int32", f"dsc_{name}", *operands))


def configure(tokens: Expr, columns: Expr) -> None:
    """Give this thread's tiles their sizes: up to 16 tokens and 16 columns."""
    _call("tiles", tokens, columns)


def configure_bytes() -> None:
    """Give this thread's tiles their sizes for products of bytes."""
    _call("byte_tiles")


def multiply_bytes(number: int) -> None:
    """Set a sum to 0 and add the products of 16 rows of x with 16 columns of a weight."""
    _call(f"zero{SUMS[number]}")
    _call(f"multiply_bytes{SUMS[number]}")


def zero(tile: int) -> None:
    """Set sums to 0."""
    _call(f"zero{tile}")


def multiply(sums: int, weights: int, pairs: int) -> None:
    """Add products to sums."""
    _call(f"multiply{sums}{weights}{pairs}")


def address(x: Tensor | Local, position: Expr) -> Expr:
    """Where an element lies."""
    place = T.address_of(x.buffer[integer(position)])
    return tirx.call_extern("int64", "dsc_address", place)


def load(tile: int, at: Expr, stride: Expr) -> None:
    """Fill a tile from memory: rows at an address, `stride` bytes apart."""
    _call(f"load{tile}", at, integer(stride))


def save(tile: int, at: Expr, stride: Expr) -> None:
    """Write sums to memory."""
    _call(f"save{tile}", at, integer(stride))


def pack(rows: Sequence[Expr], at: Expr, tokens: Expr) -> None:
    """32 values of each of 16 rows, at their addresses, as pairs of the first `tokens` of them."""
    _call("pack", *rows, at, integer(tokens))


def pairs(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Two rows of 32 values as words of one column each: columns 0 .. 15 and 16 .. 31."""
    low, high = (tirx.call_pure_extern("int32x16", f"dsc_pair{i}", a, b) for i in range(2))
    return low, high


def unpack(source: Expr, target: Expr, stride: Expr) -> None:
    """16 x 16 words in the other order, to rows `stride` bytes apart."""
    _call("unpack", source, target, integer(stride))
