"""One shared library: the kernels, `execute` that walks a list of steps, and a function an entry.

`decode(values, steps)` takes the addresses of two int64 arrays. `values` holds the sizes of the
symbols and the addresses of the arena, the inputs, the outputs and the weights, in the order of
`Slots`; the entry's function checks them (`dsc.backends.tvm.checks`), fills in what is derived from
the sizes, and returns 0, or the number of the check that failed. `steps` is the entry's list: the
number of steps, then for each a kernel's number, and for each of its arguments a slot and what is
added to its value. `execute` reads a step and calls its kernel directly, so that a decode step runs
without Python, and the code to compile does not grow with the number of layers.

Lists are data, so a profile costs nothing when there is none: `dsc.backends.tvm.timed` gives the
same function a list with calls of `clock` and `copy` between the steps.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import ir, tirx
from tvm.ir import Call
from tvm.tirx.script.builder import ir as T

from dsc.backends.tvm.checks import Addresses, Check, emit_addresses, emit_check
from dsc.backends.tvm.kernels.cpp import compiled
from dsc.backends.tvm.machine import Machine, tvm_target
from dsc.backends.tvm.tir import (
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    cast,
    integer,
    loop,
    when,
)
from dsc.errors import BackendUnavailable, UsageError
from dsc.files import check_room
from dsc.ir.dims import Dim, free_symbols
from dsc.ir.graph import Graph
from dsc.ir.kernels import Cpp
from dsc.ir.types import DType
from dsc.runtime.plan import ARENA, STATUS, EntryPlan, Launch, Ref

PIPELINE = "dsc"
EXECUTE = "execute"
CLOCK, COPY = "dsc_clock", "dsc_copy"
"""What every library holds for profiles, in this order (`dsc.backends.tvm.timed`)."""
OBJECT_BYTES = 16 * 10**6
"""Room that a library and its object file may take, by far: LLVM ends the process without it."""
_CLOCK_MONOTONIC = 1  # <time.h> of Linux; the clock of `time.perf_counter`
ZERO, SELF = "zero", "self"
"""Slots that no entry lacks. `self` is where `values` lies, `status` what a step found wrong."""
_FIXED = (ZERO, SELF, STATUS)


@dataclass(frozen=True)
class Slots:
    """What an entry's `values` hold: `given` by the caller, then `derived` sizes, then weights."""

    given: tuple[str, ...]
    derived: tuple[Dim, ...]
    weights: tuple[str, ...]
    plan: EntryPlan

    @staticmethod
    def of(graph: Graph, plan: EntryPlan, weights: Sequence[str]) -> Slots:
        """The slots of an entry: zero, self, status, symbols, `arena`, `input:x`, `output:y`."""
        dims = dict.fromkeys(
            a for x in plan.launches for a in x.arguments if not isinstance(a, Ref | int)
        )
        shapes = (d for v in graph.inputs for d in v.type.shape)
        symbols = sorted(frozenset().union(*map(free_symbols, (*dims, *shapes))))
        inputs = [f"input:{v.name}" for v in graph.inputs]
        outputs = [f"output:{name}" for name in graph.output_names]
        given = (*_FIXED, *symbols, ARENA, *inputs, *outputs)
        return Slots(given, tuple(dims), tuple(weights), plan)

    @cached_property
    def numbers(self) -> dict[str | Dim, int]:
        """The number of each slot; weights by `weight:name`."""
        names = [*self.given, *self.derived, *(f"weight:{w}" for w in self.weights)]
        return {name: i for i, name in enumerate(names)}

    def buffer(self, ref: Ref) -> tuple[int, int]:
        """A buffer's address as a slot and what is added."""
        buffer = self.plan.buffers[ref.buffer]
        if buffer.region == ARENA:
            return self.numbers[ARENA], buffer.offset
        if buffer.region == STATUS:
            return self.numbers[SELF], 8 * self.numbers[STATUS]
        return self.numbers[f"{buffer.region}:{buffer.name}"], 0

    def size(self, dim: Dim) -> tuple[int, int]:
        """A size as a slot and what is added."""
        return (self.numbers[ZERO], dim) if isinstance(dim, int) else (self.numbers[dim], 0)

    def arguments(self, launch: Launch) -> list[tuple[int, int]]:
        """A launch's arguments in the order of its kernel's parameters."""
        return [self.buffer(a) if isinstance(a, Ref) else self.size(a) for a in launch.arguments]


def encode_steps(slots: Slots, numbers: Mapping[str, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The entry's list of launches; `numbers` gives each kernel's."""
    words = [len(slots.plan.launches)]
    for launch in slots.plan.launches:
        words.append(numbers[launch.kernel])
        for slot, added in slots.arguments(launch):
            words += (slot, added)
    try:
        return np.array(words, dtype="<i8")
    except OverflowError:
        raise UsageError(
            f"an arena of {slots.plan.arena_bytes:.1e} bytes is more than addresses reach",
            hint="give every symbol an upper bound: `symbols {B=[1,4], ...}` in the program",
        ) from None


def entry_function(entry: str, slots: Slots, checks: Sequence[Check]) -> PrimFunc:
    """`entry(values, steps)`: check what is given, derive the other sizes, execute the steps."""

    def body(values: Expr, steps: Expr) -> None:
        table = Tensor(values, DType.i64, (len(slots.numbers),))

        def slot(name: str) -> Expr:
            return bind(table.load(slots.numbers[name]))

        for number, check in enumerate(checks, 1):
            if isinstance(check, Addresses):
                emit_addresses(number, table, slots.numbers[ARENA], len(slots.given))
            emit_check(check, number, slot, lambda dim: dim_value(dim, slot))
        table.store(values, slots.numbers[SELF])
        table.store(integer(0), slots.numbers[STATUS])
        for dim in slots.derived:
            table.store(dim_value(dim, slot), slots.numbers[dim])
        T.evaluate(call_function(EXECUTE, [values, steps]))
        T.Return(cast(table.load(slots.numbers[STATUS]), "int32"))

    return build(body).with_attr("global_symbol", entry)


def dim_value(dim: Dim, symbol: Callable[[str], Expr]) -> Expr:
    """The value of a dim as int64, where `symbol` gives those of its symbols."""
    if isinstance(dim, int):
        return integer(dim)
    terms = []
    for monomial, coefficient in dim.terms:
        factors = [integer(coefficient)]
        for atom in monomial:
            if isinstance(atom, str):
                factors.append(symbol(atom))
                continue
            over = dim_value(atom.numerator, symbol)
            factors.append(tirx.floordiv(over, dim_value(atom.denominator, symbol)))
        terms.append(reduce(mul, factors))
    return reduce(lambda a, b: a + b, terms)


def execute_function(kernels: Mapping[str, PrimFunc], numbers: Mapping[str, int]) -> PrimFunc:
    """`execute(values, steps)`: call one kernel after another, until a check fails."""

    def body(values: Expr, steps: Expr) -> None:
        table, words = Tensor(values, DType.i64, (1,)), Tensor(steps, DType.i64, (1,))
        at = Local(1, "int64")
        at[0] = integer(1)

        def run(name: str) -> None:
            first, arity = bind(at[0] + 1), len(kernels[name].params)
            pairs = [(words.at(first + 2 * i), words.at(first + 2 * i + 1)) for i in range(arity)]
            T.evaluate(call_function(name, [table.at(slot) + added for slot, added in pairs]))
            at[0] = first + 2 * arity

        cases = [(n, name) for name, n in numbers.items()]
        with loop(bind(words.at(0))), when(tirx.EQ(table.at(_FIXED.index(STATUS)), integer(0))):
            _switch(bind(words.at(at[0])), cases, run)

    return build(body)


def timing_functions() -> dict[str, PrimFunc]:
    """`clock(target)` writes seconds and nanoseconds; `copy(source, target, size)` moves bytes."""

    def clock(target: Expr) -> None:
        arguments = [tirx.IntImm("int32", _CLOCK_MONOTONIC), target]
        T.evaluate(tirx.call_extern("int32", "clock_gettime", *arguments))

    def copy(source: Expr, target: Expr, size: Expr) -> None:
        T.evaluate(tirx.call_extern("int64", "memcpy", target, source, size))

    return {CLOCK: build(clock), COPY: build(copy)}


def _switch(number: Expr, cases: Sequence[tuple[int, str]], run: Callable[[str], None]) -> None:
    """Run the case of a number by halving: a few comparisons for any number of kernels."""
    if len(cases) == 1:
        run(cases[0][1])
        return
    middle = len(cases) // 2
    with T.If(number < integer(cases[middle][0])):
        with T.Then():
            _switch(number, cases[:middle], run)
        with T.Else():
            _switch(number, cases[middle:], run)


def call_function(name: str, arguments: Sequence[Expr]) -> Expr:
    """A call of another function of the library."""
    return Call(global_var(name), list(arguments), ret_ty=ir.PrimType("int32"))


@cache
def global_var(name: str) -> Any:
    """One GlobalVar a name: TVM compares them by identity."""
    return ir.GlobalVar(name)


def tir_passes() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The passes that our kernels need.

    TVM's own pipeline takes ten times as long, and its storage rewrite would hoist local arrays
    out of the device attributes that they need. Buffers are flat as they are built, and LLVM
    simplifies anyway: TVM's simplifier took half of the time of a build, for the same speed.
    """
    passes = tirx.transform

    def finish() -> Any:
        return tvm.ir.transform.Sequential([passes.LowerTVMBuiltin(), passes.LowerIntrin()])

    steps = [passes.AnnotateEntryFunc(), passes.SplitHostDevice(), passes.MakePackedAPI()]
    return tvm.ir.transform.Sequential(steps), finish, finish


def compile_library(
    functions: Mapping[str, PrimFunc], machine: Machine, sources: Sequence[Cpp] = ()
) -> bytes:
    """The shared library of all functions and of the C++ that they call.

    Raises `BackendUnavailable` without a C++ compiler, `UsageError` for C++ that does not compile.
    """
    if not any(map(shutil.which, ("g++", "c++", "clang++", os.environ.get("CXX", "g++")))):
        raise BackendUnavailable(
            "the tvm backend found no C++ compiler to link its library with",
            hint="install g++ (apt install g++)",
        )
    module = tvm.IRModule({global_var(name): f for name, f in functions.items()})
    tirx.register_tir_pipeline(PIPELINE, tir_passes)
    built = tvm.compile(module, target=tvm_target(machine.cpu), tir_pipeline=PIPELINE)
    with tempfile.TemporaryDirectory(prefix="dsc-tvm-") as folder:
        path = Path(folder) / "kernels.so"
        check_room(path, OBJECT_BYTES, "code to be linked")
        objects = [compiled(source, machine, Path(folder)) for source in dict.fromkeys(sources)]
        built.export_library(str(path), addons=[str(each) for each in objects])
        return path.read_bytes()
