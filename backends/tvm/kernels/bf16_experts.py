"""experts and grouped_linear in bf16: pairs sorted by expert, each weight read once.

Bound: with few tokens the bytes of the chosen experts, 6 d i each, over bandwidth; with many
6 d i flops a pair over the peak of pair products. A task is a block of rows of one expert's weights
with all of its tokens. Tasks go block by block, then expert by expert, so that threads stay level
however uneven the experts' loads are. The sum over a token's experts is fp32, in the order of
experts, whatever shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from dsc.backends.tvm.bf16 import SUMS, instructions, narrow, put_bits
from dsc.backends.tvm.kernels.bf16_linear import grain
from dsc.backends.tvm.kernels.bf16_product import (
    BLOCK,
    Weights,
    dot_block,
    row_tiles,
    store_row,
    tile_height,
)
from dsc.backends.tvm.kernels.sorting import sort_pairs
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.tir import (
    ACTIVATIONS,
    Expr,
    PrimFunc,
    Tensor,
    bind,
    build,
    f32,
    for_each,
    integer,
    loop,
    select,
    splat,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.types import DType

UNITS = 32
"""Hidden units of a task: as many rows of gate and of up, 256 KiB at d = 2048."""


def launch(rows: Dim, experts: int, d: int, hidden: int, top_k: int, act: str) -> Launch:
    """The launch of `experts`.

    Scratch: the sorted pairs (i64 [experts + 1] and [pairs]), the chosen experts (their number,
    then i64 [experts]), the fp32 sums [rows, d], and the hidden activations bf16 [pairs, hidden].
    """
    pairs = rows * top_k
    scratch = 16 * (experts + 1) + pairs * (8 + 2 * hidden) + rows * (4 * d)
    static = (experts, d, hidden, top_k, act)
    return Launch(bf16_experts, static, (rows,), scratch=scratch, flops=pairs * (6 * d * hidden))


def bf16_experts(experts: int, d: int, hidden: int, top_k: int, act: str) -> PrimFunc:
    """Arguments: x, idx, w, gate_up [e, 2i, d], down [e, d, i], y, scratch; rows."""
    activation = ACTIVATIONS[act]

    def body(
        x: Expr, idx: Expr, w: Expr, gate_up: Expr, down: Expr, y: Expr, scratch: Expr, rows: Expr
    ) -> None:
        pairs = rows * top_k
        source = Tensor(x, DType.bf16, (rows, d))
        target = Tensor(y, DType.bf16, (rows, d))
        chosen, weight = Tensor(idx, DType.i64, (pairs,)), Tensor(w, DType.f32, (pairs,))
        up = Tensor(gate_up, DType.bf16, (experts, 2 * hidden, d))
        out = Tensor(down, DType.bf16, (experts, d, hidden))
        offsets = Tensor(scratch, DType.i64, (experts + 1,))
        active = Tensor(scratch + 8 * (experts + 1), DType.i64, (experts + 1,))
        order = Tensor(scratch + 16 * (experts + 1), DType.i64, (pairs,))
        sums_at = scratch + 16 * (experts + 1) + 8 * pairs
        sums = Tensor(sums_at, DType.f32, (rows, d))
        h = Tensor(sums_at + 4 * d * rows, DType.bf16, (pairs, hidden))
        sort_pairs(chosen, pairs, experts, offsets, order)
        _list_active(offsets, active, experts)

        def pair_tiles(e: Expr, tile: Callable[[Expr, int], None]) -> None:
            first = bind(offsets.load(e))
            count = bind(offsets.load(e + 1) - first)
            row_tiles(count, tile_height(), lambda p, height: tile(first + p, height))

        def hidden_block(task: Expr) -> None:
            """act(gate) * up of UNITS hidden units, for all tokens of an expert."""
            e = bind(active.load(1 + tirx.truncdiv(task, integer(hidden // UNITS))))
            unit = bind(tirx.truncmod(task, integer(hidden // UNITS)) * UNITS)
            gate_at = bind((e * (2 * hidden) + unit) * d)

            def tile(p: Expr, height: int) -> None:
                x_rows = [bind(order.load(p + r) // top_k * d) for r in range(height)]
                lift_at = bind(gate_at + hidden * d)
                gate, lift = (
                    dot_block(source, x_rows, Weights(up, start, integer(d), UNITS, d, then))
                    for start, then in ((gate_at, lift_at), (lift_at, gate_at + UNITS * d))
                )
                for r in range(height):
                    for j in range(0, UNITS, SUMS):
                        at = integer(r * BLOCK + j)
                        value = activation(bind(gate.load(at, SUMS))) * lift.load(at, SUMS)
                        put_bits(h, (p + r) * hidden + unit + j, narrow(value))

            pair_tiles(e, tile)

        columns = grain(rows)

        def output_block(task: Expr) -> None:
            """A block of the output's columns, summed over experts in their order."""
            first = bind(task * columns)
            width = bind(tirx.min(columns, d - first))
            vectors = bind(tirx.truncdiv(width, integer(SUMS)))
            with loop(rows) as r, loop(vectors) as j:
                sums.store(splat(f32(0.0), SUMS), r, first + j * SUMS)
            with loop(active.load(0)) as a:
                e = bind(active.load(1 + a))
                more = a + 1 < active.load(0)
                after = bind(active.load(1 + select(more, a + 1, integer(0))))
                column = select(more, first, first + columns)
                following = bind((after * d + column) * hidden)

                def tile(p: Expr, height: int) -> None:
                    h_rows = [bind((p + r) * hidden) for r in range(height)]
                    start = bind((e * d + first) * hidden)
                    block = Weights(out, start, integer(hidden), width, hidden, following)
                    values = dot_block(h, h_rows, block)
                    for r in range(height):
                        place = bind(order.load(p + r))
                        at = bind(sums.offset(place // top_k, first))
                        share = bind(splat(weight.load(place), SUMS))
                        with loop(vectors) as j:
                            value = share * values.load(j * SUMS + r * BLOCK, SUMS)
                            sums.put(at + j * SUMS, sums.at(at + j * SUMS, SUMS) + value)

                pair_tiles(e, tile)
            with loop(rows) as r, loop(vectors) as j:
                at = bind(target.offset(r, first + j * SUMS))
                put_bits(target, at, narrow(sums.at(at, SUMS)))

        with instructions():
            tasks = bind(active.load(0) * (hidden // UNITS))
            for_each(tasks, UNITS * d // 2, hidden_block)
            blocks = bind(tirx.truncdiv(d + columns - 1, columns))
            for_each(blocks, rows * (top_k * SUMS * hidden // 4), output_block)

    return build(body)


def _list_active(offsets: Tensor, active: Tensor, experts: int) -> None:
    """active[1 ..]: the experts that have tokens; active[0]: their number."""
    active.store(integer(0), 0)
    with loop(experts) as e, when(offsets.load(e + 1) > offsets.load(e)):
        count = bind(active.load(0) + 1)
        active.store(e, count)
        active.store(count, 0)


def launch_grouped(rows: Dim, experts: int, n: int, k: int) -> Launch:
    """The launch of `grouped_linear`."""
    return Launch(bf16_grouped, (experts, n, k), (rows,), flops=rows * (2 * n * k))


def bf16_grouped(experts: int, n: int, k: int) -> PrimFunc:
    """Arguments: x [rows, k], weight [e, n, k], offsets [e+1], y [rows, n]; rows."""

    def body(x: Expr, weight: Expr, offsets: Expr, y: Expr, rows: Expr) -> None:
        source, target = Tensor(x, DType.bf16, (rows, k)), Tensor(y, DType.bf16, (rows, n))
        w = Tensor(weight, DType.bf16, (experts, n, k))
        starts = Tensor(offsets, DType.i64, (experts + 1,))

        def task(i: Expr) -> None:
            e, column = bind(tirx.truncmod(i, experts)), bind(tirx.truncdiv(i, experts) * BLOCK)
            first, width = bind(starts.load(e)), bind(tirx.min(integer(BLOCK), n - column))
            block = Weights(w, bind((e * n + column) * k), integer(k), width, k)

            def tile(p: Expr, height: int) -> None:
                at = [bind(first + p + r) for r in range(height)]
                values = dot_block(source, [bind(row * k) for row in at], block)
                for r, row in enumerate(at):

                    def value(j: Expr, lanes: int, r: int = r) -> Expr:
                        return values.load(j + r * BLOCK, lanes)

                    store_row(target, bind(row * n + column), width, value)

            row_tiles(bind(starts.load(e + 1) - first), tile_height(), tile)

        with instructions():
            for_each(experts * -(-n // BLOCK), rows * k, task)

    return build(body)
