"""Kernels in C++ that operators from outside bring along: a call, and an object file to link."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from dsc.backends.tvm.launch import Launch, Unsupported
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import size_names
from dsc.backends.tvm.tir import Expr, PrimFunc, T, build, tirx
from dsc.errors import BackendUnavailable, UsageError
from dsc.ir.analyses import call_of
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.kernels import Cpp
from dsc.ir.op import lookup
from dsc.toolchain import cpp_compiler

LEVELS = {16: "x86-64-v4", 8: "x86-64-v3"}
"""What the C++ compiler is told of a machine, by the lanes of its vectors: it may be older than the
CPU and not know it by name."""


def lower(node: Node, machine: Machine, source: Cpp) -> Launch:
    """The launch of a node whose kernel is C++."""
    definition, call = lookup(node.op), call_of(node)
    for declared in definition.operands:
        given = call.operands.get(declared.name)
        if (
            given is not None
            and declared.pattern.dtype.isupper()
            and (given.dtype not in source.dtypes)
        ):
            takes = ", ".join(sorted(map(str, source.dtypes)))
            raise Unsupported(f"{node.op} of {given.dtype}; its C++ takes {takes}")
    told = [{**call.attrs, **call.dims}[name] for name in source.sizes]
    told = [int(x) if isinstance(x, bool) else x for x in told]
    sizes = tuple(_extent(x) for x in told if not isinstance(x, float))
    arity = len(node.operands) + len(node.outputs)
    numbers = tuple(x.hex() if isinstance(x, float) else None for x in told)
    static = (source, arity, numbers)
    problem = _mismatch(source, ["*"] * arity + [" " if n is None else "double" for n in numbers])
    if problem is not None:
        raise Unsupported(f"the C++ of {node.op} {problem}")
    flops = definition.traits.flops(call)
    return Launch(call_cpp, static, sizes, flops=flops, sources=(source,))


def _mismatch(source: Cpp, given: list[str]) -> str | None:
    """Why a function cannot be called so, where its parameters are plainly written, or `None`.

    Neither a compiler nor a linker would tell: names are all that "C" functions are linked by.
    """
    form = rf'extern\s+"C"[^(;]*\b{re.escape(source.function)}\s*\(([\w\s*,]*)\)'
    found = re.search(form, source.source)
    if found is None:
        return None
    taken = [p for p in found[1].split(",") if p.strip()]
    if len(taken) != len(given):
        return f"has {len(taken)} parameters, and {len(given)} are given"
    for written, wanted in zip(taken, given, strict=True):
        floating = "*" not in written and re.search(r"\b(float|double)\b", written)
        number = floating[0] if floating else ""
        if ("double" if wanted == "double" else "") != number:
            want = "a double" if wanted == "double" else "no floating number"
            return f"has the parameter `{written.strip()}`, and {want} is given"
    return None


def _extent(dim: Dim | tuple[Dim, ...]) -> Dim:
    return product(dim) if isinstance(dim, tuple) else dim


def call_cpp(source: Cpp, arity: int, numbers: tuple[str | None, ...]) -> PrimFunc:
    """Arguments: addresses of the operands and results; sizes.

    `numbers` says of each size whether it is a float attribute: its digits, which tell 0 from -0.
    """

    def body(*arguments: Expr) -> None:
        addresses, sizes = arguments[:arity], iter(arguments[arity:])
        told = (
            next(sizes) if n is None else tirx.FloatImm("float64", float.fromhex(n))
            for n in numbers
        )
        T.evaluate(tirx.call_extern("int32", source.function, *addresses, *told))

    return build(body, [*(f"x{i}" for i in range(arity)), *size_names(numbers.count(None))])


def compiled(sources: Iterable[Cpp], machine: Machine, folder: Path) -> list[str]:
    """The object files of all texts; one may hold several kernels.

    Raises `UsageError` with what the compiler says, and for a kernel with the name of a function of
    the C library, whose place it would take.
    """
    texts: dict[str, str] = {}
    for source in sources:
        if hasattr(ctypes.CDLL(None), source.function):
            what = f"{source.function} in C++ is a function of the C library"
            raise UsageError(what, hint="give it another name")
        texts[source.source] = source.function
    return [
        _object(name, text, machine, folder / str(number))
        for number, (text, name) in enumerate(texts.items())
    ]


def _object(name: str, source: str, machine: Machine, place: Path) -> str:
    text, found = place.with_suffix(".cc"), place.with_suffix(".o")
    text.write_text(source)
    level = [f"-march={LEVELS[machine.lanes]}"] if machine.lanes in LEVELS else []
    line = [compiler(machine.triple), "-std=c++17", "-O3", *level, "-fPIC", "-c", str(text)]
    done = subprocess.run([*line, "-o", str(found)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"the C++ of {name} does not compile:\n{done.stderr.strip()}",
            hint=f"{' '.join(line[:-1])} must take it",
        )
    return str(found)


def compiler(triple: str = "") -> str:
    """The C++ compiler; of another architecture GCC's for its triple.

    Raises `BackendUnavailable` where there is none.
    """
    tool, wanted, package = cpp_compiler(), "", ""
    if triple:
        tool, wanted, package = f"{triple}-g++", f" for {triple}", triple.replace("_", "-")
    if not shutil.which(tool):
        name = f"g++-{package}" if package else "g++"
        raise BackendUnavailable(
            f"the tvm backend found no C++ compiler{wanted} to link its library with",
            hint=f"install {name} (apt install {name})",
        )
    return tool
