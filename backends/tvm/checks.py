"""What an entry's function checks before its first step: sizes, addresses, and what indices hold.

Whoever calls a library (a session, run.py, somebody's ctypes) gives it numbers and addresses, and
kernels believe them. So the function looks once, in this order: every size against what memory was
planned for, every address, and every input that is an index against the tensor that it points into
(`dsc.ir.index_ranges`). It returns the number of the check that failed, counted from 1 in the order
of `entry_checks`, or 0. An index that the entry computes itself is checked by a step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.tir import Expr, Local, PrimFunc, Tensor, bind, build, loop, tirx, when
from dsc.ir.dims import Dim, Range
from dsc.ir.graph import Graph
from dsc.ir.index_ranges import Computed, Demand, IndexRanges, PageDemand
from dsc.ir.interpreter import symbol_places
from dsc.ir.types import DType

C_TYPES = {
    DType.i64: "long long",
    DType.i32: "int",
    DType.i16: "short",
    DType.i8: "signed char",
    DType.u8: "unsigned char",
    DType.boolean: "unsigned char",
}
"""What an index may be, in C++."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A symbol, the size of a `place` such as `axis 0 of input_ids`, lies in its range."""

    symbol: str
    range: Range
    place: str

    @property
    def facts(self) -> list[str]:
        """What failed, as the manifest says it: a kind, a name, words."""
        return ["size", self.place, f"must be {self.range.lo} to {self.range.hi}"]


@dataclass(frozen=True, slots=True)
class Addresses:
    """No address is null; that of an empty tensor may be any other."""

    facts = ("address", "", "every address must be given")


@dataclass(frozen=True, slots=True)
class Values:
    """The values of an input of some element type lie where they must."""

    demand: Demand
    dtype: DType
    numel: Dim

    @property
    def facts(self) -> list[str]:
        """What failed."""
        return ["value", self.demand.input, f"is {self.demand.what}"]


@dataclass(frozen=True, slots=True)
class Pages:
    """Every token of the cache lies in a page."""

    demand: PageDemand
    shape: tuple[Dim, ...]

    @property
    def facts(self) -> list[str]:
        """What failed."""
        return ["pages", self.demand.table, self.demand.what]


@dataclass(frozen=True, slots=True)
class Later:
    """An index that the entry computes, which a step checks."""

    computed: Computed

    @property
    def facts(self) -> list[str]:
        """What failed."""
        reader = self.computed.reader
        place = f" at {reader.loc}" if reader.loc else ""
        what = f"an index that is computed must be inside: that of {reader.op}{place}"
        return ["computed", reader.op, what]


Check = Sizes | Addresses | Values | Pages | Later


def entry_checks(graph: Graph, symbols: Mapping[str, Range], found: IndexRanges) -> list[Check]:
    """The checks of an entry, in the order of their numbers."""
    types = {v.name: v.type for v in graph.inputs}
    checks: list[Check] = [
        Sizes(symbol, symbols[symbol], f"axis {axis} of {name}")
        for symbol, (name, axis) in symbol_places(graph).items()
        if symbol in symbols
    ]
    checks.append(Addresses())
    checks += [Values(d, types[d.input].dtype, types[d.input].numel) for d in found.demands]
    checks += [Pages(d, types[d.table].shape) for d in found.pages]
    return [*checks, *map(Later, found.computed)]


def failing(check: Check, slot: Callable[[str], str], value: Callable[[Dim], str]) -> str:
    """The C++ condition under which a check fails, or "".

    `slot` gives what the caller put into a slot of this name, `value` that of a dim. Addresses are
    looked at together (`library`), and computed indices by their steps.
    """
    match check:
        case Sizes(symbol, range, _):
            return f"{slot(symbol)} < {range.lo}LL || {slot(symbol)} > {range.hi}LL"
        case Values(demand, dtype, numel):
            span = demand.span
            ends = f"{value(span.low)}, {value(span.high)}, {str(span.ascending).lower()}"
            values = f"{slot(f'input:{demand.input}')}, {value(numel)}"
            return f"outside<{C_TYPES[dtype]}>({values}, {ends})"
        case Pages(demand, shape):
            addresses = f"{slot(f'input:{demand.table}')}, {slot(f'input:{demand.lengths}')}"
            return f"uncovered({addresses}, {', '.join(map(value, shape))}, {demand.rows})"
        case _:
            return ""


def _outside(
    address: Expr, dtype: DType, numel: Expr, ends: tuple[Expr, Expr], ascending: bool
) -> Expr:
    """Whether some element lies outside of `ends`, or below the one before it."""
    values = Tensor(address, dtype, (numel,))
    found, last = Local(1, "bool"), Local(1, "int64")
    found[0] = tirx.const(False, "bool")
    last[0] = ends[0]
    with loop(numel) as i:
        x = bind(tirx.Cast("int64", values.load(i)))
        found[0] = tirx.any(found[0], x < last[0], x > ends[1])
        if ascending:
            last[0] = x
    return found[0]


def lower_check(found: Computed, number: int) -> Launch:
    """The launch that checks a computed index. Its operand is the index, its result the status."""
    assert found.value is not None, "a region that computes an index was refused"
    t, span = found.value.type, found.span
    return Launch(check_index, (t.dtype, span.ascending), (t.numel, span.low, span.high, number))


def check_index(dtype: DType, ascending: bool) -> PrimFunc:
    """Arguments: index, status; elements, least, largest, the check's number."""

    def body(
        index: Expr, status: Expr, elements: Expr, low: Expr, high: Expr, number: Expr
    ) -> None:
        outside = _outside(index, dtype, elements, (low, high), ascending)
        with when(outside):
            Tensor(status, DType.i64, (1,)).store(number, 0)

    return build(body)


def facts_of(checks: list[Check]) -> list[Any]:
    """The checks as the manifest holds them."""
    return [list(check.facts) for check in checks]
