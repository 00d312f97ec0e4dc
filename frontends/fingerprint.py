"""What a module computes, as data: two modules with equal fingerprints have the same trace.

A configuration does not say everything: the code that builds a module may change an attribute, a
buffer or a method of it afterwards. So the fingerprint holds, for every submodule, its class and
the code of its `forward`, all attributes by value, the types of its parameters and the values of
its buffers, and the sources of all modules outside of the installed packages that any of its
classes can reach. What cannot be told by value makes a module `Unknown`: it has no fingerprint.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from dsc.frontends.trace_cache import digest

MAX_DEPTH = 8
_STATE = frozenset({"_modules", "_parameters", "_buffers"})
_INSTALLED = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")
)


class Unknown(Exception):
    """An attribute that cannot be told by value."""


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Structure and sources of `module`, as JSON values. Raises `Unknown`."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(repr((name, _part(part))).encode())
    return {"structure": digest.hexdigest(), "sources": _sources(module)}


def _part(part: nn.Module) -> tuple[Any, ...]:
    kind = type(part)
    tensors = [
        (key, None if t is None else (str(t.dtype), tuple(t.shape)))
        for key, t in part._parameters.items()
    ]
    buffers = [(key, None if t is None else _told(t)) for key, t in part._buffers.items()]
    plain = [(k, _told(v)) for k, v in sorted(vars(part).items()) if k not in _STATE]
    code = _code(inspect.unwrap(kind.forward))
    return (kind.__module__, kind.__qualname__, code, tensors, buffers, plain)


def _told(value: Any, depth: int = 0) -> Any:
    """A value as something whose repr is equal when, and only when, the value is."""
    if depth > MAX_DEPTH:
        raise Unknown("values nest too deep")
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, nn.Module):
        return "module", type(value).__qualname__
    if isinstance(value, Mapping):
        return type(value).__name__, [
            (_told(k, depth + 1), _told(v, depth + 1)) for k, v in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_told(v, depth + 1) for v in value]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(repr(_told(v, depth + 1)) for v in value)
    if isinstance(value, type):
        return "class", value.__module__, value.__qualname__
    if isinstance(value, MethodType):
        return "method", _told(value.__func__, depth + 1), type(value.__self__).__qualname__
    if isinstance(value, FunctionType):
        cells = [_told(c.cell_contents, depth + 1) for c in value.__closure__ or ()]
        return "function", value.__module__, value.__qualname__, _code(value), cells
    return _object(value, depth)


def _object(value: Any, depth: int) -> Any:
    """An instance of some class: what it says of itself, else its attributes."""
    for method in ("to_dict", "model_dump"):
        if callable(say := getattr(value, method, None)):
            return type(value).__qualname__, _told(say(), depth + 1)
    if not hasattr(value, "__dict__"):
        raise Unknown(f"an attribute of type {type(value).__qualname__}")
    return type(value).__qualname__, _told(vars(value), depth + 1)


def _tensor(value: torch.Tensor) -> Any:
    kind = (str(value.dtype), tuple(value.shape))
    if value.is_meta:
        return kind
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return *kind, hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else hashlib.sha256(marshal.dumps(code)).hexdigest()


def _sources(module: nn.Module) -> dict[str, str]:
    """Digests of the files that the module's classes come from or can reach."""
    pending = [sys.modules.get(type(m).__module__) for m in module.modules()]
    files: dict[str, str] = {}
    seen: set[int] = set()
    while pending:
        python = pending.pop()
        if python is None or id(python) in seen:
            continue
        seen.add(id(python))
        file = getattr(python, "__file__", None)
        if file is None or not Path(file).is_file():
            continue
        files[file] = digest_of(file)
        if not _is_installed(python):
            pending.extend(_reached(python))
    return dict(sorted(files.items()))


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
    ours = python.__name__.startswith("dsc.") and not python.__name__.startswith("dsc.models.")
    return ours or str(Path(python.__file__).resolve()).startswith(_INSTALLED)


digest_of = cache(digest)
"""SHA-256 of a file as this process first saw it: what it has imported stays what it was."""
