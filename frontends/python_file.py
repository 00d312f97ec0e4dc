"""A `.py` file with `build(config)`: the user's own code, run and asked for its module.

What it raises is a `UsageError` that names its line. A file of dsc's models is installed code: it
is the module that it already is, and is imported only where no trace of it is kept.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsc.errors import DscError, UsageError
from dsc.files import read_text
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.stock import cast_parameters
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.models import configs
from dsc.strict_json import JsonObject, parse_object

if TYPE_CHECKING:
    from torch import nn


def built(path: Path, config: ModelConfig, dtype: DType) -> nn.Module:
    """What `build(config)` of a file gives, on meta. Raises `UsageError` for any fault of it."""
    build = _build_function(path)
    with torch.device("meta"), blaming(path):
        module = build(config)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"build(config) returned {type(module).__name__}, not a module",
            where=str(path),
            hint="return the torch.nn.Module to compile, as models/v3.py does",
        )
    module = cast_parameters(module, dtype.torch)
    _check_signature(module, config, path)
    return module


EXAMPLE = "example_inputs"
"""What a file has whose module is no causal LM: `example_inputs(config)`, a tuple of tensors."""


@dataclass(frozen=True)
class Example:
    """A module that is traced on example arguments, and which of their sizes are open."""

    module: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: Mapping[str, Any] | None


def example_of(path: Path, config: str | None) -> Example | None:
    """The module of a file that defines `example_inputs` and, if sizes are open, `dynamic_shapes`.

    `config` is a file of JSON, which `build` and `example_inputs` are given; `{}` without one.
    Raises `UsageError` for any fault of the file.
    """
    if module_of_ours(path) or not path.is_file() or EXAMPLE not in read_text(path):
        return None
    file = _module_at(path)
    inputs = getattr(file, EXAMPLE, None)
    if not callable(inputs):
        return None
    said: JsonObject = {}
    if config is not None:
        said = parse_object(read_text(Path(config)).encode(), config, UsageError)
    build: Callable[[JsonObject], Any] = _build_function(path, file)
    with blaming(path):
        module, args = build(said), inputs(said)
    if not isinstance(module, torch.nn.Module) or not isinstance(args, (tuple, list)):
        raise UsageError(
            f"build gave {type(module).__name__}, {EXAMPLE} {type(args).__name__}",
            where=str(path),
            hint="build gives a torch.nn.Module, example_inputs a tuple of its arguments",
        )
    return Example(module, tuple(args), getattr(file, "dynamic_shapes", None))


def _build_function(path: Path, file: ModuleType | None = None) -> Callable[[Any], nn.Module]:
    file = _module_at(path) if file is None else file
    build: Callable[[Any], nn.Module] | None = getattr(file, "build", None)
    if not callable(build):
        raise UsageError(
            "the file defines no build(config)",
            where=str(path),
            hint="define build(config) that returns the module to compile, as models/v3.py does",
        )
    return build


def _check_signature(module: nn.Module, config: ModelConfig, path: Path) -> None:
    """Raise `UsageError` unless `forward` takes what the step of a causal LM gives it."""
    try:
        inspect.signature(module.forward).bind(*states_of(config).input_names())
    except TypeError as problem:
        raise UsageError(
            f"forward of {type(module).__name__} does not take"
            f" input_ids, positions, lengths, logits_at, *past: {problem}",
            where=str(path),
            hint="give it the signature of the model in models/v3.py",
        ) from None


@contextmanager
def blaming(path: Path, only_its_lines: bool = False) -> Iterator[None]:
    """Turn what the user's own file raises into a `UsageError` that names its line.

    With `only_its_lines` an error that no line of the file takes part in stays what it is.
    """
    try:
        yield
    except (DscError, OSError, MemoryError):
        raise
    except Exception as problem:
        lines = [n for name, n in _frames(problem) if name == str(path.resolve())]
        if only_its_lines and not lines:
            raise
        raise UsageError(
            f"the file fails when it is run: {type(problem).__name__}: {problem}",
            where=f"{path}:{lines[-1]}" if lines else str(path),
        ) from problem


def _frames(problem: BaseException | None) -> Iterator[tuple[str, int | None]]:
    """Files and lines that an error and its causes passed through."""
    while problem is not None:
        yield from ((f.filename, f.lineno) for f in traceback.extract_tb(problem.__traceback__))
        problem = problem.__cause__


def module_of_ours(path: Path) -> str:
    """The module that a file of dsc's models is; of others ""."""
    ours = path.resolve().parent == Path(configs.__file__).resolve().parent
    return f"dsc.models.{path.stem}" if ours else ""


def _module_at(path: Path) -> ModuleType:
    """Import a file under a name of its own; a file of dsc's models is the module it already is."""
    if ours := module_of_ours(path):
        return importlib.import_module(ours)
    path = path.resolve()
    name = f"dsc_user_model_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("this is no Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with blaming(path):
        spec.loader.exec_module(module)
    return module
