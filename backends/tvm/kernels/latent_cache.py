"""Where the rows of a cache lie: in order for each sequence, or in pages.

Memory is a number of slots, each of one token. In order, row t of sequence b is slot b * capacity +
t; in pages, it is a slot of page block_table[b, t // page]. Slots of a page follow each other, so
that a kernel asks for the slot of the first row of a tile that divides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dsc.backends.tvm.launch import Unsupported
from dsc.backends.tvm.tir import Expr, Tensor, bind, integer, tirx, when
from dsc.ir.graph import Node
from dsc.ir.paging import BLOCK_TABLE, rows_of_page
from dsc.ir.types import DType


@dataclass(frozen=True)
class CacheRows:
    """`count` rows a sequence, or as many blocks of `page` rows that `table` [b, count] names."""

    count: Expr
    page: int = 0
    table: Tensor | None = None

    @staticmethod
    def of(given: Mapping[str, Expr], page: int) -> CacheRows:
        """Those of the cache among a kernel's arguments, which `arguments` named."""
        b, t = given["b"], given["t"]
        table = Tensor(given[BLOCK_TABLE], DType.i64, (b, t)) if page else None
        return CacheRows(t, page, table)

    @property
    def extent(self) -> Expr:
        """Rows that a sequence has room for."""
        return self.count * self.page if self.page else self.count

    def slot(self, batch: Expr, row: Expr) -> Expr:
        """The slot of a row. Where there is no page it is page 0's: only padding looks there."""
        if self.table is None:
            return bind(batch * self.count + row)
        block = bind(tirx.truncdiv(row, integer(self.page)))
        number = tirx.max(self.table.at(batch * self.count + block), integer(0))
        return bind(number * self.page + (row - block * self.page))

    @contextmanager
    def place(self, batch: Expr, row: Expr) -> Iterator[Expr]:
        """The slot that a row is written to; what is in the context runs where there is one."""
        if self.table is None:
            yield self.slot(batch, row)
            return
        block = bind(tirx.truncdiv(row, integer(self.page)))
        number = bind(self.table.at(batch * self.count + block))
        with when(number >= integer(0)):
            yield bind(number * self.page + (row - block * self.page))


@dataclass(frozen=True)
class LatentCache:
    """Latents of `c` and rope keys of `r` elements a slot, and where each sequence's rows lie."""

    latent: Tensor
    rope: Tensor
    rows: CacheRows
    c: int
    r: int

    @staticmethod
    def of(given: Mapping[str, Expr], dtype: DType, c: int, r: int, page: int) -> LatentCache:
        """The cache at the addresses among a kernel's arguments, which `arguments` named.

        Where there are `numbers` among them, latents lie there.
        """
        slots = (1, page) if page else (given["b"], given["t"])
        latent = Tensor(given.get("numbers", given["latent"]), dtype, (*slots, c))
        rope = Tensor(given["rope"], dtype, (*slots, r))
        return LatentCache(latent, rope, CacheRows.of(given, page), c, r)

    @property
    def extent(self) -> Expr:
        """Rows that a sequence has room for."""
        return self.rows.extent

    def slot(self, batch: Expr, row: Expr) -> Expr:
        """The slot of a row: its latent starts at c times that, its rope key at r times."""
        return self.rows.slot(batch, row)


def arguments(operands: str, page: int, rest: str) -> list[str]:
    """The names of a kernel's arguments: operands, a block table where there are pages, the rest.

    The sizes are b, s, t: batch, new tokens, and a sequence's rows, or blocks, in the cache.
    """
    return [*operands.split(), *[BLOCK_TABLE] * (page > 0), *rest.split(), "b", "s", "t"]


def page_of(node: Node, multiple: int) -> int:
    """Rows of a page that an operator reads; 0 where its cache lies in order.

    Raises `Unsupported` when they are no multiple of the kernel's tile.
    """
    if node.get(BLOCK_TABLE) is None:
        return 0
    page = rows_of_page(node)
    if page is None or page % multiple:
        raise Unsupported(f"pages of {page} rows; a multiple of {multiple} is needed")
    return page
