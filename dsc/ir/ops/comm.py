"""Collectives between ranks, as operators. Every rank runs them in the same order.

`ranks` is the number of ranks that the program was sharded for; running it on another number is an
error. On one rank each collective is the identity. The references speak to the current group of
`dsc.ir.ranks`, so that one interpreter serves threads and processes alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError
from dsc.ir.dims import Dim
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, op
from dsc.ir.ops.shape import axis_of, demand_parts
from dsc.ir.ranks import current
from dsc.ir.sized import Sized
from dsc.ir.traits import COLLECTIVE, Form, Role, Traits
from dsc.ir.types import TensorType

if TYPE_CHECKING:
    from dsc.ir.ranks import Group

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]


def _group(what: str, ranks: int) -> Group:
    """The current group, which must have as many ranks as the program was made for."""
    group = current()
    if group.size != ranks:
        raise UsageError(
            f"{what} was compiled for {ranks} ranks, {group.size} run",
            hint=f"start it with `dsc generate OUT --ranks {ranks}`, or under torchrun",
        )
    return group


def _trade(what: str, parts: Sequence[Any]) -> list[Any]:
    """Give part r to rank r; the parts that all ranks gave to this one, in order of rank."""
    group = _group(what, len(parts))
    others = [r for r in range(group.size) if r != group.rank]
    mine = parts[group.rank].contiguous()
    sent = {r: parts[r].contiguous() for r in others}
    got = group.exchange(
        f"{what} of {list(mine.shape)}", sent, {r: torch.empty_like(mine) for r in others}
    )
    return [mine if r == group.rank else got[r] for r in range(group.size)]


def _sum(parts: Sequence[Any]) -> Any:
    """The sum in order of rank, in fp32 for 16-bit floats: the same bits on every rank.

    Routers decide on sums, and ranks that decide differently would wait for each other.
    """
    first = parts[0]
    wide = first.is_floating_point() and first.element_size() < 4
    total = first.float() if wide else first.clone()
    for part in parts[1:]:
        total += part
    return total.to(first.dtype)


def _all_reduce(x: Any, ranks: int) -> Any:
    return _sum(_trade("all_reduce", [x] * ranks))


def _all_gather(x: Any, axis: int, ranks: int) -> Any:
    return torch.cat(_trade("all_gather", [x] * ranks), axis)


def _reduce_scatter(x: Any, axis: int, ranks: int) -> Any:
    return _sum(_trade("reduce_scatter", _parts("reduce_scatter", x, axis, ranks)))


def _all_to_all(x: Any, axis: int, ranks: int) -> Any:
    return torch.cat(_trade("all_to_all", _parts("all_to_all", x, axis, ranks)), axis)


def _parts(what: str, x: Any, axis: int, ranks: int) -> Any:
    """`x` in equal parts of an axis, whose extent may be known only now."""
    if x.shape[axis] % ranks:
        raise UsageError(f"{what}: an axis of {x.shape[axis]} does not part into {ranks} ranks")
    return x.split(x.shape[axis] // ranks, axis)


def _send(x: Any, to: int) -> Any:
    group = current()
    if to != group.rank:
        group.exchange(f"send of {list(x.shape)} to rank {to}", {to: x.contiguous()}, {})
    return x


def _recv(x: Any, source: int) -> Any:
    group = current()
    if source == group.rank:
        return x
    what = f"recv of {list(x.shape)} from rank {source}"
    return group.exchange(what, {}, {source: torch.empty_like(x).contiguous()})[source]


def _with_axis(x: TensorType, axis: int, extent: Dim) -> TensorType:
    axis = axis_of(axis, x.rank)
    return x.with_shape((*x.shape[:axis], extent, *x.shape[axis + 1 :]))


def _extent(x: TensorType, attrs: Mapping[str, Any]) -> Dim:
    """The axis's extent. Raises `TypeMismatch` when it does not part into `ranks`."""
    extent, ranks = x.shape[axis_of(attrs["axis"], x.rank)], _ranks(attrs)
    if isinstance(extent, int) and extent % ranks:
        raise TypeMismatch(f"an axis of {extent} does not part into {ranks} ranks")
    return extent


def _ranks(attrs: Mapping[str, Any]) -> int:
    ranks: int = attrs["ranks"]
    if ranks < 1:
        raise TypeMismatch(f"{ranks} ranks")
    return ranks


def _infer_all_reduce(types: Types, attrs: Mapping[str, Any]) -> Result:
    _ranks(attrs)
    return (types[0],)


def _infer_all_gather(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    extent = x.shape[axis_of(attrs["axis"], x.rank)]
    return (_with_axis(x, attrs["axis"], extent * _ranks(attrs)),)


def _infer_reduce_scatter(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,) = types
    return (_with_axis(x, attrs["axis"], _extent(x, attrs) // _ranks(attrs)),)


def _infer_all_to_all(types: Types, attrs: Mapping[str, Any]) -> Result:
    _extent(types[0], attrs)
    return (types[0],)


def _infer_peer(types: Types, attrs: Mapping[str, Any]) -> Result:
    peer = attrs.get("to", attrs.get("source", 0))
    if peer < 0:
        raise TypeMismatch(f"rank {peer}")
    return (types[0],)


def _demand_all_to_all(call: Sized) -> None:
    call.same(call["x"], call.outs[0])
    axis = axis_of(call.attrs["axis"], len(call["x"]))
    call.system.divisible(call["x"][axis], call.attrs["ranks"])


_traits = partial(Traits, Role.COLLECTIVE, Form.COLLECTIVE, lane=COLLECTIVE)

all_reduce = op(
    "all_reduce(x: T[*n]; ranks: int) -> T[*n]",
    _traits(),
    reference=_all_reduce,
    doc="The sum of x over all ranks, in order of rank: every rank gets the same bits.",
    example="f32[2,3] {ranks=1}",
    infer=_infer_all_reduce,
)
all_gather = op(
    "all_gather(x: T[...]; axis: int, ranks: int) -> T[...]",
    _traits(demand=lambda c: demand_parts(c, [c["x"]] * c.attrs["ranks"], c.outs[0])),
    reference=_all_gather,
    doc="The x of all ranks, one after another along an axis, in order of rank.",
    example="f32[2,3] {axis=-1, ranks=1}",
    infer=_infer_all_gather,
)
reduce_scatter = op(
    "reduce_scatter(x: T[...]; axis: int, ranks: int) -> T[...]",
    _traits(demand=lambda c: demand_parts(c, [*c.outs] * c.attrs["ranks"], c["x"])),
    reference=_reduce_scatter,
    doc="The sum of x over all ranks, of which rank r keeps part r of an axis.",
    example="f32[2,4] {axis=1, ranks=1}",
    infer=_infer_reduce_scatter,
)
all_to_all = op(
    "all_to_all(x: T[...]; axis: int, ranks: int) -> T[...]",
    _traits(demand=_demand_all_to_all),
    reference=_all_to_all,
    doc="Part r of an axis goes to rank r; what came, in order of rank, takes its place.",
    example="f32[4,3] {axis=0, ranks=1}",
    infer=_infer_all_to_all,
)
send = op(
    "send(x: T[*n]; to: int) -> T[*n]",
    _traits(),
    reference=_send,
    doc="Give x to another rank, and pass it on. To the rank itself: nothing else happens.",
    example="f32[2,3] {to=0}",
    infer=_infer_peer,
)
recv = op(
    "recv(x: T[*n]; source: int) -> T[*n]",
    _traits(),
    reference=_recv,
    doc="What rank `source` sends, of the type of x. From the rank itself: x.",
    example="f32[2,3] {source=0}",
    infer=_infer_peer,
)
