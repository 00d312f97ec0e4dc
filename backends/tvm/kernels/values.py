"""Values of fused regions in registers: pointwise operators, rounded as memory would round them.

A region keeps the bits of its parts: what an operator gives is rounded to its element type whether
or not it is stored. So fusion levels agree, and a level is a choice of speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsc.backends.tvm import bf16
from dsc.backends.tvm.kernels.formulas import convert, formula
from dsc.backends.tvm.kernels.movement import constant
from dsc.backends.tvm.tir import (
    STORAGE,
    VALUE,
    Expr,
    Local,
    Tensor,
    bind,
    decode,
    encode,
    lanes_of,
    splat,
)
from dsc.ir.region_steps import Literal, Step
from dsc.ir.types import DType


def compute(step: Step, values: Sequence[Expr], native: bool) -> Expr:
    """A pointwise operator on register values of equal lanes."""
    if step.op == "cast":
        value = convert(values[0], step.reads[0].dtype, step.dtype)
    else:
        value = formula(step.op, step.attrs)(*values)
    return held(rounded(value, step.dtype, native))


def literal(number: Literal, dtype: DType, lanes: int) -> Expr:
    """A number in every lane, as its element type holds it."""
    return splat(rounded(constant(number.value, dtype), dtype, native=False), lanes)


def rounded(value: Expr, dtype: DType, native: bool) -> Expr:
    """A register value as it would come back from memory of `dtype`."""
    if native and dtype is DType.bf16 and lanes_of(value) == bf16.SUMS:
        return decode(bf16.narrow(value), dtype)
    if dtype is DType.boolean or (STORAGE[dtype] == VALUE[dtype]):
        return value
    return decode(encode(value, dtype), dtype)


def put(target: Tensor, position: Expr, value: Expr, native: bool) -> None:
    """Write a register value; in bf16 by the machine's own conversion where it has one."""
    if native and target.dtype is DType.bf16 and lanes_of(value) == bf16.SUMS:
        bf16.put_bits(target, position, bf16.narrow(value))
    else:
        target.put(position, value)


def held(value: Expr) -> Expr:
    """`value`, computed once here: see `tir.hold`, for any element type."""
    name = str(value.ty.dtype.with_lanes(1))
    if name == "bool":
        return bind(value)
    cell = Local(1, name, lanes_of(value))
    cell[0] = value
    return cell[0]
