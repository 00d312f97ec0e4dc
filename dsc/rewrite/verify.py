"""Compares what two programs compute: the check behind `--verify-each` and `dsc bisect`.

Both programs run in the interpreter on the same seeded inputs, at several small sizes, and their
outputs are compared by name. A pass that is exact is held to every bit; another to its tolerance,
in fp32. Programs too wide to interpret are shrunk first, and the pass is applied to the small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.errors import DscError, VerificationError
from dsc.ir.dims import Sym, free_symbols
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.interpreter import Interpreter
from dsc.ir.lazy import torch
from dsc.ir.limits import BATCH, PAST, STEP, WANTED, cache_sizes
from dsc.ir.op import TypeMismatch, lookup
from dsc.ir.paging import BLOCK_TABLE, gathered, page_rows, scattered
from dsc.ir.program import Program
from dsc.ir.ranks import RankedInterpreter, interpreter
from dsc.ir.samples import sample_inputs
from dsc.ir.traits import Role
from dsc.rewrite.base import EXACT
from dsc.rewrite.routing import NEAR, Routing
from dsc.rewrite.widen import runnable

Sizes = Mapping[str, int]
WIDEST = 200_000_000
MOST_EXCLUDED = 0.01
"""The largest fraction of decisions (and always one) that near-ties may excuse."""
SIZES: tuple[Sizes, ...] = (
    {BATCH: 2, STEP: 3, PAST: 5, WANTED: 2},
    {BATCH: 1, STEP: 1, PAST: 4, WANTED: 1},
    {BATCH: 2, STEP: 4, PAST: 0, WANTED: 3},
)
_OTHER, _SPARE = 3, 2


@dataclass
class Comparison:
    """What was compared and what came of it; `failure` is empty when all agreed.

    `form` is `full`, or `shrunk` and of how many layers;
    `worst` the largest difference relative to max(1, |value|max);
    `excluded` of `decisions` routing decisions were near-ties and taken from the first program;
    `errors` holds the largest difference by entry and output.
    """

    form: str = "full"
    runs: int = 0
    worst: float = 0.0
    decisions: int = 0
    excluded: int = 0
    failure: str = ""
    entries: list[str] = field(default_factory=list)
    errors: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every output agreed."""
        return not self.failure

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return self.told("agree")

    def told(self, verdict: str) -> str:
        """What was run and how far apart it lies at most, with a word for that."""
        near = f", {self.excluded} of {self.decisions} near-ties excluded" if self.decisions else ""
        ran = f"{self.runs} runs of {', '.join(self.entries)}"
        return f"{self.form} form: {ran} {verdict}, difference {self.worst:.1e}{near}"


def compare_programs(
    before: Program,
    after: Program,
    tolerance: float = EXACT,
    seed: int = 0,
    reapply: Callable[[Program], Program] | None = None,
    widest: int = WIDEST,
    widen: bool | None = None,
    form: str = "full",
) -> Comparison:
    """Run both programs on the same inputs and compare their outputs.

    `tolerance` bounds |difference| relative to max(1, |value|max); `EXACT` wants every bit. Above
    `widest` weight elements both are shrunk, which takes `reapply`, the pass as a function. Entries
    are paired by name; a single entry before is compared with every entry after. 16-bit floats are
    widened to fp32 where the tolerance is not exact, or as `widen` says; `form` is for the record.
    """
    found = Comparison(form)
    if weight_elements(before) > widest:
        if reapply is None:
            raise VerificationError(
                f"{before.name} is too wide to interpret",
                hint="give compare_programs the pass as `reapply`",
            )
        before = before.shrunk()
        after = reapply(before)
        found.form = "shrunk"
    widen = tolerance != EXACT if widen is None else widen
    first, second = (interpreter(runnable(p, widen)) for p in (before, after))
    for old, new in _pairs(before, after, found):
        found.entries.append(new)
        for case in _cases(first.program, second.program, old, new):
            if not found.failure:
                _Run(first, second, old, new, case, tolerance, seed, found).compare()
    if not found.failure and found.excluded > max(1, MOST_EXCLUDED * found.decisions):
        found.failure = f"{found.excluded} of {found.decisions} routing decisions are near-ties"
    return found


def weight_elements(program: Program) -> int:
    """Elements of all weights that some entry reads."""
    used = program.used_weights()
    counts = (e.type.numel for name, e in program.weights.items() if name in used)
    return sum(n for n in counts if isinstance(n, int))


def _pairs(before: Program, after: Program, found: Comparison) -> Iterator[tuple[str, str]]:
    for new in after.entries:
        if new in before.entries:
            yield new, new
        elif len(before.entries) == 1:
            yield next(iter(before.entries)), new
        else:
            found.failure = f"entry {new} has no counterpart before"
    if len(before.entries) > 1 and before.entries.keys() - after.entries.keys():
        gone = sorted(before.entries.keys() - after.entries.keys())
        found.failure = f"the entries {', '.join(gone)} are gone"


@dataclass(frozen=True)
class Case:
    """Sizes of the symbols of both graphs, and how much of each past is filled (None: all)."""

    before: Sizes
    after: Sizes
    lengths: tuple[int, ...] | None

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in sorted(self.before.items()))
        return f"{shown}, lengths {list(self.lengths)}" if self.lengths else shown


def _cases(before: Program, after: Program, old: str, new: str) -> list[Case]:
    """The sizes to try, clamped to the symbols' ranges, each once, and ragged where both can."""
    first, second = before.entries[old], after.entries[new]
    fixed = pinned(first, second)
    cases: dict[tuple[Any, ...], Case] = {}
    for wanted in SIZES:
        env = {s: _clamped(before, s, wanted.get(s, _OTHER)) for s in _symbols(first)} | fixed
        if WANTED in env and WANTED not in fixed:
            env[WANTED] = max(1, env[WANTED])
        rows = env.get(PAST, wanted.get(PAST, 0)) + env.get(STEP, wanted.get(STEP, 1))
        batch = env.get(BATCH, wanted.get(BATCH, 1))
        room = cache_sizes(batch, rows, page_rows(second) or rows + _SPARE, _SPARE)
        env |= {s: _clamped(before, s, n) for s, n in room.items() if s in _symbols(first)}
        other = {**wanted, **room, **env}
        later = {s: _clamped(after, s, other.get(s, _OTHER)) for s in _symbols(second)}
        later |= {s: n for s, n in env.items() if s in later}
        for lengths in _fillings(first, second, {**other, **env}):
            case = Case(env, later, lengths)
            cases[tuple(sorted(env.items())), tuple(sorted(later.items())), lengths] = case
    return list(cases.values())


def _fillings(first: Graph, second: Graph, env: Sizes) -> Iterator[tuple[int, ...] | None]:
    yield None
    batch, past = env.get(BATCH, 1), env.get(PAST, 0)
    if batch > 1 and past > 0 and _is_ragged(first) and _is_ragged(second):
        yield tuple(past if b == 0 else max(0, past - 2 * b) for b in range(batch))


def _is_ragged(graph: Graph) -> bool:
    """Whether a graph gives sequences of different lengths a meaning: by where it writes caches."""
    has_lengths = any(v.name == "lengths" for v in graph.inputs)
    return has_lengths and any(map(_writes_cache, graph.walk()))


def _writes_cache(node: Node) -> bool:
    """Whether a node places new rows at each sequence's own length."""
    found = lookup(node.op)
    return found.traits.role is Role.WRITE and found.has_operand("lengths")


def _symbols(graph: Graph) -> list[str]:
    return sorted({s for v in graph.inputs for s in v.type.symbols})


def _clamped(program: Program, name: str, size: int) -> int:
    known = program.symbols.get(name)
    return size if known is None else known.nearest(size)


def pinned(first: Graph, second: Graph) -> dict[str, int]:
    """Symbols of the first graph that are numbers in the second, as S is 1 in a decode."""
    later = {v.name: v.type for v in second.inputs}
    found: dict[str, int] = {}
    for value in first.inputs:
        other = later.get(value.name)
        if other is None or other.rank != value.type.rank:
            continue
        for mine, theirs in zip(value.type.shape, other.shape, strict=True):
            names = free_symbols(mine)
            if isinstance(theirs, int) and isinstance(mine, Sym) and [str(mine)] == sorted(names):
                found[str(mine)] = theirs
    return found


@dataclass
class _Run:
    """One entry at one set of sizes."""

    first: Interpreter | RankedInterpreter
    second: Interpreter | RankedInterpreter
    old: str
    new: str
    case: Case
    tolerance: float
    seed: int
    found: Comparison

    def compare(self) -> None:
        """Run both, compare, and note the outcome."""
        before, after = self.first.program.entries[self.old], self.second.program.entries[self.new]
        given = sample_inputs(before, self.case.before, self.seed, self.case.lengths)
        oracle = Routing()
        loose = self.tolerance != EXACT
        wanted = self.first.run(self.old, _cloned(given), intercept=oracle if loose else None)
        same = len(oracle.seen) == sum(n.op == "route" for n in after.walk())
        routing = Routing(oracle.seen if same else None)
        try:
            inputs = self._inputs(before, after, given)
            made = self.second.run(self.new, inputs, intercept=routing if loose else None)
        except (DscError, TypeMismatch, LookupError, RuntimeError, ValueError) as problem:
            self._fail(f"it does not run: {problem}")
            return
        if self._pages_came(before, after):
            states = {after.output_names[o] for o, _ in after.aliases}
            table = inputs[BLOCK_TABLE]
            made |= {name: gathered(made[name], table) for name in states & made.keys()}
        self.found.runs += 1
        self.found.decisions += routing.decisions
        self.found.excluded += routing.forced
        if routing.wrong:
            self._fail(f"{routing.wrong} routing decisions differ beyond any near-tie")
        near = set() if len(oracle.seen) == len(routing.seen) else self._near(oracle, routing)
        for name, tensor in wanted.items():
            if name not in made:
                self._fail(f"output {name} is gone")
            else:
                self._output(before, name, tensor, made[name], near)

    def _inputs(
        self, before: Graph, after: Graph, given: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The same inputs for the second graph; a cache of more rows starts with the same rows."""
        made = sample_inputs(after, self.case.after, self.seed + 1, self.case.lengths)
        types = [{v.name: v.type for v in graph.inputs} for graph in (before, after)]
        states = {before.inputs[i].name for _, i in before.aliases}
        paged = self._pages_came(before, after)
        for name, own in made.items():
            tensor = given.get(name)
            if paged and name == BLOCK_TABLE:
                continue
            if paged and name in states:
                start = torch.zeros(len(given[name]), dtype=torch.int64)
                scattered(own, made[BLOCK_TABLE], given[name], start)
            elif tensor is None:
                raise VerificationError(f"input {name} was not there before")
            elif name in states and tensor.dtype != own.dtype:
                was, now = (str(each[name]) for each in types)
                raise VerificationError(f"cache {name} was {was} and is {now}: no past is of both")
            elif tensor.shape == own.shape:
                made[name] = tensor.clone()
            elif name in states and tensor.dim() == own.dim() and tensor.shape[1] <= own.shape[1]:
                own[:, : tensor.shape[1]] = tensor
            else:
                raise VerificationError(
                    f"input {name} was {tuple(tensor.shape)} and is {tuple(own.shape)}"
                )
        return made

    def _pages_came(self, before: Graph, after: Graph) -> bool:
        """Whether the caches lie in pages in the second graph alone."""
        return page_rows(before) is None and page_rows(after) is not None

    def _output(
        self,
        before: Graph,
        name: str,
        wanted: torch.Tensor,
        made: torch.Tensor,
        near: set[int],
    ) -> None:
        index = before.output_names.index(name)
        state = dict(before.aliases).get(index)
        if state is not None and wanted.dim() > 1 and wanted.dim() == made.dim():
            wanted, made = self._filled(before.inputs[state], wanted, made)
        if wanted.shape != made.shape or wanted.dtype != made.dtype:
            self._fail(
                f"output {name} was {wanted.dtype} {tuple(wanted.shape)}"
                f" and is {made.dtype} {tuple(made.shape)}"
            )
            return
        if near and wanted.dim() and len(wanted) == self.case.before.get(BATCH):
            keep = [b for b in range(len(wanted)) if b not in near]
            wanted, made = wanted[keep], made[keep]
        relative = relative_difference(wanted, made)
        known = self.found.errors.get((self.new, name), 0.0)
        self.found.errors[self.new, name] = max(known, relative)
        if self.tolerance == EXACT or not wanted.is_floating_point():
            if not same_bits(wanted, made):
                self._fail(f"output {name} is not the same bit for bit; {difference(wanted, made)}")
            return
        self.found.worst = max(self.found.worst, relative)
        if not relative <= self.tolerance:
            self._fail(f"output {name} differs by {relative:.3g}, tolerance {self.tolerance:.3g}")

    def _filled(
        self, state: Value, wanted: torch.Tensor, made: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a cache that hold tokens, of all sequences one after another."""
        if PAST not in self.case.before:  # written in place before already: all rows are given
            return wanted, made
        past = self.case.before[PAST]
        new = wanted.shape[1] - past
        lengths = self.case.lengths or (past,) * wanted.shape[0]
        if new < 0 or any(n + new > made.shape[1] for n in lengths):
            return wanted, made
        rows = [n + new for n in lengths]
        return (
            torch.cat([x[:n] for x, n in zip(wanted, rows, strict=True)]),
            torch.cat([x[:n] for x, n in zip(made, rows, strict=True)]),
        )

    def _near(self, oracle: Routing, routing: Routing) -> set[int]:
        """Sequences with a near-tie in either program, where only one of them has routers."""
        decisions = [*oracle.seen, *routing.seen]
        batch = self.case.before.get(BATCH, 1)
        near: set[int] = set()
        for decision in decisions:
            tokens = (decision.margins < NEAR).nonzero().flatten().tolist()
            self.found.excluded += len(tokens)
            near |= {t * batch // max(1, len(decision.margins)) for t in tokens}
        return near

    def _fail(self, what: str) -> None:
        if not self.found.failure:
            entry = self.new if self.old == self.new else f"{self.new} (from {self.old})"
            self.found.failure = f"{what}; entry {entry}, {self.found.form} form, {self.case}"


def _cloned(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; any NaN equals any NaN."""
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = a.contiguous(), b.contiguous()
    same = a.view(ints) == b.view(ints)
    return bool((same | (a.isnan() & b.isnan())).all())


def relative_difference(wanted: torch.Tensor, made: torch.Tensor) -> float:
    """max |difference| / max(1, max |wanted|); infinite where one is not finite and they differ."""
    if wanted.numel() == 0:
        return 0.0
    a, b = wanted.double(), made.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"), float("inf"))
    finite = a[a.isfinite()].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    return float(apart.max()) / scale


def difference(wanted: torch.Tensor, made: torch.Tensor) -> str:
    """Words for how far two tensors are apart."""
    if not wanted.is_floating_point():
        return f"{int((wanted != made).sum())} of {wanted.numel()} elements differ"
    return f"the largest difference is {relative_difference(wanted, made):.3g}"
