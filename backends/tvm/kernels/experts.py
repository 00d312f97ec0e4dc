"""experts: sum_k w_k * down_k(act(gate_k x) * up_k x) over the chosen experts of each token.

The (token, slot) pairs are sorted by expert, so that each weight is read once and a decode step
touches the chosen experts only. Bound in bf16: with few tokens the bytes of the chosen experts,
6 d i each, over bandwidth; with many 6 d i flops a pair over the peak of pair products. A task is a
block of rows of one expert's weights with all of its tokens. Tasks go block by block, then expert
by expert, so that threads stay level however uneven the experts' loads are. The sum over a token's
experts is fp32, in the order of experts, whatever shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dsc.backends.tvm import codes
from dsc.backends.tvm.amx import TOKENS
from dsc.backends.tvm.bf16 import SUMS, instructions
from dsc.backends.tvm.kernels import coded as by_codes
from dsc.backends.tvm.kernels.bf16_product import BLOCK, Weights
from dsc.backends.tvm.kernels.coded import (
    PAIRS,
    Block,
    Coded,
    Codes,
    Taken,
    coded,
)
from dsc.backends.tvm.kernels.coded import Rows as CodedRows
from dsc.backends.tvm.kernels.coded import grain as coded_grain
from dsc.backends.tvm.kernels.coded import multiply as multiply_codes
from dsc.backends.tvm.kernels.coded_rows import scratch_bytes, taken
from dsc.backends.tvm.kernels.panels import (
    Rows,
    first_panel,
    fits,
    grain,
    multiply,
    pack_stacked,
    panel_bytes,
    tile_rows,
)
from dsc.backends.tvm.kernels.sorting import sort_pairs
from dsc.backends.tvm.kernels.values import put
from dsc.backends.tvm.launch import Launch, Unsupported, operand, rows_of, static_dim
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
    lanes_for,
    loop,
    select,
    splat,
    tirx,
    when,
)
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.ops.moe import is_plain
from dsc.ir.types import DType

UNITS, PLAIN_UNITS = 32, 16
"""Hidden units of a task at most: as many rows of gate and of up, 256 KiB at d = 2048.

Of codes it is the machine's `run`: gate and up lie far apart, and each is read in a run.
"""


@dataclass(frozen=True, slots=True)
class Experts:
    """What the kernel is specialised to.

    Element types of x and of the weights, extents; where bf16's instructions multiply, `plain` is
    `None`, and `tiles` says whether by tile registers. `codes` are those of both weights, if any.
    """

    dtype: DType
    stored: DType
    experts: int
    d: int
    hidden: int
    top_k: int
    act: str
    tiles: bool
    plain: Machine | None
    codes: tuple[Coded, Coded] | None

    @property
    def height(self) -> int:
        """Rows of a tile."""
        return self.codes[0].heights[0] if self.codes else tile_rows(self.plain)

    @property
    def between(self) -> DType:
        """The element type of hidden activations."""
        return DType.f32 if self.plain else DType.bf16


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `experts`; with biases or limits it is lowered to its grouped form."""
    if len(node.operands) > 5 or not is_plain(node.attrs):
        raise Unsupported("experts with biases, or with limits of what they gate")
    x, idx, gate_up, down = (operand(node, i).type for i in (0, 1, 3, 4))
    up_codes, down_codes = (coded(node, x.dtype, t, machine) for t in (gate_up, down))
    both = (up_codes, down_codes) if up_codes and down_codes else None
    if both is None and (up_codes or down_codes):
        raise Unsupported(f"experts of {gate_up} and {down}")
    experts, d, hidden = (static_dim(n, "an expert's axis") for n in down.shape)
    top_k, rows = static_dim(idx.shape[-1], "top_k"), rows_of(x)
    native = both is None and fits(machine, d, x, gate_up, down) and fits(machine, hidden, x)
    plain = None if native else replace(machine, bf16=False, tiles=False)
    of = Experts(
        x.dtype, gate_up.dtype, experts, d, hidden, top_k, node.attrs["act"],
        native and machine.tiles, plain, both,
    )  # fmt: skip
    flops = rows * (6 * top_k * d * hidden)
    return Launch(experts_direct, (of,), (rows,), scratch=_places(rows, of)["end"], flops=flops)


def _places(rows: Dim | Expr, of: Experts) -> dict[str, Any]:
    """Where things lie in scratch memory, on whole cache lines; `end` is its size.

    The sorted pairs (i64 [experts + 1] and [pairs]), the chosen experts (their number, then i64
    [experts]), the fp32 sums [rows, d], the hidden activations [pairs, hidden], and the panels of
    both products.
    """
    pairs, experts = rows * of.top_k, of.experts
    sizes: dict[str, Any] = {
        "offsets": 8 * (experts + 1),
        "active": 8 * (experts + 1),
        "order": pairs * 8,
        "sums": rows * (4 * of.d),
        "hidden": pairs * (of.between.itemsize * of.hidden),
        "x_panels": panel_bytes(pairs, of.d, experts) if of.tiles else 0,
        "hidden_panels": panel_bytes(pairs, of.hidden, experts) if of.tiles else 0,
        "x_codes": scratch_bytes(of.codes[0], rows) if of.codes else 0,
        "hidden_codes": scratch_bytes(of.codes[1], pairs) if of.codes else 0,
    }
    found: dict[str, Any] = {}
    at: Any = 0
    for name, size in sizes.items():
        found[name] = at
        at = at + (size + 63) // 64 * 64
    return {**found, "end": at}


def experts_direct(of: Experts) -> PrimFunc:
    """Arguments: x, idx, w, gate_up [e, 2i, d], down [e, d, i], y, scratch; rows.

    Weights in codes are as many arguments as they have parts.
    """
    experts, d, hidden, top_k = of.experts, of.d, of.hidden, of.top_k
    activation, plain, native = ACTIVATIONS[of.act], of.plain, of.plain is None
    most, line = UNITS if native else PLAIN_UNITS, BLOCK
    if of.codes is not None:
        assert plain is not None
        most, line = plain.run, by_codes.BLOCK
    units = lanes_for(hidden, most)
    wide, lanes = lanes_for(units, SUMS), lanes_for(d, SUMS)
    parts = [c.addresses for c in of.codes] if of.codes else [1, 1]
    names = ["x", "idx", "w", *(f"gate_up{i}" for i in range(parts[0]))]
    names += [*(f"down{i}" for i in range(parts[1])), "y", "scratch", "rows"]

    def body(x: Expr, idx: Expr, w: Expr, *more: Expr) -> None:
        gate_up, down = more[: parts[0]], more[parts[0] : -3]
        y, scratch, rows = more[-3:]
        pairs = rows * top_k
        places = _places(rows, of)
        at = {name: bind(scratch + place) for name, place in places.items()}
        source, target = (Tensor(address, of.dtype, (rows, d)) for address in (x, y))
        chosen, weight = Tensor(idx, DType.i64, (pairs,)), Tensor(w, DType.f32, (pairs,))
        if of.codes is None:
            up = Tensor(gate_up[0], of.stored, (experts, 2 * hidden, d))
            out = Tensor(down[0], of.stored, (experts, d, hidden))
        else:
            up_codes, down_codes = map(Codes, of.codes, (gate_up, down))
            taken_x = taken(of.codes[0], at["x_codes"], rows)
            taken_h = taken(of.codes[1], at["hidden_codes"], pairs)
        offsets = Tensor(at["offsets"], DType.i64, (experts + 1,))
        active = Tensor(at["active"], DType.i64, (experts + 1,))
        order = Tensor(at["order"], DType.i64, (pairs,))
        sums = Tensor(at["sums"], DType.f32, (rows, d))
        h = Tensor(at["hidden"], of.between, (pairs, hidden))
        sort_pairs(chosen, pairs, experts, offsets, order)
        _list_active(offsets, active, experts)

        def coded_rows(e: Expr, taken: Taken, place: Callable[[Expr], Expr]) -> CodedRows:
            """An expert's rows among those that are taken."""
            first = bind(offsets.load(e))
            return CodedRows(taken, first, bind(offsets.load(e + 1) - first), place)

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
            """act(gate) * up of some hidden units, for all tokens of an expert."""
            e = bind(active.load(1 + tirx.truncdiv(task, integer(hidden // units))))
            unit = bind(tirx.truncmod(task, integer(hidden // units)) * units)
            gate_at = bind((e * (2 * hidden) + unit) * d)
            lift_at = bind(gate_at + hidden * d)

            place = 1 + tirx.truncdiv(task + 1, integer(hidden // units))
            after = bind(active.load(tirx.min(place, active.load(0))))
            next_unit = tirx.truncmod(task + 1, integer(hidden // units)) * units
            away = bind((after * (2 * hidden) + next_unit) * d - gate_at)

            def block(n: Expr) -> Weights:
                gate = tirx.EQ(integer(n), integer(0))
                start = bind(select(gate, gate_at, lift_at))
                then = bind(select(gate, lift_at, gate_at + away))
                return Weights(up, start, integer(d), units, d, then, start + away)

            def finish(tile: Local, r: Expr, p: Expr) -> None:
                for j in range(0, units, wide):
                    gate = tile.load(r * line + j, wide)
                    lift = tile.load((r + of.height) * line + j, wide)
                    put(h, p * hidden + unit + j, activation(bind(gate)) * lift, native)

            if of.codes is None:
                multiply(tokens_of(e), integer(2), block, finish, 2, plain)
                return
            mine = coded_rows(e, taken_x, lambda p: order.load(p) // top_k)

            def both(n: Expr) -> Block:
                return Block(e, bind(unit + n * hidden), integer(units))

            multiply_codes(mine, up_codes, integer(2), both, finish, 2)

        columns = grain(rows, hidden) if native else integer(SUMS)
        if of.codes is not None:
            assert plain is not None
            columns = coded_grain(rows, plain.run, line)

        def output_block(task: Expr) -> None:
            """A block of the output's columns, summed over experts in their order."""
            first = bind(task * columns)
            width = bind(tirx.min(columns, d - first))
            vectors = bind(tirx.truncdiv(width, integer(lanes)))
            with loop(rows) as r, loop(vectors) as j:
                sums.store(splat(f32(0.0), lanes), r, first + j * lanes)
            with loop(active.load(0)) as a:
                e = bind(active.load(1 + a))
                more = a + 1 < active.load(0)
                after = bind(active.load(1 + select(more, a + 1, integer(0))))
                column = select(more, first, first + columns)
                following = bind((after * d + column) * hidden)
                start = bind((e * d + first) * hidden)
                if of.codes is None:
                    block = Weights(
                        out, start, integer(hidden), width, hidden, following, following
                    )

                def finish(tile: Local, r: Expr, p: Expr) -> None:
                    place = bind(order.load(p))
                    at = bind(sums.offset(place // top_k, first))
                    share = bind(splat(weight.load(place), lanes))
                    with loop(vectors) as j:
                        value = share * tile.load(j * lanes + r * line, lanes)
                        sums.put(at + j * lanes, sums.at(at + j * lanes, lanes) + value)

                if of.codes is None:
                    multiply(activations_of(e), integer(1), lambda _: block, finish, plain=plain)
                else:
                    mine = coded_rows(e, taken_h, lambda p: p)
                    here = Block(e, first, width)
                    multiply_codes(mine, down_codes, integer(1), lambda _: here, finish)
            with loop(rows) as r, loop(vectors) as j:
                at = bind(target.offset(r, first + j * lanes))
                put(target, at, sums.at(at, lanes), native)

        with _instructions(of):
            count = bind(active.load(0))
            if of.codes is not None:
                taken_x.take(source, lambda i: i * d, rows)
            if native:
                pack_stacked(count, d, lambda a: tokens_of(bind(active.load(1 + a))))
            for_each(bind(count * (hidden // units)), units * d // 2, hidden_block)
            if of.codes is not None:
                taken_h.take(h, lambda i: i * hidden, pairs)
            if native:
                pack_stacked(count, hidden, lambda a: activations_of(bind(active.load(1 + a))))
            blocks = bind(tirx.truncdiv(d + columns - 1, columns))
            for_each(blocks, rows * (top_k * SUMS * hidden // 4), output_block)

    return build(body, names)


@contextmanager
def _instructions(of: Experts) -> Iterator[None]:
    with ExitStack() as stack:
        if of.codes is not None:
            assert of.plain is not None
            stack.enter_context(codes.instructions(of.plain))
        if of.plain is None or (of.codes and PAIRS in {each.way for each in of.codes}):
            stack.enter_context(instructions())
        yield


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
