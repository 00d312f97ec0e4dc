"""What TVM's compiler does for us: object files of kernels, and what it knows of a CPU.

Only what must have the compiler stands here; it runs in processes of its own (`worker`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, tirx
from tvm.target import codegen

from dsc.backends.tvm.bf16 import instructions_of
from dsc.backends.tvm.machine import FLAGS, Cpu, Machine
from dsc.backends.tvm.tir import PrimFunc
from dsc.errors import UsageError
from dsc.files import check_room
from dsc.runtime.standalone import lacking

PIPELINE = "dsc"
OBJECT_BYTES = 16 * 10**6
"""Room that an object file may take, by far: LLVM ends the process without it."""

TRIPLES = ("x86_64-linux-gnu", "aarch64-linux-gnu")
"""Architectures whose CPUs are tried where the host's has none of a name."""


def build_kernel(
    maker: Callable[..., PrimFunc], static: tuple[Hashable, ...], machine: Machine, symbol: str
) -> bytes:
    """The object file of `maker(*static)`, a C function `int symbol(int64_t, ...)`."""
    with instructions_of(machine):
        function = maker(*static)
    return build_object({symbol: function}, machine)


def build_object(functions: Mapping[str, PrimFunc], machine: Machine) -> bytes:
    """The object file of functions, each under its name.

    Those that have a `global_symbol` get TVM's packed interface, the others C's.
    """
    module = tvm.IRModule({ir.GlobalVar(name): f for name, f in functions.items()})
    tirx.register_tir_pipeline(PIPELINE, tir_passes)
    target = tvm_target(machine.cpu, machine.triple, machine.without)
    built = tvm.compile(module, target=target, tir_pipeline=PIPELINE)
    with tempfile.TemporaryDirectory(prefix="dsc-tvm-") as folder:
        path = Path(folder) / "kernel.o"
        check_room(path, OBJECT_BYTES, "code to be linked")
        built.mod.write_to_file(str(path), "o")
        return path.read_bytes()


def tir_passes() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The passes that our kernels need.

    TVM's own pipeline takes ten times as long, and its storage rewrite would hoist local arrays
    out of the device attributes that they need. Buffers are flat as they are built, and LLVM
    simplifies anyway: TVM's simplifier took half of the time of a build, for the same speed.
    """
    passes = tirx.transform

    def finish() -> Any:
        return tvm.ir.transform.Sequential([passes.LowerTVMBuiltin(), passes.LowerIntrin()])

    steps = [passes.SplitHostDevice(), passes.MakePackedAPI(), _named()]
    return tvm.ir.transform.Sequential(steps), finish, finish


def _named() -> Any:
    """Make private functions visible to the linker, by the names that they have."""

    def visible(module: Any, _: Any) -> Any:
        for name, function in module.functions.items():
            if "global_symbol" not in function.attrs:
                module.update_func(name, function.with_attr("global_symbol", name.name_hint))
        return module

    return tvm.ir.transform.module_pass(visible, opt_level=0)


def tvm_target(cpu: str, triple: str = "", without: Sequence[str] = ()) -> Any:
    """TVM's target for an LLVM CPU name, less some features; elsewhere with its triple."""
    told: dict[str, Any] = {"mtriple": triple} if triple else {}
    if without:
        told["mattr"] = [f"-{name}" for name in without]
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, **told})


def describe_cpu(name: str) -> Cpu:
    """What LLVM knows of a CPU, the host for "". Raises `UsageError` for a name that it lacks.

    Of the host's what its operating system does not give is left out: LLVM goes by the name, and a
    virtual machine may hide some.
    """
    host = codegen.llvm_get_system_cpu()
    cpu = name or host
    ours = codegen.llvm_get_system_triple()
    found = [each for each in (ours, *TRIPLES) if codegen.llvm_is_valid_cpu(cpu, each)]
    if not found:
        raise UsageError(
            f"LLVM knows no CPU called {cpu!r}",
            hint="a name such as cpu:znver4, cpu:x86-64-v3 or cpu:neoverse-n1",
        )
    triple = "" if found[0] == ours else found[0]
    features = _features(tvm_target(cpu, triple))
    without: tuple[str, ...] = ()
    if cpu == host:
        without = tuple(x for x in features if x in FLAGS and lacking([FLAGS[x]]))
        features = _features(tvm_target(cpu, triple, without))
    return Cpu(cpu, host, features, int(codegen.llvm_version_major()), triple, without)


def _features(target: Any) -> tuple[str, ...]:
    return tuple(sorted(map(str, codegen.llvm_get_cpu_features(target))))
