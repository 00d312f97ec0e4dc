"""What a module computes, as data: two modules with equal fingerprints have the same trace.

A configuration does not say everything: the code that builds a module may change an attribute, a
buffer or a method of it afterwards, or a global that its code reads. So the fingerprint holds, for
every submodule, all attributes by value, the types of its parameters, the values of its buffers and
what its classes hold; and of the files that they come from, and of all outside of the installed
packages that can be reached from there, the sources, the functions and classes, and every global
that some of that code names. What cannot be told by value makes a module `Unknown`: it has no
fingerprint. What an installed package holds, whose version is told elsewhere, is then told by its
type alone: a lock, or a table of what was imported.
"""

from __future__ import annotations

import hashlib
import marshal
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import nn

from dsc.frontends.trace_cache import digest

MAX_DEPTH = 8
_STATE = frozenset({"_modules", "_parameters", "_buffers"})
_PLAIN = frozenset({bool, int, float, complex, str, bytes, range, torch.dtype, torch.device})
_CODE = (FunctionType, staticmethod, classmethod, property)
_ITEMS = 3
"""From here on what `__reduce_ex__` gives are iterators: of a list's items, and of a mapping's."""
_INSTALLED = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")
)


class Unknown(Exception):
    """An attribute that cannot be told by value."""


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Structure and sources of `module`, as JSON values. Raises `Unknown`."""
    tell = _Teller(module)
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(repr((name, tell.part(part))).encode())
    for kind in _kinds(module):
        digest.update(repr((kind.__module__, kind.__qualname__, tell.kind(kind))).encode())
    kinds = {sys.modules.get(type(m).__module__) for m in module.modules()}
    met = (sys.modules.get(name) for name in sorted(tell.met))
    modules = _modules([*kinds, *(m for m in met if m is not None and not _is_installed(m))])
    code = [(python.__name__, tell.code(python)) for python, _ in modules]
    rest = [(python.__name__, tell.globals(python)) for python, _ in modules]
    digest.update(repr((code, rest)).encode())
    files = {file: digest_of(file) for _, file in modules}
    return {"structure": digest.hexdigest(), "sources": dict(sorted(files.items()))}


class _Teller:
    """Values as something whose repr is equal when, and only when, the value is."""

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(part): path for path, part in module.named_modules()}
        self.met: set[str] = set()
        """The modules of Python, by name, whose functions and classes were told."""
        self._names: set[str] = set()
        """What the functions that were told name."""

    def part(self, part: nn.Module) -> tuple[Any, ...]:
        """A submodule, but for what its class holds."""
        kind = type(part)
        tensors = [
            (key, None if t is None else (str(t.dtype), tuple(t.shape)))
            for key, t in part._parameters.items()
        ]
        buffers = [(key, None if t is None else _tensor(t)) for key, t in part._buffers.items()]
        plain = [(k, self.value(v)) for k, v in sorted(vars(part).items()) if k not in _STATE]
        return kind.__module__, kind.__qualname__, tensors, buffers, plain

    def code(self, python: ModuleType) -> list[Any]:
        """The functions that a module of Python holds, and its own classes."""
        known = _is_installed(python)
        found: list[Any] = []
        for name, value in sorted(vars(python).items()):
            if isinstance(value, type) and value.__module__ == python.__name__:
                found.append((name, self.kind(value)))
            elif isinstance(value, FunctionType):
                found.append((name, self._held(value, known)))
        return found

    def globals(self, python: ModuleType) -> list[Any]:
        """What else it holds that any code names which was told before."""
        known = _is_installed(python)
        return [
            (name, self._held(value, known))
            for name, value in sorted(vars(python).items())
            if name in self._names and not isinstance(value, FunctionType)
            and not _is_private(name)
        ]  # fmt: skip

    def kind(self, kind: type) -> list[Any]:
        """What a class holds itself."""
        known = _is_installed(sys.modules.get(kind.__module__))
        return [
            (name, self._held(value, known))
            for name, value in sorted(vars(kind).items())
            if isinstance(value, _CODE) or not _is_private(name)
        ]

    def _held(self, value: Any, known: bool) -> Any:
        """What a class or a module holds, by its type alone where `known` code keeps a secret."""
        if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)):
            return type(value).__name__
        try:
            return self.value(value)
        except Unknown:
            if not known:
                raise
            return type(value).__qualname__, _code(value)

    def value(self, value: Any, depth: int = 0) -> Any:
        """A value. Raises `Unknown`."""
        if depth > MAX_DEPTH:
            raise Unknown("values nest too deep")
        if value is None or type(value) in _PLAIN or isinstance(value, Enum):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module):
            if id(value) not in self._paths:
                raise Unknown("a module that is no submodule")
            return "module", self._paths[id(value)]
        if isinstance(value, ModuleType):
            return "python", value.__name__
        if isinstance(value, type):
            self.met.add(value.__module__)
            return "class", value.__module__, value.__qualname__
        if isinstance(value, FunctionType):
            self.met.add(value.__module__)
            self._names.update(names_of(value.__code__))
            held = [c.cell_contents for c in value.__closure__ or () if c != CellType()]
            held += [value.__defaults__, value.__kwdefaults__]
            told = [self.value(v, depth + 1) for v in held]
            return "function", value.__module__, value.__qualname__, _code(value), told
        if isinstance(value, MethodType):
            return "method", [self.value(v, depth + 1) for v in (value.__func__, value.__self__)]
        return type(value).__qualname__, self._inside(value, depth + 1)

    def _inside(self, value: Any, depth: int) -> Any:
        """What is in a container or an instance: what it says of itself, else how it is pickled."""
        for method in ("to_dict", "model_dump"):
            if callable(say := getattr(value, method, None)):
                return self.value(say(), depth)
        if isinstance(value, Mapping):
            return [(self.value(k, depth), self.value(v, depth)) for k, v in value.items()]
        if isinstance(value, (list, tuple)):
            return [self.value(v, depth) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted(repr(self.value(v, depth)) for v in value)
        if isinstance(value, property):
            return [self.value(v, depth) for v in (value.fget, value.fset)]
        if isinstance(value, (staticmethod, classmethod)):
            return self.value(value.__func__, depth)
        try:
            made = value.__reduce_ex__(2)
        except Exception as problem:
            raise Unknown(f"an attribute of type {type(value).__qualname__}") from problem
        if isinstance(made, str):
            wrapped = getattr(value, "__wrapped__", None)
            return getattr(value, "__module__", ""), made, self.value(wrapped, depth)
        listed = [each if each is None or n < _ITEMS else list(each) for n, each in enumerate(made)]
        return [self.value(each, depth) for each in listed]


def _tensor(value: torch.Tensor) -> Any:
    kind = (str(value.dtype), tuple(value.shape))
    if value.is_meta:
        return kind
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return *kind, hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else code_digest(code)


def code_digest(code: CodeType) -> str:
    """A hash of code that is the same in every process."""
    # Version 2 tells equal code alike; later ones tell what is shared as well.
    return hashlib.sha256(marshal.dumps(code, 2)).hexdigest()


def names_of(code: CodeType) -> Iterator[str]:
    """The globals and attributes that code names, and functions that are made within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


def _is_private(name: str) -> bool:
    """Whether Python itself, and not somebody's code, makes an attribute of this name."""
    return name == "_abc_impl" or (name.startswith("__") and name.endswith("__"))


def _kinds(module: nn.Module) -> list[type]:
    """The classes of a module's parts and their bases, but for torch's base of all."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    kinds -= {nn.Module, object}
    return sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))


def _modules(pending: list[ModuleType | None]) -> list[tuple[ModuleType, str]]:
    """These modules of Python, those that they can reach, and their files, by name."""
    found: dict[str, tuple[ModuleType, str]] = {}
    while pending:
        python = pending.pop()
        if python is None or python.__name__ in found:
            continue
        file = getattr(python, "__file__", None)
        if file is None or not Path(file).is_file():
            continue
        found[python.__name__] = python, file
        if not _is_installed(python):
            pending.extend(_reached(python))
    return [found[name] for name in sorted(found)]


def _reached(python: ModuleType) -> Iterator[ModuleType | None]:
    """The modules that a module's globals are, or come from, installed packages apart."""
    for value in list(vars(python).values()):
        found = value if isinstance(value, ModuleType) else None
        if found is None:
            name = getattr(value, "__module__", None)
            found = sys.modules.get(name) if isinstance(name, str) else None
        if getattr(found, "__file__", None) is not None and not _is_installed(found):
            yield found


def _is_installed(python: Any) -> bool:
    """Whether a module is an installed package's, or dsc's own but for models.

    Who keeps a trace has the sources of dsc in the key; which are loaded is no matter.
    """
    file = getattr(python, "__file__", None)
    if file is None:
        return getattr(python, "__name__", "") in sys.builtin_module_names
    ours = python.__name__.startswith("dsc.") and not python.__name__.startswith("dsc.models.")
    return ours or str(Path(file).resolve()).startswith(_INSTALLED)


digest_of = cache(digest)
"""SHA-256 of a file as this process first saw it: what it has imported stays what it was."""
