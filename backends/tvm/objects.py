"""Object files of kernels, each made once: what is kept on disk is not compiled again.

A kernel is the function that makes it and what that is specialised to; its key is these, the
machine, the versions of TVM and LLVM, and our own sources. A kernel that an operator from outside
brings is only known by its code, which may change: it is made in this process, and not kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from types import FunctionType
from typing import Any, cast

from dsc import kept
from dsc.backends.tvm import workers
from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine, cpu_of
from dsc.ir.graph import Attrs
from dsc.ir.op import added
from dsc.runtime.emission import Progress

KIND = "kernels"
OURS = ("backends/tvm", "ir")
"""Folders of dsc whose code says what a kernel is."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of a library: the symbol that the linker sees, and what it is made of."""

    symbol: str
    launch: Launch
    machine: Machine
    key: Mapping[str, Any] | None

    @staticmethod
    def of(name: str, launch: Launch, machine: Machine) -> Kernel:
        """The kernel of a launch; `name` tells those that are not kept apart."""
        try:
            spelled = canonical((launch.maker, launch.static, machine))
        except Foreign:
            return Kernel(name, launch, machine, None)
        key = {"kernel": spelled, **surroundings(machine)}
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        title = re.sub(r"\W", "_", launch.name, flags=re.ASCII)
        return Kernel(f"{title}_{digest[:20]}", launch, machine, key)


def objects_of(kernels: Sequence[Kernel], progress: Progress | None = None) -> dict[str, bytes]:
    """The object files of kernels by symbol; those that have most to say are made first.

    They come as the kernels do, whatever of them was kept: they are linked in this order.
    """
    found = {k.symbol: kept.get(KIND, k.key) for k in kernels if k.key is not None}
    objects = {symbol: data for symbol, data in found.items() if data is not None}
    missing = [k for k in kernels if k.symbol not in objects]

    def done(number: int) -> None:
        if progress is not None:
            progress("kernels", len(objects) + number, len(objects) + len(missing))

    done(0)
    own = [k for k in missing if k.key is not None]
    own.sort(key=lambda k: len(str(k.key)), reverse=True)
    made = workers.run([("dsc.backends.tvm.build:build_kernel", _told(k)) for k in own], done)
    ours = not own or not kept.edited(*OURS)  # a process may have started after an edit
    for kernel, data in zip(own, made, strict=True):
        if ours:
            kept.put(KIND, cast(Mapping[str, Any], kernel.key), data)
        objects[kernel.symbol] = data
    for kernel in missing:
        if kernel.key is None:
            from dsc.backends.tvm.build import build_kernel

            objects[kernel.symbol] = build_kernel(*_told(kernel))
    return {kernel.symbol: objects[kernel.symbol] for kernel in kernels}


def _told(kernel: Kernel) -> tuple[Any, ...]:
    return kernel.launch.maker, kernel.launch.static, kernel.machine, kernel.symbol


class Foreign(Exception):
    """A value whose meaning is code of somebody else's."""


def canonical(value: Any) -> str:
    """A text that equal values share in every process, and others do not.

    Raises `Foreign` for functions from outside of this tree, and what names an operator from there.
    """
    match value:
        case str() if value in added():
            raise Foreign(value)
        case None | bool() | int() | str() | bytes():
            return repr(value)
        case float():
            return value.hex()
        case Enum():
            return f"{_name(type(value))}.{value.name}"
        case tuple():
            kind = "" if type(value) is tuple else _name(type(value))
            return f"{kind}({', '.join(map(canonical, value))})"
        case Attrs():
            return f"{{{', '.join(f'{k}: {canonical(v)}' for k, v in value.items())}}}"
        case frozenset():
            return f"{{{', '.join(sorted(map(canonical, value)))}}}"
        case FunctionType():
            return _place(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            parts = (canonical(getattr(value, f.name)) for f in fields(value))
            return f"{_name(type(value))}({', '.join(parts)})"
        case _:
            raise Foreign(repr(value))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _place(function: Any) -> str:
    module, name = str(function.__module__), str(function.__qualname__)
    if not module.startswith("dsc.") or "<" in name:
        raise Foreign(f"{module}.{name}")
    return f"{module}:{name}"


def surroundings(machine: Machine) -> dict[str, Any]:
    """What else an object file depends on, the same for all kernels of a program."""
    cpu = cpu_of(machine.cpu)
    return {
        "features": cpu.features,
        "llvm": cpu.llvm,
        "tvm": version("apache-tvm"),
        "ours": kept.sources(*OURS),
    }
