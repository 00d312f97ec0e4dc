"""experts: sum_k w_k * down_k(act(gate_k x) * up_k x) over the chosen experts of each token.

The (token, slot) pairs are sorted by expert first, so that a block of an expert's rows is read once
for all of its tokens; a decode step touches the chosen experts only. Threads share out blocks of
rows of gate and up, then blocks of rows of down: no two write the same element.
"""

from __future__ import annotations

from collections.abc import Callable

from dsc.backends.tvm.kernels import bf16_experts
from dsc.backends.tvm.kernels.bf16_panels import fits
from dsc.backends.tvm.kernels.dots import dots
from dsc.backends.tvm.kernels.sorting import sort_pairs
from dsc.backends.tvm.launch import Launch, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    ACTIVATIONS,
    PARALLEL_WORK,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    f32,
    for_each,
    integer,
    lanes_for,
    loop,
    splat,
    tiles,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `experts`.

    Scratch: the sorted pairs (i64 [experts + 1] and [pairs]), the hidden activations f32 [pairs, i]
    and the fp32 sums [rows, d].
    """
    x, idx, gate_up, down = (operand(node, i).type for i in (0, 1, 3, 4))
    experts, d, i = (static_dim(n, "an expert's axis") for n in down.shape)
    top_k, rows = static_dim(idx.shape[-1], "top_k"), rows_of(x)
    act = node.attrs["act"]
    if fits(machine, d, x, gate_up, down) and fits(machine, i, x):
        return bf16_experts.launch(rows, experts, d, i, top_k, act, machine)
    static = (x.dtype, gate_up.dtype, experts, d, i, top_k, act, machine)
    pairs = rows * top_k
    return Launch(
        experts_direct,
        static,
        (rows,),
        scratch=pairs * (8 + 4 * i) + 8 * (experts + 1) + rows * (4 * d),
        flops=pairs * (6 * d * i),
    )


def experts_direct(
    dtype: DType,
    stored: DType,
    experts: int,
    d: int,
    hidden: int,
    top_k: int,
    act: str,
    machine: Machine,
) -> PrimFunc:
    """Arguments: x, idx, w, gate_up [e, 2i, d], down [e, d, i], y, scratch; rows."""
    activation = ACTIVATIONS[act]
    block = lanes_for(hidden, max(1, machine.columns // 2))
    wide = lanes_for(d, machine.columns)

    def body(
        x: Expr, idx: Expr, w: Expr, gate_up: Expr, down: Expr, y: Expr, scratch: Expr, rows: Expr
    ) -> None:
        pairs = rows * top_k
        source, target = Tensor(x, dtype, (rows, d)), Tensor(y, dtype, (rows, d))
        chosen, weight = Tensor(idx, DType.i64, (pairs,)), Tensor(w, DType.f32, (pairs,))
        up = Tensor(gate_up, stored, (experts, 2 * hidden, d))
        out = Tensor(down, stored, (experts, d, hidden))
        offsets = Tensor(scratch, DType.i64, (experts + 1,))
        order = Tensor(scratch + 8 * (experts + 1), DType.i64, (pairs,))
        h_at = scratch + 8 * (experts + 1) + 8 * pairs
        h = Tensor(h_at, DType.f32, (pairs, hidden))
        sums = Tensor(h_at + 4 * hidden * pairs, DType.f32, (rows, d))
        sort_pairs(chosen, pairs, experts, offsets, order)

        def expert_tiles(e: Expr, tile: Callable[[Expr, int], None]) -> None:
            first = bind(offsets.load(e))
            count = bind(offsets.load(e + 1) - first)
            tiles(count, machine.rows, lambda p, n: tile(first + p, n))

        def hidden_block(i: Expr) -> None:
            """act(gate) * up of `block` hidden units, for every pair."""
            with loop(experts) as e:

                def pair_tile(p: Expr, count: int) -> None:
                    places = [bind(order.load(p + a)) for a in range(count)]
                    x_rows = [bind(place // top_k * d) for place in places]
                    units = [i * block + c for c in range(block)]
                    w_rows = [up.offset(e, u) for u in units]
                    w_rows += [up.offset(e, u + hidden) for u in units]
                    values = dots(source, x_rows, up, [bind(r) for r in w_rows], d, machine.lanes)
                    for a, line in enumerate(values):
                        for c, unit in enumerate(units):
                            value = activation(bind(line[c])) * line[c + block]
                            h.store(value, p + a, unit)

                expert_tiles(e, pair_tile)

        def output_block(j: Expr) -> None:
            """`wide` columns of the output, summed over experts in a fixed order."""
            columns = [j * wide + c for c in range(wide)]
            with loop(rows) as r:
                sums.store(splat(f32(0.0), wide), r, j * wide)
            with loop(experts) as e:

                def pair_tile(p: Expr, count: int) -> None:
                    places = [bind(order.load(p + a)) for a in range(count)]
                    h_rows = [bind((p + a) * hidden) for a in range(count)]
                    w_rows = [bind(out.offset(e, c)) for c in columns]
                    values = dots(h, h_rows, out, w_rows, hidden, machine.lanes)
                    for place, line in zip(places, values, strict=True):
                        token, share = bind(place // top_k), bind(weight.load(place))
                        for column, value in zip(columns, line, strict=True):
                            old = sums.load(token, column)
                            sums.store(old + share * value, token, column)

                expert_tiles(e, pair_tile)
            with loop(rows) as r:
                target.store(sums.load(r, j * wide, lanes=wide), r, j * wide)

        for_each(hidden // block, _work(rows, experts, block * d), hidden_block)
        for_each(d // wide, _work(rows, experts, wide * hidden), output_block)

    return build(body)


def _work(rows: Expr, experts: int, block: int) -> Expr:
    """Work of a block: at least one product for a token, and the scan over all experts."""
    return PARALLEL_WORK if block >= PARALLEL_WORK // 64 else rows * integer(block + experts)
