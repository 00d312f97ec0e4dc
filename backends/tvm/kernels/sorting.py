"""Group (token, slot) pairs by expert: a counting sort, stable, on one thread."""

from __future__ import annotations

from dsc.backends.tvm.tir import Expr, Tensor, bind, integer, loop


def sort_pairs(chosen: Tensor, pairs: Expr, experts: int, offsets: Tensor, order: Tensor) -> None:
    """offsets[e] .. offsets[e+1]-1 are expert e's places in `order`, which holds pair numbers.

    Counts go to offsets[e + 1]; their running sum makes offsets[e] the next free place of e, which
    filling moves on to the first place of e + 1; shifting by one restores the starts.
    """
    with loop(experts + 1) as e:
        offsets.store(integer(0), e)
    with loop(pairs) as p:
        place = bind(chosen.load(p) + 1)
        offsets.store(offsets.load(place) + 1, place)
    with loop(experts) as e:
        offsets.store(offsets.load(e) + offsets.load(e + 1), e + 1)
    with loop(pairs) as p:
        expert = bind(chosen.load(p))
        place = bind(offsets.load(expert))
        order.store(p, place)
        offsets.store(place + 1, expert)
    with loop(experts) as i:
        e = experts - i
        offsets.store(offsets.load(e - 1), e)
    offsets.store(integer(0), 0)
