"""KV-cache operators: a functional append and a write in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsc.ir.lazy import LazyModule
from dsc.ir.op import op
from dsc.ir.traits import Form, Role, Traits, Within, nothing

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

ROOM = "the number of tokens that a sequence has in the cache, with room left for the new ones"


def _write(cache: Any, new: Any, lengths: Any) -> Any:
    rows = lengths[:, None] + torch.arange(new.shape[1])
    cache[torch.arange(new.shape[0])[:, None], rows] = new
    return cache


def _append(past: Any, new: Any, lengths: Any) -> Any:
    b, p, d = past.shape
    grown = past.new_zeros(b, p + new.shape[1], d)
    grown[:, :p] = past
    return _write(grown, new, lengths)


append = op(
    "append(past: T[b, p, d], new: T[b, s, d], lengths: i64[b]) -> T[b, p+s, d]",
    Traits(Role.WRITE, flops=nothing),
    reference=_append,
    doc="A grown copy of the cache with new rows at lengths[b] .. lengths[b]+s-1; lengths[b] <= p.",
    example="f32[2,4,3], f32[2,2,3], i64[2]=4",
    within={"lengths": Within("0", "p", ROOM)},
)
cache_write = op(
    "cache_write(cache: T[b, c, d], new: T[b, s, d], lengths: i64[b]) -> T[b, c, d]",
    Traits(
        Role.WRITE,
        Form.LOWERED,
        flops=nothing,
        reads={"cache": nothing},
        writes=("new",),
        demand=lambda c: c.system.at_most(c.dims["s"], c.dims["c"]),
    ),
    reference=_write,
    doc="Write new rows at lengths[b] .. lengths[b]+s-1 in place; the result is the cache itself.",
    example="f32[2,7,3], f32[2,2,3], i64[2]=4",
    aliases=((0, 0),),
    within={"lengths": Within("0", "c-s", ROOM)},
)
