"""KV-cache operators: a functional append and a write in place.

A cache that is written in place is rows in pages (`dsc.ir.paging`): with a block table those that
it names; without one every sequence has one page, which is then simply its rows.
"""

from __future__ import annotations

from typing import Any

from dsc.ir.lazy import torch
from dsc.ir.op import op
from dsc.ir.paging import BLOCK_TABLE, scattered
from dsc.ir.sized import Sized
from dsc.ir.traits import DISTINCT, Form, Role, Traits, Within, nothing

ROOM = "the number of tokens that a sequence has in the cache, with room left for the new ones"
IN_PAGES = {
    "lengths": Within("0", "m*p-s", ROOM),
    BLOCK_TABLE: Within("-1", "n-1", "the number of a page, or -1 for none", DISTINCT),
}
"""What `lengths` and a block table i64[b, m] may hold for a cache of n pages of p rows."""
ONE_PAGE = {BLOCK_TABLE: {"m": "1", "n": "b"}}
"""A cache without a block table: one page a sequence."""


def _write(cache: Any, new: Any, lengths: Any, block_table: Any = None) -> Any:
    if block_table is not None:
        return scattered(cache, block_table, new, lengths)
    rows = lengths[:, None] + torch.arange(new.shape[1])
    cache[torch.arange(new.shape[0])[:, None], rows] = new
    return cache


def _append(past: Any, new: Any, lengths: Any) -> Any:
    b, p, d = past.shape
    grown = past.new_zeros(b, p + new.shape[1], d)
    grown[:, :p] = past
    return _write(grown, new, lengths)


def _demand_room(call: Sized) -> None:
    """One page has room for the new rows."""
    if BLOCK_TABLE not in call:
        call.system.at_most(call.dims["s"], call.dims["p"])


append = op(
    "append(past: T[b, p, d], new: T[b, s, d], lengths: i64[b]) -> T[b, p+s, d]",
    Traits(Role.WRITE, flops=nothing, stored=("past",), into={"new": "past"}),
    reference=_append,
    doc="A grown copy of the cache with new rows at lengths[b] .. lengths[b]+s-1; lengths[b] <= p.",
    example="f32[2,4,3], f32[2,2,3], i64[2]=4",
    within={"lengths": Within("0", "p", ROOM)},
)
cache_write = op(
    "cache_write(cache: T[n, p, d], new: T[b, s, d], lengths: i64[b], block_table: i64[b, m]?)"
    " -> T[n, p, d]",
    Traits(
        Role.WRITE,
        Form.LOWERED,
        flops=nothing,
        reads={"cache": nothing},
        writes=("new",),
        stored=("cache",),
        into={"new": "cache"},
        demand=_demand_room,
    ),
    reference=_write,
    doc="Write new rows at lengths[b] .. lengths[b]+s-1 of each sequence in place; the result is"
    " the cache. Row t is row t % p of page block_table[b, t // p], dropped where that is -1;"
    " without a block table it is of page b.",
    example="f32[2,7,3], f32[2,2,3], i64[2]=4",
    aliases=((0, 0),),
    within=IN_PAGES,
    without=ONE_PAGE,
)
