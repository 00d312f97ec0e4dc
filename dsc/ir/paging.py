"""Paged caches: what the pages of a graph are, rows in and out.

A cache in pages is one tensor `T[N, page, c + r]` a layer, a row the latent and the rope key of one
token. Row t of sequence b lies in page `block_table[b, t // page]`; -1 stands for no page: what is
written there is dropped, and nothing visible is read there (Kwon et al. 2023, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsc.ir.graph import Graph, Node, Value
from dsc.ir.op import lookup

if TYPE_CHECKING:
    import torch

PAGE = 64
"""Rows of a page: whole tiles of the attention kernels, 72 KiB at a row of 576 16-bit values."""
BLOCK_TABLE = "block_table"
PAGES = "pages"


def reads_pages(node: Node) -> bool:
    """Whether an operator works on a cache in pages: it takes them and a block table."""
    return node.body is None and lookup(node.op).has_operand(BLOCK_TABLE)


def page_inputs(graph: Graph) -> list[Value]:
    """The inputs that are caches in pages, in order."""
    used = {n[PAGES].name for n in graph.walk() if reads_pages(n)}
    return [v for v in graph.inputs if v.name in used]


def page_rows(graph: Graph) -> int | None:
    """Rows of a page; `None` where a graph has no cache in pages."""
    found = page_inputs(graph)
    rows = found[0].type.shape[1] if found else None
    return rows if isinstance(rows, int) else None


def scattered(
    pages: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Write rows [b, s, w] at start[b] .. start[b]+s-1 of each sequence, in place."""
    import torch

    at = start[:, None] + torch.arange(rows.shape[1])
    block = at // pages.shape[1]
    inside = block < table.shape[1]
    number = table.gather(1, block.clamp(max=table.shape[1] - 1))
    kept = inside & (number >= 0)
    pages[number[kept], (at % pages.shape[1])[kept]] = rows[kept]
    return pages


def gathered(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows [b, m * page, w] of each sequence in order; zeros where there is no page."""
    rows = pages[table.clamp(min=0)]
    empty = (table < 0)[..., None, None]
    return rows.masked_fill(empty, 0).reshape(table.shape[0], -1, pages.shape[2])


def filled_pages(
    pages: torch.Tensor, table: torch.Tensor, caches: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`pages` with the rows of contiguous caches [b, p, w_i], side by side, from row 0 on."""
    import torch

    rows = torch.cat(list(caches), -1)
    return scattered(pages, table, rows, torch.zeros(len(rows), dtype=torch.int64))
