"""Prologues of products: rows that a product makes as it reads them, so that no launch does before.

A *norm* of few rows is done by the first product that multiplies them: each program sums up the
squares of its rows, which lie in cache, before it walks along k, and scales what it loads. Where
others read the normed rows too, the programs of the first tile of columns store them. The *spans*
of an attention that was cut along its cache (flash-decoding) are merged by the product that reads
it, head by head, as it walks along k. Absorbed attention turns its queries (rope) as it reads them.
Rows that are *taken* by an index, those whose logits are wanted, are read where they lie.

All round where the launch would, so results are the same but for the order of sums.

Cost      the rows once more a tile of columns: 14 KB a row of 7,168, beside 450 KB of weights. So
          few rows only: a launch of its own costs what some MB cost.
Legality  a norm whose first reader is a linear, or a router; an attention whose only reader is an
          einsum that sums a head's numbers, a matrix a head; rope that absorbed attention alone
          reads, of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc.backends.triton.blocks import Choice, Tile, next_power
from dsc.backends.triton.pointwise import TYPES, normed
from dsc.backends.triton.slots import Slot
from dsc.ir import views
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.ops.core import einsum_terms
from dsc.ir.regions import anchor_of
from dsc.ir.types import TensorType
from dsc.ir.views import View

if TYPE_CHECKING:
    from dsc.backends.triton.context import Context, Given

NORMED_ROWS = 8
"""Rows of which each program makes all by itself."""


@dataclass(slots=True)
class Normed:
    """rms_norm of the rows of `source`; `shared` where not the first product alone reads it.

    `stored` is where that product stores it. `copied` makes it by a launch.
    """

    source: View
    gain: View
    eps: float
    shared: bool
    copied: Callable[[Context], View]
    stored: View | None = None

    def made(self, ctx: Context) -> View:
        """What the first product stored, or else a launch stores."""
        self.stored = self.stored or self.copied(ctx)
        return self.stored

    def slot(self, ctx: Context, rows: Dim) -> Slot:
        """What a product does to `rows` rows of the source, each of which has unit steps."""
        few, width = next_power(ctx.limit(rows)), int(self.source.shape[-1])  # type: ignore[arg-type]
        kind, gain = self.source.dtype, self.gain.dtype
        made = normed("x.to(tl.float32)", "norm[:, None]", "norm_by", kind, gain is kind)
        given: dict[str, Given] = {"norm_gain": self.gain, "norm_eps": self.eps}
        lines = [
            "norm_by = tl.load(norm_gain + k, mask=k < K, other=0.0).to(tl.float32)[None, :]",
            f"x = ({made}).to({TYPES[kind]})",
        ]
        if self.shared:
            self.stored = ctx.make(self.source.type)
            given["norm_rows"] = self.stored
            at = "norm_rows + m[:, None].to(tl.int64) * K + k[None, :]"
            first = "live & (tile_n + tl.zeros_like(m) == 0)"
            lines.append(f"tl.store({at}, x, mask=({first})[:, None] & (k[None, :] < K))")
        return Slot("normed", {"start": _squares(few, ctx.blocks.squares(few, width)),
                               "rows": lines}, given)  # fmt: skip


def _squares(few: int, columns: int) -> list[str]:
    """`norm` [BLOCK_M]: row m of a tile is row m % few of those few, there are no more."""
    return [
        f"few = tl.arange(0, {few})[:, None]",
        f"squares = tl.zeros(({few},), dtype=tl.float32)",
        f"for start in range(0, K, {columns}):",
        f"    column = start + tl.arange(0, {columns})[None, :]",
        "    there = (few < M) & (column < K)",
        "    some = tl.load(a + few.to(tl.int64) * a_m + column, mask=there, other=0.0)",
        "    squares += tl.sum(some.to(tl.float32) * some.to(tl.float32), axis=1)",
        "norm = tl.rsqrt(squares / K + norm_eps)",
        f"norm = tl.reshape(tl.broadcast_to(norm[None, :], (BLOCK_M // {few}, {few})), (BLOCK_M,))",
    ]


@dataclass(frozen=True, slots=True)
class Spans:
    """Attention over spans of a cache, not merged yet: rows of heads of numbers.

    `partial` f32[spans, rows, heads, width] are the results of the spans, `lse` f32[spans, rows,
    heads] their log-sum-exp. `most` is the largest number of spans, which the attention has by a
    `choice` of its tile.
    """

    type: TensorType
    partial: View
    lse: View
    spans: Dim
    most: int
    copied: Callable[[Context], View]
    choice: Choice | None = None

    def made(self, ctx: Context) -> View:
        """The result of a launch that merges them."""
        return self.copied(ctx)

    @property
    def view(self) -> View:
        """Where the merged numbers would lie."""
        return View(self.partial.buffer, self.type, views.dense_strides(self.type.shape))

    def tile(self, ctx: Context, tile: Tile, rows: Dim) -> Tile:
        """The tile of a product that merges `rows` rows a head."""
        heads = int(self.type.shape[-2])  # type: ignore[arg-type]
        return ctx.blocks.merging(tile, ctx.limit(rows), self.most, heads)

    def slot(self, ctx: Context, rows: Dim) -> Slot:
        """What a product of `rows` rows a head reads in place of them."""
        given: dict[str, Given] = {"partial": self.partial, "lse": self.lse, "spans": self.spans}
        few, heads = next_power(ctx.limit(rows)), self.type.shape[-2]
        begin = [
            f"few = tl.arange(0, {few})[:, None]",
            f"span = tl.arange(0, {next_power(self.most)})[None, :]",
            f"part_at = (span.to(tl.int64) * M + few) * {heads} + matrix",
            "level_at = lse + part_at",
            'level = tl.load(level_at, mask=(few < M) & (span < spans), other=float("-inf"))',
            "top = tl.where(few < M, tl.max(level, axis=1)[:, None], 0.0)",
            "share = tl.exp(level - top)",
            "share = share / tl.where(few < M, tl.sum(share, axis=1)[:, None], 1.0)",
            "part_at = partial + (part_at * K)[:, :, None]",
        ]
        loads = [
            "there = (share > 0.0)[:, :, None] & (k < K)[None, None, :]",
            "part = tl.load(part_at + k[None, None, :], mask=there, other=0.0)",
            "x = tl.sum(share[:, :, None] * part, axis=1).to(c.dtype.element_ty)",
            f"x = tl.broadcast_to(x[None, :, :], (BLOCK_M // {few}, {few}, BLOCK_K))",
            "x = tl.reshape(x, (BLOCK_M, BLOCK_K))",
        ]
        return Slot("merged", {"at": begin, "x": loads}, given)


@dataclass(frozen=True, slots=True)
class Turned:
    """rope of queries [b, s, heads, width], which attention does as it reads them."""

    source: View
    positions: View
    frequencies: View
    layout: str
    scale: float
    copied: Callable[[Context], View]

    def made(self, ctx: Context) -> View:
        """The result of a launch that turns them."""
        return self.copied(ctx)

    def slot(self) -> Slot:
        """A column r is made of one, and of its partner, by the angle of their pair."""
        half = int(self.source.shape[-1]) // 2  # type: ignore[arg-type]
        lower = f"r < {half}"
        own, partner, pair = {
            "half": ("r", f"tl.where({lower}, r + {half}, r - {half})", f"r % {half}"),
            "interleaved": ("r", "r + 1 - r % 2 * 2", "r // 2"),
            "deinterleave": (
                f"r % {half} * 2 + r // {half}", f"r % {half} * 2 + 1 - r // {half}", f"r % {half}",
            ),
        }[self.layout]  # fmt: skip
        first = "r % 2 == 0" if self.layout == "interleaved" else lower
        at = "q_rope + row * qr_row + h[:, None] * qr_head"
        keep = "mask=live & (r[None, :] < R), other=0.0"
        lines = [
            f"angle = tl.load(turn_frequencies + {pair}, mask=r < R, other=0.0)",
            "angle = tl.load(turn_positions + row).to(tl.float32) * angle",
            f"cos = tl.cos(angle) * {self.scale!r}",
            f"sin = tl.where({first}, -tl.sin(angle), tl.sin(angle)) * {self.scale!r}",
            f"own = tl.load({at} + ({own})[None, :], {keep}).to(tl.float32)",
            f"partner = tl.load({at} + ({partner})[None, :], {keep}).to(tl.float32)",
            "rope_queries = own * cos[None, :] + partner * sin[None, :]",
            "rope_queries = rope_queries.to(q_rope.dtype.element_ty)",
        ]
        given = {"turn_positions": self.positions, "turn_frequencies": self.frequencies}
        return Slot(f"turned_{self.layout}", {"queries": lines}, given)


@dataclass(frozen=True, slots=True)
class Taken:
    """Row l of sequence b is row index[b, l] of that sequence in `source` [b, s, width], dense.

    One that is none of the s is another of them: whoever runs an entry refuses such an index before
    (`dsc.runtime.admission`), and no memory outside of the source is read.
    """

    source: View
    index: View
    copied: Callable[[Context], View]

    def made(self, ctx: Context) -> View:
        """The result of a launch that copies them."""
        return self.copied(ctx)

    def lines(self, row: str) -> tuple[list[str], dict[str, Given]]:
        """From the number m of a taken row to `row`, where it lies in the source."""
        given: dict[str, Given] = {f"{row}_index": self.index}
        given |= {f"{row}_all": self.source.shape[1], f"{row}_each": self.index.shape[1]}
        lines = [
            f"{row} = tl.load({row}_index + m, mask=live, other=0)",
            f"{row} = tl.minimum(tl.maximum({row}, 0), {row}_all - 1)",
            f"{row} += (m // {row}_each).to(tl.int64) * {row}_all",
        ]
        return lines, given

    def slot(self) -> Slot:
        """What a product reads in place of rows that a launch has taken."""
        lines, given = self.lines("taken")
        lines.append("x_at = a + taken[:, None] * a_m")
        return Slot("taken", {"at": lines}, given, row="taken")


def merges(graph: Graph) -> dict[str, bool]:
    """By name the norms, attentions and turned queries that their first reader may make.

    The value says whether others read them too.
    """
    makes = {"rms_norm": _multiplies, "latent_attention": _sums_heads, "rope": _attends}
    origins: dict[str, str] = {}
    kinds: dict[str, str] = {}
    readers: dict[str, list[bool]] = {}
    for node in graph.nodes:
        for x in dict.fromkeys(x for x in node.operands if isinstance(x, Value)):
            origin = origins.get(x.name, x.name)
            if origin not in readers:
                continue
            if node.op == "reshape" and node.output.type.shape[-1:] == x.type.shape[-1:]:
                origins[node.output.name] = origin
                continue
            readers[origin].append(makes[kinds[origin]](node, x))
        if node.op in makes:
            kinds[node.output.name], readers[node.output.name] = node.op, []
    for result in graph.outputs:
        readers.get(origins.get(result.name, result.name), []).append(False)
    return {name: len(found) > 1 for name, found in readers.items() if found and found[0]}


def _multiplies(node: Node, x: Value) -> bool:
    """Whether a node is a product of rows of `x`, and reads them for nothing else."""
    rows, nodes = x.name, [node]
    if node.body is not None:
        inside = zip(node.body.inputs, node.operands, strict=True)
        names = [v.name for v, y in inside if y is x]
        (rows, nodes) = (names[0], list(node.body.nodes)) if len(names) == 1 else ("", [])
    product = anchor_of(nodes) if node.op != "route" else node
    if product is None or product.op not in ("linear", "route") or rows != product.operands[0].name:
        return False
    return [y.name for n in nodes for y in n.operands].count(rows) == 1


def _sums_heads(node: Node, x: Value) -> bool:
    """Whether a node is an einsum that multiplies each head of `x`, its first operand, alone."""
    if node.op != "einsum" or len(node.operands) != 2 or node.operands[0].name != x.name:
        return False
    (left, right), result = einsum_terms(node.attrs["eq"])
    if len(left) != 4 or node.operands[1].name == x.name:
        return False
    rows, head, k = left[:2], left[2], left[3]
    apart = not set(rows) & set(right) and set(rows) <= set(result)
    return apart and head in right and head in result and k in right and k not in result


def _attends(node: Node, x: Value) -> bool:
    """Whether a node is absorbed attention with queries `x`."""
    places = [i for i, y in enumerate(node.operands) if y.name == x.name]
    return node.op == "latent_attention" and places == [1]
