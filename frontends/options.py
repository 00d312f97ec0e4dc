"""How a function is to be compiled: the options of `dsc.optimize` and of the backend of Dynamo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError

if TYPE_CHECKING:
    from dsc.api import CompiledModel
    from dsc.ir.program import Program

_FALLBACKS = ("eager", "error")


@dataclass(frozen=True)
class Options:
    """How to compile: a backend by name (the best here by default), and what its passes may do.

    `fallback` says what becomes of operators that cannot be compiled: "eager" or "error". With
    `freeze`, parameters and buffers are constants, which passes may fold and pack.
    """

    memory_reuse: bool = True
    fusion_level: int = 3
    backend: str | None = None
    fallback: str = "eager"
    freeze: bool = False

    def compile(self, program: Program) -> CompiledModel:
        """Compile a traced program."""
        from dsc.api import compile_program

        return compile_program(
            program,
            backend=self.backend,
            fusion_level=self.fusion_level,
            memory_reuse=self.memory_reuse,
        )


def checked(options: Options) -> Options:
    """The options. Raises `UsageError` for an impossible value, before anything is captured."""
    from dsc import backends
    from dsc.pipeline import check_fusion_level

    check_fusion_level(options.fusion_level)
    if options.fallback not in _FALLBACKS:
        raise UsageError(f"fallback {options.fallback!r}", hint=f"one of {', '.join(_FALLBACKS)}")
    if options.backend is not None:
        backends.get(options.backend)
    return options


def options_by_name(given: Mapping[str, Any]) -> Options:
    """Options as a user of `torch.compile` gives them. Raises `UsageError`."""
    known = [f.name for f in fields(Options)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise UsageError(
            f"unknown option {', '.join(unknown)} of the dsc backend",
            hint=f"it takes {', '.join(known)}",
        )
    return checked(Options(**given))
