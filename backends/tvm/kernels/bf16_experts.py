"""experts in bf16: pairs sorted by expert, each weight read once.

Bound: with few tokens the bytes of the chosen experts, 6 d i each, over bandwidth; with many
6 d i flops a pair over the peak of pair products. A task is a block of rows of one expert's weights
with all of its tokens. Tasks go block by block, then expert by expert, so that threads stay level
however uneven the experts' loads are. The sum over a token's experts is fp32, in the order of
experts, whatever shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc.backends.tvm.amx import TOKENS
from dsc.backends.tvm.bf16 import SUMS, instructions, narrow, put_bits
from dsc.backends.tvm.kernels.bf16_panels import (
    Rows,
    first_panel,
    grain,
    multiply,
    pack_stacked,
    panel_bytes,
    tile_rows,
)
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights
from dsc.backends.tvm.kernels.sorting import sort_pairs
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    ACTIVATIONS,
    Expr,
    Local,
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
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.types import DType

UNITS = 32
"""Hidden units of a task: as many rows of gate and of up, 256 KiB at d = 2048."""


def launch(
    rows: Dim, experts: int, d: int, hidden: int, top_k: int, act: str, machine: Machine
) -> Launch:
    """The launch of `experts`."""
    static = (experts, d, hidden, top_k, act, machine.tiles)
    pairs = rows * top_k
    scratch = _places(rows, experts, d, hidden, top_k, machine.tiles)["end"]
    return Launch(bf16_experts, static, (rows,), scratch=scratch, flops=pairs * (6 * d * hidden))


def _places(
    rows: Dim | Expr, experts: int, d: int, hidden: int, top_k: int, tiles: bool
) -> dict[str, Any]:
    """Where things lie in scratch memory, on whole cache lines; `end` is its size.

    The sorted pairs (i64 [experts + 1] and [pairs]), the chosen experts (their number, then i64
    [experts]), the fp32 sums [rows, d], the hidden activations bf16 [pairs, hidden], and the panels
    of both products.
    """
    pairs = rows * top_k
    sizes: dict[str, Any] = {
        "offsets": 8 * (experts + 1),
        "active": 8 * (experts + 1),
        "order": pairs * 8,
        "sums": rows * (4 * d),
        "hidden": pairs * (2 * hidden),
        "x_panels": panel_bytes(pairs, d, experts) if tiles else 0,
        "hidden_panels": panel_bytes(pairs, hidden, experts) if tiles else 0,
    }
    found: dict[str, Any] = {}
    at: Any = 0
    for name, size in sizes.items():
        found[name] = at
        at = at + (size + 63) // 64 * 64
    return {**found, "end": at}


def bf16_experts(experts: int, d: int, hidden: int, top_k: int, act: str, tiles: bool) -> PrimFunc:
    """Arguments: x, idx, w, gate_up [e, 2i, d], down [e, d, i], y, scratch; rows."""
    activation = ACTIVATIONS[act]

    def body(
        x: Expr, idx: Expr, w: Expr, gate_up: Expr, down: Expr, y: Expr, scratch: Expr, rows: Expr
    ) -> None:
        pairs = rows * top_k
        places = _places(rows, experts, d, hidden, top_k, tiles)
        at = {name: bind(scratch + place) for name, place in places.items()}
        source = Tensor(x, DType.bf16, (rows, d))
        target = Tensor(y, DType.bf16, (rows, d))
        chosen, weight = Tensor(idx, DType.i64, (pairs,)), Tensor(w, DType.f32, (pairs,))
        up = Tensor(gate_up, DType.bf16, (experts, 2 * hidden, d))
        out = Tensor(down, DType.bf16, (experts, d, hidden))
        offsets = Tensor(at["offsets"], DType.i64, (experts + 1,))
        active = Tensor(at["active"], DType.i64, (experts + 1,))
        order = Tensor(at["order"], DType.i64, (pairs,))
        sums = Tensor(at["sums"], DType.f32, (rows, d))
        h = Tensor(at["hidden"], DType.bf16, (pairs, hidden))
        sort_pairs(chosen, pairs, experts, offsets, order)
        _list_active(offsets, active, experts)

        def tokens_of(e: Expr) -> Rows:
            """The rows of x that chose an expert."""
            return _rows_of(
                e, offsets, source, x, lambda p: order.load(p) // top_k * d, d, at["x_panels"]
            )

        def activations_of(e: Expr) -> Rows:
            """The hidden activations of an expert's pairs."""
            return _rows_of(
                e, offsets, h, at["hidden"], lambda p: p * hidden, hidden, at["hidden_panels"]
            )

        def hidden_block(task: Expr) -> None:
            """act(gate) * up of UNITS hidden units, for all tokens of an expert."""
            e = bind(active.load(1 + tirx.truncdiv(task, integer(hidden // UNITS))))
            unit = bind(tirx.truncmod(task, integer(hidden // UNITS)) * UNITS)
            gate_at = bind((e * (2 * hidden) + unit) * d)
            lift_at = bind(gate_at + hidden * d)

            place = 1 + tirx.truncdiv(task + 1, integer(hidden // UNITS))
            after = bind(active.load(tirx.min(place, active.load(0))))
            next_unit = tirx.truncmod(task + 1, integer(hidden // UNITS)) * UNITS
            away = bind((after * (2 * hidden) + next_unit) * d - gate_at)

            def block(n: Expr) -> Weights:
                gate = tirx.EQ(integer(n), integer(0))
                start = bind(select(gate, gate_at, lift_at))
                then = bind(select(gate, lift_at, gate_at + away))
                return Weights(up, start, integer(d), UNITS, d, then, start + away)

            def finish(tile: Local, r: Expr, p: Expr) -> None:
                for j in range(0, UNITS, SUMS):
                    gate = tile.load(r * BLOCK + j, SUMS)
                    lift = tile.load((r + tile_rows()) * BLOCK + j, SUMS)
                    put_bits(h, p * hidden + unit + j, narrow(activation(bind(gate)) * lift))

            multiply(tokens_of(e), integer(2), block, finish, copies=2)

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
                start = bind((e * d + first) * hidden)
                block = Weights(out, start, integer(hidden), width, hidden, following, following)

                def finish(tile: Local, r: Expr, p: Expr) -> None:
                    place = bind(order.load(p))
                    at = bind(sums.offset(place // top_k, first))
                    share = bind(splat(weight.load(place), SUMS))
                    with loop(vectors) as j:
                        value = share * tile.load(j * SUMS + r * BLOCK, SUMS)
                        sums.put(at + j * SUMS, sums.at(at + j * SUMS, SUMS) + value)

                multiply(activations_of(e), integer(1), lambda _: block, finish)
            with loop(rows) as r, loop(vectors) as j:
                at = bind(target.offset(r, first + j * SUMS))
                put_bits(target, at, narrow(sums.at(at, SUMS)))

        with instructions():
            count = bind(active.load(0))
            pack_stacked(count, d, lambda a: tokens_of(bind(active.load(1 + a))))
            for_each(bind(count * (hidden // UNITS)), UNITS * d // 2, hidden_block)
            pack_stacked(count, hidden, lambda a: activations_of(bind(active.load(1 + a))))
            blocks = bind(tirx.truncdiv(d + columns - 1, columns))
            for_each(blocks, rows * (top_k * SUMS * hidden // 4), output_block)

    return build(body)


def _rows_of(
    e: Expr, offsets: Tensor, x: Tensor, base: Expr, at: Callable[[Expr], Expr], depth: Expr,
    panels: Expr,
) -> Rows:  # fmt: skip
    """An expert's rows of those that are sorted by expert."""
    first = bind(offsets.load(e))
    count = bind(offsets.load(e + 1) - first)
    mine = panels + first_panel(first, e) * (integer(depth) * (2 * TOKENS))
    return Rows(x, base, at, first, count, depth, bind(mine))


def _list_active(offsets: Tensor, active: Tensor, experts: int) -> None:
    """active[1 ..]: the experts that have tokens; active[0]: their number."""
    active.store(integer(0), 0)
    with loop(experts) as e, when(offsets.load(e + 1) > offsets.load(e)):
        count = bind(active.load(0) + 1)
        active.store(e, count)
        active.store(count, 0)
