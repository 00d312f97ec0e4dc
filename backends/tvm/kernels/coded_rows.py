"""Rows of x that meet codes: what they are taken as, and how they are multiplied (`coded`).

integers   8-bit codes with a scale for each 32 columns, times integer codes: for 544 bytes of
           weights 8 products of 64 and four instructions that scale, so memory is the bound from
           two rows down; with many rows it is 64 products an instruction, by AMX up to 8192.
pairs      bf16, times FP8 codes looked up as bf16: 32 products an instruction, and six to look up
           64 codes. Rows that are said to be FP8 are such numbers too, with a scale for each 128
           columns: their products are exact.
widened    fp32, times FP8 codes that become fp16 and then fp32: 12 instructions for a vector's
           codes, and as many conversions and products as they take.
floats     fp32, times any codes, widened one by one: what any machine can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from dsc.backends.tvm import amx, bf16, codes
from dsc.backends.tvm.codes import LANES
from dsc.backends.tvm.kernels.coded import FLOATS, INTEGERS, PAIRS, TILE_ROWS, WIDENED, Coded, Codes
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    T,
    Tensor,
    bind,
    cast,
    f32,
    for_each,
    integer,
    loop,
    select,
    splat,
    tirx,
)
from dsc.ir.dims import Dim
from dsc.ir.formats import CODINGS, ROWS, STEP
from dsc.ir.types import DType

F8 = DType.f8e4m3.value
F8_GROUP = int(ROWS[F8].rpartition(":")[2])
"""Columns of a row in FP8 that share a scale; of 8-bit codes a step's do."""


class _Rows:
    """Rows of x in scratch memory, `width` columns at a time."""

    width = STEP

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        self.of, self.rows = of, integer(rows)
        self.depth = of.steps * STEP

    def take(self, x: Tensor, start: Callable[[Expr], Expr], rows: Expr) -> None:
        """All rows of x: row i begins at `start(i)`; what is beyond its end is 0."""
        width = self.width

        def row(i: Expr) -> None:
            begin = bind(integer(start(i)))
            whole = self.of.depth // width
            with loop(whole) as part:
                at = bind(begin + part * width)
                self._take(i, part, [x.at(at + n, LANES) for n in range(0, width, LANES)])
            rest = self.of.depth - whole * width
            if rest:
                last = Local(width)
                for n in range(0, width, LANES):
                    last.store(integer(n), splat(f32(0.0), LANES))
                with loop(rest) as j:
                    last[j] = x.at(begin + (whole * width) + j)
                self._take(i, integer(whole), [last.load(n, LANES) for n in range(0, width, LANES)])

        for_each(rows, integer(self.of.depth), row)

    def _take(self, i: Expr, part: Expr, vectors: Sequence[Expr]) -> None:
        raise NotImplementedError

    def sums(
        self, places: Sequence[Expr], weights: Codes, tiles: Sequence[Expr]
    ) -> list[list[Expr]]:
        """For each of some rows its products with each of some tiles of columns."""
        sums = _zeros_for(places, tiles)
        with loop(self.of.steps) as step:
            group = bind(weights.group(step))
            found = self._step(places, weights, tiles, step, group)
            scales = [weights.shared(weights.scales, tile, group) for tile in tiles]
            for line, values in zip(sums, found, strict=True):
                for total, value, scale in zip(line, values, scales, strict=True):
                    total[0] = codes.fma(total[0], value, scale)
        return [[total[0] for total in line] for line in sums]

    def _step(
        self,
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
        group: Expr,
    ) -> list[list[Expr]]:
        """The sums over 32 columns of x, without the weights' scales."""
        raise NotImplementedError


class Integers(_Rows):
    """Rows as 8-bit codes: with a scale, and the sum of the codes, for each 32 columns."""

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        super().__init__(of, address, rows)
        self.bytes = Tensor(address, DType.i8, (rows, self.depth))
        self.words = Tensor(address, DType.i32, (rows, self.depth // 4))
        after = bind(address + self.rows * self.depth)
        self.scales = Tensor(after, DType.f32, (rows, of.steps))
        self.totals = Tensor(bind(after + self.rows * (4 * of.steps)), DType.i32, (rows, of.steps))

    @staticmethod
    def bytes_of(of: Coded) -> int:
        """Of a row."""
        return of.steps * (STEP + 8)

    def sums(
        self, places: Sequence[Expr], weights: Codes, tiles: Sequence[Expr]
    ) -> list[list[Expr]]:
        """As for all."""
        if len(places) == TILE_ROWS:
            amx.configure_bytes()
        return super().sums(places, weights, tiles)

    def _take(self, i: Expr, part: Expr, vectors: Sequence[Expr]) -> None:
        a, b = (bind(each) for each in vectors)
        scale = _scale(codes.largest(a, b), "i8")
        whole = splat(scale, LANES)
        a, b = (bind(codes.nearest(each / whole)) for each in (a, b))
        joined = codes.join(a, b, even_first=self.of.together > 1)
        at = self.bytes.offset(i, part * STEP)
        T.buffer_store(self.bytes.buffer, joined, [tirx.Ramp(at, integer(1), STEP)])
        self.scales.store(scale, i, part)
        self.totals.store(codes.total(a, b), i, part)

    def _step(
        self,
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
        group: Expr,
    ) -> list[list[Expr]]:
        totals = [bind(self.totals.load(place, step)) for place in places]
        if len(places) == TILE_ROWS:
            found = self._by_tiles(places, weights, tiles, step, totals)
        else:
            found = self._by_vectors(places, weights, tiles, step, totals)
        zeros = [_zeros(weights, tile, group) for tile in tiles]
        results = []
        for line, place, total in zip(found, places, totals, strict=True):
            scale = bind(splat(bind(self.scales.load(place, step)), LANES))
            values = []
            for acc, zero in zip(line, zeros, strict=True):
                value = cast(acc, "float32")
                if zero is not None:  # both are whole numbers below 2^24
                    value = value - zero * splat(cast(total, "float32"), LANES)
                values.append(bind(value * scale))
            results.append(values)
        return results

    def _by_vectors(
        self,
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
        totals: Sequence[Expr],
    ) -> list[list[Expr]]:
        """Sums of bytes, without what codes are too large by where there are no zero points."""
        of = self.of
        accs = [[Local(1, "int32", LANES) for _ in tiles] for _ in places]
        for line, total in zip(accs, totals, strict=True):
            for acc in line:
                begun = of.excess and of.zeros is None
                acc[0] = splat(bind(total * (-of.excess)), LANES) if begun else acc.zero
        words = [bind(self.words.offset(place, step * (STEP // 4))) for place in places]
        starts = [weights.begin(tile, step, len(places)) for tile in tiles]
        for v in range(of.vectors):
            found = [_multiplied(weights, start + v * LANES) for start in starts]
            for h in range(of.together):
                for line, word in zip(accs, words, strict=True):
                    x = bind(splat(bind(self.words.at(word + (v * of.together + h))), LANES))
                    for acc, halves in zip(line, found, strict=True):
                        acc[0] = codes.dot4(acc[0], halves[h], x, of.signed)
        return [[acc[0] for acc in line] for line in accs]

    def _by_tiles(
        self,
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
        totals: Sequence[Expr],
    ) -> list[list[Expr]]:
        """The same of 16 rows by AMX, which are collected; 8-bit codes stay signed there."""
        of, rows = self.of, Local(TILE_ROWS * STEP, "int8")
        for r, place in enumerate(places):
            at = tirx.Ramp(self.bytes.offset(place, step * STEP), integer(1), STEP)
            rows.store(integer(r * STEP), self.bytes.buffer[at])
        amx.load(amx.PAIRS[0], amx.address(rows, integer(0)), integer(STEP))
        sums = []
        for n, tile in enumerate(tiles):
            start = bind(weights.vectors(tile, step))
            source: Tensor | Local = weights.words
            if of.together > 1:
                source, here = Local(STEP // 4 * LANES, "int32"), start
                for v in range(of.vectors):
                    for h, half in enumerate(_multiplied(weights, here + v * LANES)):
                        source.store(integer((v * of.together + h) * LANES), half)
                start = integer(0)
            amx.load(amx.WEIGHTS[n], amx.address(source, start), integer(4 * LANES))
            amx.multiply_bytes(n)
            found = Local(TILE_ROWS * LANES, "int32")
            amx.save(amx.SUMS[n], amx.address(found, integer(0)), integer(4 * LANES))
            sums.append(found)
        more = (of.excess if of.together == 1 else 0) - (0 if of.zeros else of.excess)
        return [
            [bind(each.load(r * LANES, LANES) + splat(total * more, LANES)) for each in sums]
            for r, total in enumerate(totals)
        ]


class Floats(_Rows):
    """Rows in fp32; of those that are said to be FP8, the numbers that their codes stand for."""

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        super().__init__(of, address, rows)
        self.width = F8_GROUP if of.rows else STEP
        self.stride = _padded(of, self.width)
        self.values = Tensor(address, DType.f32, (rows, self.stride))

    @staticmethod
    def bytes_of(of: Coded) -> int:
        """Of a row."""
        return 4 * _padded(of, F8_GROUP if of.rows else STEP)

    def _take(self, i: Expr, part: Expr, vectors: Sequence[Expr]) -> None:
        self.put(i, part, self.numbers(vectors))

    def numbers(self, vectors: Sequence[Expr]) -> list[Expr]:
        """What vectors of x are taken as."""
        values = [bind(each) for each in vectors]
        if not self.of.rows:
            return values
        scale, values = _in_f8(values)
        return [bind(each * splat(scale, LANES)) for each in values]

    def put(self, i: Expr, part: Expr, values: Sequence[Expr]) -> None:
        """Write a part of a row."""
        for n, value in enumerate(values):
            self.values.put(self.values.offset(i, part * self.width + n * LANES), value)

    def _step(
        self,
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
        group: Expr,
    ) -> list[list[Expr]]:
        of = self.of
        sums = _zeros_for(places, tiles)
        zeros = [_zeros(weights, tile, group) for tile in tiles]
        with loop(of.vectors) as v:
            at = [bind(weights.vectors(tile, step) + v * LANES) for tile in tiles]
            first = step * STEP + v * (4 * of.together)
            rows = [bind(self.values.offset(place, first)) for place in places]
            for h in range(of.together):
                for byte in range(4):
                    columns = [
                        bind(_widened(weights, each, h, byte, zero))
                        for each, zero in zip(at, zeros, strict=True)
                    ]
                    for line, row in zip(sums, rows, strict=True):
                        x = bind(splat(bind(self.values.at(row + (byte * of.together + h))), LANES))
                        for total, column in zip(line, columns, strict=True):
                            total[0] = codes.fma(total[0], column, x)
        return [[bind(total[0]) for total in line] for line in sums]


class _Halves(_Rows):
    """Products with 64 codes as two parts; a range of x that shares scales has sums of its own."""

    def sums(
        self, places: Sequence[Expr], weights: Codes, tiles: Sequence[Expr]
    ) -> list[list[Expr]]:
        """As for all."""
        of = self.of
        sums = _zeros_for(places, tiles)
        per = of.group // STEP if of.group else of.steps
        if of.rows:
            per = gcd(per, F8_GROUP // STEP) if of.group else F8_GROUP // STEP
        ranges = -(-of.steps // per)
        with loop(ranges) as part:
            first = bind(part * per)
            last = bind(tirx.min(first + per, integer(of.steps)))
            lows, highs = (_zeros_for(places, tiles) for _ in range(2))
            halves = [list(zip(*both, strict=True)) for both in zip(lows, highs, strict=True)]
            with loop(bind(last - first)) as n:
                self._add(halves, places, weights, tiles, bind(first + n))
            group = bind(weights.group(first))
            scales = [weights.shared(weights.scales, tile, group) for tile in tiles]
            for line, totals, place in zip(halves, sums, places, strict=True):
                for (low, high), total, scale in zip(line, totals, scales, strict=True):
                    value = bind(self._gathered(low[0], high[0], place, first))
                    total[0] = codes.fma(total[0], value, scale)
        return [[total[0] for total in line] for line in sums]

    def _add(
        self,
        halves: list[list[tuple[Local, Local]]],
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
    ) -> None:
        """The products over 32 columns of x, four at a time."""
        raise NotImplementedError

    def _gathered(self, low: Expr, high: Expr, place: Expr, step: Expr) -> Expr:
        """The sums of a range that begins with a step, in the order of columns."""
        raise NotImplementedError


class Pairs(_Halves):
    """Rows in bf16, or FP8 as bf16 with a scale for each 128 columns, times FP8 codes."""

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        super().__init__(of, address, rows)
        self.width = F8_GROUP if of.rows else STEP
        self.stride = _padded(of, self.width)
        self.values = Tensor(address, DType.bf16, (rows, self.stride))
        self.fours = Tensor(address, DType.i64, (rows, self.stride // 4))
        after = bind(address + self.rows * (2 * self.stride))
        self.scales = Tensor(after, DType.f32, (rows, -(-of.depth // F8_GROUP)))

    @staticmethod
    def bytes_of(of: Coded) -> int:
        """Of a row."""
        scales = 4 * -(-of.depth // F8_GROUP) if of.rows else 0
        return 2 * _padded(of, F8_GROUP if of.rows else STEP) + scales

    def _take(self, i: Expr, part: Expr, vectors: Sequence[Expr]) -> None:
        values = [bind(each) for each in vectors]
        if self.of.rows:
            scale, values = _in_f8(values)
            self.scales.store(scale, i, part)
        for n, value in enumerate(values):
            self.values.put(self.values.offset(i, part * self.width + n * LANES), value)

    def _add(
        self,
        halves: list[list[tuple[Local, Local]]],
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
    ) -> None:
        starts = [weights.begin(tile, step, len(places)) for tile in tiles]
        rows = [bind(self.fours.offset(place, step * (STEP // 4))) for place in places]
        for v in range(self.of.vectors):
            found = []
            for start in starts:
                both = bind(weights.words.at(start + v * LANES, LANES))
                found.append([bind(each) for each in codes.bf16_of_f8(both)])
            for line, row in zip(halves, rows, strict=True):
                four = splat(bind(self.fours.at(row + v)), LANES // 2)
                x = bind(T.reinterpret("uint16x32", four))
                for pair, columns in zip(line, found, strict=True):
                    for each, column in zip(pair, columns, strict=True):
                        each[0] = bf16.pair_dot(each[0], column, x)

    def _gathered(self, low: Expr, high: Expr, place: Expr, step: Expr) -> Expr:
        value = codes.gathered(low, high)
        if not self.of.rows:
            return value
        scaled = tirx.truncdiv(step * STEP, integer(F8_GROUP))
        return value * splat(bind(self.scales.load(place, scaled)), LANES)


class Widened(_Halves):
    """Rows in fp32, as `Floats` has them, times FP8 codes as fp32."""

    def __init__(self, of: Coded, address: Expr, rows: Expr) -> None:
        super().__init__(of, address, rows)
        self.floats = Floats(of, address, rows)
        self.width = self.floats.width
        self.twos = Tensor(address, DType.i64, (rows, self.floats.stride // 2))

    @staticmethod
    def bytes_of(of: Coded) -> int:
        """Of a row."""
        return Floats.bytes_of(of)

    def _take(self, i: Expr, part: Expr, vectors: Sequence[Expr]) -> None:
        values = [codes.crossed(each) for each in self.floats.numbers(vectors)]
        self.floats.put(i, part, values)

    def _add(
        self,
        halves: list[list[tuple[Local, Local]]],
        places: Sequence[Expr],
        weights: Codes,
        tiles: Sequence[Expr],
        step: Expr,
    ) -> None:
        starts = [weights.begin(tile, step, len(places)) for tile in tiles]
        rows = [bind(self.twos.offset(place, step * (STEP // 2))) for place in places]
        for v in range(self.of.vectors):
            found = []
            for start in starts:
                both = bind(weights.words.at(start + v * LANES, LANES))
                found.append([tuple(map(bind, columns)) for columns in codes.of_f8(both)])
            for line, row in zip(halves, rows, strict=True):
                xs = [
                    bind(T.reinterpret("float32x16", splat(bind(self.twos.at(at)), LANES // 2)))
                    for at in (row + 2 * v, row + (2 * v + 1))
                ]
                for pair, columns in zip(line, found, strict=True):
                    for each, two in zip(pair, columns, strict=True):
                        for column, x in zip(two, xs, strict=True):
                            each[0] = codes.fma(each[0], column, x)

    def _gathered(self, low: Expr, high: Expr, place: Expr, step: Expr) -> Expr:
        return codes.gathered_f16(low, high)


WAYS: dict[str, type[Integers | Floats | Pairs | Widened]] = {
    INTEGERS: Integers,
    FLOATS: Floats,
    PAIRS: Pairs,
    WIDENED: Widened,
}


def taken(of: Coded, address: Expr, rows: Expr) -> Integers | Floats | Pairs | Widened:
    """Rows in scratch memory at an address."""
    return WAYS[of.way](of, address, rows)


def scratch_bytes(of: Coded, rows: Dim | Expr) -> Any:
    """Bytes of so many rows, which are a dim or a run-time value."""
    return rows * WAYS[of.way].bytes_of(of)


def _padded(of: Coded, width: int) -> int:
    """Columns of a row, a multiple of `width`."""
    return -(-of.depth // width) * width


def _scale(largest: Expr, kind: str) -> Expr:
    """The scale with which a magnitude is the largest code; 1 of zeros."""
    scale = bind(largest / f32(CODINGS[kind].largest))
    return bind(select(tirx.EQ(scale, f32(0.0)), f32(1.0), scale))


def _in_f8(values: Sequence[Expr]) -> tuple[Expr, list[Expr]]:
    """A scale, and 128 numbers over it rounded to what e4m3 has."""
    pairs = zip(values[::2], values[1::2], strict=True)
    most = [bind(codes.largest(a, b)) for a, b in pairs]
    for _ in range(2):
        most = [bind(codes.larger(a, b)) for a, b in zip(most[::2], most[1::2], strict=True)]
    scale = _scale(most[0], F8)
    return scale, [bind(codes.nearest_f8(each / splat(scale, LANES))) for each in values]


def _zeros_for(places: Sequence[Expr], tiles: Sequence[Expr]) -> list[list[Local]]:
    """A sum for each row and tile, which is 0."""
    sums = [[Local(1, width=LANES) for _ in tiles] for _ in places]
    for line in sums:
        for total in line:
            total[0] = total.zero
    return sums


def _multiplied(weights: Codes, at: Expr) -> list[Expr]:
    """The codes of a vector as bytes that are multiplied; of two in one, the low halves first."""
    both = bind(weights.words.at(at, LANES))
    if weights.of.together == 1:
        turned = splat(tirx.const(-0x7F7F7F80, "int32"), LANES)
        return [both if weights.of.signed else bind(both ^ turned)]
    nibbles = splat(tirx.const(0x0F0F0F0F, "int32"), LANES)
    four = splat(tirx.const(4, "int32"), LANES)
    return [bind(both & nibbles), bind((both >> four) & nibbles)]


def _zeros(weights: Codes, tile: Expr, group: Expr) -> Expr | None:
    """The zero points of a tile, as codes that are multiplied have them, if there are any."""
    if weights.zeros is None:
        return None
    excess = splat(f32(float(weights.of.excess)), LANES)
    return bind(weights.shared(weights.zeros, tile, group) + excess)


def _widened(weights: Codes, at: Expr, half: int, byte: int, zero: Expr | None) -> Expr:
    """One code of each column, less its zero point, as fp32."""
    shift = splat(tirx.const(8 * byte, "int32"), LANES)
    if weights.of.dtype.is_float:
        return codes.from_f8(bind(weights.words.at(at, LANES)) >> shift)
    moved = _multiplied(weights, at)[half] >> shift
    value = cast(moved & splat(tirx.const(255, "int32"), LANES), "float32")
    return value - (splat(f32(float(weights.of.excess)), LANES) if zero is None else zero)
