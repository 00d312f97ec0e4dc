"""One shared library: the kernels, `execute` that walks a list of steps, and a function an entry.

`decode(values, steps)` takes the addresses of two int64 arrays. `values` holds the sizes of the
symbols and the addresses of the arena, the inputs, the outputs and the weights, in the order of
`Slots`; the entry's function checks them (`dsc.backends.tvm.checks`), fills in what is derived from
the sizes, and returns 0, or the number of the check that failed. `steps` is the entry's list: the
number of steps, then for each a kernel's number, and for each of its arguments a slot and what is
added to its value. `execute` reads a step and calls its kernel directly, so that a decode step runs
without Python, and the code to compile does not grow with the number of layers.

Kernels are object files (`objects`). What calls them is a page of C++, which the compiler that
links the library takes with them.

Lists are data, so a profile costs nothing when there is none: `dsc.backends.tvm.timed` gives the
same function a list with calls of `clock` and `copy` between the steps.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsc import kept
from dsc.backends.tvm.checks import Addresses, Check, failing
from dsc.backends.tvm.kernels.cpp import compiled, compiler
from dsc.backends.tvm.machine import Machine
from dsc.errors import InternalError, UsageError
from dsc.files import check_room
from dsc.ir.dims import Dim, free_symbols
from dsc.ir.graph import Graph
from dsc.ir.kernels import Cpp
from dsc.runtime.plan import ARENA, STATUS, EntryPlan, Launch, Ref
from dsc.toolchain import compiler_version

KIND = "libraries"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wl,-Bsymbolic")
LINKED_BYTES = 10**6
"""Room that a library takes beside its object files, by far."""
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


def source_of(
    symbols: Sequence[tuple[str, int]], entries: Mapping[str, tuple[Slots, Sequence[Check]]]
) -> str:
    """The C++ of `execute` and of every entry; `symbols` are the kernels and their arities.

    Entries have TVM's packed interface, for `tvm_ffi` to call.
    """
    cases = [
        f"      case {number}: {symbol}({', '.join(f'A({i})' for i in range(arity))});"
        f" at += {2 * arity}; break;"
        for number, (symbol, arity) in enumerate(symbols, FIRST)
    ]
    parts = [
        PRELUDE,
        SHARE.format(parts=PARTS, shares=SHARES),
        *(declared(symbol, arity) for symbol, arity in symbols),
        _EXECUTE.format(status=_FIXED.index(STATUS), cases="\n".join(cases)),
    ]
    for number, (name, (slots, checks)) in enumerate(entries.items()):
        parts.append(_entry(f"entry_{number}", slots, checks))
        parts.append(packed(name, f"entry_{number}", 2))
    return "\n".join(parts)


def declared(symbol: str, arity: int) -> str:
    """The C++ declaration of a kernel."""
    return f'extern "C" int {symbol}({", ".join(["i64"] * arity)});'


def packed(name: str, function: str, arity: int) -> str:
    """C++ that gives a C function of integers TVM's packed interface, under a name."""
    given = ", ".join(f"given[{i}].value" for i in range(arity))
    return _PACKED.format(function=function, name=name, given=given)


PARTS = 16
"""Parts of a thread's share of a parallel loop: as many as make it wait little at the end."""
SHARES = 128
"""Shares at most; more threads have none, and take of the others'."""
FIRST = 2
"""The number of the first kernel: before it come `CLOCK` and `COPY` (`dsc.backends.tvm.timed`)."""
PRELUDE = """\
#include <string.h>
#include <time.h>
typedef long long i64;
struct Any { int kind; unsigned unused; i64 value; };  // TVMFFIAny of tvm/ffi/c_api.h
static i64 floor_div(i64 a, i64 b) { return a / b - (a % b < 0); }
template <typename T>
static bool outside(i64 address, i64 count, i64 low, i64 high, bool ascending) {
  for (i64 i = 0; i < count; ++i) {
    i64 x = (i64)((const T *)address)[i];
    if (x < low || x > high) return true;
    if (ascending) low = x;
  }
  return false;
}
static bool uncovered(i64 pages, i64 lengths, i64 batch, i64 blocks, i64 rows) {
  for (i64 b = 0; b < batch; ++b)
    for (i64 i = 0; i < (((const i64 *)lengths)[b] + rows - 1) / rows; ++i)
      if (((const i64 *)pages)[b * blocks + i] < 0) return true;
  return false;
}"""
SHARE = """\
// TVM's run time gives each thread an equal part of a parallel loop once and for all, and all wait
// for the slowest. Here a thread takes its own share in small parts, from the front, so that it
// reads memory as one stream; one that is done takes parts of the others' from their ends.
struct Env {{ void *sync; int tasks; }};  // TVMParallelGroupEnv of tvm/runtime/c_backend_api.h
typedef int (*Part)(int number, Env *env, void *data);
typedef int (*Launch)(Part part, void *data, int tasks);
extern "C" __attribute__((weak)) Launch __TVMBackendParallelLaunch;  // what kernels call
static Launch threads;
// Of each thread's share, how many parts are gone from the front (low half) and from the end.
struct Loop {{ Part part; void *data; unsigned long long gone[{shares}]; }};
static bool next(unsigned long long *gone, int parts, bool own, int *found) {{
  unsigned long long now = __atomic_load_n(gone, __ATOMIC_RELAXED);
  do {{
    int front = (int)now, end = (int)(now >> 32);
    if (front + end >= parts) return false;
    *found = own ? front : parts - 1 - end;
  }} while (!__atomic_compare_exchange_n(gone, &now, now + (own ? 1 : 1ull << 32), 1,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return true;
}}
static int take(int number, Env *env, void *given) {{
  Loop *loop = (Loop *)given;
  const int shares = env->tasks < {shares} ? env->tasks : {shares};
  const int each = shares > 1 ? {parts} : 1;
  Env parts = {{env->sync, shares * each}};
  for (int i = 0; i < shares; ++i) {{
    int mine = (number + i) % shares;
    for (int at; next(&loop->gone[mine], each, i == 0, &at);)
      if (int failed = loop->part(mine * each + at, &parts, loop->data)) return failed;
  }}
  return 0;
}}
static int share(Part part, void *data, int tasks) {{
  Loop loop = {{part, data, {{}}}};
  return threads(take, &loop, tasks);
}}
static void sharing() {{
  if (!&__TVMBackendParallelLaunch) return;  // no kernel has a parallel loop
  Launch found = __atomic_load_n(&__TVMBackendParallelLaunch, __ATOMIC_ACQUIRE);
  if (found == share) return;
  threads = found;
  __atomic_store_n(&__TVMBackendParallelLaunch, &share, __ATOMIC_RELEASE);
}}"""
_EXECUTE = """\
#define A(i) (values[at[2 * (i)]] + at[2 * (i) + 1])
static void execute(const i64 *values, const i64 *at) {{
  sharing();
  for (i64 left = *at++; left > 0 && values[{status}] == 0; --left) {{
    switch (*at++) {{
      case 0: clock_gettime(CLOCK_MONOTONIC, (timespec *)A(0)); at += 2; break;
      case 1: memcpy((void *)A(1), (const void *)A(0), A(2)); at += 6; break;
{cases}
    }}
  }}
}}"""
_PACKED = """\
extern "C" int packed_{function}(void *, const Any *given, int, Any *result)
    __asm__("__tvm_ffi_{name}");
extern "C" int packed_{function}(void *, const Any *given, int, Any *result) {{
  *result = Any{{1, 0, {function}({given})}};
  return 0;
}}"""


def _entry(function: str, slots: Slots, checks: Sequence[Check]) -> str:
    """`entry(values, steps)`: check what is given, derive the other sizes, execute the steps."""
    numbers = slots.numbers

    def slot(name: str) -> str:
        return f"v[{numbers[name]}]"

    lines = [f"static i64 {function}(i64 values, i64 steps) {{", "  i64 *v = (i64 *)values;"]
    for number, check in enumerate(checks, 1):
        if isinstance(check, Addresses):
            first, last = numbers[ARENA], len(slots.given)
            lines.append(f"  for (int i = {first}; i < {last}; ++i) if (!v[i]) return {number};")
        else:
            failed = failing(check, slot, lambda dim: dim_value(dim, slot))
            lines += [f"  if ({failed}) return {number};"] if failed else []
    lines += [f"  {slot(SELF)} = values;", f"  {slot(STATUS)} = 0;"]
    lines += [f"  v[{numbers[dim]}] = {dim_value(dim, slot)};" for dim in slots.derived]
    lines += ["  execute(v, (const i64 *)steps);", f"  return {slot(STATUS)};", "}"]
    return "\n".join(lines)


def dim_value(dim: Dim, symbol: Callable[[str], str]) -> str:
    """The value of a dim in C++, where `symbol` gives those of its symbols."""
    if isinstance(dim, int):
        return f"{dim}LL"
    terms = []
    for monomial, coefficient in dim.terms:
        factors = [f"{coefficient}LL"]
        for atom in monomial:
            if isinstance(atom, str):
                factors.append(symbol(atom))
                continue
            over, under = (dim_value(d, symbol) for d in (atom.numerator, atom.denominator))
            factors.append(f"floor_div({over}, {under})")
        terms.append(" * ".join(factors))
    return f"({' + '.join(terms)})"


def compile_library(
    source: str, objects: Mapping[str, bytes], machine: Machine, extras: Sequence[Cpp] = ()
) -> bytes:
    """The shared library of C++ and of the object files, by symbol, that it calls.

    `extras` are kernels in C++, compiled each time: no text of theirs tells what it includes.
    Raises `BackendUnavailable` without a C++ compiler, `UsageError` for C++ of a kernel that does
    not compile or link: two of one name, or none of that name.
    """
    with tempfile.TemporaryDirectory(prefix="dsc-tvm-") as temporary:
        folder = Path(temporary)
        linked = {
            Path(each).name: Path(each).read_bytes() for each in compiled(extras, machine, folder)
        }
        linked |= {f"{symbol}.o": data for symbol, data in objects.items()}
        tool = compiler(machine.triple)
        flags = [*FLAGS, *sorted({f"-Wl,--require-defined={each.function}" for each in extras})]
        key = {
            "source": source,
            "objects": {name: hashlib.sha256(data).hexdigest() for name, data in linked.items()},
            "flags": flags,
            "compiler": compiler_version(tool),
        }
        found = kept.get(KIND, key)
        if found is not None:
            return found
        path, glue = folder / "kernels.so", folder / "entries.cc"
        check_room(path, sum(map(len, linked.values())) + LINKED_BYTES, "code to be linked")
        glue.write_text(source)
        for name, data in linked.items():
            (folder / name).write_bytes(data)
        files = [str(folder / name) for name in linked]
        line = [tool, *flags, "-o", str(path), str(glue), *files]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = f"the library does not link:\n{done.stderr.strip()}"
            if extras:
                hint = 'a kernel in C++ is one function of its name, declared extern "C"'
                raise UsageError(problem, hint=hint)
            raise InternalError(problem, program=source)
        data = path.read_bytes()
    kept.put(KIND, key, data)
    return data
