"""Caches in pages: which operators read them, rows in and out.

A cache is rows in pages, `T[n, page, w]`. Row t of sequence b is row t % page of page
`block_table[b, t // page]`; -1 stands for no page: what is written there is dropped, and nothing
visible is read there (Kwon et al. 2023, section 4.1). Without a block table sequence b has page b,
and all its rows are in it. A page is a whole number of the kernels' tiles, so that a tile looks its
page up once. It may stand in a table several times, as of a prefix that is shared; who has two
sequences write to one page gets either's rows.
"""

from __future__ import annotations

from dsc.ir.analyses import call_of
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node
from dsc.ir.lazy import torch
from dsc.ir.op import lookup

PAGE = 64
"""Rows of a page: whole tiles of the attention kernels, 64 KiB at a row of 512 16-bit values."""
BLOCK_TABLE = "block_table"


def reads_pages(node: Node) -> bool:
    """Whether an operator, or one in a region, works on a cache in pages: by a block table."""
    if node.body is not None:
        return any(map(reads_pages, node.body.nodes))
    return takes_pages(node.op) and node.get(BLOCK_TABLE) is not None


def takes_pages(op: str) -> bool:
    """Whether an operator may be given a block table."""
    return lookup(op).has_operand(BLOCK_TABLE)


def rows_of_page(node: Node) -> int | None:
    """Rows of a page that a node reads or writes; `None` where it works on no cache in pages."""
    if node.body is not None or not reads_pages(node):
        return None
    rows = call_of(node).dim("p")
    return rows if isinstance(rows, int) else None


def cached_rows(node: Node, cache: str) -> Dim:
    """How many rows a sequence has in the operand `cache`; in pages, how many blocks."""
    table = node.get(BLOCK_TABLE)
    return node[cache].type.shape[1] if table is None else table.type.shape[1]


def page_rows(graph: Graph) -> int | None:
    """Rows of a page; `None` where a graph has no cache in pages."""
    return next((n for n in map(rows_of_page, graph.walk()) if n is not None), None)


def scattered(
    pages: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Write rows [b, s, w] at start[b] .. start[b]+s-1 of each sequence, in place."""
    at = start[:, None] + torch.arange(rows.shape[1])
    number = table.gather(1, at // pages.shape[1])
    kept = number >= 0
    pages[number[kept], (at % pages.shape[1])[kept]] = rows[kept]
    return pages


def gathered(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows [b, m * page, *w] of each sequence in order; zeros where there is no page."""
    rows = pages[table.clamp(min=0)]
    empty = (table < 0).reshape(*table.shape, *(1,) * (pages.dim() - 1))
    return rows.masked_fill(empty, 0).reshape(table.shape[0], -1, *pages.shape[2:])
