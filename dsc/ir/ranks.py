"""Ranks: several processes that run one program together, each with its part of the weights.

A sharded program is one text for all ranks (SPMD): its graphs are the same everywhere, and only
weight expressions name the symbol `rank`. Collectives are operators; their references speak to the
*current group*, which is a world of one rank unless somebody has entered another: processes over a
network (`dsc.runtime.collectives`), or the threads of one process here, which is how passes are
verified and tests run without starting processes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from dsc.errors import RankError, VerificationError
from dsc.ir.dims import Sym, substitute, symbol
from dsc.ir.graph import Attrs
from dsc.ir.interpreter import Intercept, Interpreter, Observer
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.ir.weights import Apply, Source, WeightExpr, apply

T = TypeVar("T")
RANK = symbol("rank")
"""The rank's number, 0 to ranks-1, in weight expressions."""
THREAD_TIMEOUT = 60.0


class Group(Protocol):
    """Ranks that can exchange tensors: the one primitive that all collectives are made of."""

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def exchange(
        self, what: str, sent: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Send to each rank of `sent` its tensor; return what each rank of `wanted` sent here.

        The values of `wanted` are tensors of the right type to be filled. Every rank calls in the
        same order. `what` names the operator for errors. Raises `RankError`, never hangs.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """A world of one rank: nothing to exchange."""

    rank: int = 0
    size: int = 1

    def exchange(
        self, what: str, sent: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Refuse: there is nobody else."""
        if sent or wanted:
            raise RankError(f"{what} speaks to other ranks, and this one runs alone")
        return {}


_process: list[Group] = [Alone()]
_entered: ContextVar[Group | None] = ContextVar("group", default=None)


def current() -> Group:
    """The group that collectives of this thread speak to."""
    return _entered.get() or _process[-1]


def set_process_group(group: Group) -> None:
    """Make `group` the one of the whole process."""
    _process[:] = [group]


@contextmanager
def entered(group: Group) -> Iterator[None]:
    """`group` is the current one inside the block, in this thread."""
    token = _entered.set(group)
    try:
        yield
    finally:
        _entered.reset(token)


def at_rank(program: Program, rank: int) -> Program:
    """The program with the weights of one rank: `rank` replaced by its number.

    Slices move through what stacks and casts tensors, so that a rank's experts are read alone.
    """
    weights = {name: _at(expr, rank) for name, expr in program.weights.items()}
    return replace(program, weights=weights)


def _at(expr: WeightExpr, rank: int) -> WeightExpr:
    if isinstance(expr, Source):
        return expr
    fixed = {
        k: substitute(v, {"rank": rank}) if isinstance(v, Sym) else v for k, v in expr.attrs.items()
    }
    attrs = Attrs(fixed).of(expr.op)
    return _narrowed(expr.op, tuple(_at(a, rank) for a in expr.args), attrs)


def _narrowed(op: str, args: tuple[WeightExpr, ...], attrs: Attrs) -> WeightExpr:
    """`op(args)`; a slice of a cast becomes a cast of a slice, a slice of a stack a stack."""
    inner = args[0] if args else None
    if op != "slice" or not isinstance(inner, Apply):
        return apply(op, *args, **attrs)
    if inner.op == "cast":
        return apply("cast", _narrowed("slice", inner.args, attrs), **inner.attrs)
    if inner.op == "stack" and attrs["axis"] == 0 and attrs["step"] == 1:
        return apply("stack", *inner.args[attrs["start"] : attrs["end"]])
    return apply(op, *args, **attrs)


@dataclass
class _Post:
    """What the threads of one group share: letters by (from, to, number), and the first failure."""

    size: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    letters: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    failure: BaseException | None = None


@dataclass
class ThreadRank:
    """One rank among the threads of a process."""

    rank: int
    post: _Post
    numbers: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.post.size

    def exchange(
        self, what: str, sent: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Leave copies for the others and wait for theirs."""
        post = self.post
        letters = {self._next(self.rank, to): x.clone() for to, x in sent.items()}
        keys = {other: self._next(other, self.rank) for other in wanted}
        with post.changed:
            post.letters.update(letters)
            post.changed.notify_all()
            arrived = post.changed.wait_for(
                lambda: post.failure is not None or all(k in post.letters for k in keys.values()),
                THREAD_TIMEOUT,
            )
            if post.failure is not None or not arrived:
                late = ", ".join(str(r) for r, k in keys.items() if k not in post.letters)
                raise RankError(f"{what}: nothing came from rank {late}")
            return {other: post.letters.pop(key) for other, key in keys.items()}

    def _next(self, source: int, to: int) -> tuple[int, int, int]:
        """The key of the next letter from one rank to another."""
        self.numbers[source, to] += 1
        return source, to, self.numbers[source, to]


def run_ranks(ranks: int, function: Callable[[int], T]) -> list[T]:
    """`function(rank)` in one thread a rank, all in one group; the results in order of rank.

    Raises the first error of any rank.
    """
    post = _Post(ranks)
    results: dict[int, T] = {}

    def body(rank: int) -> None:
        try:
            with entered(ThreadRank(rank, post)):
                results[rank] = function(rank)
        except BaseException as problem:
            with post.changed:
                post.failure = post.failure or problem
                post.changed.notify_all()

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if post.failure is not None:
        raise post.failure
    return [results[rank] for rank in range(ranks)]


class RankedInterpreter:
    """All ranks of a sharded program, interpreted by the threads of this process.

    Behaves as an `Interpreter`: what rank 0 returns is the result, after a check that every rank
    has the same bits.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._each = [Interpreter(at_rank(program, rank)) for rank in range(program.mesh.ranks)]

    def run(
        self,
        entry: str,
        inputs: Mapping[str, torch.Tensor],
        observe: Observer | None = None,
        intercept: Intercept | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run `entry` on every rank; `observe` sees rank 0, `intercept` decides once for all."""
        shared = None if intercept is None else _once(intercept)

        def one(rank: int) -> dict[str, torch.Tensor]:
            given = {k: v if rank == 0 else v.clone() for k, v in inputs.items()}
            return self._each[rank].run(entry, given, None if rank else observe, shared)

        first, *others = run_ranks(len(self._each), one)
        for rank, other in enumerate(others, 1):
            apart = [
                name
                for name, x in first.items()
                if not torch.equal(x.nan_to_num(), other[name].nan_to_num())
            ]
            if apart:
                raise VerificationError(f"ranks 0 and {rank} disagree on {', '.join(apart)}")
        return first


def interpreter(program: Program) -> Interpreter | RankedInterpreter:
    """What runs a program here: with all of its ranks, where it has several."""
    return RankedInterpreter(program) if program.mesh.ranks > 1 else Interpreter(program)


def _once(intercept: Intercept) -> Intercept:
    """`intercept`, called by the first rank that comes to a node; the others take its answer."""
    lock = threading.Lock()
    answers: dict[str, tuple[Any, ...] | None] = {}

    def shared(node: Any, operands: list[Any]) -> tuple[Any, ...] | None:
        with lock:
            name = node.outputs[0].name
            if name not in answers:
                answers[name] = intercept(node, operands)
            return answers[name]

    return shared
