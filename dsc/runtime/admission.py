"""What an entry admits: sizes that it was compiled for, and indices that point into tensors.

One place for every executable: `Admitted` is what they are made of. `Admission.sizes` reads the
symbols off the shapes and checks them against their ranges, `values` looks into the inputs that are
indices. Both raise `UsageError` in the words of the inputs and of the options that a model is
compiled with, before anything runs. An index that the entry computes is looked at by the code
itself, or in what the code gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dsc.errors import DscError, UsageError
from dsc.ir.arrays import Array, array_of, extremes, tensor_of
from dsc.ir.dims import Range, evaluate
from dsc.ir.graph import Graph, Node
from dsc.ir.index_ranges import Computed, PageDemand, Span, index_name, index_ranges
from dsc.ir.interpreter import Intercept, Interpreter, bind_symbols, symbol_places
from dsc.ir.limits import OPTIONS
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.program import Program, is_causal_step
from dsc.ir.sampled import SEEDS
from dsc.runtime.executable import Call, Executable, IndexSpan

if TYPE_CHECKING:
    import numpy as np


def moved_on(inputs: Mapping[str, Array], steps: int) -> dict[str, Array]:
    """Inputs of an entry that chooses tokens, `steps` steps of one token later: all but the tokens.

    Its seeds [B, 2] are a key and the number of a draw, and each step draws the next.
    """
    return {**inputs, **_moved(inputs, steps), SEEDS: inputs[SEEDS] + (0, steps)}


def _moved(inputs: Mapping[str, Array], steps: int) -> dict[str, Array]:
    """Positions [B, 1] and lengths [B] so many steps later; rows without a page stay."""
    lengths = inputs["lengths"]
    by = lengths * 0 + steps
    if BLOCK_TABLE in inputs:
        by = by * (inputs[BLOCK_TABLE][:, 0] >= 0)
    return {"positions": inputs["positions"] + by[:, None], "lengths": lengths + by}


class Admitted(Executable):
    """An executable that runs what its entries admit, and nothing else.

    A backend adds `execute`, or `prepare` where there is work to do once for many calls. `looks`:
    its code looks at values itself, be they given or computed.
    """

    looks: ClassVar[bool] = False

    def __init__(self, program: Program) -> None:
        self.program = program
        self.admissions = _Admissions(program)

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run an entry on dense arrays that it admits; `env` are the symbols' sizes."""
        raise NotImplementedError

    def prepare(self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]) -> Call:
        """What runs an entry on these arrays, again and again."""
        return partial(self.execute, graph, inputs, env)

    def declared(self, graph: Graph, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """The inputs as the entry declares them, where an executable takes other types as well."""
        return inputs

    def bind(self, entry: str, inputs: Mapping[str, Array]) -> Call:
        """A call of an entry on dense arrays by name.

        Raises `UsageError` for sizes and types that the entry does not admit; the call does for
        indices.
        """
        graph = self.program.entry(entry, inputs)
        admission = self.admissions[entry]
        declared = self.declared(graph, inputs)
        env = admission.sizes(declared)
        for value in graph.inputs:
            if not inputs[value.name].flags.c_contiguous:
                raise UsageError(f"{value.name} is updated in place and must be contiguous")
        execute = self.prepare(graph, inputs, env)

        def call() -> dict[str, Array]:
            if not self.looks:
                admission.values(declared, env)
            try:
                results = execute()
            except DscError:
                raise
            except Exception:  # every runtime has classes of its own
                self._blame(graph, inputs, env)
                raise
            return admission.taken(results, env)

        return call

    def _blame(self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]) -> None:
        """Raise `UsageError` where a run failed because an index that it computed was outside.

        The interpreter runs the entry again, on copies, and looks at each before it is read.
        """
        guard = self.admissions[graph.name].guard(env)
        if guard is None:
            return
        own = {v.name: inputs[v.name].astype(v.type.stored.dtype.numpy) for v in graph.inputs}
        try:
            tensors = {name: tensor_of(x) for name, x in own.items()}
            Interpreter(self.program).run(graph.name, tensors, intercept=guard)
        except UsageError:
            raise
        except Exception:  # it fails as well, and not for an index: what failed first says more
            return


class Admission:
    """Checks the inputs of one entry, and the indices that it computes."""

    def __init__(
        self, graph: Graph, symbols: Mapping[str, Range], most: Mapping[str, Range] | None = None
    ) -> None:
        """`symbols` are the ranges of this entry's sizes, `most` those of the program's."""
        self._graph = graph
        self._symbols = symbols
        self._most = symbols if most is None else most
        self._found = index_ranges(graph, symbols)
        self._causal = is_causal_step(graph)
        self._seen: tuple[list[tuple[tuple[int, ...], np.dtype[Any]]], Mapping[str, int]] = [], {}

    def check(self, inputs: Mapping[str, Array]) -> Mapping[str, int]:
        """The symbols' sizes, when shapes, element types and indices are admitted."""
        env = self.sizes(inputs)
        self.values(inputs, env)
        return env

    def sizes(self, inputs: Mapping[str, Array]) -> Mapping[str, int]:
        """The symbols' sizes, when shapes and element types are admitted. Raises `UsageError`.

        Step after step has the same shapes: the last ones are known.
        """
        given = [inputs[v.name] for v in self._graph.inputs]
        types = [(array.shape, array.dtype) for array in given]
        known, env = self._seen
        if known == types and types:
            return env
        env = bind_symbols(self._graph, given)
        for name, size in env.items():
            self._admit(name, size)
        self._seen = types, env
        return env

    def values(self, inputs: Mapping[str, Array], env: Mapping[str, int]) -> None:
        """Raise `UsageError` where an index points outside of its tensor."""
        for demand in self._found.demands:
            wrong = _wrong(demand.span, demand.what, inputs[demand.input], env)
            if wrong is not None:
                raise UsageError(f"input {demand.input} {wrong[0]}", hint=wrong[1])
        for pages in self._found.pages:
            check_pages(pages, inputs[pages.table], inputs[pages.lengths])

    def spans(self, env: Mapping[str, int]) -> list[IndexSpan]:
        """The same demands as data, for who looks at values on a device."""
        return [
            IndexSpan(
                d.input, evaluate(d.span.low, env), evaluate(d.span.high, env), d.span.ascending,
                d.what,
            )
            for d in self._found.demands
        ]  # fmt: skip

    def along(self, inputs: Mapping[str, Array], steps: int) -> Mapping[str, int]:
        """The symbols' sizes for so many steps of one token that begin with these inputs.

        Raises `UsageError` where the first or the last would not be admitted.
        """
        self.check({**inputs, **_moved(inputs, steps - 1)})
        return self.check(inputs)

    def guard(self, env: Mapping[str, int]) -> Intercept | None:
        """What the interpreter asks before each node, so that no computed index is outside.

        `None` where the entry computes none. It raises `UsageError`.
        """
        watched: dict[int, list[Computed]] = {}
        for found in self._found.computed:
            watched.setdefault(id(found.reader), []).append(found)

        def look(node: Node, operands: list[Any]) -> None:
            for found in watched.get(id(node), ()):
                _check_computed(found, array_of(operands[found.place]), env)

        return look if watched else None

    def taken(self, results: dict[str, Array], env: Mapping[str, int]) -> dict[str, Array]:
        """The results of an entry, without the indices that it gives to be checked.

        Raises `UsageError` where one is outside (`dsc.ir.index_ranges.giving_indices`).
        """
        given: dict[str, Array] = {}
        for found in self._found.computed:
            name = "" if found.value is None else index_name(found.value)
            if name in results:
                given[name] = results.pop(name)
            if name in given:
                _check_computed(found, given[name], env)
        return results

    def _admit(self, name: str, size: int) -> None:
        bound = self._symbols.get(name)
        if bound is None or bound.lo <= size <= bound.hi:
            return
        option = OPTIONS.get(name) if self._causal and size > bound.hi else None
        larger = "" if option is None else f"; compile it with a larger {option}"
        if bound.hi < size <= self._most[name].hi:
            larger = "; another entry takes more"
        value, axis = symbol_places(self._graph)[name]
        raise UsageError(
            f"input {value} has {size} at axis {axis}",
            hint=f"it was compiled for {bound.lo} to {bound.hi}{larger}",
        )


class _Admissions(dict[str, Admission]):
    """Those of a program's entries, each made when it is first asked for."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def __missing__(self, name: str) -> Admission:
        graph, ranges = self._program.entries[name], self._program.ranges(name)
        found = self[name] = Admission(graph, ranges, self._program.symbols)
        return found


def _check_computed(found: Computed, values: Array, env: Mapping[str, int]) -> None:
    """Raise `UsageError` where an index that an entry computed is outside."""
    wrong = _wrong(found.span, found.what, values, env)
    if wrong is not None:
        raise UsageError(
            f"an index that is computed must be inside: that of {found.reader.op} {wrong[0]}",
            where=found.reader.loc or None,
            hint=wrong[1],
        )


def _wrong(
    span: Span, what: str, array: Array, env: Mapping[str, int]
) -> tuple[str, str | None] | None:
    """What is wrong with the values of an index, and which are possible; `None`: nothing is."""
    least, most = evaluate(span.low, env), evaluate(span.high, env)
    values = array.reshape(-1)
    if not values.size:
        return None
    low, high = extremes(values)
    if low < least or high > most:
        found = str(low) if low == high else f"{low} to {high}"
        possible = f"{least} to {most} are" if least <= most else "at these sizes none is"
        return f"holds {found}; each is {what}", f"{possible} possible here"
    if span.ascending and bool((values[1:] < values[:-1]).any()):
        return "is not in ascending order", None
    return None


def check_pages(demand: PageDemand, table: Any, lengths: Any) -> None:
    """Raise `UsageError` where a token of the cache has no page."""
    for row, length in enumerate(lengths.tolist()):
        used = -(-length // demand.rows)
        if used and int(table[row, :used].min()) < 0:
            raise UsageError(
                f"{demand.table} names no page for some of the {length} tokens of sequence {row}",
                hint="-1 may stand only where a sequence has no tokens yet",
            )
