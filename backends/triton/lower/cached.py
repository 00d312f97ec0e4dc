"""Caches where attention reads them: in pages, in codes by the tile, or all rows of a step at once.

A tile of rows lies in one page, so that a program looks up one number of the block table a tile.
Rows without a page are zeros, as the reference has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsc.backends.triton.blocks import Tile, ceil_div, next_power
from dsc.backends.triton.coded_cache import parts_of, to_numbers
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.slots import PLAIN, Slot, Slots
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.paging import BLOCK_TABLE, cached_rows, rows_of_page
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

LEAST_PAGE = 16
"""Rows of a page at least: those of the smallest tile that is multiplied."""


@dataclass(frozen=True)
class Cache:
    """How many rows sequences have in a node's caches, and which pages they are in.

    `page` is 0 where a cache is in order; `table` i64[b, blocks] is there where it is in pages.
    """

    rows: Dim
    page: int = 0
    table: View | None = None

    @staticmethod
    def of(ctx: Context, node: Node, name: str) -> Cache:
        """That of the operand called `name`, and of its like."""
        page, rows = rows_of_page(node), cached_rows(node, name)
        if page is None:
            return Cache(rows)
        return Cache(rows * page, page, ctx.dense(ctx.view(node[BLOCK_TABLE])))

    def batch(self, view: View) -> Dim:
        """From one sequence to the next: all of them have their rows in one row of pages."""
        return 0 if self.page else view.strides[0]

    def touched(self, sequences: Dim, **given: Given) -> dict[str, Dim]:
        """Bytes that a launch moves of caches in pages, at most: the rows of its sequences."""
        return {
            name: product((sequences, self.rows, *x.shape[2:])) * x.dtype.itemsize
            for name, x in given.items()
            if isinstance(x, View) and self.page
        }

    def tile(self, tile: Tile) -> Tile:
        """A tile whose rows lie in one page."""
        return replace(tile, n=min(tile.n, self.page)) if self.page else tile

    def slot(self, rows: str = "rows", held: str = "", both: str = "") -> Slot:
        """The place `pages`: from rows of a sequence to rows of the pool, below 0 where none are.

        The mask `held`, where a kernel has one, loses those. Rows called `both` are the same.
        """
        if self.table is None:
            return PLAIN
        lines = [
            "page = tl.load(table + b * blocks + start // PAGE)",
            f"{rows} = page * PAGE + {rows} % PAGE",
        ]
        if both:
            lines.append(f"{both} = {rows}")
        if held:
            lines.append(f"{held} = {held} & ({rows} >= 0)")
        given: dict[str, Given] = {"table": self.table, "blocks": self.table.shape[1]}
        return Slot("paged", {"pages": lines}, given | {"PAGE": self.page})


def pages_reason(node: Node) -> str | None:
    """Why attention reads no caches in such pages, or `None`."""
    page = rows_of_page(node)
    if page is None or (page >= LEAST_PAGE and page == next_power(page)):
        return None
    return f"pages of {page} rows; a power of two from {LEAST_PAGE} on is taken"


def reader(ctx: Context, cache: View, kind: DType, place: Cache) -> tuple[View, Slot]:
    """A kernel's pointer to a cache, and the slot that makes numbers of a type of its rows."""
    if cache.type.format is None:
        return ctx.unit_rows(cache), PLAIN
    codes, scales = parts_of(cache)
    given: dict[str, Given] = {"scales": scales}
    given |= {"scales_batch": place.batch(scales), "scales_row": scales.strides[1]}
    title = f"{cache.dtype}_cache"
    return codes, Slot(title, {"values": to_numbers(cache.type, kind, ctx.blocks.fp8)}, given)


def widened(
    ctx: Context, cache: View, dtype: DType, lengths: View, new_rows: Dim, place: Cache
) -> View:
    """The numbers, in order, of all rows that a step of so many new ones sees."""
    codes, values = reader(ctx, cache, dtype, place)
    b, t, width = lengths.shape[0], place.rows, cache.shape[2]
    made = ctx.make(TensorType(dtype, (b, t, width)))
    slots = Slots(prologue=place.slot(held="fresh"), loader=values)
    padded = next_power(int(width))  # type: ignore[arg-type]
    tile = ctx.blocks.rows(ctx.limit(t), padded, f"widen_rows {cache.type.spelled} {dtype}")
    rows = min(tile.rows, place.page) if place.page else tile.rows
    given: dict[str, Given] = {"latent": codes, "lengths": lengths, "out": made, "T": t}
    given |= {"new_rows": new_rows, "l_batch": place.batch(codes), "l_row": codes.strides[1]}
    given |= {"C": width, "BLOCK_C": padded, "BLOCK_T": rows}
    touched = place.touched(b, latent=codes, scales=values.arguments.get("scales"))
    grid = (ceil_div(t, rows), b)
    ctx.launch("coded_cache:widen_rows", grid, given, tile, touched=touched, slots=slots)
    return made
