"""Where the rows of a latent cache lie: in order for each sequence, or in pages.

Memory is a number of slots, a slot the latent and the rope key of one token. In order, row t of
sequence b is slot b * capacity + t, and the two parts are tensors of their own. In pages, it is a
slot of page block_table[b, t // page], and the parts are columns of one tensor. Slots of a page
follow each other, so that a kernel asks for the slot of the first row of a tile that divides it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from dsc.backends.tvm.launch import Unsupported, operand, static_dim
from dsc.backends.tvm.tir import Expr, Tensor, bind, integer
from dsc.ir.graph import Node
from dsc.ir.types import DType


@dataclass(frozen=True)
class LatentCache:
    """Latents of `c` and rope keys of `r` elements; `extent` rows a sequence, at most."""

    latent: Tensor
    rope: Tensor
    table: Tensor | None
    c: int
    r: int
    page: int
    extent: Expr

    @staticmethod
    def at(
        first: Expr, second: Expr, dtype: DType, sizes: tuple[Expr, Expr], c: int, r: int, page: int
    ) -> LatentCache:
        """The cache at two addresses: latent and rope key, or with `page` pages and block table.

        `sizes` is the batch and a sequence's capacity, in rows or in pages.
        """
        b, t = sizes
        if not page:
            latent, rope = Tensor(first, dtype, (b, t, c)), Tensor(second, dtype, (b, t, r))
            return LatentCache(latent, rope, None, c, r, page, t)
        pages = Tensor(first, dtype, (1, page, c + r))
        return LatentCache(pages, pages, Tensor(second, DType.i64, (b, t)), c, r, page, t * page)

    def slot(self, batch: Expr, row: Expr) -> Expr:
        """The slot of a row. Where there is no page it is page 0's: only padding looks there."""
        if self.table is None:
            return bind(batch * self.extent + row)
        block = bind(tirx.truncdiv(row, integer(self.page)))
        number = tirx.max(self.table.load(batch, block), integer(0))
        return bind(number * self.page + (row - block * self.page))

    @property
    def latent_stride(self) -> int:
        """Elements from a latent to that of the next slot."""
        return self.c + self.r if self.page else self.c

    @property
    def rope_stride(self) -> int:
        """Elements from a rope key to that of the next slot."""
        return self.c + self.r if self.page else self.r

    def latent_at(self, slot: Expr) -> Expr:
        """The flat position of a slot's latent."""
        return slot * self.latent_stride

    def rope_at(self, slot: Expr) -> Expr:
        """The flat position of a slot's rope key."""
        return slot * self.rope_stride + (self.c if self.page else 0)


def page_of(node: Node, multiple: int) -> int:
    """Rows of a page that an attention reads; 0 where its cache lies in order.

    Raises `Unsupported` when they are no multiple of the kernel's tile.
    """
    if not node.op.startswith("paged_"):
        return 0
    page = static_dim(operand(node, 2).type.shape[1], "a page")
    if page % multiple:
        raise Unsupported(f"pages of {page} rows; a multiple of {multiple} is needed")
    return page
