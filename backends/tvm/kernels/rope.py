"""rope: rotate pairs of the last axis by position * frequency; three layouts of the pairs.

The angles of a token are computed once and serve all of its heads.
"""

from __future__ import annotations

from tvm import tirx

from dsc.backends.tvm.launch import Launch, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    f32,
    for_each,
    loop,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `rope` on [b,s,r] (one head) or [b,s,h,r]."""
    x, positions = operand(node, 0).type, operand(node, 1).type
    width = static_dim(x.shape[-1], "the rotated axis")
    heads = static_dim(x.shape[2], "the number of heads") if x.rank == 4 else 1
    scale = float(node.attrs["scale"])
    static = (x.dtype, heads, width, node.attrs["layout"], scale)
    tokens = rows_of(positions, 0)
    return Launch(rope, static, (tokens,), flops=tokens * (3 * heads * width))


def rope(dtype: DType, heads: int, width: int, layout: str, scale: float) -> PrimFunc:
    """Arguments: x [tokens, heads, width], positions, inv_freq [width/2], y as x; tokens."""
    half = width // 2

    def body(x: Expr, positions: Expr, inv_freq: Expr, y: Expr, tokens: Expr) -> None:
        shape = (tokens, heads, width)
        source, target = Tensor(x, dtype, shape), Tensor(y, dtype, shape)
        position = Tensor(positions, DType.i64, (tokens,))
        frequency = Tensor(inv_freq, DType.f32, (half,))

        def token(t: Expr) -> None:
            cos, sin = Local(half), Local(half)
            where = bind(cast(position.load(t), "float32"))
            with loop(half) as i:
                angle = bind(where * frequency.load(i))
                cos[i] = tirx.cos(angle) * f32(scale)
                sin[i] = tirx.sin(angle) * f32(scale)
            with loop(heads) as h, loop(half) as i:
                pair = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
                out = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half)
                a = bind(source.load(t, h, pair[0]))
                b = bind(source.load(t, h, pair[1]))
                target.store(a * cos[i] - b * sin[i], t, h, out[0])
                target.store(b * cos[i] + a * sin[i], t, h, out[1])

        for_each(tokens, width * (heads + 8), token)

    return build(body)
