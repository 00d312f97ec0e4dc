"""What an entry admits: sizes that it was compiled for, and indices that point into tensors.

One place for every executable: `sizes` reads the symbols off the shapes and checks them against
their ranges, `values` looks into the inputs that are indices. Both raise `UsageError` in the words
of the inputs and of the options that a model is compiled with, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError
from dsc.ir.dims import Range, evaluate, free_symbols
from dsc.ir.graph import Graph
from dsc.ir.index_ranges import Demand, PageDemand, index_ranges
from dsc.ir.interpreter import bind_symbols
from dsc.ir.limits import OPTIONS
from dsc.ir.program import is_causal_step

if TYPE_CHECKING:
    import torch

FEW = 64
"""Values that are looked at one by one: for so few that takes less than an array operation."""


class Admission:
    """Checks the inputs of one entry."""

    def __init__(self, graph: Graph, symbols: Mapping[str, Range]) -> None:
        self._graph = graph
        self._symbols = symbols
        self._found = index_ranges(graph, symbols)
        self._causal = is_causal_step(graph)
        self._seen: tuple[list[torch.Size], Mapping[str, int]] = [], {}

    def check(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, int]:
        """The symbols' sizes, when shapes, element types and indices are admitted."""
        env = self.sizes(inputs)
        self.values(inputs, env)
        return env

    def sizes(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, int]:
        """The symbols' sizes, when shapes and element types are admitted. Raises `UsageError`.

        Step after step of decoding has the same shapes: the last ones are known.
        """
        given = [inputs[name] for name, _ in self._wanted]
        for (name, dtype), tensor in zip(self._wanted, given, strict=True):
            if tensor.dtype != dtype:
                raise UsageError(f"input {name} is {tensor.dtype}, {dtype} is declared")
        shapes = [tensor.shape for tensor in given]
        known, env = self._seen
        if known == shapes and shapes:
            return env
        env = bind_symbols(self._graph, given)
        for name, size in env.items():
            self._admit(name, size)
        self._seen = shapes, env
        return env

    @cached_property
    def _wanted(self) -> list[tuple[str, torch.dtype]]:
        """Names and element types of the inputs."""
        return [(v.name, v.type.dtype.torch) for v in self._graph.inputs]

    def values(self, inputs: Mapping[str, torch.Tensor], env: Mapping[str, int]) -> None:
        """Raise `UsageError` where an index points outside of its tensor."""
        for demand in self._found.demands:
            self._value(demand, inputs[demand.input], env)
        for pages in self._found.pages:
            check_pages(pages, inputs[pages.table], inputs[pages.lengths])

    def blame_computed(self, problem: Exception) -> None:
        """Raise `UsageError` for what went wrong where the entry computes an index itself.

        Only whoever runs it can tell that such an index is outside, in words of its own.
        """
        if self._found.computed:
            names = ", ".join(sorted({c.node.op for c in self._found.computed}))
            raise UsageError(
                f"an index that is computed must be inside ({names}): {problem}"
            ) from problem

    def _admit(self, name: str, size: int) -> None:
        bound = self._symbols.get(name)
        if bound is None or bound.lo <= size <= bound.hi:
            return
        place = next(
            f"{v.name} has {size} at axis {axis}"
            for v in self._graph.inputs
            for axis, dim in enumerate(v.type.shape)
            if name in free_symbols(dim)
        )
        option = OPTIONS.get(name) if self._causal and size > bound.hi else None
        larger = "" if option is None else f"; compile it with a larger {option}"
        raise UsageError(
            f"input {place}", hint=f"it was compiled for {bound.lo} to {bound.hi}{larger}"
        )

    def _value(self, demand: Demand, tensor: torch.Tensor, env: Mapping[str, int]) -> None:
        span = demand.span
        least, most = evaluate(span.low, env), evaluate(span.high, env)
        values = tensor.reshape(-1)
        if values.numel() == 0:
            return
        if values.numel() <= FEW:
            listed = values.tolist()
            low, high = min(listed), max(listed)
        else:
            low, high = int(values.min()), int(values.max())
        if low < least or high > most:
            found = str(low) if low == high else f"{low} to {high}"
            possible = f"{least} to {most} are" if least <= most else "at these sizes none is"
            raise UsageError(
                f"input {demand.input} holds {found}; each is {demand.what}",
                hint=f"{possible} possible here",
            )
        if span.ascending and bool((values[1:] < values[:-1]).any()):
            raise UsageError(f"input {demand.input} is not in ascending order")


def check_pages(demand: PageDemand, table: Any, lengths: Any) -> None:
    """Raise `UsageError` where a token of the cache has no page."""
    for row, length in enumerate(lengths.tolist()):
        used = -(-length // demand.rows)
        if used and int(table[row, :used].min()) < 0:
            raise UsageError(
                f"{demand.table} names no page for some of the {length} tokens of sequence {row}",
                hint="-1 may stand only where a sequence has no tokens yet",
            )
