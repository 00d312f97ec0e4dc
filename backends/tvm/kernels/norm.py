"""rms_norm: y = round(x * rsqrt(mean(x^2) + eps)) * weight, one row at a time, statistics in fp32.

The normalised value is rounded to the element type before the weight multiplies it, as the
operator's reference does.
"""

from __future__ import annotations

from tvm import tirx

from dsc.backends.tvm.launch import Launch, fp32_only, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    decode,
    encode,
    f32,
    for_each,
    lanes_for,
    loop,
    splat,
    total,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `rms_norm`: rows are all leading axes."""
    fp32_only(node)
    x = operand(node, 0).type
    d, rows = static_dim(x.shape[-1], "the normalised axis"), rows_of(x)
    return Launch(rms_norm, (x.dtype, d, node.attrs["eps"], machine), (rows,), flops=rows * (4 * d))


def rms_norm(dtype: DType, d: int, eps: float, machine: Machine) -> PrimFunc:
    """Arguments: x [rows, d], weight [d], y [rows, d]; rows."""
    lanes = lanes_for(d, machine.lanes)

    def body(x: Expr, weight: Expr, y: Expr, rows: Expr) -> None:
        source, target = Tensor(x, dtype, (rows, d)), Tensor(y, dtype, (rows, d))
        gain = Tensor(weight, dtype, (d,))

        def row(r: Expr) -> None:
            squares = Local(1, width=lanes)
            squares[0] = squares.zero
            with loop(d // lanes) as i:
                v = bind(source.load(r, i * lanes, lanes=lanes))
                squares[0] = squares[0] + v * v
            scale = bind(f32(1.0) / tirx.sqrt(total(squares[0]) / f32(d) + f32(eps)))
            with loop(d // lanes) as i:
                v = source.load(r, i * lanes, lanes=lanes) * splat(scale, lanes)
                rounded = decode(encode(v, dtype), dtype)
                target.store(rounded * gain.load(i * lanes, lanes=lanes), r, i * lanes)

        for_each(rows, 2 * d, row)

    return build(body)
