"""The values of a weight expression as a stream of blocks, so that no whole weight is in memory.

A weight is written to a file as its elements in row-major order, so a block is any run of them: a
stack is its arguments one after another, a reshape is what it reshapes, and what is left is
computed for some rows of the leading axis at a time, as far down the expression as rows reach;
what lies deeper, as a matrix that is turned, is computed once.
Tensors of a checkpoint pass through as views of its mapped files; where nothing is computed, no
torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import lcm
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from dsc.ir.arrays import tensor_of
from dsc.ir.dims import Dim
from dsc.ir.formats import WHOLE, along
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch, concrete, lookup
from dsc.ir.weights import Apply, Source, WeightExpr, WeightSource, check_tensor

BLOCK_BYTES = 1 << 20
"""Bytes that a block has or is read from at most, where rows allow: what is computed of it stays in
a core's caches."""
Block: TypeAlias = Callable[[], Any]
"""Makes a block's values. Any thread may call it, at any time, once."""


def blocks(expr: WeightExpr, source: WeightSource, size: int = BLOCK_BYTES) -> Iterator[Any]:
    """Values of about `size` bytes whose elements, in order, are those of the expression.

    What is moved only is an array, what is computed a tensor, or `Packed`.

    Raises `TypeMismatch` when a tensor is not of the declared type.
    """
    for block in cuts(expr, source, size):
        yield block()


def cuts(expr: WeightExpr, source: WeightSource, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """What makes each of the `blocks`; nothing is read or computed before it is called."""
    if isinstance(expr, Apply):
        if expr.op == "reshape":
            yield from cuts(expr.args[0], source, size)
            return
        if expr.op == "stack" or (expr.op == "concat" and _axis(expr) == 0):
            for arg in expr.args:
                yield from cuts(arg, source, size)
            return
        if expr.op == "cast":
            (arg,) = expr.args
            share = max(1, size * arg.type.dtype.itemsize // expr.type.dtype.itemsize)
            for block in cuts(arg, source, share):
                yield partial(_after, expr, block)
            return
    if not expr.type.shape:
        yield partial(_whole, expr, source)
        return
    expr, source = _settled(expr, source)
    height = _size(expr.type.shape[0])
    step = max(1, height * size // max(1, _widest(expr)))
    grain = _grain(expr)
    step = max(grain, step // grain * grain)
    for start in range(0, height, step):
        yield partial(rows, expr, source, start, min(start + step, height))


def _after(expr: Apply, block: Block) -> Any:
    return _run(expr, [block()])


def _widest(expr: WeightExpr) -> int:
    """Bytes of the largest value on the way to an expression's, of the part that it takes."""
    own = _size(expr.type.nbytes)
    if isinstance(expr, Source):
        return own
    below = max(map(_widest, expr.args))
    if expr.op == "slice":
        return below * own // max(1, _size(expr.args[0].type.nbytes))
    return max(own, below)


def rows(expr: WeightExpr, source: WeightSource, start: int, stop: int) -> Any:
    """Rows `start <= i < stop` of the leading axis; `start` a multiple of the blocks' height."""
    if isinstance(expr, Source):
        array = source.array(expr.key, slice(start, stop))
        declared = expr.type.with_shape((stop - start, *expr.type.shape[1:]))
        check_tensor(f"source {expr.key}", array, declared)
        return array
    if not _streams(expr):
        return _whole(expr, source)[start:stop]
    if expr.op == "slice" and _axis(expr) == 0:
        first = int(concrete(expr.attrs, {})["start"])
        return rows(expr.args[0], source, first + start, first + stop)
    if expr.op == "concat" and _axis(expr) == 0:
        return _joined(expr, source, start, stop)
    if expr.op == "reshape":
        ratio = _ratio(expr)
        inner = rows(expr.args[0], source, start * ratio, stop * ratio)
        return inner.reshape(stop - start, *map(_size, expr.type.shape[1:]))
    taken = _taken(expr)
    if taken > 1:
        (arg,) = expr.args
        last = min(stop * taken, _size(arg.type.shape[0]))
        return _run(expr, [rows(arg, source, start * taken, last)])
    parts = [
        rows(part, source, 0, 1) if high == WHOLE
        else rows(part, source, start // high, -(-stop // high))
        for part, high in zip(expr.args, _heights(expr), strict=True)
    ]  # fmt: skip
    return _run(expr, parts)


def _joined(expr: Apply, source: WeightSource, start: int, stop: int) -> Any:
    """Rows of what lies one on the other, of each only what is among them."""
    parts, above = [], 0
    for part in expr.args:
        height = _size(part.type.shape[0])
        first, last = max(start - above, 0), min(stop - above, height)
        if first < last:
            parts.append(rows(part, source, first, last))
        above += height
    if not parts:
        return rows(expr.args[0], source, 0, 0)
    return parts[0] if len(parts) == 1 else _run(expr, parts)


@dataclass(frozen=True)
class _Late:
    """A value that is computed when it is first asked for, by one thread."""

    expr: WeightExpr
    source: WeightSource
    lock: Lock
    made: list[Any]

    def value(self) -> Any:
        """The value."""
        with self.lock:
            if not self.made:
                self.made.append(_whole(self.expr, self.source))
        return self.made[0]


class _Held(WeightSource):
    """Values by key over another source."""

    def __init__(self, below: WeightSource) -> None:
        self.values: dict[str, _Late] = {}
        self.below, self.types = below, below.types

    def load(self, key: str) -> torch.Tensor:
        """The tensor below."""
        return self.below.load(key)

    def array(self, key: str, rows: slice = slice(None)) -> Any:
        """The value, or what the source below has. `KeyError`."""
        found = self.values.get(key)
        return self.below.array(key, rows) if found is None else found.value()[rows]


def _settled(expr: WeightExpr, source: WeightSource) -> tuple[WeightExpr, WeightSource]:
    """The expression over the values of what in it does not stream, each computed once."""
    held = _Held(source)

    def settled(each: WeightExpr) -> WeightExpr:
        if _streams(each):
            return each
        if isinstance(each, Apply) and _keeps_rows(each):
            return replace(each, args=tuple(map(settled, each.args)))
        key = f"held {len(held.values)}"
        held.values[key] = _Late(each, source, Lock(), [])
        return Source(key, each.type)

    made = settled(expr)
    return made, held if held.values else source


def _whole(expr: WeightExpr, source: WeightSource) -> Any:
    """The value of an expression that does not stream."""
    if isinstance(expr, Source):
        array = source.array(expr.key)
        check_tensor(f"source {expr.key}", array, expr.type)
        return array
    found = _run(expr, [_whole(arg, source) for arg in expr.args])
    check_tensor(expr.op, found, expr.type)
    return found


def _run(expr: Apply, parts: Sequence[Any]) -> Any:
    """The operator of an expression on values of its arguments, or on rows of them."""
    definition, attrs = lookup(expr.op), concrete(expr.attrs, {})
    move = definition.traits.arrays
    if move is not None and all(isinstance(part, np.ndarray) for part in parts):
        return move(*parts, **attrs)
    tensors = [tensor_of(part) if isinstance(part, np.ndarray) else part for part in parts]
    return definition.run(tensors, attrs)


def _streams(expr: WeightExpr) -> bool:
    """Whether rows of the result need no more than rows of the sources."""
    return isinstance(expr, Source) or (_keeps_rows(expr) and all(map(_streams, expr.args)))


def _keeps_rows(expr: Apply) -> bool:
    """Whether rows of the result need no more than rows of the arguments."""
    if expr.op == "slice" and _axis(expr) == 0:
        return expr.attrs["step"] == 1 and _grain(expr.args[0]) == 1
    if expr.op == "concat" and _axis(expr) == 0:
        heights = [_size(arg.type.shape[0]) for arg in expr.args]
        grain = lcm(*map(_grain, expr.args))
        return all(above % grain == 0 for above in accumulate(heights[:-1]))
    if expr.op in ("slice", "concat"):
        return _axis(expr) != 0
    if expr.op == "permute":
        return bool(expr.type.shape) and expr.attrs["dims"][0] == 0
    if expr.op == "reshape":
        before, after = expr.args[0].type.shape, expr.type.shape
        return bool(before and after) and _size(before[0]) % max(1, _size(after[0])) == 0
    if expr.op in ("word_bytes", "join_nibbles", "block_codes"):
        return expr.type.rank > 1
    if expr.op == "block_scales":
        return expr.type.rank > 1 and _high(expr) != WHOLE
    if expr.op == "scaled":  # of a matrix in tiles a part has fewer rows than it is for
        return expr.attrs["tile"] == 1 or expr.type.rank > 2
    if expr.op == "dequantize" and isinstance(expr.args[0], Apply):
        return _keeps_rows(expr.args[0])
    return expr.op in ("above_least", "cast", "centre", "dequantize", "tiled")


def _axis(expr: Apply) -> int:
    """The axis of a slice or a concat, counted from the front."""
    axis: int = expr.attrs["axis"]
    return axis % expr.type.rank


def _grain(expr: WeightExpr) -> int:
    """Blocks start at multiples of so many rows, which is where a block of scales starts."""
    if isinstance(expr, Source) or not _streams(expr):
        return 1
    inner = lcm(*map(_grain, expr.args), *(max(1, high) for high in _heights(expr)))
    if expr.op == "reshape":
        return lcm(inner, _ratio(expr)) // _ratio(expr)
    taken = _taken(expr)
    return lcm(inner, taken) // taken


def _heights(expr: Apply) -> list[int]:
    """For each argument, how many rows of the result one of its rows is for."""
    if expr.op == "block_codes":
        return [1, _high(expr)]
    format, rank = expr.type.format, expr.type.rank
    if format is None or rank > 2:
        return [1] * len(expr.args)
    return [part.block[-rank] for part in format.parts(expr.type.dtype)]


def _taken(expr: WeightExpr) -> int:
    """How many rows of its one argument a row of the result takes, where some may be left over."""
    if isinstance(expr, Apply) and expr.op == "tiled" and expr.type.rank == 2:
        return int(expr.attrs["tile"])
    return max(1, _high(expr)) if isinstance(expr, Apply) and expr.op == "block_scales" else 1


def _high(expr: Apply) -> int:
    """Rows of the first argument that share a scale."""
    return along(expr.attrs["block"], expr.args[0].type.rank)[0]


def _ratio(reshape: Apply) -> int:
    """Rows of the argument that make one row of the result."""
    return _size(reshape.args[0].type.shape[0]) // max(1, _size(reshape.type.shape[0]))


def _size(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise TypeMismatch(f"a weight of symbolic size {dim}")
    return dim
