"""Stored weights as some products take them: unsigned codes, rows of whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dsc.ir.formats import CODINGS, UNSIGNED, WHOLE, Format, grid
from dsc.ir.ops.shape import axis_of
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Apply, WeightExpr, apply, scaled
from dsc.passes._in_format import Dequantised

SCALES = DType.f32
"""Products of fp32 rows take scales in it; every scale of fewer bits is one."""
COLUMNS = 128
"""Of a block where a row has one scale, if there are kernels for so many."""


def each_matrix(expr: WeightExpr, step: Callable[[WeightExpr], WeightExpr]) -> WeightExpr:
    """A step on every matrix of a stack, one by one, so that they can be streamed."""
    if isinstance(expr, Apply) and _joins_matrices(expr):
        return apply(expr.op, *(each_matrix(arg, step) for arg in expr.args), **expr.attrs)
    return step(expr)


def as_unsigned(expr: Apply, most: int) -> Apply:
    """A weight that is row after row in a format, its codes unsigned, `most` columns a block.

    Raises `Dequantised`.
    """
    made = _type(expr.type, most)
    before, after = expr.type.format, made.format
    assert before is not None
    assert after is not None
    codes, scales, *zeros = expr.args
    together, bits = CODINGS[made.dtype].together, made.dtype.bits

    def in_bytes(x: WeightExpr) -> WeightExpr:
        """Codes as they are stored, 4-bit ones in pairs already."""
        above = x if together > 1 else apply("above_least", x, bits=bits)
        return _filled(above, after.step // together)

    def zero_bytes(x: WeightExpr) -> WeightExpr:
        above = apply("above_least", x, bits=bits)
        return apply("join_nibbles", _filled(above, together)) if together > 1 else above

    def wide(x: WeightExpr) -> WeightExpr:
        return x if x.type.dtype is SCALES else apply("cast", x, dtype=SCALES)

    if before.block[1] == WHOLE:  # one scale of a row for each of its blocks
        blocks = grid(made.shape, after.block)

        def expanded(x: WeightExpr) -> WeightExpr:
            return apply("expand", x, shape=blocks)

        scales, *zeros = map(expanded, (scales, *zeros))
    found = [each_matrix(codes, in_bytes), each_matrix(scales, wide)]
    return scaled([*found, *(each_matrix(x, zero_bytes) for x in zeros)], made)


def _type(given: TensorType, most: int) -> TensorType:
    """The type in unsigned codes. Raises `Dequantised` where there is none."""
    format = given.format
    assert format is not None
    (rows, columns), zeros = format.block, format.zeros
    columns = min(COLUMNS, most) if columns == WHOLE else columns
    if given.rank < 2 or rows != 1:
        raise Dequantised(f"{rows} of its rows share a scale")
    if columns < UNSIGNED or columns > most or columns & columns - 1:
        due = f"a power of two from {UNSIGNED} to {most} is due"
        raise Dequantised(f"its blocks have {columns} columns; {due}")
    if zeros not in (None, DType.i8):
        raise Dequantised(f"its zero points are in {zeros}")
    made = Format((1, columns), SCALES, zeros and DType.u8, unsigned=True)
    return replace(given, format=made)


def _filled(x: WeightExpr, step: int) -> WeightExpr:
    """Rows filled up to a multiple of so many columns."""
    whole = isinstance(x.type.shape[-1], int) and x.type.shape[-1] % step == 0
    return x if whole else apply("tiled", x, tile=1, step=step)


def _joins_matrices(expr: Apply) -> bool:
    rank = expr.type.rank
    if expr.op == "concat":
        return axis_of(expr.attrs["axis"], rank) < rank - 2
    return expr.op == "stack" and rank > 2
