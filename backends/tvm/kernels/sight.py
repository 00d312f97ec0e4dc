"""What the queries of an attention see: rows up to their own, of a window or chunk, and sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsc.backends.tvm.tir import Expr, Tensor, bind, integer, tirx
from dsc.ir.graph import Node
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.types import DType

ALL, CAUSAL, LENGTHS = "all", "causal", "lengths"


@dataclass(frozen=True)
class Sight:
    """The attributes and optional operands of an attention, as its kernels are specialised to."""

    by: str
    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: bool

    @staticmethod
    def of(node: Node) -> Sight:
        """That of a node."""
        causal = CAUSAL if node.attrs["causal"] else ALL
        by = causal if node.get(LENGTHS) is None else LENGTHS
        window, chunk, softcap = (node.attrs[name] for name in ("window", "chunk", "softcap"))
        sinks = node.get("sinks") is not None
        return Sight(by, float(node.attrs["scale"]), window, chunk, float(softcap), sinks)

    @property
    def bounded(self) -> bool:
        """Whether a query does not see all rows before its own."""
        return self.window > 0 or self.chunk > 0

    @property
    def careful(self) -> bool:
        """Whether a query may see no row of a tile, or none at all."""
        return self.bounded or self.by != LENGTHS

    def names(self, page: int) -> list[str]:
        """The operands that a kernel takes behind queries, keys and values."""
        given = {LENGTHS: self.by == LENGTHS, "sinks": self.sinks, BLOCK_TABLE: page > 0}
        return [name for name, there in given.items() if there]

    def rows(self, given: Mapping[str, Expr], extent: Expr) -> Rows:
        """What queries see of `extent` rows, from a kernel's arguments."""
        used = Tensor(given[LENGTHS], DType.i64, (given["b"],)) if self.by == LENGTHS else None
        return Rows(self, used, extent, given["s"])


@dataclass(frozen=True)
class Rows:
    """The rows that a token of a sequence sees: first .. limit - 1."""

    sight: Sight
    used: Tensor | None
    extent: Expr
    new: Expr

    def limit(self, batch: Expr, token: Expr) -> Expr:
        """How many rows there are up to the token's own."""
        if self.sight.by == ALL:
            return self.extent
        return bind(tirx.min(self.extent, self._own(batch, token) + 1))

    def first(self, batch: Expr, token: Expr) -> Expr:
        """The first row in sight."""
        first = integer(0)
        own = bind(self._own(batch, token)) if self.sight.bounded else first
        if self.sight.window:
            first = tirx.max(first, own + (1 - self.sight.window))
        if self.sight.chunk:
            chunk = integer(self.sight.chunk)
            first = tirx.max(first, tirx.truncdiv(own, chunk) * chunk)
        return bind(first) if self.sight.bounded else first

    def _own(self, batch: Expr, token: Expr) -> Expr:
        """The row of a token."""
        start = self.extent - self.new if self.used is None else self.used.load(batch)
        return start + token
