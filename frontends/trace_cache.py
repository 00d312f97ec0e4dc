"""Traced programs, kept between runs: tracing is the slowest part of a compile.

The key is everything that a trace depends on, in full: the configuration, the element type, the
module's fingerprint (`fingerprint.py`), the sources of our own frontends, and the versions of torch
and transformers. The file name is only its hash; the key itself is stored and compared. What is
kept is the program's text and the few constants that tracing found; no weight is ever stored.

The folder is `$XDG_CACHE_HOME/dsc/traces` (`~/.cache` by default); `DSC_TRACE_CACHE=off` turns the
cache off. A damaged or foreign file is a miss.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc import frontends
from dsc._version import __version__
from dsc.errors import DscError, FileError
from dsc.files import write_bytes, write_text
from dsc.frontends.fingerprint import Unknown, digest_of, fingerprint
from dsc.ir import ops
from dsc.ir.lazy import torch
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.weights import LayeredSource, MetaSource, source_types
from dsc.user_folders import cache_entry

if TYPE_CHECKING:
    from torch import nn

MAX_ENTRY_BYTES = 512 * 2**20


def key_of(module: nn.Module, **facts: Any) -> dict[str, Any] | None:
    """Everything that the trace of `module` depends on; `facts` are the caller's part.

    `None` for a module that has an attribute which cannot be told by value: it is not kept.
    """
    try:
        found = fingerprint(module)
    except Unknown:
        return None
    ours = [p for folder in (frontends, ops) for p in Path(folder.__path__[0]).glob("*.py")]
    return {
        **facts,
        "module": found,
        "ours": {str(p): digest_of(str(p)) for p in sorted(ours)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "dsc": __version__,
        "python": list(sys.version_info[:2]),
    }


def load(key: Mapping[str, Any]) -> Program | None:
    """The traced program of a key, or `None`."""
    try:
        path = _path(key)
        if path is None or not path.is_file() or path.stat().st_size > MAX_ENTRY_BYTES:
            return None
        entry = json.loads(path.read_text())
        if entry["key"] != json.loads(json.dumps(key)):
            return None
        program = parse_program(entry["program"])
        constants = open_safetensors(path.with_suffix(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DscError):
        return None
    types = source_types(program.weights.values())
    return replace(program, source=LayeredSource((constants, MetaSource(types))))


def store(key: Mapping[str, Any], program: Program, constants: Mapping[str, torch.Tensor]) -> None:
    """Keep a traced program. `constants` are the values among its weights' sources, by key."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    # A cache that takes nothing is a slower compile, no error.
    with suppress(FileError, OSError, SafetensorError):
        path = _path(key)
        if path is None:
            return
        values = save({k: v.contiguous() for k, v in constants.items()})
        write_bytes(path.with_suffix(".safetensors"), values)
        write_text(path, json.dumps({"key": key, "program": print_program(program)}))


def _path(key: Mapping[str, Any]) -> Path | None:
    if os.environ.get("DSC_TRACE_CACHE") == "off":
        return None
    return cache_entry("traces", key)
