"""Operators over a latent cache in pages (`dsc.ir.paging`): a write in place, and two attentions.

Both attentions read the rows that the block table names and are otherwise `latent_attention` and
`mla_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsc.ir.dims import Dim
from dsc.ir.lazy import LazyModule
from dsc.ir.op import op
from dsc.ir.ops import nn
from dsc.ir.ops.cache import ROOM
from dsc.ir.paging import gathered, scattered
from dsc.ir.placement import over_heads
from dsc.ir.traits import DISTINCT, Call, Form, Role, Traits, Within, nothing
from dsc.ir.types import TensorType

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def _rows(call: Call) -> Dim:
    """Elements of the rows that a block table can name."""
    rows: Dim = call.dim("b") * call.dim("m") * call.dim("p")
    return rows * call["pages"].shape[2]


_TABLE = Within("-1", "n-1", "the number of a page, or -1 for none", DISTINCT)


def _page_write(pages: Any, latent: Any, rope: Any, block_table: Any, lengths: Any) -> Any:
    return scattered(pages, block_table, torch.cat([latent, rope], -1), lengths)


def _latent(
    q_latent: Any, q_rope: Any, pages: Any, block_table: Any, lengths: Any, scale: float
) -> Any:
    width = q_latent.shape[-1]
    rows = gathered(pages, block_table)
    return nn.latent_attention.reference(
        q_latent, q_rope, rows[..., :width], rows[..., width:], lengths, scale
    )


def _mla(
    q_nope: Any, q_rope: Any, pages: Any, block_table: Any, kv_b: Any, lengths: Any, scale: float
) -> Any:
    width = kv_b.shape[-1]
    rows = gathered(pages, block_table)
    return nn.mla_attention.reference(
        q_nope, q_rope, rows[..., :width], rows[..., width:], kv_b, lengths, scale
    )


def _infer_mla(types: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    return nn.mla_result(types[0], types[4])


page_write = op(
    "page_write(pages: T[n, p, c+r], latent: T[b, s, c], rope: T[b, s, r],"
    " block_table: i64[b, m], lengths: i64[b]) -> T[n, p, c+r]",
    Traits(
        Role.WRITE, Form.LOWERED, flops=nothing, reads={"pages": nothing}, writes=("latent", "rope")
    ),
    reference=_page_write,
    doc="Write rows [latent | rope] at lengths[b] .. lengths[b]+s-1 of each sequence in place;"
    " row t is row t % p of page block_table[b, t // p], dropped where that is -1 or t >= m * p.",
    example="f32[7,4,8], f32[2,3,6], f32[2,3,2], i64[2,3], i64[2]=6",
    aliases=((0, 0),),
    within={"block_table": _TABLE, "lengths": Within("0", "m*p", ROOM)},
)
paged_latent_attention = op(
    "paged_latent_attention(q_latent: T[b, s, h, c], q_rope: T[b, s, h, r], pages: T[n, p, c+r],"
    " block_table: i64[b, m], lengths: i64[b]; scale: float) -> T[b, s, h, c]",
    Traits(
        Role.ATTENTION,
        Form.LOWERED,
        results=("attention",),
        flops=lambda c: nn.absorbed_flops(c, c.dim("m") * c.dim("p")),
        reads={"pages": _rows},
        place=over_heads("q_latent", "q_rope"),
        wants=("q_latent", "q_rope"),
    ),
    reference=_latent,
    doc="latent_attention over the rows that a block table names.",
    example="f32[2,3,4,6], f32[2,3,4,2], f32[7,4,8], i64[2,3], i64[2]=9 {scale=0.5}",
    within={"block_table": _TABLE, "lengths": Within("0", "m*p", ROOM)},
)
paged_mla_attention = op(
    "paged_mla_attention(q_nope: T[b, s, h, d], q_rope: T[b, s, h, r], pages: T[n, p, c+r],"
    " block_table: i64[b, m], kv_b: T[w, c], lengths: i64[b]; scale: float) -> T[b, s, h, v]",
    Traits(
        Role.ATTENTION,
        Form.LOWERED,
        results=("attention",),
        flops=lambda c: nn.expanded_flops(c, c.dim("m") * c.dim("p")),
        reads={"pages": _rows},
        stored=("kv_b",),
        demand=nn.demand_kv_b,
        place=over_heads("q_nope", "q_rope", weight="kv_b"),
        wants=("q_nope", "q_rope"),
    ),
    reference=_mla,
    doc="mla_attention over the rows that a block table names.",
    example="f32[2,3,4,5], f32[2,3,4,2], f32[7,4,8], i64[2,3], f32[32,6], i64[2]=9 {scale=0.5}",
    infer=_infer_mla,
    within={"block_table": _TABLE, "lengths": Within("0", "m*p", ROOM)},
)
