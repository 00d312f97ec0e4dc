"""Weight expressions over numbers as the same expressions over what is stored of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsc.ir.dims import Dim
from dsc.ir.formats import WHOLE, along, grid, is_whole
from dsc.ir.ops.shape import axis_of
from dsc.ir.weights import Apply, Source, WeightExpr, apply, stored_type

EACH = "each element would have a scale of its own"


class Dequantised(Exception):
    """Why a weight cannot stay in its format."""


def in_format(expr: WeightExpr) -> Apply:
    """A weight without the dequantising in its expression. Raises `Dequantised`."""
    whole = expr.args[0] if isinstance(expr, Apply) and expr.op == "dequantize" else expr
    if isinstance(whole, Apply) and whole.op == "scaled":
        if whole is not expr and set(whole.attrs["block"]) == {1}:
            raise Dequantised(EACH)
        return whole
    stored = _in_parts(expr)
    for axis in range(expr.type.rank - 2):
        stored = [part.with_blocks_of_one(expr, axis) for part in stored]
    kind = stored_type(expr)
    assert kind is not None
    assert kind.format is not None
    if stored[0].block[-2:] != kind.format.parts(kind.dtype)[0].block:
        raise Dequantised("its codes are packed along another axis")
    block = stored[1].block[-2:]
    if len(block) < 2 or any(size != 1 for part in stored for size in part.block[:-2]):
        raise Dequantised("its blocks lie along other axes than the last two")
    if set(block) == {1}:
        raise Dequantised(EACH)
    return apply("scaled", *(part.expr for part in stored), block=block)


@dataclass(frozen=True)
class _Part:
    """A part of what is stored of a tensor, and how many elements it has one for by axis."""

    expr: WeightExpr
    block: tuple[int, ...]

    def with_blocks_of_one(self, whole: WeightExpr, axis: int) -> _Part:
        """The same with an element for each of `whole` along an axis that shares them."""
        if self.block[axis] != WHOLE:
            return self
        block = (*self.block[:axis], 1, *self.block[axis + 1 :])
        if set(block) == {1}:
            raise Dequantised(EACH)
        expanded = apply("expand", self.expr, shape=grid(whole.type.shape, block))
        return _Part(expanded, block)


def _in_parts(expr: WeightExpr) -> list[_Part]:
    """What is stored of a weight, in order."""
    if isinstance(expr, Source):
        raise Dequantised(f"a part of it is stored as {expr.type}")
    if expr.op == "scaled":
        assert expr.type.format is not None
        if expr.type.format.tile > 1:
            raise Dequantised(f"{expr.type.format.tile} of its rows lie side by side")
        parts = expr.type.format.parts(expr.type.dtype)
        blocks = (along(part.block, expr.type.rank) for part in parts)
        return list(map(_Part, expr.args, blocks))
    if expr.op == "dequantize":
        return _in_parts(expr.args[0])
    stored = [_in_parts(arg) for arg in expr.args]
    if expr.op == "concat":
        axis = axis_of(expr.attrs["axis"], expr.type.rank)
        stored = [
            [part.with_blocks_of_one(arg, axis) for part in parts]
            for arg, parts in zip(expr.args, stored, strict=True)
        ]
    kinds = {tuple((part.block, part.expr.type.dtype) for part in parts) for parts in stored}
    if len(kinds) != 1:
        raise Dequantised("its parts are stored in different formats")
    return [_step(expr, parts) for parts in zip(*stored, strict=True)]


def _step(expr: Apply, parts: Sequence[_Part]) -> _Part:
    """What a step makes of one part of each of its arguments."""
    attrs, block = _along_blocks(expr, parts[0].block)
    made = apply(expr.op, *(part.expr for part in parts), **{**expr.attrs, **attrs})
    return _Part(made, block)


def _along_blocks(expr: Apply, block: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The attributes that change where a step is done to a part, and the blocks after it."""
    match expr.op:
        case "stack":
            return {}, (1, *block)
        case "permute":
            return {}, tuple(block[axis] for axis in expr.attrs["dims"])
        case "concat":
            axis = axis_of(expr.attrs["axis"], len(block))
            _check(expr, block[axis], *(arg.type.shape[axis] for arg in expr.args[:-1]))
            return {}, block
        case "slice" if expr.attrs["step"] == 1:
            axis = axis_of(expr.attrs["axis"], len(block))
            size, start, end = block[axis], expr.attrs["start"], expr.attrs["end"]
            if size == WHOLE:
                return {"start": 0, "end": 1}, block
            last = end == expr.args[0].type.shape[axis]
            _check(expr, size, start, *(() if last else (end,)))
            return {"start": start // size, "end": -(-end // size)}, block
        case "reshape":
            return _parted(expr, block)
    raise Dequantised(f"{expr.op} computes with its numbers")


def _parted(expr: Apply, block: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """One axis parts into several; blocks along it lie along the last of them, or along all."""
    before, after = expr.args[0].type.shape, expr.type.shape
    more, axis = len(after) - len(before), 0
    while axis < min(len(before), len(after)) - 1 and before[axis] == after[axis]:
        axis += 1
    if more < 0 or after[axis + more + 1 :] != before[axis + 1 :]:
        raise Dequantised("reshape joins axes")
    one = WHOLE
    if block[axis] != WHOLE:
        one = 1
        _check(expr, block[axis], after[axis + more])
    parted = (*block[:axis], *(one,) * more, *block[axis:])
    return {"shape": grid(after, parted)}, parted


def _check(expr: Apply, size: int, *at: Dim) -> None:
    cut = [place for place in at if not is_whole(place, size)]
    if cut:
        raise Dequantised(f"{expr.op} at {cut[0]} cuts a block of {size}")
