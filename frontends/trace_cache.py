"""Traced programs, kept between runs (`dsc/kept.py`): tracing is the slowest part of a compile.

A key is everything that a trace depends on, in full. Of a module in memory that is its fingerprint
(`fingerprint.py`). Of code that is installed, as the stock classes are, it is where that lies and
the packages beside it: then nothing is imported to find a trace. Which files the code consists of
is known once it was traced, so an entry lists them with their digests, and holds while those are as
they were. Code that this process imported before is a module in memory: somebody may have changed
it there.

What is kept is the program's text, the types of what its module takes from a checkpoint, the table
of how a checkpoint names it, the facts of the model, and the few constants that tracing found; no
weight is ever stored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsc import kept
from dsc.errors import DscError
from dsc.frontends.conversions import AS_DECLARED, Conversions
from dsc.frontends.facts import Facts
from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.lazy import torch
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import WeightSource, source_types

if TYPE_CHECKING:
    from torch import nn

KIND = "traces"
OURS = ("frontends", "ir", "models")
"""Folders of dsc whose code shapes a trace."""
_STARTED = time.time()
"""When no installed code that a key stands for had been read."""


@dataclass(frozen=True)
class Trace:
    """A traced program, whose source holds the constants that tracing found and nothing else.

    `parameters` are the names and types of what the module takes from a checkpoint. `facts` are the
    model's, where reading its configuration does not tell them all. `conversions` are those of a
    stock class.
    """

    program: Program
    parameters: Mapping[str, TensorType]
    facts: Facts | None = None
    conversions: Conversions = AS_DECLARED


class _Constants(WeightSource):
    """Constants out of an entry, in base64."""

    def __init__(self, types: Mapping[str, TensorType], values: Mapping[str, str]) -> None:
        self.types = {key: types[key] for key in values}
        self.values = values

    def load(self, key: str) -> torch.Tensor:
        """The tensor."""
        return tensor_of(self.array(key))

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """The array, or rows of it."""
        found = self.types[key]
        shape: Any = found.shape
        data = bytearray(base64.b64decode(self.values[key]))
        whole: Array = np.frombuffer(data, np.uint8).view(found.dtype.numpy).reshape(shape)
        return whole if rows == slice(None) else whole[rows]


def key_of(module: nn.Module, **facts: Any) -> dict[str, Any] | None:
    """Everything that the trace of a module in memory depends on; `facts` are the caller's part.

    `None` for a module that has an attribute which cannot be told by value: it is not kept.
    """
    from dsc.frontends.fingerprint import Unknown, fingerprint

    with suppress(Unknown):
        return {**facts, "module": fingerprint(module), **_surroundings()}
    return None


def key_of_installed(code: str, **facts: Any) -> dict[str, Any] | None:
    """Everything that the trace of installed code depends on, but for what its files say.

    `code` is a module or a package. `None` where this process has imported it.
    """
    if code in sys.modules:
        return None
    return {**facts, "code": code, **_surroundings(code)}


def _surroundings(*code: str) -> dict[str, Any]:
    found = {name: find_spec(name) for name in ("torch", *code)}
    places = {name: spec.origin if spec else "" for name, spec in found.items()}
    return {"places": places, "ours": kept.sources(*OURS), **kept.surroundings()}


def digest(file: str | Path) -> str:
    """SHA-256 of a file as it is now."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def entry(kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is kept of a key, while the sources that it lists are what they were; else `None`."""
    data = kept.get(kind, key)
    if data is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found: dict[str, Any] = json.loads(data)
        if all(digest(file) == then for file, then in found["sources"].items()):
            return found
    return None


def keep_entry(kind: str, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Keep values; none of installed code that changed since, which may be another than ran."""
    sources = _sources(key["code"]) if "code" in key else []
    if not all(os.stat(file).st_mtime < _STARTED for file in sources):
        return
    found = {"sources": {file: digest(file) for file in sources}, **values}
    kept.put(kind, key, json.dumps(found).encode())


def load(key: Mapping[str, Any]) -> Trace | None:
    """The trace that is kept of a key, or `None`."""
    found = entry(KIND, key)
    if found is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, DscError):
        program = parse_program(found["program"])
        types = source_types(program.weights.values())
        constants = _Constants(types, found["constants"])
        parameters = {
            name: TensorType(DType(dtype), tuple(shape))
            for name, (dtype, shape) in found["parameters"].items()
        }
        facts = Facts.from_json(found["facts"]) if found["facts"] else None
        conversions = Conversions.from_json(found["conversions"])
        return Trace(replace(program, source=constants), parameters, facts, conversions)
    return None


def store(key: Mapping[str, Any], trace: Trace) -> None:
    """Keep a trace."""
    program = trace.program
    constants = {name: program.source.load(name) for name in program.source.types}
    values = {
        "program": print_program(program),
        "parameters": {k: (t.dtype, t.shape) for k, t in trace.parameters.items()},
        "facts": trace.facts.to_json() if trace.facts else None,
        "conversions": trace.conversions.to_json(),
        "constants": {k: base64.b64encode(_bytes(v)).decode() for k, v in constants.items()},
    }
    keep_entry(KIND, key, values)


def _sources(code: str) -> list[str]:
    """The files of all that was imported of a package."""
    modules = [m for name, m in sys.modules.items() if f"{name}.".startswith(f"{code}.")]
    files = {file for m in modules if (file := getattr(m, "__file__", None))}
    return sorted(file for file in files if os.path.isfile(file))


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = array_of(tensor).tobytes()
    return data
