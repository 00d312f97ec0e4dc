"""Row-wise regions: pointwise chains, norms, softmax, rope, cache writes as one loop over rows.

Threads share out rows; what a row's operators tell each other stays in registers, or in small
arrays on the thread's stack that never leave the first-level cache. Neighbouring pointwise
operators run in one loop. Angles of rope are computed once a row for all that it rotates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from itertools import groupby
from operator import mul

from dsc.backends.tvm import bf16
from dsc.backends.tvm.kernels.access import Rows
from dsc.backends.tvm.kernels.formulas import FORMULAS
from dsc.backends.tvm.kernels.latent_cache import CacheRows
from dsc.backends.tvm.kernels.sums import nest, summed
from dsc.backends.tvm.kernels.values import compute, held, literal, put, rounded
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import count, size_names
from dsc.backends.tvm.tir import (
    STORAGE,
    VALUE,
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    decode,
    encode,
    exp_of_any,
    f32,
    fold,
    for_each,
    integer,
    lanes_for,
    largest,
    loop,
    splat,
    tirx,
    total,
)
from dsc.ir.dims import Dim
from dsc.ir.region_steps import Lines, Literal, Read, RowStep
from dsc.ir.traits import Role
from dsc.ir.types import DType

LOWEST = float("-inf")
_PAIRS = {"amax": "maximum", "amin": "minimum"}
_REDUCED = frozenset({"sum", "mean", "amax", "amin"})
"""Reductions that give one number of a row."""


def row_region(
    steps: tuple[RowStep, ...], rows: Dim, parameters: int, sizes: int, machine: Machine
) -> PrimFunc:
    """Arguments: the region's operands and results; sizes. Symbols in `steps` are `$i`."""

    def body(*arguments: Expr) -> None:
        given = arguments[parameters:]
        places = Rows(given)
        weight = sum((_work(s, places) for s in steps), start=0)

        tensors = {
            (a.view.buffer, a.view.dtype): Tensor(arguments[a.view.buffer], a.view.dtype, (1,))
            for a in sorted(_lines(steps), key=lambda a: a.view.buffer)
        }

        def row(r: Expr) -> None:
            _Row(tensors, places, machine, r).run(steps)

        with bf16.instructions() if machine.bf16 else nullcontext():
            for_each(places.at(rows), weight, row)

    return build(body, [*(f"x{i}" for i in range(parameters)), *size_names(sizes)])


def _lines(steps: Sequence[RowStep]) -> list[Lines]:
    """What the steps read and write."""
    read = [x.source for s in steps for x in s.reads if isinstance(x.source, Lines)]
    return [*read, *(w for s in steps for w in s.writes)]


def _width(step: RowStep, places: Rows) -> Expr:
    """What a row of a step's result holds."""
    return reduce(mul, map(places.at, step.extents), 1)


def _work(step: RowStep, places: Rows) -> Expr:
    """Elements of a row that a step goes over, each as often as it takes pointwise ones."""
    if step.role is Role.POINTWISE:
        return _width(step, places)
    read = step.over if step.op in _REDUCED else step.extents
    return reduce(mul, map(places.at, read), 3)


class _Row:
    """One row of a region: its steps, one after another."""

    def __init__(
        self, tensors: dict[tuple[int, DType], Tensor], places: Rows, machine: Machine, row: Expr
    ) -> None:
        self.tensors, self.places, self.machine, self.row = tensors, places, machine, row
        self.scratch: dict[int, tuple[Local, int]] = {}
        self.angles: dict[tuple[object, ...], tuple[Local, Local]] = {}
        places.forget()

    def run(self, steps: Sequence[RowStep]) -> None:
        """Emit all steps; neighbouring pointwise ones of one width share a loop."""
        for lines in _lines(steps):
            self.places.start(lines, self.row)
        for step in steps:
            if step.kept:
                width = _width(step, self.places)
                self.scratch[step.number] = (Local(width, STORAGE[step.dtype]), width)
        for (role, _), run in groupby(steps, lambda s: (s.role, s.extents)):
            if role is Role.POINTWISE:
                self._points(list(run))
            else:
                for step in run:
                    self._emit(step)

    def _emit(self, step: RowStep) -> None:
        match step.op:
            case "rms_norm":
                self._rms_norm(step)
            case "layer_norm":
                self._layer_norm(step)
            case "softmax":
                self._softmax(step)
            case "rope":
                self._rope(step)
            case "cache_write":
                self._cache_write(step)
            case _:
                self._reduce(step)

    # --- memory -----------------------------------------------------------------------------------

    def tensor(self, lines: Lines) -> Tensor:
        """The buffer that lines lie in."""
        return self.tensors[lines.view.buffer, lines.view.dtype]

    def load(self, read: Read, index: Sequence[Expr], lanes: int, extents: Sequence[Expr]) -> Expr:
        """Elements of an operand at an inner index over `extents`."""
        source = read.source
        if isinstance(source, Lines):
            position = self.position(source, index)
            if source.constant:
                return splat(bind(self.tensor(source).at(position)), lanes)
            return self.tensor(source).at(position, lanes)
        if isinstance(source, Literal):
            return literal(source, read.dtype, lanes)
        local, width = self.scratch[source]
        if width == 1:
            return splat(bind(decode(local[0], read.dtype)), lanes)
        return decode(local.load(_flat(index, extents), lanes), read.dtype)

    def store(
        self, step: RowStep, index: Sequence[Expr], value: Expr, extents: Sequence[Expr]
    ) -> None:
        """A step's result to where it leaves the region, and to where it is read again."""
        for lines in step.writes:
            put(self.tensor(lines), self.position(lines, index), value, self.machine.bf16)
        if step.kept:
            local, _ = self.scratch[step.number]
            local.store(_flat(index, extents), encode(value, step.dtype))

    def position(self, lines: Lines, index: Sequence[Expr]) -> Expr:
        """The position of an inner index of this row."""
        position = self.places.start(lines, self.row)
        for i, stride in zip(index, lines.inner, strict=True):
            position = position + i * integer(self.places.at(stride))
        return position

    def lanes(self, steps: Sequence[RowStep]) -> int:
        """The widest vector that all accesses of some steps of one width can take."""
        width = self.places.at(steps[0].extents[-1])
        dtypes = {s.dtype for s in steps} | {x.dtype for s in steps for x in s.reads}
        plain = all(a.unit or a.constant for a in _lines(steps))
        plain = plain and all(w.unit for s in steps for w in s.writes)
        # TVM's simplifier fails on vectors of bool: masks are walked one by one.
        if not isinstance(width, int) or not plain or DType.boolean in dtypes:
            return 1
        return lanes_for(width, self.machine.lanes)

    # --- operators --------------------------------------------------------------------------------

    def _points(self, steps: list[RowStep]) -> None:
        """A run of pointwise operators: values stay in registers between them."""
        width, lanes = self.places.at(steps[0].extents[-1]), self.lanes(steps)
        with loop(width // lanes if isinstance(width, int) else width) as i:
            known: dict[int, Expr] = {}
            at = [i * lanes]
            for step in steps:
                values = [
                    known[x.source]
                    if isinstance(x.source, int) and x.source in known
                    else held(self.load(x, at, lanes, [width]))
                    for x in step.reads
                ]
                value = known[step.number] = compute(step, values, self.machine.bf16)
                self.store(step, at, value, [width])

    def _rms_norm(self, step: RowStep) -> None:
        x, gain = step.reads
        (d,), lanes = map(self.places.at, step.extents), self.lanes([step])
        squares = Local(1, width=lanes)
        squares[0] = squares.zero
        with loop(d // lanes) as i:
            v = bind(self.load(x, [i * lanes], lanes, [d]))
            squares[0] = squares[0] + v * v
        eps = f32(step.attrs["eps"])
        scale = bind(f32(1.0) / tirx.sqrt(total(squares[0]) / f32(d) + eps))
        with loop(d // lanes) as i:
            v = held(self.load(x, [i * lanes], lanes, [d])) * splat(scale, lanes)
            early = gain.dtype is step.dtype
            value = rounded(v, step.dtype, self.machine.bf16) if early else v
            value = value * self.load(gain, [i * lanes], lanes, [d])
            self.store(step, [i * lanes], held(value), [d])

    def _layer_norm(self, step: RowStep) -> None:
        """The mean, the deviation from it, and what follows, each a walk along the row."""
        x, *affine = step.reads
        (d,), lanes = map(self.places.at, step.extents), self.lanes([step])

        def mean_of(term: Callable[[Expr], Expr]) -> Expr:
            acc = Local(1, width=lanes)
            acc[0] = acc.zero
            with loop(d // lanes) as i:
                acc[0] = acc[0] + term(bind(self.load(x, [i * lanes], lanes, [d])))
            return bind(total(acc[0]) / f32(d))

        mean = bind(splat(mean_of(lambda v: v), lanes))

        def squared(v: Expr) -> Expr:
            centred = bind(v - mean)
            return centred * centred

        scale = bind(f32(1.0) / tirx.sqrt(mean_of(squared) + f32(step.attrs["eps"])))
        with loop(d // lanes) as i:
            v = held(self.load(x, [i * lanes], lanes, [d]) - mean) * splat(scale, lanes)
            gain, *shift = (self.load(r, [i * lanes], lanes, [d]) for r in affine)
            self.store(step, [i * lanes], held(sum(shift, start=v * gain)), [d])

    def _softmax(self, step: RowStep) -> None:
        (x,) = step.reads
        d, name = self.places.at(step.extents[-1]), VALUE[x.dtype]
        lanes = self.lanes([step]) if name == "float32" else 1
        steps = d // lanes if isinstance(d, int) else d
        peaks, sums = Local(1, name, lanes), Local(1, name, lanes)
        peaks[0] = splat(tirx.FloatImm(name, LOWEST), lanes)

        def visit(body: Callable[[Expr, Expr], None]) -> None:
            with loop(steps) as i:
                body(i * lanes, bind(self.load(x, [i * lanes], lanes, [d])))

        def raise_peak(at: Expr, v: Expr) -> None:
            peaks[0] = tirx.max(peaks[0], v)

        visit(raise_peak)
        peak = bind(splat(bind(largest(peaks[0])), lanes))

        def add(at: Sequence[Expr]) -> None:
            v = bind(self.load(x, [at[0] * lanes], lanes, [d]))
            sums[0] = sums[0] + exp_of_any(v - peak)

        (found,) = summed([steps], [sums], add)
        mass = bind(splat(bind(total(found)), lanes))
        visit(lambda at, v: self.store(step, [at], held(exp_of_any(v - peak) / mass), [d]))

    def _reduce(self, step: RowStep) -> None:
        """sum, mean, amax and amin of a row; `extents` is what the row holds."""
        (x,), sums = step.reads, step.op in ("sum", "mean")
        extents, name = list(map(self.places.at, step.over)), VALUE[x.dtype]
        *outer, d = extents
        plain = not isinstance(x.source, Lines) or x.source.unit
        wide = isinstance(d, int) and name == "float32" and plain
        lanes = lanes_for(d, self.machine.lanes) if wide else 1
        acc = Local(1, name, lanes)
        steps = [*outer, d // lanes if isinstance(d, int) else d]

        def add(at: Sequence[Expr]) -> None:
            v = bind(self.load(x, [*at[:-1], at[-1] * lanes], lanes, extents))
            acc[0] = acc[0] + v if sums else FORMULAS[_PAIRS[step.op]](v, acc[0])

        if sums:
            (result,) = summed(steps, [acc], add)
        else:
            acc[0] = self.load(x, [integer(0)] * len(extents), lanes, extents)
            nest(steps, add)
            result = acc[0]
        if lanes > 1:
            result = total(result) if sums else _joined(step.op, acc, lanes)
        if step.op == "mean":
            result = result / cast(integer(count(extents)), name)
        self.store(step, [integer(0)], held(result), [1])

    def _rope(self, step: RowStep) -> None:
        x, positions, frequencies = step.reads
        *heads, width = map(self.places.at, step.extents)
        turned = step.attrs["dims"] or width
        half, layout = turned // 2, step.attrs["layout"]
        cos, sin = self._angles(positions, frequencies, half, step.attrs["scale"])
        shape = [*heads, width]
        with loop(heads[0] if heads else 1) as h, loop(half) as i:
            pair = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
            out = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half)
            own = [h] if heads else []
            a = bind(self.load(x, [*own, pair[0]], 1, shape))
            b = bind(self.load(x, [*own, pair[1]], 1, shape))
            self.store(step, [*own, out[0]], held(a * cos[i] - b * sin[i]), shape)
            self.store(step, [*own, out[1]], held(b * cos[i] + a * sin[i]), shape)
        if turned == width:
            return
        lanes = lanes_for(width - turned, self.lanes([step]))
        with loop(heads[0] if heads else 1) as h, loop((width - turned) // lanes) as i:
            at = [*([h] if heads else []), turned + i * lanes]
            self.store(step, at, held(self.load(x, at, lanes, shape)), shape)

    def _angles(
        self, positions: Read, frequencies: Read, half: int, scale: float
    ) -> tuple[Local, Local]:
        """cos and sin of the row's position times each frequency, times `scale`."""
        key = (positions, frequencies, half, scale)
        if key not in self.angles:
            cos, sin = Local(half), Local(half)
            where = bind(cast(self.load(positions, [], 1, []), "float32"))
            with loop(half) as i:
                angle = bind(where * self.load(frequencies, [i], 1, [half]))
                cos[i] = tirx.cos(angle) * f32(scale)
                sin[i] = tirx.sin(angle) * f32(scale)
            self.angles[key] = (cos, sin)
        return self.angles[key]

    def _cache_write(self, step: RowStep) -> None:
        new, lengths, cache, *table = step.reads
        d, s, count, *page = map(self.places.at, (*step.extents, *step.over))
        batch, i = bind(tirx.truncdiv(self.row, integer(s))), tirx.truncmod(self.row, integer(s))
        used = self.tensor(_memory(lengths)).at(batch)
        blocks = self.tensor(_memory(table[0])) if table else None
        rows = CacheRows(integer(count), int(page[0]) if page else 0, blocks)
        plain = not isinstance(new.source, Lines) or new.source.unit
        lanes = lanes_for(d, self.machine.lanes) if plain else 1
        target = self.tensor(_memory(cache))
        with rows.place(batch, bind(used + i)) as slot:
            start = bind(slot * d)
            with loop(d // lanes) as at:
                value = held(self.load(new, [at * lanes], lanes, [d]))
                put(target, start + at * lanes, value, self.machine.bf16)


def _memory(read: Read) -> Lines:
    assert isinstance(read.source, Lines)
    return read.source


def _flat(index: Sequence[Expr], extents: Sequence[Expr]) -> Expr:
    """The position of an index in a row's scratch."""
    position: Expr = integer(0)
    for i, extent in zip(index, extents, strict=True):
        position = position * extent + i
    return position


def _joined(op: str, acc: Local, lanes: int) -> Expr:
    """The largest or smallest lane."""
    return fold(bind(acc[0]), FORMULAS[_PAIRS[op]])
