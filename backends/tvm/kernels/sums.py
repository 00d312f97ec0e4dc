"""Sums of many terms: blocks in fp32, the sums of blocks in fp64.

A plain fp32 sum of n equal terms is off by up to n * 2^-24; in blocks it is by `BLOCK` * 2^-24,
however long it is. The order depends on extents alone, never on threads or on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from dsc.backends.tvm.tir import Expr, Local, cast, integer, loop, tirx

BLOCK = 128
"""Terms (vectors of them) that are summed in fp32: few enough for errors, many against the cost."""


def nest(
    extents: Sequence[Expr], body: Callable[[Sequence[Expr]], None], index: Sequence[Expr] = ()
) -> None:
    """Serial loops over all of `extents`."""
    if not extents:
        body(index)
        return
    with loop(extents[0]) as i:
        nest(extents[1:], body, [*index, i])


def summed(
    extents: Sequence[Expr], parts: Sequence[Local], add: Callable[[Sequence[Expr]], None]
) -> list[Expr]:
    """The sums of what `add(index)` adds to each of `parts`, over all of `extents`.

    `parts` hold one element or vector each, of one element type; other types than fp32 are exact,
    or wide enough as they are.
    """
    cut = len(extents)
    while cut and isinstance(extents[cut - 1], int) and prod(extents[cut - 1 :]) <= BLOCK:
        cut -= 1
    if parts[0].name != "float32" or not cut:
        _clear(parts)
        nest(extents, add)
        return [p[0] for p in parts]
    *outer, extent = extents[:cut]
    inner = extents[cut:]
    per = max(1, BLOCK // max(1, prod(inner)))
    sums = [Local(1, "float64", p.width) for p in parts]
    _clear(sums)

    def block(above: Sequence[Expr], start: Expr, count: Expr) -> None:
        _clear(parts)
        nest([count, *inner], lambda at: add([*above, start + at[0], *at[1:]]))
        for total, part in zip(sums, parts, strict=True):
            total[0] = total[0] + cast(part[0], "float64")

    def line(above: Sequence[Expr]) -> None:
        if isinstance(extent, int):
            with loop(extent // per) as b:
                block(above, b * per, per)
            if extent % per:
                block(above, integer(extent - extent % per), extent % per)
            return
        with loop(tirx.truncdiv(extent + (per - 1), integer(per))) as b:
            block(above, b * per, tirx.min(integer(per), extent - b * per))

    nest(outer, line)
    return [cast(s[0], "float32") for s in sums]


def _clear(parts: Sequence[Local]) -> None:
    for part in parts:
        part[0] = part.zero
