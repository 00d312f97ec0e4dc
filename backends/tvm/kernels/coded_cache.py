"""Latent caches whose rows are codes with scales behind them (`dsc.ir.formats`).

cache_write    a task is a row: its groups become a scale and codes each.
attention      reads what codes stand for, in the element type of the queries. A step of one token
               widens rows a tile at a time, which stays in a cache of the CPU while all heads pass
               by; bound: the bytes of the codes over bandwidth, or what attention computes. A step
               of several tokens widens every row that is seen once, into scratch memory at the same
               slots, and goes on over that: codes are a small part of what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import TypeAlias

from dsc.backends.tvm import bf16, codes
from dsc.backends.tvm.codes import LANES
from dsc.backends.tvm.kernels.bf16_product import ceil_div
from dsc.backends.tvm.kernels.latent_cache import CacheRows, LatentCache, arguments
from dsc.backends.tvm.launch import Launch, Unsupported, operand, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    T,
    Tensor,
    bind,
    build,
    cast,
    f32,
    for_each,
    integer,
    loop,
    reinterpret,
    select,
    splat,
    tirx,
)
from dsc.ir.dims import Dim
from dsc.ir.formats import CACHED, CODINGS, code_bytes
from dsc.ir.graph import Node
from dsc.ir.paging import cached_rows, rows_of_page
from dsc.ir.types import DType, TensorType

Group: TypeAlias = tuple[Expr, Expr]
ROWS = 64
"""Rows that a task widens for the steps of several tokens."""
WIDE = 64
"""Codes that tables take at a time."""
BIAS, EXPONENTS = 127, (-117, 119)
"""What fp32 adds to an exponent, and those of scales with which every FP8 code is one of bf16."""
LINE = 64
"""Bytes that come from memory together."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kernel is specialised to: codes, elements of a row, elements that share a scale."""

    codes: DType
    width: int
    group: int
    machine: Machine

    @staticmethod
    def of(t: TensorType, machine: Machine) -> Kind | None:
        """That of a cache in a format; `None` of one in numbers."""
        if t.format is None:
            return None
        width = static_dim(t.shape[-1], "a cache row")
        group = t.format.block[1] or width
        if t.dtype.value not in CACHED or t.format.scales is not DType.f32:
            raise Unsupported(f"a cache in {t.dtype}{t.format}")
        if group % LANES and group < width:
            raise Unsupported(f"groups of {group}; a multiple of {LANES} is needed")
        return Kind(t.dtype, width, group, machine)

    @property
    def scales_at(self) -> int:
        """Bytes of a row before its scales."""
        found = code_bytes(self.width, 1)
        assert isinstance(found, int)
        return found

    @property
    def bytes(self) -> int:
        """Of a row."""
        return self.scales_at + 4 * -(-self.width // self.group)


class CodedRows:
    """Rows at an address, by the numbers of their slots; scales are fp32 words between them.

    With `native` numbers are bf16, and the kernel has its instructions (`../bf16.py`).
    """

    def __init__(self, kind: Kind, address: Expr, native: bool = False) -> None:
        self.kind, self.native = kind, native
        self.words = Tensor(address, DType.i32, (1,))
        self.codes = Tensor(address, DType.u8 if kind.codes.is_float else DType.i8, (1,))
        self.scales = Tensor(address, DType.f32, (1,))

    def widen(self, slot: Expr, target: Tensor, at: Expr) -> None:
        """Write what a row stands for to `target`, from a position on, in its element type."""
        tables = self.native and self.kind.codes.is_float and self.kind.machine.vbmi
        for each_group, count in self._groups(slot):
            with each_group as (column, place):
                scale = bind(self.scales.at(place))
                start, to = bind(slot * self.kind.bytes + column), bind(at + column)
                if not tables or count % WIDE:
                    self._multiply(start, count, scale, target, to)
                    continue
                bits = bind(reinterpret(scale, "int32"))
                exponent = bind(bits >> tirx.const(23, "int32"))
                low, high = (tirx.const(n + BIAS, "int32") for n in EXPONENTS)
                plain = tirx.EQ(bits & tirx.const(0x7FFFFF, "int32"), tirx.const(0, "int32"))
                with T.If(tirx.all(plain, exponent >= low, exponent <= high)):
                    with T.Then():
                        self._look_up(start, count, exponent, target, to)
                    with T.Else():
                        self._multiply(start, count, scale, target, to)

    def ahead(self, slot: Expr) -> None:
        """Ask for the lines of a row."""
        for line in range(0, self.kind.bytes + LINE - 1, LINE):
            bf16.prefetch_far(self.codes, slot * self.kind.bytes + line)

    def _look_up(self, start: Expr, count: int, exponent: Expr, target: Tensor, to: Expr) -> None:
        """FP8 codes by tables, times a power of two."""
        first = bind(tirx.truncdiv(start, integer(4)))
        for n in range(0, count, WIDE):
            found = bind(self.words.at(first + n // 4, LANES))
            halves = codes.scaled_f8(found, exponent - tirx.const(BIAS, "int32"))
            for half, numbers in enumerate(halves):
                bf16.put_bits(target, to + n + half * bf16.LANES, numbers)

    def _multiply(self, start: Expr, count: int, scale: Expr, target: Tensor, to: Expr) -> None:
        """Codes times a scale, in fp32."""
        every = splat(scale, LANES)
        for n in _whole(count):
            found = self._numbers(self.codes.at(start + n, LANES)) * every
            if self.native:
                bf16.put_bits(target, to + n, bf16.narrow(bind(found)))
            else:
                target.put(to + n, found)
        with loop(count % LANES) as n:
            last = bind(count - count % LANES + n)
            found = self._numbers(splat(bind(self.codes.at(start + last)), LANES))
            target.put(to + last, tirx.Shuffle([bind(found * every)], [0]))

    def write(self, slot: Expr, source: Tensor, at: Expr) -> None:
        """Write a row of numbers that lies in `source`, from a position on, as codes."""
        kind = self.kind
        for n in range(kind.width, kind.scales_at):
            self.codes.put(bind(slot * kind.bytes + n), tirx.const(0, "int32"))
        for each_group, count in self._groups(slot):
            with each_group as (column, place):
                start = bind(at + column)
                numbers = [bind(source.at(start + n, LANES)) for n in _whole(count)]
                if count % LANES:
                    last = Local(LANES)
                    last.store(integer(0), splat(f32(0.0), LANES))
                    with loop(count % LANES) as n:
                        last[n] = source.at(start + (count - count % LANES) + n)
                    numbers.append(last.load(integer(0), LANES))
                pairs = zip_longest(numbers[::2], numbers[1::2], fillvalue=numbers[0])
                most = reduce(codes.larger, [bind(codes.largest(a, b)) for a, b in pairs])
                scale = _scale(bind(most), kind.codes)
                self.scales.put(place, scale)
                to = bind(slot * kind.bytes + column)
                found = [self._nearest(bind(x / splat(scale, LANES))) for x in numbers]
                for n, each in zip(_whole(count), found, strict=False):
                    self.codes.put(to + n, each)
                if count % LANES:
                    rest = Local(LANES, "int32")
                    rest.store(integer(0), found[-1])
                    with loop(count % LANES) as n:
                        self.codes.put(to + (count - count % LANES) + n, rest[n])

    def _groups(self, slot: Expr) -> Iterator[tuple[AbstractContextManager[Group], int]]:
        """Groups of a row: the column where each begins and where its scale lies; its width."""
        kind = self.kind
        first = bind(slot * (kind.bytes // 4) + kind.scales_at // 4)

        @contextmanager
        def group(place: Expr) -> Iterator[Group]:
            yield bind(place * kind.group), first + place

        @contextmanager
        def every(count: int) -> Iterator[Group]:
            with loop(count) as place, group(place) as each:
                yield each

        whole, rest = divmod(kind.width, kind.group)
        if whole:
            yield every(whole), kind.group
        if rest:
            yield group(integer(whole)), rest

    def _numbers(self, found: Expr) -> Expr:
        """16 codes as fp32."""
        return codes.from_f8(found) if self.kind.codes.is_float else cast(found, "float32")

    def _nearest(self, quotients: Expr) -> Expr:
        """The codes nearest to 16 numbers, as integers."""
        make = codes.code_f8 if self.kind.codes.is_float else codes.nearest
        return bind(make(quotients))


def _whole(count: int) -> range:
    """Where whole vectors of a group begin."""
    return range(0, count - count % LANES, LANES)


def _scale(most: Expr, kind: DType) -> Expr:
    """The scale of a group whose largest magnitude this is: `dsc.ir.formats.pack_state`."""
    scale = bind(most / f32(CODINGS[kind].largest))
    if kind.is_float:
        bits = bind(reinterpret(scale, "int32"))
        mask = tirx.const(0x7FFFFF, "int32")
        up = reinterpret((bits + mask) & tirx.const(~0x7FFFFF, "int32"), "float32")
        scale = bind(select(bits < tirx.const(0x7F800000, "int32"), up, scale))
    return bind(select(tirx.EQ(scale, f32(0.0)), f32(1.0), scale))


def instructions(kind: Kind | None) -> AbstractContextManager[None]:
    """What a kernel over such rows may use; nothing over rows in numbers."""
    return nullcontext() if kind is None else codes.instructions(kind.machine)


def lower_write(node: Node, machine: Machine) -> Launch:
    """The launch of `cache_write` into a cache whose rows are codes."""
    cache, new = operand(node, 0).type, operand(node, 1).type
    kind = Kind.of(cache, machine)
    if kind is None or not new.dtype.is_float or new.dtype is DType.f64:
        raise Unsupported(f"{new.dtype} into a cache in {cache.dtype}{cache.format or ''}")
    page = rows_of_page(node) or 0
    sizes = (*new.shape[:2], cached_rows(node, "cache"))
    return Launch(coded_write, (new.dtype, kind, page), sizes)


def coded_write(dtype: DType, kind: Kind, page: int) -> PrimFunc:
    """Arguments: cache, new [b, s, width], lengths, block table where there are pages, out."""
    names = arguments("latent new lengths", page, "out")

    def body(*parameters: Expr) -> None:
        given = dict(zip(names, parameters, strict=True))
        b, s = given["b"], given["s"]
        new = Tensor(given["new"], dtype, (b, s, kind.width))
        used = Tensor(given["lengths"], DType.i64, (b,))
        rows, places = CodedRows(kind, given["latent"]), CacheRows.of(given, page)

        def task(n: Expr) -> None:
            batch = bind(tirx.truncdiv(n, s))
            with places.place(batch, bind(used.load(batch) + (n - batch * s))) as slot:
                rows.write(slot, new, bind(n * kind.width))

        with codes.instructions(kind.machine):
            for_each(b * s, 8 * kind.width, task)

    return build(body, names)


def widen_all(
    kind: Kind, given: Mapping[str, Expr], cache: LatentCache, native: bool = False
) -> None:
    """Widen the rows that a step sees to the latents of `cache`, which lie at the same slots."""
    b, s, rows = given["b"], given["s"], CodedRows(kind, given["latent"], native)
    used = Tensor(given["lengths"], DType.i64, (b,))
    blocks = bind(ceil_div(cache.extent, ROWS))

    def task(n: Expr) -> None:
        batch = bind(tirx.truncdiv(n, blocks))
        first = bind((n - batch * blocks) * ROWS)
        shown = bind(tirx.min(used.load(batch) + s, cache.extent))
        with loop(tirx.max(tirx.min(shown - first, integer(ROWS)), integer(0))) as t:
            slot = cache.slot(batch, first + t)
            rows.widen(slot, cache.latent, bind(slot * kind.width))

    for_each(b * blocks, ROWS * kind.width, task)


def scratch_bytes(kind: Kind | None, latent: TensorType, dtype: DType) -> Dim:
    """Bytes of all slots in numbers; none where they are numbers already."""
    return 0 if kind is None else latent.numel * dtype.itemsize
