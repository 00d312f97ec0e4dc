"""One shared library: the kernels, and for each entry one host function that runs its steps.

`decode(table, weights)` takes two addresses of int64 arrays. `table` holds the sizes of the symbols
and the addresses of the arena, the inputs and the outputs, in the order of `slots`; `weights` holds
the addresses of the weights. A step is a direct call of a private kernel, so that a decode step
runs without Python and costs about 0.1 us a kernel beyond its work. Long entries are cut into
parts, because the code generator takes more than linear time in the length of a function.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from operator import mul
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, tirx
from tvm.ir import Call

from dsc.backends.tvm.machine import Machine, tvm_target
from dsc.backends.tvm.tir import Expr, PrimFunc, integer
from dsc.errors import BackendUnavailable
from dsc.ir.dims import Dim, free_symbols
from dsc.ir.graph import Graph
from dsc.runtime.plan import BufferRef, EntryPlan, Step

PIPELINE = "dsc"
PART = 48
"""Steps in one part of a host function."""


def slots_of(graph: Graph, plan: EntryPlan) -> list[str]:
    """What the entry's table holds, in order: symbols, `arena`, `input:x`, `output:y`."""
    symbols: set[str] = set()
    for step in plan.steps:
        for _, dim in step.scalars:
            symbols |= free_symbols(dim)
    inputs = [f"input:{v.name}" for v in graph.inputs]
    outputs = [f"output:{name}" for name in graph.output_names]
    return [*sorted(symbols), "arena", *inputs, *outputs]


class Table:
    """Expressions for what the two int64 arrays of a host function hold."""

    def __init__(self, slots: Sequence[str], weights: Sequence[str]) -> None:
        self.slots = {name: i for i, name in enumerate(slots)}
        self.weights = {name: i for i, name in enumerate(weights)}
        self.addresses = [tirx.Var("table", "int64"), tirx.Var("weights", "int64")]
        self.arrays = [
            tirx.decl_buffer((max(1, len(names)),), "int64", name=name)
            for name, names in (("slot", slots), ("weight", weights))
        ]

    def declarations(self) -> list[Any]:
        """The statements that make the arrays readable."""
        pointer = ir.PointerType(ir.PrimType("int64"))
        return [
            tirx.DeclBuffer(array, data=Call("tirx.reinterpret", [address], ret_ty=pointer))
            for array, address in zip(self.arrays, self.addresses, strict=True)
        ]

    def slot(self, name: str) -> Expr:
        """A slot's value."""
        return tirx.BufferLoad(self.arrays[0], [integer(self.slots[name])])

    def address(self, ref: BufferRef) -> Expr:
        """Where a buffer starts."""
        if ref.region == "weight":
            return tirx.BufferLoad(self.arrays[1], [integer(self.weights[ref.key])])
        if ref.region == "arena":
            return self.slot("arena") + integer(ref.offset)
        return self.slot(f"{ref.region}:{ref.key}")

    def dim(self, dim: Dim) -> Expr:
        """The value of a symbolic dim."""
        if isinstance(dim, int):
            return integer(dim)
        terms = []
        for monomial, coefficient in dim.terms:
            factors = [integer(coefficient)]
            for atom in monomial:
                if isinstance(atom, str):
                    factors.append(self.slot(atom))
                else:
                    factors.append(
                        tirx.floordiv(self.dim(atom.numerator), self.dim(atom.denominator))
                    )
            terms.append(reduce(mul, factors))
        return reduce(lambda a, b: a + b, terms)


def host_functions(
    entry: str, plan: EntryPlan, slots: Sequence[str], weights: Sequence[str]
) -> dict[str, PrimFunc]:
    """The public function of an entry and its private parts, by name."""
    functions: dict[str, PrimFunc] = {}
    table = Table(slots, weights)
    calls = []
    for start in range(0, len(plan.steps), PART):
        part = f"{entry}_part_{start // PART}"
        functions[part] = _part(plan.steps[start : start + PART], slots, weights)
        calls.append(_call(part, table.addresses))
    body = tirx.SeqStmt([*calls, tirx.Return(tirx.const(0, "int32"))])
    public = tirx.PrimFunc(table.addresses, body, ret_type=ir.PrimType("int32"))
    functions[entry] = public.with_attr("global_symbol", entry)
    return functions


def _part(steps: Sequence[Step], slots: Sequence[str], weights: Sequence[str]) -> PrimFunc:
    table = Table(slots, weights)
    statements = table.declarations()
    for step in steps:
        refs = (*(r for r in step.reads if r is not None), *step.writes)
        sizes = [table.dim(dim) for _, dim in step.scalars]
        statements.append(_call(step.kernel, [*(table.address(r) for r in refs), *sizes]))
    statements.append(tirx.Return(tirx.const(0, "int32")))
    body = tirx.SeqStmt(statements)
    return tirx.PrimFunc(table.addresses, body, ret_type=ir.PrimType("int32"))


def _call(name: str, arguments: Sequence[Expr]) -> Any:
    return tirx.Evaluate(Call(_global(name), list(arguments), ret_ty=ir.PrimType("int32")))


@cache
def _global(name: str) -> Any:
    """One GlobalVar a name: TVM compares them by identity."""
    return ir.GlobalVar(name)


def _pipeline() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The passes that our kernels need.

    TVM's own pipeline takes ten times as long, and its storage rewrite would hoist local arrays
    out of the device attributes that they need.
    """
    passes = tirx.transform

    def finish() -> Any:
        return tvm.ir.transform.Sequential([passes.LowerTVMBuiltin(), passes.LowerIntrin()])

    steps = [passes.FlattenBuffer(), passes.StmtSimplify(), passes.AnnotateEntryFunc()]
    steps += [passes.SplitHostDevice(), passes.MakePackedAPI()]
    return tvm.ir.transform.Sequential(steps), finish, finish


def compile_library(functions: Mapping[str, PrimFunc], machine: Machine) -> bytes:
    """The shared library of all functions. Raises `BackendUnavailable` without a C++ linker."""
    if not any(map(shutil.which, ("g++", "c++", "clang++", os.environ.get("CXX", "g++")))):
        raise BackendUnavailable(
            "the tvm backend found no C++ compiler to link its library with",
            hint="install g++ (apt install g++)",
        )
    module = tvm.IRModule({_global(name): f for name, f in functions.items()})
    tirx.register_tir_pipeline(PIPELINE, _pipeline)
    built = tvm.compile(module, target=tvm_target(machine.cpu), tir_pipeline=PIPELINE)
    with tempfile.TemporaryDirectory(prefix="dsc-tvm-") as folder:
        path = Path(folder) / "kernels.so"
        built.export_library(str(path))
        return path.read_bytes()
