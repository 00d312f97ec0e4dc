"""Caches in codes (`quantize_cache`): rows of bytes, each its codes and then its scales.

New rows become codes where they are written, bit for bit as `dsc.ir.formats.pack_state` has them:
scales of FP8 are powers of two, and a group with NaN or infinity is NaN. Absorbed attention makes
numbers of a tile of rows as it loads it; the expanded form, whose every head reads a row, has those
that it sees made numbers once, by a launch before.

Cost      a row is read as 656 bytes where bf16 has 1,152 (512 latents, 64 rope keys).
Legality  codes in e4m3 or 8 bits, groups of a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsc.backends.triton.blocks import next_power
from dsc.backends.triton.codes import e4m3_bits, nearest_e4m3, power_of_two
from dsc.backends.triton.pointwise import TYPES
from dsc.ir import views
from dsc.ir.formats import CODINGS, code_bytes, grid
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

CACHES: Mapping[str, tuple[str, ...]] = {
    "cache_write": ("cache",),
    "latent_attention": ("latent",),
    "mla_attention": ("latent",),
}
"""Operands that kernels read, or write, as caches in codes."""


def cache_reason(t: TensorType) -> str | None:
    """Why no kernel reads and writes rows of such a cache, or `None`."""
    if t.format is None:
        return None
    if not t.format.behind or CODINGS[t.dtype].together > 1 or t.format.scales is not DType.f32:
        return f"a cache in {t.dtype}{t.format}"
    group = t.format.block[1]
    return None if group and not group & group - 1 else f"a cache in groups of {group} columns"


def row_bytes(t: TensorType) -> int:
    """Bytes of a row: a multiple of four."""
    return int(t.stored.shape[-1])  # type: ignore[arg-type]


def parts_of(cache: View) -> tuple[View, View]:
    """Where the codes u8[…, columns] and the scales f32[…, groups] of a dense cache lie."""
    t, width = cache.type, row_bytes(cache.type)
    assert t.format is not None
    codes = views.dense_strides((*t.shape[:-1], width))
    scales = views.dense_strides((*t.shape[:-1], width // 4))
    groups = grid(t.shape, t.format.block)
    together = CODINGS[t.dtype].together
    behind = code_bytes(t.shape[-1], together) // 4
    return (
        View(cache.buffer, TensorType(DType.u8, t.shape), codes),
        View(cache.buffer, TensorType(DType.f32, groups), scales, behind),
    )


def group_of(t: TensorType) -> int:
    """Columns that share a scale, of a row that is padded to a power of two."""
    assert t.format is not None
    return min(t.format.block[1], next_power(int(t.shape[-1])))  # type: ignore[arg-type]


def to_codes(name: str, t: TensorType, rows: str) -> list[str]:
    """From `name` f32[rows, padded width] to its codes u8 and `{name}_scales` f32[rows, groups].

    What is no element is 0.
    """
    group, coding = group_of(t), CODINGS[t.dtype]
    width = next_power(int(t.shape[-1]))  # type: ignore[arg-type]
    apart = f"({rows}, {width // group}, {group})"
    lines = [
        f"{name} = tl.reshape({name}, {apart})",
        f"peak = tl.max(tl.abs({name}), axis=2) + tl.sum({name} - {name}, axis=2)",
        f"{name}_scales = tl.div_rn(peak, peak * 0.0 + {coding.largest})",
    ]
    if t.dtype.is_float:
        lines += power_of_two(f"{name}_scales", "peak")
    lines.append(f"{name}_scales = tl.where({name}_scales == 0.0, 1.0, {name}_scales)")
    wide = f"tl.broadcast_to({name}_scales[:, :, None], {apart})"
    lines.append(f"{name} = tl.div_rn({name}, {wide})")
    if t.dtype.is_float:
        lines += [
            *nearest_e4m3(name),
            f"half = ({name} * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)",
            f"{name} = (((half >> 7) & 127) | ((half >> 8) & 128)).to(tl.uint8)",
        ]
    else:
        lines += [
            f"{name} = {name} + 12582912.0 - 12582912.0",
            f"{name} = {name}.to(tl.int8).to(tl.uint8, bitcast=True)",
        ]
    return [*lines, f"{name} = tl.reshape({name}, ({rows}, {width}))"]


def to_numbers(t: TensorType, kind: DType, fp8: str) -> list[str]:
    """The place `values`: rows of a cache as numbers [BLOCK_T, BLOCK_C] of a type.

    `fp8` is the kind of e4m3 that the target converts by itself.
    """
    group = group_of(t)
    groups = next_power(int(t.shape[-1])) // group  # type: ignore[arg-type]
    decoded = ["values = codes.to(tl.int8, bitcast=True)"]
    if t.dtype.is_float and fp8 == "e4m3fn":
        decoded = ["values = codes.to(tl.float8e4nv, bitcast=True)"]
    elif t.dtype.is_float:
        decoded = [*e4m3_bits("codes"), "values = codes"]
    return [
        "codes = tl.load(l_at, mask=fresh & (c[None, :] < C), other=0)",
        *decoded,
        f"group = tl.arange(0, {groups})[None, :]",
        "scale_at = scales + b * scales_batch + rows * scales_row + group",
        f"row_scale = tl.load(scale_at, mask=fresh & (group * {group} < C), other=0.0)",
        f"values = tl.reshape(values.to(tl.float32), (BLOCK_T, {groups}, {group}))",
        "values = tl.reshape(values * row_scale[:, :, None], (BLOCK_T, BLOCK_C))",
        f"values = values.to({TYPES[kind]})",
    ]
